"""References in whole runs: what moves, when, and that nothing is ever compared with two versions at once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from rlkit import cli
from rlkit.compose import compose
from rlkit.controller import loop
from rlkit.controller.fleet import Learners, ReferenceScorer
from rlkit.controller.local import InProcessCluster
from rlkit.controller.turns import SideBySide
from rlkit.core.loss import Knobs
from rlkit.data.collate import collate, minibatches, with_reference
from rlkit.data.models.loading import checkpoint_tensors, resolve
from rlkit.errors import ConfigError, DataError
from rlkit.workers.learner import Learner
from rlkit.workers.scorer import Scorer

SMALL = ["cluster=inprocess", "rollout=transformers", "evaluation=none", "prompts_per_step=4", "group_size=4"]
SMALL += ["reward.num_workers=1", "max_response_tokens=8", "optimizer.learning_rate=1e-3", "divergence=reverse_kl"]


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlkit.controller.tracking.tracker.write_plots", lambda history, folder: None)  # half of a run's time


def run(folder: Path, *overrides: str, cluster: InProcessCluster | None = None) -> list[dict]:
    """The lines of a run's metrics."""
    loop.train(compose([*SMALL, f"run_dir={folder}", "num_steps=3", *overrides]), cluster or InProcessCluster())
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def scorer_in(cluster: InProcessCluster) -> Scorer:
    return next(handle._worker for handle in cluster._workers.values() if isinstance(handle._worker, Scorer))


@pytest.mark.parametrize("learner", ["fsdp", "lora"])
@pytest.mark.parametrize("estimator", ["score", "exact"])
def test_a_refreshed_reference_is_the_policy_that_the_next_step_starts_from(tmp_path, estimator, learner):
    """By sampled tokens, and over whole distributions, where head and hidden states must be of one version."""
    settings = [f"divergence.estimator={estimator}", f"learner={learner}"]
    fresh = run(tmp_path / "fresh", "reference=refresh", "reference.every=1", *settings)
    held = run(tmp_path / "held", *settings)
    name = "divergence/exact" if estimator == "exact" else "kl/ref_k3"
    assert all(row[name] == pytest.approx(0, abs=1e-6) for row in fresh)
    assert held[0][name] == pytest.approx(0, abs=1e-6)
    assert all(row[name] > 1e-5 for row in held[1:])
    assert [row["reference/version"] for row in fresh] == [1, 2, 3]
    assert all(row["reference/distance"] > 0 for row in fresh)
    assert not any(name.startswith("reference/") for row in held for name in row)


def test_it_moves_when_its_rule_says_and_the_rollouts_say_which_version_scored_them(tmp_path):
    rows = run(tmp_path / "run", "reference=soft_refresh", "reference.every=2", "num_steps=5")
    assert [row["reference/version"] for row in rows] == [0, 1, 1, 2, 2]
    assert [row["reference/age"] for row in rows] == [1, 0, 1, 0, 1]
    assert ["reference/distance" in row for row in rows] == [False, True, False, True, False]
    tables = [pq.read_table(tmp_path / "run" / "rollouts" / f"step_{step:06d}.parquet") for step in range(1, 6)]
    assert [set(table["ref_version"].to_pylist()) for table in tables] == [{0}, {0}, {1}, {1}, {2}]


def test_head_and_hidden_states_are_of_one_version_at_every_optimiser_step(tmp_path, monkeypatch):
    cluster, seen = InProcessCluster(), []
    real = Learner.update

    def update(learner: Learner, batch, **kwargs):
        scorer = scorer_in(cluster)
        assert learner.reference_head is not None
        assert torch.equal(learner.reference_head, torch.from_numpy(scorer.head()))
        assert batch.ref_version is not None
        seen.append((set(batch.ref_version.tolist()), learner.reference_version, scorer.ref_version))
        return real(learner, batch, **kwargs)

    monkeypatch.setattr(Learner, "update", update)
    settings = ["reference=ema", "reference.decay=0.5", "divergence.estimator=exact", "optimizer_steps_per_batch=2"]
    run(tmp_path / "run", *settings, cluster=cluster)
    assert seen == [({version}, version, version) for version in (0, 0, 1, 1, 2, 2)]


