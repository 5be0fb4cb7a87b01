"""A sweep goes on when a run fails, and tells the whole story at the end."""

import json
from pathlib import Path

import numpy as np
import pytest

from rlkit.compose import Arm, compose_arms
from rlkit.config import RunConfig
from rlkit.controller.cluster import Cluster
from rlkit.controller.evaluate import Evaluation
from rlkit.controller.loop import RunSummary
from rlkit.errors import NumericalError, Preempted, WorkerError
from rlkit.sweep import run_sweep


def evaluation(reward: float) -> Evaluation:
    return Evaluation(
        prompt_ids=("a", "b"),
        row_digests=("", ""),
        sample_rewards=((reward,) * 4,) * 2,
        num_correct=np.full(2, round(4 * reward)),
        distinct=np.ones(2),
        num_failed=0,
        ks=(1,),
    )


class Training:
    """Stands in for `train`: what happens depends on the seed."""

    def __init__(self, failures: dict[int, BaseException]):
        self.failures, self.seeds, self.clusters = failures, [], []

    def __call__(self, config: RunConfig, cluster: Cluster) -> RunSummary:
        self.seeds.append(config.seed)
        self.clusters.append(cluster)
        if config.seed in self.failures:
            raise self.failures[config.seed]
        run_dir = Path(config.run_dir)
        return RunSummary(run_dir=run_dir, checkpoint=run_dir, before=evaluation(0.25), after=evaluation(0.5))


@pytest.fixture
def arms(in_folder: Path) -> list[Arm]:
    return compose_arms(["cluster=inprocess", "rollout=transformers", "run_dir=sweep", "seed=1,2,3"])


def outcomes() -> list[dict]:
    return json.loads(Path("sweep/sweep.json").read_text())


def test_all_runs_share_one_cluster_and_end_in_one_table(arms: list[Arm]):
    train, shown = Training({}), []
    assert run_sweep(arms, train, shown.append) == 0
    assert train.seeds == [1, 2, 3]
    assert len({id(cluster) for cluster in train.clusters}) == 1
    assert shown[0] == "run 1 of 3: seed=1"
    assert [line.split()[:2] for line in shown[-1].splitlines()] == [
        ["run", "outcome"],
        *([f"seed={s}", "done"] for s in (1, 2, 3)),
    ]
    assert "reward 0.250 -> 0.500, pass@1 0.250 -> 0.500" in shown[-1]
    assert [outcome["run_dir"] for outcome in outcomes()] == ["sweep/seed=1", "sweep/seed=2", "sweep/seed=3"]


def test_a_failed_run_is_recorded_and_the_rest_go_on(arms: list[Arm]):
    train = Training({1: WorkerError("rollout engine 0 died."), 2: RuntimeError("a bug")})
    shown = []
    assert run_sweep(arms, train, shown.append) == WorkerError.exit_code  # the worst of 4, 1, 0
    assert train.seeds == [1, 2, 3]
    assert [(outcome["exit_code"], outcome["message"]) for outcome in outcomes()] == [
        (4, "rollout engine 0 died."),
        (1, "RuntimeError: a bug"),
        (0, ""),
    ]
    assert any("Traceback" in text for text in shown)  # of the bug
    assert "failed (4)" in shown[-1]


def test_an_interrupt_stops_the_sweep_and_still_records_it(arms: list[Arm]):
    train, shown = Training({2: KeyboardInterrupt()}), []
    with pytest.raises(KeyboardInterrupt):
        run_sweep(arms, train, shown.append)
    assert [outcome["exit_code"] for outcome in outcomes()] == [0, 130, None]
    assert "not run" in shown[-1]


def test_a_run_that_was_asked_to_stop_ends_the_sweep(arms: list[Arm]):
    train = Training({1: NumericalError("loss is nan"), 2: Preempted("stopped")})
    assert run_sweep(arms, train, lambda text: None) == 75
    assert train.seeds == [1, 2]
