"""How the controller reaches a worker, whether it is a Ray actor or an object in this process."""

from __future__ import annotations

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
