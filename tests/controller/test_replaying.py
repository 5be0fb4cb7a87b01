"""Replay in a run: who joins, with which log-probabilities, and what strategies see of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rlkit.compose import compose
from rlkit.controller import loop
from rlkit.controller.local import InProcessCluster
from rlkit.controller.replaying import open_buffer, replayed, store
from rlkit.data.collate import collate
from rlkit.types import TrainBatch

SMALL = ["cluster=inprocess", "rollout=transformers", "evaluation=none", "prompts_per_step=4", "group_size=4", "num_steps=4"]
SMALL += ["reward.num_workers=1", "optimizer.learning_rate=1e-3"]


@pytest.fixture
def rollouts_of(make_rollout):
    """A function (rewards by group) -> rollouts of two responses a group."""

    def build(step: int, *rewards: tuple[float, float]):
        made = []
        for group, pair in enumerate(rewards):
            for index, reward in enumerate(pair):
                rollout = make_rollout(index, [5, 6], [7, 8])
                rollout.token_rewards[-1] = reward
                ids = {"sample_id": f"{step}/{group}/{index}", "group_id": f"{step}/{group}"}
                made.append(replace(rollout, reward=float(reward), policy_version=np.full(2, step - 1), **ids))
        return made

    return build


def outcomes(rollouts) -> torch.Tensor:
    return torch.tensor([float(rollout.reward) for rollout in rollouts])


def test_groups_of_equal_rewards_give_way_to_stored_ones_and_the_batch_keeps_its_size(rollouts_of):
    buffer = open_buffer(compose(["replay=zero_variance"]))
    assert buffer is not None
    first = rollouts_of(1, (0, 0), (1, 0), (1, 1), (0, 1))
    chosen = replayed(buffer, first, outcomes(first), step=1, version=0)
    assert (chosen.fresh, chosen.stored) == (first, [])  # nothing is stored yet
    advantages = torch.tensor([0, 0, 0.7, -0.7, 0, 0, -0.7, 0.7]).unsqueeze(-1).expand(8, 2)
    store(buffer, first, collate(first, advantages))
    assert [group.rollouts[0].group_id for group in buffer.groups] == ["1/1", "1/3"]
    assert [group.score for group in buffer.groups] == pytest.approx([1.4 * 0.5**0.5] * 2)
    second = rollouts_of(2, (1, 1), (0, 1), (0, 0), (0, 0))
    chosen = replayed(buffer, second, outcomes(second), step=2, version=1)
    assert [each.group_id for each in chosen.fresh] == ["2/1", "2/1"]
    assert len(chosen.stored) == 6  # three groups are wanted and two are stored, so one comes twice
    assert len({each.sample_id for each in chosen.stored}) == 6
    metrics = chosen.metrics(buffer, 1)
    assert metrics["replay/num_groups"] == 3
    assert metrics["replay/fraction"] == 0.75
    assert metrics["replay/age_mean"] == metrics["replay/age_max"] == 1


def test_a_buffers_groups_join_the_fresh_ones(rollouts_of):
    buffer = open_buffer(compose(["replay=buffer", "replay.fraction=0.5", "prompts_per_step=4"]))
    assert buffer is not None
    first, second = rollouts_of(1, (1, 0), (1, 1)), rollouts_of(2, (0, 0))
    store(buffer, first, collate(first, torch.tensor([1.0, -1.0, 0.0, 0.0]).unsqueeze(-1).expand(4, 2)))
    chosen = replayed(buffer, second, outcomes(second), step=2, version=1)
    assert chosen.fresh == second
    assert [each.group_id for each in chosen.stored] == ["1/0", "1/0"]


def batches(monkeypatch: pytest.MonkeyPatch) -> list[TrainBatch]:
    """What a run's steps train on."""
    seen, real = [], loop.Run.learn
    monkeypatch.setattr(loop.Run, "learn", lambda run, step, batch, count: seen.append(batch) or real(run, step, batch, count))
    return seen


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("correction", ["none", "decoupled_ppo"])
def test_replayed_tokens_keep_the_log_probabilities_they_were_sampled_with(correction, tmp_path, monkeypatch):
    seen = batches(monkeypatch)
    settings = [*SMALL, "replay=buffer", "replay.fraction=0.5", f"correction={correction}", "divergence=reverse_kl"]
    loop.train(compose([*settings, f"run_dir={tmp_path / 'run'}"]), InProcessCluster())
    first = seen[0]
    known = {name: (first.rollout_logprobs[row], int(first.response_lengths[row])) for row, name in enumerate(first.sample_ids)}
    found = 0
    for batch in seen[1:]:
        assert batch.old_logprobs is not None
        assert len(set(batch.sample_ids)) == batch.num_rows
        for row, name in enumerate(batch.sample_ids):
            if name not in known:
                continue
            logprobs, length = known[name]
            assert torch.equal(batch.rollout_logprobs[row, :length], logprobs[:length])
            moved = (batch.old_logprobs[row, :length] - logprobs[:length]).abs().max()
            # The ratio is to the sampler; or a weight takes over where the ratio is to the policy before the step.
            assert (moved > 1e-4) == (correction == "decoupled_ppo")
            found += 1
    assert found > 0
    lines = rows(tmp_path / "run")
    assert lines[0]["replay/num_groups"] == 0
    assert all(line["replay/num_groups"] > 0 and line["replay/age_mean"] >= 1 for line in lines[1:])
    assert all(line["policy/skipped_steps"] == 0 for line in lines)
    assert lines[-1]["policy/ratio_max"] > 1.001 or correction == "decoupled_ppo"


def test_a_group_is_worth_the_same_advantages_whenever_it_is_trained_on(tmp_path, monkeypatch):
    seen = batches(monkeypatch)
    loop.train(compose([*SMALL, "replay=zero_variance", f"run_dir={tmp_path / 'run'}", "num_steps=5"]), InProcessCluster())
    known: dict[str, float] = {}
    again = 0
    for batch in seen:
        for row, name in enumerate(batch.sample_ids):
            name, advantage = name.split("/again-")[0], float(batch.advantages[row, 0])
            again += name in known
            assert known.setdefault(name, advantage) == pytest.approx(advantage, abs=1e-6)
    assert again > 0
    assert {batch.num_rows for batch in seen} == {16}


def test_strategies_measure_the_policy_on_fresh_samples_only(tmp_path, monkeypatch):
    seen, real = [], loop.Progress.having_seen
    monkeypatch.setattr(
        loop.Progress, "having_seen", lambda progress, config, batch: seen.append(batch) or real(progress, config, batch)
    )
    settings = [*SMALL, "replay=buffer", "replay.fraction=0.5", "safeguard=entropy_gated", "divergence=reverse_kl", "num_steps=3"]
    loop.train(compose([*settings, f"run_dir={tmp_path / 'run'}"]), InProcessCluster())
    for step, batch in enumerate(seen, start=1):
        assert batch.num_rows == 16
        assert all(name.startswith(f"step-{step}/") for name in batch.sample_ids)
