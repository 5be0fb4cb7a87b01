"""How the controller reaches a worker, whether it is a Ray actor or an object in this process.

Light on purpose: the controller imports this and not the learner, whose own imports take seconds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

MIN_PAUSE_S, MAX_PAUSE_S = 0.0005, 0.02  # between looks at several calls under way


class Pending(Protocol):
    """A call under way."""

    def is_done(self) -> bool:
        """Whether `result` would answer at once."""
        ...

    def result(self, deadline_s: float) -> Any:
        """Wait for the outcome. Raises the worker's own RlkitError, or WorkerError when it died or outran the deadline."""
        ...


class Handle(Protocol):
    """One worker."""

    name: str

    def call(self, method: str, *args: Any, **kwargs: Any) -> Pending:
        """Start a method. A `Pending` among the positional arguments stands for its result, which then goes from worker to
        worker without passing through the controller."""
        ...

    def kill(self) -> None:
        """End the worker, whatever it is doing. Nothing is to be asked of it afterwards."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """This process's place among the learner's ranks."""

    index: int
    count: int
    address: str = ""  # host:port of the store where ranks meet; not needed by one alone

    @property
    def is_first(self) -> bool:
        return self.index == 0


def wait(pending: Sequence[Pending], deadline_s: float) -> list:
    """All results, in order; the first failure among them as soon as it happens.

    A rank that died leaves the others waiting for it in a collective: whoever waits for them in turn would not hear of it.
    """
    started, pause = time.monotonic(), MIN_PAUSE_S
    waiting = list(pending)
    while len(waiting) > 1 and (left := deadline_s - (time.monotonic() - started)) > 0:
        done = [one for one in waiting if one.is_done()]
        for one in done:
            one.result(left)
        waiting = [one for one in waiting if one not in done]
        if not done:
            time.sleep(pause)
            pause = min(2 * pause, MAX_PAUSE_S)
    return [one.result(max(deadline_s - (time.monotonic() - started), MIN_PAUSE_S)) for one in pending]
