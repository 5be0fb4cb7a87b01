"""Generation beside learning: bounded staleness, nothing lost, and the time it saves.

The engine here sleeps instead of computing, which stands for hardware of its own; its lengths have a long tail.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from rlkit import cli
from rlkit.compose import compose
from rlkit.controller import fleet, loop
from rlkit.controller.dispatch import Dispatcher
from rlkit.controller.local import InProcessCluster
from rlkit.errors import WorkerError
from rlkit.metrics import Mean
from rlkit.types import Completion, FinishReason, SampleRequest, SamplingSpec, StepStats
from rlkit.workers.rollout.transformers import TransformersRolloutEngine

TOKEN_S = 0.005
QUANTUM = 5  # tokens that one `advance` decodes
MAX_LENGTH = 100
DIGIT = 4  # a token id


class SleepingEngine(TransformersRolloutEngine):
    """Weights, syncs and checks are real; tokens take time and are all alike."""

    jitter = 0.0

    def __init__(self, spec):
        super().__init__(spec)
        self._under_way: dict[str, tuple[int, list[int]]] = {}  # id -> length, versions of its tokens so far

    def generate(self, requests, sampling):
        done = {completion.sample_id: completion for completion in self.advance(requests, sampling)}
        while len(done) < len(requests):
            done |= {completion.sample_id: completion for completion in self.advance([], sampling)}
        return [done[request.sample_id] for request in requests]

    def advance(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> list[Completion]:
        for request in requests:
            # Exponential with a mean of 0.3 of the longest: what a fixed seed draws for a sample does not depend on timing.
            draw = np.random.default_rng(request.seed).exponential(0.3 * MAX_LENGTH)
            self._under_way[request.sample_id] = (int(np.clip(draw, 1, MAX_LENGTH)), [])
        time.sleep(TOKEN_S * QUANTUM * (1 + self.jitter * np.random.default_rng().uniform()))
        for length, versions in self._under_way.values():
            versions += [self.version] * min(QUANTUM, length - len(versions))
        done = [name for name, (length, versions) in self._under_way.items() if len(versions) == length]
        return [self._sample(name, *self._under_way.pop(name)) for name in done]

    def abort(self):
        self._under_way.clear()

    @staticmethod
    def _sample(sample_id: str, length: int, versions: list[int]) -> Completion:
        return Completion(
            sample_id=sample_id,
            response_ids=np.full(length, DIGIT),
            rollout_logprobs=np.full(length, -1.0, dtype=np.float32),
            policy_version=np.array(versions),
            finish_reason=FinishReason.length,
        )


class Sleeper:
    """Stands for the learner's step."""

    def __init__(self, seconds: float, jitter: float = 0.0):
        self.seconds, self.jitter = seconds, jitter

    def __call__(self, batch, knobs=None) -> StepStats:
        time.sleep(self.seconds * (1 + self.jitter * np.random.default_rng().uniform(-1, 1)))
        return StepStats(metrics={"policy/loss": Mean(0.0, 1.0), "entropy/mean": Mean(0.0, 1.0)}, skipped=False)


@pytest.fixture(autouse=True)
def sleeping(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wait_until) -> Iterator[None]:
    (tmp_path / "rewards.py").write_text("def length(prompts, completions, **columns):\n    return [float(len(completions[0]))]\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(fleet.ENGINE_CLASSES, "transformers", f"{__name__}:SleepingEngine")
    monkeypatch.setattr("rlkit.controller.tracking.tracker.write_plots", lambda history, folder: None)
    yield
    assert wait_until(lambda: not threads_of_runs())


def threads_of_runs() -> list[str]:
    """Nothing goes on feeding engines or waiting for samples when a run has ended."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith(("feeds ", "collects "))]


SETTINGS = [
    "cluster=inprocess",
    "rollout=transformers",
    "evaluation=none",
    "reward.fn=rewards.py:length",
    "reward.num_workers=1",
    "prompts_per_step=4",
    "group_size=4",
    f"max_response_tokens={MAX_LENGTH}",
    "learner.tokens_per_microbatch=4096",
]


def start(run_dir: str, *overrides: str) -> float:
    """Seconds of the run's steps without the syncs and their checks: these compute, and take what a busy machine leaves them."""
    loop.train(compose([*SETTINGS, f"run_dir={run_dir}", *overrides]), InProcessCluster())
    return sum(row["time/step_s"] - row["time/sync_s"] - row["time/sync_check_s"] for row in rows(run_dir))


def rows(run_dir: str) -> list[dict]:
    return [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]


def rollouts(run_dir: str) -> dict[int, list[dict]]:
    files = sorted(Path(run_dir, "rollouts").glob("*.parquet"))
    return {int(file.stem.removeprefix("step_")): pq.read_table(file).to_pylist() for file in files}


def staleness(run_dir: str) -> list[int]:
    """Of every trained token."""
    return [step - 1 - version for step, found in rollouts(run_dir).items() for row in found for version in row["policy_version"]]


def ids(run_dir: str) -> list[str]:
    return sorted(row["sample_id"] for found in rollouts(run_dir).values() for row in found)


@pytest.mark.parametrize("learn_share", [pytest.param(0.5, marks=pytest.mark.slow), 1.0])
def test_one_step_of_staleness_is_at_least_1_4_times_as_fast(learn_share, monkeypatch):
    """Done-when 3 of the design: lengths with mean/max 0.3, a learner that takes 0.5 to 1.0 of the generation."""
    monkeypatch.setattr(fleet.Learners, "update", Sleeper(learn_share * TOKEN_S * MAX_LENGTH))
    seconds = {bound: start(f"run-{bound}", f"max_staleness={bound}", "num_steps=10") for bound in (0, 1)}
    assert seconds[0] >= 1.4 * seconds[1], seconds
    assert max(staleness("run-1")) == 1
    assert ids("run-0") == ids("run-1")


@pytest.mark.parametrize("bound", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)])
def test_no_trained_token_is_older_than_the_bound_whatever_the_delays(bound, monkeypatch):
    monkeypatch.setattr(SleepingEngine, "jitter", 2.0)
    monkeypatch.setattr(fleet.Learners, "update", Sleeper(0.15, jitter=1.0))
    start("run", f"max_staleness={bound}", "num_steps=8")
    found = staleness("run")
    assert max(found) <= bound
    assert max(found) > 0  # the bound was put to use
    assert [row["staleness/max"] for row in rows("run")] == [
        max(step - 1 - version for row in found for version in row["policy_version"]) for step, found in rollouts("run").items()
    ]
    assert len(ids("run")) == len(set(ids("run"))) == 8 * 16


