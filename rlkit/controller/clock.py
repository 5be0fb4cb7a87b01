"""Where a step's time goes."""

from __future__ import annotations

import time
from collections import Counter


class Clock:
    """Where one step's time goes. What nobody claimed shows as the rest."""

    def __init__(self):
        self._start = time.monotonic()
        self._parts: Counter[str] = Counter()

    def add(self, name: str, seconds: float) -> None:
        self._parts[f"time/{name}_s"] += seconds  # pyright: ignore[reportArgumentType]

    def split(self, name: str, **parts: float) -> None:
        """Put the seconds of `name` down to `parts`; what they do not account for shows as the rest."""
        del self._parts[f"time/{name}_s"]
        for part, seconds in parts.items():
            self.add(part, seconds)

    def time(self, name: str) -> Stopwatch:
        return Stopwatch(self, name)

    def stop(self) -> dict[str, float]:
        return dict(self._parts) | {"time/step_s": time.monotonic() - self._start}


class Stopwatch:
    """Adds the time of a `with` block to a clock."""

    def __init__(self, clock: Clock, name: str):
        self._clock, self._name = clock, name

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        self._clock.add(self._name, time.monotonic() - self._start)