def test_log_probs_of_another_version_are_refused_by_the_loop_and_by_the_learner(tmp_path, monkeypatch, learner, make_batch):
    real = loop.Run.learn

    def stale(self: loop.Run, step: int, batch, num_responses):
        assert batch.ref_version is not None
        batch.ref_version[3:5] -= int(step == 2)  # as two that were kept from the step before
        return real(self, step, batch, num_responses)

    monkeypatch.setattr(loop.Run, "learn", stale)
    with pytest.raises(DataError, match=r"2 of 16 rows are of version 0 of the reference, which is at version 1 now\. Score them"):
        run(tmp_path / "run", "reference=ema")

    learner.begin(compose(["divergence=reverse_kl", "divergence.estimator=exact"]))
    learner.set_reference_head(np.zeros((96, 64), dtype=np.float32), 3)
    batch = make_batch()
    hidden = torch.zeros(*batch.response_mask.shape, 64)
    batch = replace(batch, ref_hidden=hidden, ref_version=torch.full((batch.num_rows,), 2))
    with pytest.raises(DataError, match="6 of 6 rows are of version 2 of the reference, which is at version 3 now"):
        learner.update(batch, denominators={}, knobs=Knobs(divergence_coef=0.1))


def test_versions_stay_with_their_rows(make_rollout):
    rollouts = [make_rollout(i, [3], [4] * (i + 1)) for i in range(6)]
    scores = [np.zeros(i + 1, dtype=np.float32) for i in range(6)]
    batch = collate(rollouts, ref_logprobs=scores, ref_version=7)
    batch.check_reference(7)
    for part in minibatches(batch, 2, seed=0):
        part.check_reference(7)
    mixed = replace(batch, ref_version=torch.arange(6))
    (part,) = (mixed.select([4, 1]),)
    assert part.ref_version is not None
    assert part.ref_version.tolist() == [4, 1]
    assert [rollout.ref_version for rollout in with_reference([*rollouts, make_rollout(9, [3], [4])], mixed)] == [*range(6), None]
    with pytest.raises(DataError, match="do not say which reference they are of"):
        collate(rollouts, ref_logprobs=scores).check_reference(7)
    collate(rollouts).check_reference(7)  # nothing was compared


def test_a_frozen_reference_is_as_it_was_on_disk_after_a_run_and_has_no_gradient(tmp_path):
    cluster = InProcessCluster()
    run(tmp_path / "run", cluster=cluster)
    parameters = dict(scorer_in(cluster).policy.model.named_parameters())
    stored = checkpoint_tensors(resolve("tiny"), parameters)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, stored[name].float())
        assert parameter.grad is None
        assert not parameter.requires_grad
    assert not (tmp_path / "run" / "checkpoints" / "step_000003" / "state" / "reference.safetensors").exists()


def test_the_next_run_on_the_cluster_starts_from_the_initial_model(tmp_path):
    cluster = InProcessCluster()
    run(tmp_path / "first", "reference=ema", "reference.decay=0.0", cluster=cluster)
    after = run(tmp_path / "second", cluster=cluster)
    alone = run(tmp_path / "alone")
    assert [row["kl/ref_k3"] for row in after] == [row["kl/ref_k3"] for row in alone]


@pytest.mark.parametrize(
    "overrides",
    [
        ["reference=soup", "reference.paths=[tiny,tiny]"],
        ["reference=model", "reference.path=tiny"],
        ["reference=geometric_mixture", "reference.path=tiny"],
    ],
    ids=["soup", "model", "mixture"],
)
def test_a_reference_made_of_the_initial_model_alone_is_that_model(tmp_path, overrides):
    mine, plain = run(tmp_path / "mine", *overrides), run(tmp_path / "plain")
    exact = run(tmp_path / "exact", *overrides, "divergence.estimator=exact")
    for row, other in zip(mine, plain, strict=True):
        assert row["kl/ref_k3"] == pytest.approx(other["kl/ref_k3"], rel=1e-3, abs=1e-7)
    assert exact[0]["divergence/exact"] == pytest.approx(0, abs=1e-6)