def test_responses_that_a_sync_overtook_have_tokens_of_both_versions(monkeypatch):
    monkeypatch.setattr(fleet.Learners, "update", Sleeper(0.05))
    start("run", "max_staleness=2", "num_steps=6")
    assert any(len(set(row["policy_version"])) > 1 for found in rollouts("run").values() for row in found)


def test_without_staleness_every_token_is_the_present_policys(monkeypatch):
    monkeypatch.setattr(fleet.Learners, "update", Sleeper(0.0))
    start("run", "num_steps=3")
    assert set(staleness("run")) == {0}


def test_a_stopped_run_keeps_what_it_had_sampled_and_loses_no_sample(monkeypatch, capsys, wait_until):
    calls, lookaheads = [], []

    class Kept(loop.Lookahead):
        def __init__(self, *arguments, **settings):
            super().__init__(*arguments, **settings)
            lookaheads.append(self)

    def update(learners, batch, knobs):
        calls.append(1)
        if len(calls) == 3:
            assert wait_until(lambda: 4 in lookaheads[0].ready())
            signal.raise_signal(signal.SIGTERM)
        return Sleeper(0.0)(batch)

    monkeypatch.setattr(loop, "Lookahead", Kept)
    monkeypatch.setattr(fleet.Learners, "update", update)
    overrides = [*SETTINGS, "run_dir=run", "max_staleness=1", "num_steps=6"]
    assert cli.guard(lambda: cli.dispatch(["train", *overrides])) == 75
    kept = pq.read_table("run/checkpoints/step_000003/state/ahead_000004.parquet").to_pylist()
    assert len(kept) == 16
    assert cli.dispatch(["train", "resume=run"]) == 0
    assert len(ids("run")) == len(set(ids("run"))) == 6 * 16
    assert max(staleness("run")) <= 1
    again = [{**row, "advantage": None} for row in rollouts("run")[4]]
    assert again == kept  # learnt from as it was sampled, not sampled again


class Scripted:
    """An engine whose `advance` waits for its turn, and then raises or goes on."""

    def __init__(self, name: str, failure: Exception | None = None):
        self.name, self.failure = name, failure
        self.entered, self.may_go_on = threading.Event(), threading.Event()
        self.calls: list[str] = []

    def call(self, method, *args, **kwargs):
        self.calls.append(method)
        return self

    def kill(self):
        raise AssertionError("nobody kills an engine that failed by itself")

    def is_done(self):
        return self.may_go_on.is_set()

    def result(self, deadline_s):
        self.entered.set()
        assert self.may_go_on.wait(deadline_s)
        if self.failure is not None:
            raise self.failure
        return []


def request(name: str) -> SampleRequest:
    return SampleRequest(sample_id=name, prompt_ids=(1,), seed=0)


SAMPLING = SamplingSpec(max_tokens=4, stop_token_ids=(2,))


def test_what_an_engine_raises_reaches_whoever_waits():
    broken = Scripted("rollout engine 0", WorkerError("rollout engine 0 died during advance: killed."))
    broken.may_go_on.set()
    dispatcher = Dispatcher([broken], max_in_flight=4, deadline_s=60.0)
    ticket = dispatcher.submit([request("a")], SAMPLING)
    with pytest.raises(WorkerError, match="died during advance"):
        ticket.result()
    with pytest.raises(WorkerError, match="closed"):
        dispatcher.submit([], SAMPLING)


def test_a_pause_does_not_wait_for_an_engine_that_failed_and_the_failure_stays_the_first():
    """Two engines inside a call: one fails, the other is still at work, and the loop wants to send weights."""
    broken = Scripted("rollout engine 0", WorkerError("rollout engine 0 died during advance: killed."))
    other = Scripted("rollout engine 1")
    dispatcher = Dispatcher([broken, other], max_in_flight=1, deadline_s=60.0)
    ticket = dispatcher.submit([request("a"), request("b")], SAMPLING)
    assert broken.entered.wait(30)
    assert other.entered.wait(30)
    paused = threading.Event()

    def pause():
        with dispatcher.paused():
            paused.set()

    threading.Thread(target=pause, daemon=True).start()
    broken.may_go_on.set()
    with pytest.raises(WorkerError, match="engine 0 died"):
        ticket.result()
    assert not paused.wait(0.2)  # engine 1 samples
    other.may_go_on.set()
    assert paused.wait(30)
    dispatcher.close()
    with pytest.raises(WorkerError, match="engine 0 died"):
        ticket.result()


def test_a_closed_dispatcher_leaves_nobody_waiting():
    busy = Scripted("rollout engine 0")
    dispatcher = Dispatcher([busy], max_in_flight=4, deadline_s=60.0)
    ticket = dispatcher.submit([request("a")], SAMPLING)
    assert busy.entered.wait(30)
    dispatcher.close()
    with pytest.raises(WorkerError, match="closed"):
        ticket.result()
    busy.may_go_on.set()
