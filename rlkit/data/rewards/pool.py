"""Scores completions with a user's function, in processes that can be killed, off the critical path.

A failed reward is never a number. It is an `error` or a `timeout`, and above `reward.max_error_rate` the run stops.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlkit.data.processes.budget import ErrorBudget
from rlkit.data.processes.channel import Unsendable, plain
from rlkit.data.rewards.functions import locate
from rlkit.data.rewards.process import WorkerDied, WorkerGrew, WorkerHung, WorkerProcess
from rlkit.data.rewards.signatures import AUTO, RewardSignature
from rlkit.errors import ConfigError, DataError, RewardError, RlkitError
from rlkit.settings import BY_VALUE, OnFailure, RewardSettings
from rlkit.types import Prompt, RewardResult, RewardStatus

logger = logging.getLogger(__name__)

START_LIMIT_S = 60.0  # to start Python and import the function
MAX_ATTEMPTS = 2  # at a call, and at replacing a worker, when the worker dies of it
CHUNK_S = 0.05  # work sent in one message: enough to hide its cost, little enough to share out evenly
MAX_CHUNK = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardItem:
    """One completion to score. `columns` is its row of the data set."""

    sample_id: str
    group_id: str
    prompt: str
    completion: str
    columns: Mapping[str, Any]
    completion_ids: Sequence[int] | np.ndarray = ()
    messages: Sequence[Mapping[str, str]] | None = None  # of a prompt in chat; None: it is plain text
    source: str = ""  # of the row
    turns: Sequence[Mapping[str, str]] | None = None  # of an episode, as messages; None: the completion is all there is


@dataclass(slots=True)
class _Job:
    """One `submit`: results in the order of its items."""

    future: Future[list[RewardResult]]
    results: list[RewardResult | None]
    num_left: int


@dataclass(slots=True)
class _Call:
    """One call of the function: one item, or a group."""

    job: _Job
    positions: list[int]
    sample_ids: list[str]
    message: dict[str, Any]
    num_attempts: int = field(default=0)
    is_alone: bool = field(default=False)  # shares no event loop: it may be the one that held one up


class RewardPool:
    """`reward.num_workers` processes that run one reward function. Use it as a context manager, or call `close`."""

    def __init__(
        self,
        fn: str,
        settings: RewardSettings,
        *,
        base_dir: Path,
        convention: str = AUTO,
        start_limit_s: float = START_LIMIT_S,
    ):
        """Starts the workers and waits for them. Raises ConfigError when the function cannot be found or imported.

        `base_dir`: where `file.py:function` and `package.module:function` are looked up, and the function's working directory.
        """
        self._fn, self._convention = fn, convention
        self._settings, self._base_dir, self._start_limit_s = settings, base_dir.resolve(), start_limit_s
        locate(fn, self._base_dir)
        self._changed = threading.Condition()  # guards everything below
        self._calls: deque[_Call] = deque()
        self._jobs: list[_Job] = []
        self._workers: dict[int, WorkerProcess] = {}  # by slot
        self._signature: RewardSignature | None = None
        self._failure: RlkitError | None = None
        self._closed = False
        self._next_call_at = 0.0  # by `reward.max_calls_per_s`
        self._call_s = CHUNK_S / 8  # a running mean of how long a call takes
        self._budget = ErrorBudget(
            f"reward.fn={fn}",
            key="reward.max_error_rate",
            limit=settings.max_error_rate,
            fix="Fix the function, or let it return None for a sample it cannot judge.",
        )
        self._num_ready = 0
        # A thread per worker, for the worker's whole life: the kernel kills a worker when its thread ends.
        self._threads = [threading.Thread(target=self._serve, args=(slot,), daemon=True) for slot in range(settings.num_workers)]
        for thread in self._threads:
            thread.start()
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._num_ready == settings.num_workers)
            failure = self._failure
        if failure is not None:
            self.close()
            raise failure

    @property
    def signature(self) -> RewardSignature:
        """What the function asks for."""
        assert self._signature is not None  # the constructor waited for it
        return self._signature

    def missing(self, source: str, columns: Mapping[str, Any]) -> str | None:
        """The column that a row lacks, whatever its source."""
        return self.signature.missing(columns)

    def start(self, prompts: Sequence[Prompt]) -> None:
        """Its workers have run since it was opened: only they know what columns the function needs."""

    @property
    def worker_pids(self) -> list[int]:
        """Of the workers alive now."""
        with self._changed:
            return [worker.pid for worker in self._workers.values()]

    def score(self, items: Sequence[RewardItem]) -> list[RewardResult]:
        """`submit` and wait."""
        return self.submit(items).result()

    def submit(self, items: Sequence[RewardItem]) -> Future[list[RewardResult]]:
        """Queues the items; the future's results are in their order. A group-wise function sees together those of one `group_id`.

        Raises DataError, here, for a column that the function needs and lacks or that cannot be sent; the future raises
        RewardError above the error rate, DataError when the function does not return one value per completion, and ConfigError when
        what it needs is set wrongly.
        """
        future: Future[list[RewardResult]] = Future()
        job = _Job(future=future, results=[None] * len(items), num_left=len(items))
        calls = self._calls_for(job, items)
        with self._changed:
            if self._failure is not None:
                raise self._failure
            if self._closed:
                raise RewardError(f"reward.fn={self._fn}: its pool is closed. Open a new one.")
            if calls:
                self._jobs.append(job)
                self._calls.extend(calls)
                self._changed.notify_all()
        if not calls:
            future.set_result([])
        return future

    def close(self) -> None:
        """Kills the workers and what they started. Jobs still queued end in a RewardError."""
        with self._changed:
            self._closed = True
            workers = list(self._workers.values())
            jobs, self._jobs = self._jobs, []
            self._calls.clear()
            self._changed.notify_all()
        for worker in workers:
            worker.kill()
        for thread in self._threads:
            thread.join()
        for job in jobs:
            job.future.set_exception(RewardError(f"reward.fn={self._fn}: its pool was closed before it had scored everything."))

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _calls_for(self, job: _Job, items: Sequence[RewardItem]) -> list[_Call]:
        groups: dict[Any, list[int]] = {}
        for position, item in enumerate(items):
            groups.setdefault(item.group_id if self.signature.group_wise else position, []).append(position)
        calls = []
        for positions in groups.values():
            members = [items[position] for position in positions]
            rows = [self.signature.select(item.columns) for item in members]
            columns = {
                name: [_sent(row.get(name), name, item) for row, item in zip(rows, members, strict=True)] for name in rows[0]
            }
            fields = {name: [_sent(getattr(item, name), name, item) for item in members] for name in self.signature.fields}
            message = fields | {"columns": columns}
            calls.append(_Call(job=job, positions=positions, sample_ids=[item.sample_id for item in members], message=message))
        return calls

    def _serve(self, slot: int) -> None:
        """A thread: keeps one worker alive and feeds it until the pool closes or fails."""
        num_failed_starts = 0
        try:
            while (worker := self._start(slot)) is not None:
                try:
                    self._welcome(worker.wait_until_ready())
                    num_failed_starts = 0
                    num_calls = 0
                    while num_calls < self._settings.max_calls_per_worker and (calls := self._take()):
                        num_calls += len(calls)
                        if not self._run(worker, calls) or worker.memory_mib() > self._settings.max_worker_mib:
                            break
                except WorkerDied as death:  # while it started; `_run` catches the others
                    num_failed_starts += 1
                    if self._signature is None or num_failed_starts == MAX_ATTEMPTS:
                        raise RewardError(
                            f"reward.fn={self._fn}: its worker {death} while importing it. See what it printed before."
                        ) from None
                finally:
                    with self._changed:
                        del self._workers[slot]
                    worker.reap()
        except RlkitError as error:
            self._fail(error)
        except Exception as error:  # a bug of ours must not leave callers waiting for ever
            self._fail(RewardError(f"reward.fn={self._fn}: the pool itself broke: {error!r}. Please report it."))
            raise

    def _start(self, slot: int) -> WorkerProcess | None:
        with self._changed:
            if self._closed or self._failure is not None:
                return None
            worker = WorkerProcess(
                self._fn,
                self._base_dir,
                convention=self._convention,
                max_mib=self._settings.max_worker_mib,
                unsandboxed=self._settings.unsafe_allow_unsandboxed,
                start_limit_s=self._start_limit_s,
            )
            self._workers[slot] = worker
            return worker

    def _welcome(self, signature: RewardSignature) -> None:
        with self._changed:
            if self._signature is not None and signature != self._signature:
                raise RewardError(f"reward.fn={self._fn}: its file changed its arguments during the run. Start the run again.")
            if self._settings.calls_at_once > 1 and not signature.is_async:
                raise ConfigError(
                    f"reward.calls_at_once={self._settings.calls_at_once}: reward.fn={self._fn} is not async, and one call of it "
                    "keeps its worker. Write reward.num_workers instead."
                )
            self._signature = signature
            self._num_ready += 1
            self._changed.notify_all()

    def _take(self) -> list[_Call]:
        """The next calls for one worker; empty when there will be no more."""
        with self._changed:
            while not (self._closed or self._failure is not None):
                pause = self._next_call_at - time.monotonic()
                if self._calls and pause <= 0:
                    break
                self._changed.wait(pause if self._calls else None)
            if self._closed or self._failure is not None:
                return []
            share = -(-len(self._calls) // self._settings.num_workers)
            size = max(1, min(int(CHUNK_S / self._call_s), share, MAX_CHUNK))
            if self._settings.calls_at_once > 1:
                size = min(share, self._settings.calls_at_once)
            if (rate := self._settings.max_calls_per_s) is not None:
                size = min(size, max(1, int(rate * CHUNK_S)))
                self._next_call_at = max(self._next_call_at, time.monotonic()) + size / rate
            if any(self._calls[index].is_alone for index in range(size)):
                size = 1
            return [self._calls.popleft() for _ in range(size)]

    def _run(self, worker: WorkerProcess, calls: list[_Call]) -> bool:
        """Whether the worker can take more. What it did not answer is finished or queued again."""
        num_answered, started = 0, time.monotonic()
        together = self._settings.calls_at_once > 1

        def recall(first: int) -> None:
            self._put_back(calls[first:])
            del calls[first:]

        try:
            messages, limit_s = [call.message for call in calls], self._settings.timeout_s
            for answer in worker.run(messages, limit_s=limit_s, recall=recall, together=together):
                self._finish(calls[num_answered], answer)
                num_answered += 1
        except (WorkerHung, WorkerDied, WorkerGrew) as failure:
            worker.kill()
            if together and len(calls) > 1:  # any of them may be the cause
                for call in calls[num_answered:]:
                    call.is_alone = True
                self._put_back(calls[num_answered:])
                return False
            self._put_back(calls[num_answered + 1 :])
            if num_answered < len(calls):  # else it was busy with a call that another worker has by now
                self._blame(calls[num_answered], failure)
            return False
        finally:
            self._call_s = 0.5 * (self._call_s + (time.monotonic() - started) / len(calls))
        return True

    def _blame(self, call: _Call, failure: WorkerHung | WorkerDied | WorkerGrew) -> None:
        """The call a worker hung in is lost. One it died in is tried once more: the cause may have come from outside."""
        if isinstance(failure, WorkerHung):
            summary = f"no answer within reward.timeout_s={self._settings.timeout_s:g}; its worker was killed"
            self._finish(call, {"timeout": {"summary": summary, "traceback": ""}})
            return
        if isinstance(failure, WorkerGrew):
            self._finish(call, {"error": {"summary": f"its worker {failure} and was killed", "traceback": ""}})
            return
        call.num_attempts += 1
        if call.num_attempts < MAX_ATTEMPTS:
            logger.info("A reward worker %s in sample %s; trying it once more.", failure, call.sample_ids[0])
            self._put_back([call])
        else:
            self._finish(call, {"error": {"summary": f"its worker {failure}, {MAX_ATTEMPTS} times", "traceback": ""}})

    def _put_back(self, calls: list[_Call]) -> None:
        with self._changed:
            self._calls.extendleft(reversed(calls))
            self._changed.notify_all()

    def _finish(self, call: _Call, answer: Mapping[str, Any]) -> None:
        if "config_error" in answer:
            self._fail(ConfigError(answer["config_error"]))
            return
        if "contract" in answer:
            self._fail(DataError(f"reward.fn={self._fn} {answer['contract']} (sample {call.sample_ids[0]}). Fix what it returns."))
            return
        results = [self._settle(result) for result in _read_answer(call, answer)]
        if call.num_attempts + 1 < MAX_ATTEMPTS and any(self._policy(result) is OnFailure.retry for result in results):
            call.num_attempts += 1
            self._put_back([call])
            return
        details = next((answer[kind]["traceback"] for kind in ("error", "timeout") if kind in answer), "")
        stopping = next((result for result in results if self._policy(result) is OnFailure.stop), None)
        failure = None if stopping is None else self._stop(stopping)
        with self._changed:
            for position, result in zip(call.positions, results, strict=True):
                call.job.results[position] = result
                failed = result.message if result.status in (RewardStatus.error, RewardStatus.timeout) else ""
                failure = self._budget.count(result.sample_id, failed, details) or failure
            call.job.num_left -= len(results)
            # A failure, this or an earlier one, ends the job in `_fail`, and `close` ends it too.
            is_done = failure is None and call.job.num_left == 0 and call.job in self._jobs
            if is_done:
                self._jobs.remove(call.job)
        if failure is not None:
            self._fail(failure)
        if is_done:
            call.job.future.set_result([result for result in call.job.results if result is not None])

    def _policy(self, result: RewardResult) -> OnFailure | None:
        """What the settings want of a sample whose reward failed; None: it did not."""
        return {RewardStatus.timeout: self._settings.on_timeout, RewardStatus.error: self._settings.on_error}.get(result.status)

    def _settle(self, result: RewardResult) -> RewardResult:
        if self._policy(result) is BY_VALUE:
            return replace(result, reward=self._settings.failed_value)
        return result

    def _stop(self, result: RewardResult) -> RewardError:
        return RewardError(
            f"reward.fn={self._fn}: sample {result.sample_id}: {result.message}. reward.on_{result.status.value}=stop "
            "ends the run; fix the function, or write mask."
        )

    def _fail(self, failure: RlkitError) -> None:
        """Ends every job with `failure`. The first one stays."""
        with self._changed:
            if self._closed or self._failure is not None:
                return
            self._failure = failure
            jobs, self._jobs = self._jobs, []
            self._calls.clear()
            workers = list(self._workers.values())
            self._changed.notify_all()
        for worker in workers:
            worker.kill()
        for job in jobs:
            job.future.set_exception(failure)


def _read_answer(call: _Call, answer: Mapping[str, Any]) -> list[RewardResult]:
    for kind in (RewardStatus.timeout, RewardStatus.error):
        if kind.value in answer:
            message = answer[kind.value]["summary"]
            return [RewardResult(sample_id=sample_id, status=kind, message=message) for sample_id in call.sample_ids]
    results = []
    for sample_id, value in zip(call.sample_ids, answer["values"], strict=True):
        if "problem" in value:
            results.append(RewardResult(sample_id=sample_id, status=RewardStatus.error, message=value["problem"]))
        elif "reward" not in value:
            results.append(RewardResult(sample_id=sample_id, status=RewardStatus.skipped))
        else:
            results.append(
                RewardResult(
                    sample_id=sample_id,
                    status=RewardStatus(value.get("status", "ok")),
                    reward=value["reward"],
                    components=value.get("parts", {}),
                    message=value.get("message", ""),
                )
            )
    return results


def _sent(value: Any, column: str, item: RewardItem) -> Any:
    """As JSON can carry it. Raises DataError."""
    try:
        return plain(value)
    except Unsendable as kind:
        raise DataError(
            f"column {column} of sample {item.sample_id} holds {kind}, which cannot be sent to a reward function. "
            f"Store it as text or numbers; or name the columns that the function needs as its arguments, without **columns."
        ) from None
