"""How the controller reaches a worker, whether it is a Ray actor or an object in this process.

Light on purpose: the controller imports this and not the learner, whose own imports take seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


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


@dataclass(frozen=True, kw_only=True, slots=True)
class Rank:
    """This process's place among the learner's ranks."""

    index: int
    count: int
    address: str = ""  # host:port of the store where ranks meet; not needed by one alone

    @property
    def is_first(self) -> bool:
        return self.index == 0