def test_a_reset_optimiser_has_no_moments_after_a_refresh(tmp_path, monkeypatch):
    moments = []
    real = Learner.update

    def update(learner: Learner, batch, **kwargs):
        moments.append(len(learner.optimizer.state) > 0)
        return real(learner, batch, **kwargs)

    monkeypatch.setattr(Learner, "update", update)
    refresh = ["reference=refresh", "reference.every=2"]
    run(tmp_path / "reset", *refresh, "reference.reset_optimizer=true", "num_steps=5")
    assert moments == [False, True, False, True, False]
    moments.clear()
    run(tmp_path / "kept", *refresh)
    assert moments == [False, True, True]


def test_two_anchors_hold_the_policy_nearer_to_where_a_batch_found_it(tmp_path):
    settings = ["optimizer_steps_per_batch=4", "num_steps=2"]
    free = run(tmp_path / "free", *settings)
    held = run(tmp_path / "held", *settings, "anchor=old_policy", "anchor.coef=50")
    assert all(mine["policy/approx_kl_k3"] < 0.7 * theirs["policy/approx_kl_k3"] for mine, theirs in zip(held, free, strict=True))
    assert all(row["anchor/loss"] > 0 for row in held)
    assert not any("anchor/loss" in row for row in free)


def test_models_that_do_not_fit_are_refused_before_a_worker_starts(tmp_path, random_model, capsys):
    overrides = ["reference=model", f"reference.path={random_model(tied=True)}"]
    cluster = InProcessCluster()
    with pytest.raises(ConfigError, match="its tokenizer is not the policy's"):
        run(tmp_path / "run", *overrides, cluster=cluster)
    assert not cluster._workers
    assert not (tmp_path / "run").exists()
    assert cli.guard(lambda: cli.dispatch(["train", "dry_run=true", *SMALL, *overrides])) == 2
    assert "its tokenizer is not the policy's" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_weights_of_one_rank_or_two_reach_the_reference(ray_cluster, random_model, make_rollout, ranks):
    """Real processes: what was refreshed scores as the learner measures."""
    settings = [f"model.path={random_model(tied=True)}", "optimizer=sgd", "optimizer.learning_rate=0.5", "divergence=reverse_kl"]
    settings += ["divergence.estimator=exact", "reference=refresh", "reference.every=2", f"learner.num_ranks={ranks}"]
    config = compose([*settings, "max_response_tokens=16", "max_prompt_tokens=8"])
    learner, reference = Learners(config, ray_cluster, SideBySide()), ReferenceScorer(config, ray_cluster)
    rng = np.random.default_rng(0)
    rollouts = [make_rollout(i, rng.integers(3, 96, 3).tolist(), rng.integers(3, 96, 2 + i).tolist()) for i in range(5)]
    reference.send_head(learner)

    def batch_now():
        scores = reference.score(rollouts)
        batch = collate(rollouts, ref_logprobs=scores.logprobs, ref_hidden=scores.hidden, ref_version=scores.ref_version)
        return replace(batch, advantages=torch.ones(batch.response_mask.shape))

    before = batch_now()
    learner.update(before, Knobs(divergence_coef=0.1))
    assert reference.follow(learner, 1) == {"reference/version": 0.0, "reference/age": 1.0}
    moved = reference.follow(learner, 2)
    assert moved["reference/version"] == 1
    assert moved["reference/distance"] > 0
    after = batch_now()
    assert before.ref_logprobs is not None
    assert after.ref_logprobs is not None
    measured = learner.measure(after)["old_logprobs"]
    torch.testing.assert_close(after.ref_logprobs, measured, atol=2e-5, rtol=0)
    assert (before.ref_logprobs - measured).abs().max() > 1e-3
    stats = learner.update(after, Knobs(divergence_coef=0.1))
    assert stats.metrics["divergence/exact"].value == pytest.approx(0, abs=1e-6)
    with pytest.raises(DataError, match="5 of 5 rows are of version 0" if ranks == 1 else "rows are of version 0"):
        learner.update(before, Knobs(divergence_coef=0.1))
