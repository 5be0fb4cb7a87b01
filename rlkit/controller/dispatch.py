"""Hands samples to whichever engine has room, one by one, while the learner is at work."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from rlkit.errors import WorkerError
from rlkit.types import Completion, SampleRequest, SamplingSpec
from rlkit.workers.handle import Handle


@dataclass(slots=True)
class Ticket:
    """One batch of requests: its completions as they come in."""

    sample_ids: list[str]
    changed: threading.Condition
    done: dict[str, Completion] = field(default_factory=dict)
    failure: BaseException | None = None

    @property
    def is_complete(self) -> bool:
        return len(self.done) == len(self.sample_ids)

    def result(self) -> list[Completion]:
        """In the order of the requests. Raises what an engine raised."""
        with self.changed:
            # With a time limit, because a wait without one cannot be interrupted by a signal.
            while self.failure is None and not self.is_complete:
                self.changed.wait(timeout=1.0)
            if self.failure is not None:
                raise self.failure
        return [self.done[sample_id] for sample_id in self.sample_ids]


def first_complete(tickets: Sequence[Ticket]) -> list[Ticket]:
    """Those of one dispatcher's that are complete, once any is. Raises what an engine raised."""
    with (changed := tickets[0].changed):
        while not (complete := [ticket for ticket in tickets if ticket.is_complete]):
            if (failure := next((ticket.failure for ticket in tickets if ticket.failure is not None), None)) is not None:
                raise failure
            changed.wait(timeout=1.0)  # see `Ticket.result`
    return complete


class Dispatcher:
    """A thread per engine keeps it full from one queue. Whatever an engine raises reaches everybody who waits for samples."""

    def __init__(self, handles: Sequence[Handle], *, max_in_flight: int, deadline_s: float):
        self._handles, self._max_in_flight, self._deadline_s = handles, max_in_flight, deadline_s
        self._changed = threading.Condition()  # guards everything below
        self._queue: deque[tuple[SampleRequest, SamplingSpec, Ticket]] = deque()
        self._tickets: list[Ticket] = []  # not complete yet
        self._num_busy = 0  # engines inside a call
        self._is_paused = self._is_closed = False
        for handle in handles:
            threading.Thread(target=self._serve, args=(handle,), name=f"feeds {handle.name}", daemon=True).start()

    def submit(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> Ticket:
        """Queue the requests behind those already queued."""
        ticket = Ticket([request.sample_id for request in requests], self._changed)
        with self._changed:
            if self._is_closed:
                raise WorkerError("The engines were closed.")
            self._tickets.append(ticket)
            self._queue.extend((request, sampling, ticket) for request in requests)
            self._changed.notify_all()
        return ticket

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within, no engine is asked for tokens; samples under way stay where they are."""
        with self._changed:
            self._is_paused = True
            self._changed.wait_for(lambda: self._num_busy == 0)
        try:
            yield
        finally:
            with self._changed:
                self._is_paused = False
                self._changed.notify_all()

    def close(self) -> None:
        """The engines drop what is under way, and whoever waits for samples hears of it."""
        self._fail(WorkerError("The engines were closed."))

    def _serve(self, handle: Handle) -> None:
        under_way: dict[str, Ticket] = {}
        try:
            while (taken := self._take(under_way)) is not None:
                requests, sampling = taken
                try:
                    completions = handle.call("advance", requests, sampling).result(self._deadline_s)
                finally:
                    self._leave()
                self._deliver(completions, under_way)
            if under_way:
                handle.call("abort")
        except Exception as error:  # whatever it is, the loop must hear of it where it waits, not a thread nobody watches
            self._fail(error)

    def _take(self, under_way: dict[str, Ticket]) -> tuple[list[SampleRequest], SamplingSpec | None] | None:
        """New requests for an engine with those under way; None when there will be no more. Samples of one call share their
        sampling, so that a different one waits for the next."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or (not self._is_paused and (self._queue or under_way)))
            if self._is_closed:
                return None
            requests: list[SampleRequest] = []
            sampling = self._queue[0][1] if self._queue else None
            # A fair share of what waits: else the first engine to ask takes it all, and the others stand idle.
            share = -(-len(self._queue) // len(self._handles))
            room = min(self._max_in_flight - len(under_way), share)
            while self._queue and len(requests) < room and self._queue[0][1] == sampling:
                request, _, ticket = self._queue.popleft()
                under_way[request.sample_id] = ticket
                requests.append(request)
            self._num_busy += 1
            return requests, sampling

    def _leave(self) -> None:
        """The engine's call is over, however it ended."""
        with self._changed:
            self._num_busy -= 1
            self._changed.notify_all()

    def _deliver(self, completions: Sequence[Completion], under_way: dict[str, Ticket]) -> None:
        with self._changed:
            for completion in completions:
                ticket = under_way.pop(completion.sample_id)
                ticket.done[completion.sample_id] = completion
                if ticket.is_complete:
                    self._tickets.remove(ticket)
            self._changed.notify_all()

    def _fail(self, failure: BaseException) -> None:
        """The first failure is the cause; what follows from it does not cover it up."""
        with self._changed:
            self._is_closed = True
            self._queue.clear()
            for ticket in self._tickets:
                ticket.failure = ticket.failure or failure
            self._changed.notify_all()
