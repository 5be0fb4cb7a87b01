"""DPH-RL's data: what the base model always solves is rehearsed, the rest explored."""

from __future__ import annotations

import json

import pytest
import torch

from rlkit.compose import compose
from rlkit.controller import loop
from rlkit.controller.local import InProcessCluster
from rlkit.controller.rehearsal import Answers
from rlkit.errors import DataError

SETTINGS = [
    *("cluster=inprocess", "rollout=transformers", "num_steps=2", "prompts_per_step=4", "group_size=2", "evaluation=none"),
    *("reward.num_workers=1", "rehearsal=base_answers", "rehearsal.num_prompts=64"),
    *("rehearsal.samples_per_prompt=1", "rehearsal.rows_per_step=3"),
]


def test_a_run_rehearses_what_its_model_could_do_and_needs_no_reference(tmp_path, monkeypatch):
    asked: list[set[str]] = []
    learn = loop.Run.learn

    def watched(self, step, batch, num_responses):
        assert self.reference is None
        rows = batch.rehearsal_mask.any(-1)
        assert int(rows.sum()) == 3
        assert not (batch.rehearsal_mask & batch.response_mask).any()  # no other term sees them
        if step == 1:  # the policy has not moved: what is stored is what the learner says now
            said = self.learner.measure(batch)["old_logprobs"]
            torch.testing.assert_close(said[batch.rehearsal_mask], batch.stored_logprobs[batch.rehearsal_mask], rtol=0, atol=1e-5)
        asked.append({name.split("/")[2] for name, row in zip(batch.sample_ids, rows.tolist(), strict=True) if not row})
        return learn(self, step, batch, num_responses)

    monkeypatch.setattr(loop.Run, "learn", watched)
    loop.train(compose([*SETTINGS, f"run_dir={tmp_path / 'run'}"]), InProcessCluster())
    answers = Answers.load(tmp_path / "run" / "rehearsal")
    assert answers.mastered
    assert all(rollout.reward == 1 and rollout.prompt_id in answers.mastered for rollout in answers.rollouts)
    assert not set.union(*asked) & answers.mastered
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["rehearsal/loss"] for row in rows if "rehearsal/loss" in row]
    assert len(losses) == 2
    assert losses[0] == pytest.approx(0, abs=1e-9)  # f(1) = 0
    assert losses[1] > 1e-9


def test_a_model_that_masters_nothing_has_nothing_to_rehearse(tmp_path):
    with pytest.raises(DataError, match="leaves nothing to rehearse"):
        loop.train(compose([*SETTINGS, "rehearsal.right_from=2", f"run_dir={tmp_path / 'run'}"]), InProcessCluster())


def test_answers_that_are_gone_are_missed(tmp_path):
    with pytest.raises(DataError, match="are gone"):
        Answers.load(tmp_path)
