"""Runs of several turns, end to end: rewards rise, and what is trained on is what the policy sampled, token for token."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlkit.compose import compose
from rlkit.controller.local import InProcessCluster
from rlkit.controller.loop import train
from rlkit.controller.tracking.files import read_rollouts
from rlkit.data.environments.tools import calculator
from rlkit.data.models import smollm2
from rlkit.data.models.loading import load_tokenizer, resolve
from rlkit.types import Completion, Origin, Rollout, TrainBatch
from rlkit.workers.learner import Learner
from rlkit.workers.rollout.transformers import TransformersRolloutEngine

pytestmark = pytest.mark.slow

RLKIT = str(Path(sys.executable).with_name("rlkit"))


def rlkit(folder: Path, *arguments: str) -> list[dict[str, Any]]:
    """Train, and return the metrics of each step."""
    command = [RLKIT, "train", "run_dir=run", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]


def stored(folder: Path) -> list[list[Rollout]]:
    return [read_rollouts(file) for file in sorted((folder / "run/rollouts").glob("*.parquet"))]


def check_origins(rollout: Rollout, tokenizer: Any) -> None:
    """Each turn's tokens spell what the policy is said to have written, and what lies between is the environment's answer."""
    turns = [each["content"] for each in rollout.transcript or () if each["role"] == "assistant"]
    answers = [each["content"] for each in rollout.transcript or () if each["role"] != "assistant"]
    own = rollout.origin == Origin.policy
    for turn, content in enumerate(turns):
        ids = rollout.response_ids[own & (rollout.turn_index == turn)]
        assert tokenizer.decode(ids, skip_special_tokens=True) == content
    for turn, content in enumerate(answers):
        ids = rollout.response_ids[~own & (rollout.turn_index == turn)]
        assert ids.tolist() == tokenizer(content, add_special_tokens=False)["input_ids"]
    assert not rollout.rollout_logprobs[~own].any()
    assert (rollout.rollout_logprobs[own] < 0).all()


def test_a_run_with_a_tool_learns_and_its_stored_rollouts_say_who_wrote_what(tmp_path):
    rows = rlkit(tmp_path, "experiment=calculator", "num_steps=16", "evaluation=none", "tracking.save_rollouts_every=1")
    rewards = [row["reward/mean"] for row in rows]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.04, rewards
    assert all(row["environment/turns_mean"] > 1 for row in rows)
    tokenizer = load_tokenizer(resolve("tiny"), trust_remote_code=False)
    steps = stored(tmp_path)
    assert len(steps) == 16
    for rollout in (rollout for step in steps for rollout in step):
        check_origins(rollout, tokenizer)
        said = [each["content"] for each in rollout.transcript or ()]
        for call, answer in zip(said[::2], said[1::2], strict=False):  # and the answers are the calculator's
            try:
                value = calculator(call.strip())
            except (ValueError, ZeroDivisionError):
                assert " = error: " in answer
            else:
                assert answer == f" = {value}:"
    # The engine's log-probs of the first step are those of the initial model at these very tokens: with a history that were not
    # exact, or a mask that took a token of the environment for the policy's, they would not be.
    some = steps[0][:64]
    engine = TransformersRolloutEngine(_engine_spec())
    for rollout, scores in zip(some, engine.score([(*r.prompt_ids, *r.response_ids.tolist()) for r in some]), strict=True):
        own = rollout.origin == Origin.policy
        np.testing.assert_allclose(scores[len(rollout.prompt_ids) - 1 :][own], rollout.rollout_logprobs[own], atol=1e-4)


def _engine_spec() -> Any:
    from rlkit.controller.fleet import engine_spec

    return engine_spec(compose(["experiment=calculator", "rollout=transformers"]))


@pytest.mark.parametrize("overrides", ["", "max_staleness=1 correction=decoupled_ppo", "advantage=gae critic=value_model"])
def test_every_trained_token_is_one_that_the_engine_sampled(in_folder, monkeypatch, overrides):
    sampled: dict[str, list[int]] = defaultdict(list)  # by episode, of all its turns
    trained: dict[str, list[int]] = {}
    generate, update = TransformersRolloutEngine.generate, Learner.update

    def recorded(self: Any, requests: Any, sampling: Any) -> list[Completion]:
        completions = generate(self, requests, sampling)
        for completion in completions:
            sampled[completion.sample_id.rpartition("/turn-")[0]] += completion.response_ids.tolist()
        return completions

    def learnt(self: Any, batch: TrainBatch, **given: Any) -> Any:
        for row, sample_id in enumerate(batch.sample_ids):
            response = batch.sequences.response(row)
            trained[sample_id] = response[batch.response_mask[row, : len(response)]].tolist()
        return update(self, batch, **given)

    monkeypatch.setattr(TransformersRolloutEngine, "generate", recorded)
    monkeypatch.setattr(Learner, "update", learnt)
    small = ["cluster=inprocess", "rollout=transformers", "num_steps=3", "prompts_per_step=4", "group_size=4", "evaluation=none"]
    config = compose(["experiment=calculator", "run_dir=run", *small, "tracking.save_rollouts_every=1", *overrides.split()])
    train(config, InProcessCluster())
    assert len(trained) == 3 * 16
    assert all(sampled[sample_id] == tokens for sample_id, tokens in trained.items())
    rollouts = {rollout.sample_id: rollout for step in stored(in_folder) for rollout in step}
    assert rollouts.keys() == trained.keys()
    for sample_id, rollout in rollouts.items():
        assert rollout.response_ids[rollout.origin == Origin.policy].tolist() == trained[sample_id]
    assert any((rollout.origin == Origin.environment).any() for rollout in rollouts.values())


def test_the_pretrained_model_calls_tools_in_chat(tmp_path):
    model = smollm2.fetch()
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"What is {a}+{a}?", "answer": str(2 * a)}) + "\n" for a in range(10, 20)))
    settings = ["environment=tools", "environment.tools=[calculator]", "environment.max_turns=3", "reward.fn=numeric_match"]
    settings += ["data=jsonl", "data.path=rows.jsonl", "data.chat=true", "data.held_out_fraction=0", "evaluation=none"]
    settings += ["model=smollm2_135m", "num_steps=1", "prompts_per_step=2", "group_size=2", "max_prompt_tokens=400"]
    rlkit(tmp_path, *settings, "max_response_tokens=96", "environment.max_turn_tokens=24", "tracking.save_rollouts_every=1")
    tokenizer = load_tokenizer(str(model), trust_remote_code=False)
    for rollout in stored(tmp_path)[0]:
        assert '"name": "calculator"' in tokenizer.decode(list(rollout.prompt_ids))
        own = rollout.origin == Origin.policy
        turns = [each["content"] for each in rollout.transcript or () if each["role"] == "assistant"]
        for turn, content in enumerate(turns):
            assert tokenizer.decode(rollout.response_ids[own & (rollout.turn_index == turn)], skip_special_tokens=True) == content


def test_the_pretrained_model_trains_on_a_task_of_reasoning_gym(tmp_path):
    settings = ["model=smollm2_135m", "data=reasoning_gym", "data.task=chain_sum", "data.size=64", "reward.fn=reasoning_gym_score"]
    settings += ["data.options={min_terms: 2, max_terms: 2, min_digits: 1, max_digits: 1}", "max_prompt_tokens=128"]
    smollm2.fetch()
    rows = rlkit(
        tmp_path, *settings, "num_steps=2", "prompts_per_step=2", "group_size=4", "max_response_tokens=24", "evaluation=none"
    )
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["reward/scored_fraction"] == 1 for row in rows)
    assert any(row["reward/mean"] > 0 for row in rows)
