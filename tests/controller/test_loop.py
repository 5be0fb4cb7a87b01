"""The loop in one process: the same code that drives Ray, on transformers' generation.

python tests/controller/test_loop.py      stores the loss curve anew
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from rlkit.compose import compose
from rlkit.controller.evaluate import Evaluation
from rlkit.controller.local import InProcessCluster
from rlkit.controller.loop import train, trainable
from rlkit.controller.sampling import sample_seed
from rlkit.controller.tracking.files import read_evaluations
from rlkit.errors import DataError, NumericalError, RewardError
from rlkit.types import RewardStatus

SMALL = [
    "cluster=inprocess",
    "rollout=transformers",
    "num_steps=3",
    "prompts_per_step=6",
    "group_size=4",
    "reward.num_workers=1",
]
EVALUATED = ["evaluation.num_prompts=8", "evaluation.samples_per_prompt=4", "evaluation.ks=[1,4]"]
STORED_CURVE = Path(__file__).with_name("loss_curve.json")


def run(folder: Path, *overrides: str, evaluated: bool = False):
    evaluation = EVALUATED if evaluated else ["evaluation=none"]
    return train(compose([*SMALL, *evaluation, f"run_dir={folder}", *overrides]), InProcessCluster())


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def steps(folder: Path) -> list[dict]:
    return [row for row in rows(folder) if "reward/mean" in row]


def without_times(row: dict) -> dict:
    return {name: value for name, value in row.items() if not name.startswith(("time/", "rate/"))}


def curve(folder: Path) -> list[dict]:
    names = ("reward/mean", "policy/loss", "policy/grad_norm", "entropy/mean")
    return [{name: row[name] for name in names} for row in steps(folder)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "run"
    run(folder, evaluated=True)
    return folder


def test_a_run_leaves_what_its_user_looks_for(finished):
    assert len(steps(finished)) == 3
    for name in ("config.yaml", "versions.json", "summary.json", "summary.md", "plots/reward.png", "rollouts/step_000003.parquet"):
        assert (finished / name).exists(), name
    assert [folder.name for folder in (finished / "checkpoints").iterdir()] == ["step_000003"]
    assert {row["step"] for row in rows(finished) if "evaluation/pass@1" in row} == {0, 3}
    kept = read_evaluations(finished)
    assert list(kept) == [0, 3]
    for row in (row for row in rows(finished) if "evaluation/pass@1" in row):
        again = Evaluation.from_json(kept[row["step"]]).metrics()
        assert again.items() <= row.items()  # to the last bit


def test_two_runs_with_one_seed_are_equal_and_another_seed_differs(finished, tmp_path):
    run(tmp_path / "same", evaluated=True)
    run(tmp_path / "other", "seed=1")
    assert [without_times(row) for row in rows(tmp_path / "same")] == [without_times(row) for row in rows(finished)]
    assert steps(tmp_path / "other")[0]["entropy/mean"] != steps(finished)[0]["entropy/mean"]


def test_the_loop_reproduces_its_stored_curve(finished):
    """To a tolerance, because other processors round otherwise. After an intended change of numbers, run this file to store the
    new curve, and say why in the commit."""
    stored = json.loads(STORED_CURVE.read_text())
    for mine, theirs in zip(curve(finished), stored, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-6)


def test_stored_rollouts_are_what_was_sampled_and_trained_on(finished):
    table = pq.read_table(finished / "rollouts" / "step_000002.parquet").to_pylist()
    assert len(table) == 24
    assert len({row["sample_id"] for row in table}) == 24
    for row in table:
        assert set(row["policy_version"]) == {1}  # sampled by the weights after step 1
        assert len(row["response_ids"]) == len(row["rollout_logprobs"])
        assert row["reward"] in (0.0, 1.0)
        assert row["status"] == "ok"
    by_group: dict[str, list] = {}
    for row in table:
        by_group.setdefault(row["group_id"], []).append(row)
    for group in by_group.values():
        rewards = np.array([row["reward"] for row in group])
        expected = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-6)
        np.testing.assert_allclose([row["advantage"] for row in group], expected, atol=1e-4)


def test_engine_and_learner_agree_after_every_sync(finished):
    for row in steps(finished):
        assert row["sync/probe_max"] <= 1e-4
        assert row["mismatch/max"] <= 1e-4


def test_every_divergence_estimator_trains_against_the_reference(tmp_path):
    for estimator in ("score", "k2", "k3_weighted", "k3", "exact"):
        folder = tmp_path / estimator
        run(folder, "num_steps=2", "divergence=reverse_kl", f"divergence.estimator={estimator}")
        first, second = steps(folder)
        assert first["kl/ref_k3"] == pytest.approx(0, abs=1e-6)  # the policy starts as the reference
        assert second["kl/ref_k3"] > 0
        assert ("divergence/exact" in second) == (estimator == "exact")


def test_a_divergence_holds_the_policy_to_its_reference(tmp_path):
    drift = {}
    for coef in (0, 10):
        folder = tmp_path / str(coef)
        overrides = ["divergence=reverse_kl", "divergence.estimator=exact", f"divergence.coef={coef}"]
        run(folder, "num_steps=6", "optimizer.learning_rate=5e-4", *overrides)
        drift[coef] = steps(folder)[-1]["divergence/exact"]
    assert drift[10] < 0.5 * drift[0]


def test_several_optimiser_steps_per_batch_move_away_from_the_sampling_policy(tmp_path):
    run(tmp_path / "run", "num_steps=2", "optimizer_steps_per_batch=3", "epochs_per_batch=2", "optimizer.learning_rate=1e-3")
    for row in steps(tmp_path / "run"):
        assert row["policy/ratio_max"] > 1.001
        assert row["policy/approx_kl_k3"] > 0


def test_a_loss_is_a_mean_over_optimiser_steps_however_many_there_are(tmp_path):
    found = []
    for count in (1, 3):
        folder = tmp_path / str(count)
        still = ["num_steps=1", "optimizer.learning_rate=1e-12", "entropy=bonus", "entropy.coef=0.01"]
        run(folder, *still, f"optimizer_steps_per_batch={count}", "aggregation=seq_mean_token_mean")
        found.append(steps(folder)[0]["entropy/loss"])
    assert found[1] == pytest.approx(found[0], rel=1e-3)


def test_failed_rewards_leave_their_groups_and_every_denominator(tmp_path, monkeypatch):
    reward = tmp_path / "rewards.py"
    reward.write_text(
        "def some(prompts, completions, digits, target, **columns):\n"
        "    if target[0] % 3 == 0:\n        return [None]\n"
        "    return [float(len(completions[0]))]\n"
    )
    monkeypatch.chdir(tmp_path)
    run(tmp_path / "run", "num_steps=1", "reward.fn=rewards.py:some", "prompts_per_step=12")
    (row,) = steps(tmp_path / "run")
    table = pq.read_table(tmp_path / "run" / "rollouts" / "step_000001.parquet").to_pylist()
    skipped = [r for r in table if r["status"] == "skipped"]
    assert skipped
    assert row["data/dropped_failed"] == len(skipped) / 4
    assert row["reward/skipped"] == len(skipped)
    assert row["reward/mean"] == pytest.approx(np.mean([r["reward"] for r in table if r["status"] == "ok"]))
    assert all(r["reward"] is None for r in skipped)


COUNTED = """
from zlib import crc32

