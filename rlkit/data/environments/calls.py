"""Calls of episodes in processes of their own: sent while there is room, answered as each is done, watched against the clock."""

from __future__ import annotations

import math
import selectors
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlkit.data.environments.protocol import Step
from rlkit.data.processes.channel import Channel, Unsendable, plain
from rlkit.data.processes.user_code import memory_mib
from rlkit.errors import ConfigError, DataError
from rlkit.settings import MultiTurn
from rlkit.types import RewardStatus

POLL_S = 0.25  # how often a silent worker's memory is looked at
MAX_ANSWER = 16 << 20  # bytes: what is longer would be cut to a few thousand


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why an episode ended without an answer; the policy had no part in it."""

    status: RewardStatus  # timeout or error
    message: str


@dataclass(eq=False, slots=True)
class EpisodeWorker:
    """The process in which an episode runs."""

    pid: int
    channel: Channel
    num_episodes: int = field(default=0)


@dataclass(eq=False, slots=True)
class _Call:
    """`worker` is None until a new episode's call is sent."""

    message: dict[str, Any]
    worker: EpisodeWorker | None
    read: Callable[[EpisodeWorker, dict[str, Any]], Any]  # what the answer says
    then: Callable[[Any], None]
    deadline: float = math.inf


class Calls:
    """Of one thread. Each call names what is to happen `then`, with its answer or its failure; `poll` does it.

    Of the calls `at_once` are under way, and the clock of each starts when it is sent. A worker whose answer is a Failure is gone.
    """

    def __init__(
        self,
        settings: MultiTurn,
        *,
        name: str,
        at_once: int,
        take: Callable[[], EpisodeWorker],
        drop: Callable[[EpisodeWorker], None],
    ):
        """`name`: of the environment, for messages. `take` gives a worker for a new episode, `drop` gets one that failed."""
        self._settings, self._name, self._at_once, self._take, self._drop = settings, name, at_once, take, drop
        self._waiting: deque[_Call] = deque()
        self._under_way: dict[_Call, EpisodeWorker] = {}
        self._answered: deque[tuple[_Call, Any]] = deque()
        self._look_at = 0.0  # when the memory of those under way is looked at again
        self._selector = selectors.DefaultSelector()

    def begin(self, row: Mapping[str, Any], seed: int, then: Callable[[tuple[EpisodeWorker, str] | Failure], None]) -> None:
        """Its worker, and what the policy reads behind its prompt. Raises DataError for a row that JSON cannot carry."""
        self._add(None, {"reset": _sent(row), "seed": seed}, lambda worker, answer: (worker, answer["observation"]), then)

    def step(self, worker: EpisodeWorker, action: str, then: Callable[[Step | Failure], None]) -> None:
        """What follows this turn of the policy."""
        self._add(worker, {"step": action}, lambda _, answer: Step(**answer), then)

    def cut(self, worker: EpisodeWorker, then: Callable[[float | Failure], None]) -> None:
        """What an episode, which ends for want of tokens or turns, is worth beside what it has earned."""
        self._add(worker, {"cut": True}, lambda _, answer: answer["reward"], then)

    def __bool__(self) -> bool:
        """Whether there is one whose `then` has not been called."""
        return bool(self._waiting or self._under_way or self._answered)

    def poll(self, timeout_s: float = math.inf) -> None:
        """Waits until a call is answered, at most so long, and does for all that are what is to happen then.

        Raises DataError for an answer that breaks the contract, ConfigError for a setting that only shows to be wrong now.
        """
        self._send()
        until = time.monotonic() + timeout_s
        while self._under_way and not self._answered:
            self._receive(until)
            self._send()
            if time.monotonic() >= until:
                break
        for _ in range(len(self._answered)):
            call, answer = self._answered.popleft()
            call.then(answer)
        self._send()  # what these have asked for is worked on while the caller does other things

    def close(self) -> None:
        """What is under way is heard of no more."""
        self._selector.close()

    def __enter__(self) -> Calls:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _add(
        self,
        worker: EpisodeWorker | None,
        message: dict[str, Any],
        read: Callable[[EpisodeWorker, dict[str, Any]], Any],
        then: Callable[[Any], None],
    ) -> None:
        self._waiting.append(_Call(message, worker, read, then))

    def _send(self) -> None:
        """What waits, as far as there is room."""
        while self._waiting and len(self._under_way) < self._at_once:
            call = self._waiting.popleft()
            worker = call.worker = call.worker or self._take()
            try:
                worker.channel.send(call.message, timeout_s=self._settings.timeout_s)
            except TimeoutError:
                self._fail(call, worker, self._late())
            except OSError:
                self._fail(call, worker, Failure(status=RewardStatus.error, message="its process ended between two turns"))
            else:
                self._selector.register(worker.channel, selectors.EVENT_READ, call)
                self._under_way[call] = worker
                call.deadline = time.monotonic() + self._settings.timeout_s

    def _receive(self, until: float) -> None:
        """What is answered by then or, at the latest, when a silent worker is to be looked at."""
        first = min(until, *(call.deadline for call in self._under_way))
        for key, _ in self._selector.select(max(min(first - time.monotonic(), POLL_S), 0.0)):
            call: _Call = key.data
            worker = self._under_way[call]
            answer = self._answer_of(worker)
            if isinstance(answer, Failure):
                self._fail(call, worker, answer)
            elif answer is not None:
                self._settle(call, worker, call.read(worker, answer))
        now = time.monotonic()
        for call, worker in [*self._under_way.items()]:
            if call.deadline <= now:
                self._fail(call, worker, self._late())
        if now < self._look_at:
            return
        self._look_at = now + POLL_S
        for call, worker in [*self._under_way.items()]:
            if (mib := memory_mib(worker.pid)) > self._settings.max_worker_mib:
                self._fail(call, worker, self._grown(mib))

    def _settle(self, call: _Call, worker: EpisodeWorker, answer: Any) -> None:
        if call in self._under_way:
            self._selector.unregister(worker.channel)
            del self._under_way[call]
        self._answered.append((call, answer))

    def _fail(self, call: _Call, worker: EpisodeWorker, failure: Failure) -> None:
        self._settle(call, worker, failure)
        self._drop(worker)

    def _late(self) -> Failure:
        limit = f"no answer within environment.timeout_s={self._settings.timeout_s:g}; its process was killed"
        return Failure(status=RewardStatus.timeout, message=limit)

    def _grown(self, mib: float) -> Failure:
        limit = f"grew to {mib:.0f} MiB, above environment.max_worker_mib={self._settings.max_worker_mib}"
        return Failure(status=RewardStatus.error, message=limit)

    def _answer_of(self, worker: EpisodeWorker) -> dict[str, Any] | Failure | None:
        """None: not all of it is there yet."""
        try:
            answer = worker.channel.receive(timeout_s=0.001)
        except TimeoutError:
            return None
        except OverflowError:
            return Failure(status=RewardStatus.error, message=f"its answer has more than {MAX_ANSWER >> 20} MiB")
        if answer is None:
            return Failure(status=RewardStatus.error, message="its process ended within a turn")
        if (mib := memory_mib(worker.pid)) > self._settings.max_worker_mib:
            return self._grown(mib)
        if "config_error" in answer:
            raise ConfigError(answer["config_error"])
        if "contract" in answer:
            raise DataError(f"{self._name}: {answer['contract']}. Fix what it returns.")
        if "error" in answer:
            return Failure(status=RewardStatus.error, message=answer["error"]["summary"])
        return answer


def _sent(row: Mapping[str, Any]) -> Any:
    try:
        return plain(dict(row))
    except Unsendable as kind:
        raise DataError(f"A row of the data holds {kind}, which cannot be sent to an environment. Store text or numbers.") from None
