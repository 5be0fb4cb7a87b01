"""SIGTERM and the first Ctrl-C ask a run to save and stop; a second one ends the process as it would without rlkit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopRequested(BaseException):
    """Leaves work that can be thrown away. Not an Exception: nobody who handles failures may take it for one."""


class Preemption:
    """While open, remembers a request to stop. Signals reach the main thread only; elsewhere it does nothing."""

    def __init__(self):
        self.requested = ""  # the signal's name
        self._interruptible = False
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> Preemption:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]
        self._previous = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = signal.Signals(number).name
        if self._interruptible:
            raise StopRequested

    def check(self) -> None:
        """Raises StopRequested if somebody asked."""
        if self.requested:
            raise StopRequested

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within, a request raises StopRequested at once: for work that changes nothing that is saved."""
        self.check()
        self._interruptible = True
        try:
            yield
        finally:
            self._interruptible = False
