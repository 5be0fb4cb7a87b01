"""Every worker in this process: for tests, debuggers and machines without Ray."""

from __future__ import annotations

import importlib
import os
import socket
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

from rlkit.controller.placement import Seat
from rlkit.workers.handle import Handle


@dataclass(frozen=True, slots=True)
class Done:
    """A call that ran when it was made."""

    value: Any

    def is_done(self) -> bool:
        return True

    def result(self, deadline_s: float) -> Any:
        return self.value


class LocalHandle:
    """A worker that is an object here; its errors are raised as they are."""

    def __init__(self, name: str, worker: Any):
        self.name = name
        self._worker = worker

    def call(self, method: str, *args: Any, **kwargs: Any) -> Done:
        values = [arg.value if isinstance(arg, Done) else arg for arg in args]
        return Done(getattr(self._worker, method)(*values, **kwargs))

    def kill(self) -> None:
        """A worker here is never in the middle of a call when somebody else is not."""


class InProcessCluster:
    """Implements `Cluster`."""

    def __init__(self):
        self._workers: dict[Hashable, LocalHandle] = {}

    def begin_run(self) -> None:
        """There is room for all."""

    def worker(self, key: Hashable, name: str, target: str, *args: Any, seat: Seat, **kwargs: Any) -> Handle:
        if key not in self._workers:
            module, cls = target.split(":")
            self._workers[key] = LocalHandle(name, getattr(importlib.import_module(module), cls)(*args, **kwargs))
        return self._workers[key]

    def meeting_point(self, keys: Sequence[Hashable]) -> str:
        return ""  # a group of one has nobody to meet

    def places(self) -> dict[str, str]:
        return {handle.name: f"{socket.gethostname()}:{os.getpid()}" for handle in self._workers.values()}

    def close(self) -> None:
        self._workers.clear()
