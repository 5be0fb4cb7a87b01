"""Batches of rollouts in the order of the data, at most `max_staleness` steps ahead of the learner."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future

from rlkit.controller.feed import Drawn
from rlkit.controller.sampling import Sampled


class Lookahead:
    """With `max_staleness=0` the batch of a step is sampled when the step asks for it, in the caller's own thread. Above that,
    later batches are sampled and scored meanwhile.

    The batch of step s is admitted once step s - max_staleness begins, so every token of it was sampled by version
    s - 1 - max_staleness or a newer one. At the bound the learner waits; nothing is thrown away, so slow prompts count as much as
    fast ones.
    """

    def __init__(
        self,
        submit: Callable[[int], Drawn],
        collect: Callable[[int, Drawn], Sampled],
        *,
        num_steps: int,
        max_staleness: int,
        ready: Mapping[int, Sampled] | None = None,
    ):
        """`ready`: batches that an interrupted run had sampled and not yet learnt from."""
        self._submit, self._collect = submit, collect
        self._num_steps, self._max_staleness = num_steps, max_staleness
        self._batches: dict[int, Future[Sampled]] = {}
        self._waiting: queue.SimpleQueue[tuple[int, Future[Sampled], Drawn] | None] = queue.SimpleQueue()
        for step, sampled in (ready or {}).items():
            self._batches[step] = Future()
            self._batches[step].set_result(sampled)
        if max_staleness:
            threading.Thread(target=self._serve, name="collects rollouts", daemon=True).start()

    def take(self, step: int) -> Sampled:
        """The step's batch; what may be sampled from now on is started first."""
        if not self._max_staleness:
            return self._collect(step, self._submit(step))
        for later in range(step, min(step + self._max_staleness, self._num_steps) + 1):
            if later not in self._batches:
                self._batches[later] = Future()
                self._waiting.put((later, self._batches[later], self._submit(later)))
        batch = self._batches[step]
        while not batch.done():  # in short waits, because a signal cannot interrupt a long one
            wait_briefly(batch)
        del self._batches[step]
        return batch.result()

    def ready(self) -> dict[int, Sampled]:
        """Sampled and scored, not yet taken."""
        return {step: batch.result() for step, batch in self._batches.items() if batch.done() and batch.exception() is None}

    def close(self) -> None:
        """Nothing more is collected."""
        self._waiting.put(None)

    def _serve(self) -> None:
        """One batch after the other, so that the reward function meets them in order."""
        while (item := self._waiting.get()) is not None:
            step, batch, submitted = item
            try:
                batch.set_result(self._collect(step, submitted))
            except Exception as error:  # raised again where the batch is taken
                batch.set_exception(error)


def wait_briefly(batch: Future) -> None:
    """Until it is done, or a moment has passed."""
    done = threading.Event()
    batch.add_done_callback(lambda _: done.set())
    done.wait(timeout=0.5)