def judged(prompt, completion, kind):
    luck = crc32((prompt + completion).encode())
    if kind == "broken" or (kind == "flaky" and luck % 4):
        raise ValueError("cannot be judged")
    return 1.0 if kind == "easy" else float(luck // 4 % 2)
"""


def test_every_prompt_whose_turn_came_is_kept_or_dropped_for_one_reason(in_folder):
    """Failed rewards, a filter and a curriculum at once. Twelve prompts, so that they recur and the easy ones retire."""
    (in_folder / "rewards.py").write_text(COUNTED)
    kinds = ["broken", "flaky", "easy", "hard", "hard", "hard"] * 2
    (in_folder / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n} 5 7 2 = 7:", "kind": kind}) + "\n" for n, kind in enumerate(kinds))
    )
    run(
        in_folder / "run",
        *("data=jsonl", "data.path=rows.jsonl", "data.held_out_fraction=0", "max_prompt_tokens=24", "max_response_tokens=2"),
        *("reward.fn=rewards.py:judged", "reward.max_error_rate=1", "num_steps=6", "prompts_per_step=3"),
        *("prompt_filter=dynamic", "prompt_filter.max_batches=0", "curriculum=pass_rate", "curriculum.retire_after=1"),
    )
    found = [row for row in rows(in_folder / "run") if "data/issued" in row]
    assert len(found) == 6
    reasons = ("filter", "surplus", "failed", "retired", "difficulty")
    for row in found:
        dropped = {name: value for name, value in row.items() if name.startswith("data/dropped_")}
        assert set(dropped) == {f"data/dropped_{reason}" for reason in reasons}
        assert row["data/issued"] == row["data/kept"] + sum(dropped.values()), row
        table = pq.read_table(in_folder / "run" / "rollouts" / f"step_{row['step']:06d}.parquet").to_pylist()
        trained = {each["group_id"] for each in table if each["advantage"] is not None}
        assert row["data/kept"] == len(trained) == 3  # what failed was replaced, like what the filter dropped
        assert all("ValueError: cannot be judged" in each["reward_message"] for each in table if each["status"] == "error")
    totals = {reason: sum(row[f"data/dropped_{reason}"] for row in found) for reason in reasons}
    assert all(totals.values()), totals  # each of them happened


def test_a_reward_function_that_always_raises_stops_the_run_with_its_own_words(tmp_path, monkeypatch):
    (tmp_path / "rewards.py").write_text("def broken(prompts, completions, **columns):\n    raise KeyError('answr')\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RewardError, match=r"rewards\.py:broken.*KeyError.*answr"):
        run(tmp_path / "run", "reward.fn=rewards.py:broken")


def test_a_reward_function_that_hangs_is_cut_off_and_stops_the_run(tmp_path, monkeypatch):
    (tmp_path / "rewards.py").write_text("def stuck(prompts, completions, **columns):\n    while True: pass\n")
    monkeypatch.chdir(tmp_path)
    settings = ["reward.timeout_s=0.2", "prompts_per_step=2", "group_size=2"]
    with pytest.raises(RewardError, match=r"rewards\.py:stuck.*no answer within reward\.timeout_s=0\.2"):
        run(tmp_path / "run", "reward.fn=rewards.py:stuck", *settings)


def test_a_missing_column_and_an_empty_data_set_are_found_before_any_worker_starts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows_file = tmp_path / "rows.jsonl"
    cluster = InProcessCluster()

    def refused(*overrides: str) -> str:
        settings = [
            "experiment=none",
            "data=jsonl",
            "data.path=rows.jsonl",
            "reward.fn=exact_match",
            "max_prompt_tokens=24",
            "max_response_tokens=16",
            "cluster=inprocess",
            "rollout=transformers",
        ]
        with pytest.raises(DataError) as caught:
            train(compose([*settings, "run_dir=run", *overrides]), cluster)
        assert not cluster._workers
        assert not (tmp_path / "run").exists()
        return str(caught.value)

    rows_file.write_text("".join(json.dumps({"question": f"{i}", "answer": "1"}) + "\n" for i in range(40)))
    assert "question" in refused()
    assert "prompt" in refused()
    rows_file.write_text("".join(json.dumps({"prompt": f"{i} 2 3 = 4:", "solution": "1"}) + "\n" for i in range(1, 9)))
    assert "solution" in refused()
    assert "answer" in refused()
    rows_file.write_text("")
    assert "rows.jsonl" in refused()


def test_a_loss_that_stays_not_finite_is_dumped_and_stops_the_run(tmp_path, monkeypatch):
    from rlkit.core.advantages import Estimate, GroupNormalized

    def broken(self, *, token_rewards, response_mask, group_ids, values=None):
        return Estimate(advantages=torch.full(response_mask.shape, float("nan")))

    monkeypatch.setattr(GroupNormalized, "__call__", broken)
    with pytest.raises(NumericalError, match="3 optimiser steps in a row"):
        run(tmp_path / "run", "num_steps=5")
    dumped = sorted(file.name for file in (tmp_path / "run" / "skipped").iterdir())
    assert dumped[0].startswith("step_000001")


def test_seeds_depend_on_every_part_of_a_samples_identity():
    seeds = {sample_seed(0, "step-1", 0, "p", 0), sample_seed(1, "step-1", 0, "p", 0), sample_seed(0, "step-2", 0, "p", 0)}
    seeds |= {sample_seed(0, "step-1", 1, "p", 0), sample_seed(0, "step-1", 0, "q", 0), sample_seed(0, "step-1", 0, "p", 1)}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(0, "step-1", 0, "p", 0) == 3305401331252223031


def test_a_group_with_one_scored_sample_is_dropped_and_counted(make_rollout):
    good = [replace(make_rollout(i, [3], [4]), group_id=f"g{i // 2}") for i in range(6)]
    spoiled = [replace(r, status=RewardStatus.timeout, reward=None) if i in (0, 4, 5) else r for i, r in enumerate(good)]
    kept, dropped = trainable(spoiled, at_least=2)
    assert [rollout.sample_id for rollout in kept] == ["sample-2", "sample-3"]
    assert dropped["group"] == 2
    assert dropped["timeout"] == 3


def test_a_probe_holds_the_sampled_divergence_against_the_exact_one(tmp_path):
    run(
        tmp_path / "run",
        "divergence=jensen_shannon",
        "divergence.coef=1",
        "evaluation.every=2",
        "optimizer.learning_rate=1e-3",
        evaluated=True,
    )
    probed = [row for row in rows(tmp_path / "run") if "divergence/probe_exact" in row]
    assert [row["step"] for row in probed] == [2]  # of three steps
    (row,) = probed
    assert row["divergence/probe_exact"] > 1e-6  # the policy has moved by one step
    assert row["divergence/probe_bias"] == pytest.approx(row["divergence/probe_sampled"] - row["divergence/probe_exact"], abs=1e-7)
    assert abs(row["divergence/probe_bias"]) < row["divergence/probe_spread"]
    exact = run(tmp_path / "exact", "divergence=jensen_shannon", "divergence.estimator=exact", "evaluation.every=1", evaluated=True)
    for row in (row for row in rows(exact.run_dir) if "divergence/probe_exact" in row):
        assert row["divergence/probe_exact"] == pytest.approx(row["divergence/exact"], abs=1e-3)  # of a part of the same tokens


if __name__ == "__main__":
    with TemporaryDirectory() as temporary:
        run(Path(temporary, "run"), evaluated=True)
        STORED_CURVE.write_text(json.dumps(curve(Path(temporary, "run")), indent=1) + "\n")
