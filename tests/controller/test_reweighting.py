"""Weights of objectives in a run: on reward parts, on a source's advantages or losses, on the supervised term."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rlkit.compose import compose
from rlkit.controller import loop
from rlkit.controller.local import InProcessCluster
from rlkit.controller.preparation import balance, correct, narrow, shaped_rewards, with_advantages
from rlkit.controller.reweighting import check_objectives, objective_metrics, rewards_by_objective
from rlkit.core.recap import Judged
from rlkit.data.collate import collate
from rlkit.data.expressions import rows
from rlkit.errors import ConfigError
from rlkit.types import Prompt

WEIGHTS = {"math": 1.5, "code": 0.5, "math.right": 2.0, "math.brief": 0.5, "code.right": 3.0}


@pytest.fixture
def rollouts(make_rollout):
    """Two groups of two: math with two parts, code with one reward."""
    parts = [{"right": 1.0, "brief": 1.0}, {"right": 0.0, "brief": 1.0}, {}, {}]
    made = []
    for index, (reward, found) in enumerate(zip([2.0, 1.0, 0.4, 0.0], parts, strict=True)):
        rollout = make_rollout(index, [5], [6] * (index + 1))
        rollout.token_rewards[-1] = reward
        source = "math" if index < 2 else "code"
        made.append(replace(rollout, reward=reward, reward_components=found, source=source, group_id=source))
    return made


def test_objectives_are_sources_or_the_parts_of_their_rewards(rollouts):
    whole = compose(["objective_weights=recap"]).objective_weights
    assert rewards_by_objective(whole, rollouts) == {"math": 1.5, "code": 0.2}
    parts = compose(["objective_weights=recap_code"]).objective_weights
    assert rewards_by_objective(parts, rollouts) == {"math.right": 0.5, "math.brief": 1.0, "code": 0.2}


def test_weights_of_parts_act_before_advantages(rollouts):
    config = compose(["objective_weights=recap", "objective_weights.apply_to=reward", "advantage=dr_grpo"])
    rewards = shaped_rewards(config, rollouts, WEIGHTS)
    assert rewards.sum(-1).tolist() == pytest.approx([2.5, 0.5, 0.2, 0.0])  # code has one part: it weighs 0.5 as a whole
    assert rewards[0, 0] == 2.5
    batch, _ = with_advantages(config, collate(rollouts), rollouts, WEIGHTS)
    assert batch.advantages[:, 0].tolist() == pytest.approx([1.0, -1.0, 0.1, -0.1])
    assert batch.objective_weight is None
    assert batch.rewards is not None
    assert batch.rewards.tolist() == pytest.approx([2.0, 1.0, 0.4, 0.0])  # as the function gave them


def test_weights_of_sources_act_after_advantages_were_normalised(rollouts):
    config = compose(["objective_weights=recap", "prompt_advantage=copo"])
    plain, _ = with_advantages(config, collate(rollouts), rollouts)
    batch, _ = with_advantages(config, collate(rollouts), rollouts, WEIGHTS)
    column = torch.tensor([1.5, 1.5, 0.5, 0.5]).unsqueeze(-1)
    torch.testing.assert_close(batch.advantages, plain.advantages * column)
    assert plain.prompt_advantages is not None
    assert batch.prompt_advantages is not None
    torch.testing.assert_close(batch.prompt_advantages, plain.prompt_advantages * column)
    assert batch.advantages[0, 0] == pytest.approx(1.5 * 0.5**0.5, abs=1e-4)


@pytest.mark.parametrize("correction", ["none", "tis", "rejection"])
def test_weights_of_losses_multiply_what_a_correction_gave(rollouts, correction):
    config = compose(["objective_weights=recap", "objective_weights.apply_to=loss", f"correction={correction}"])
    batch, _ = with_advantages(config, collate(rollouts), rollouts, WEIGHTS)
    assert batch.objective_weight is not None
    assert batch.objective_weight.tolist() == [1.5, 1.5, 0.5, 0.5]
    assert batch.select([2, 0]).objective_weight.tolist() == [0.5, 1.5]  # pyright: ignore[reportOptionalMemberAccess]
    batch = replace(batch, old_logprobs=batch.rollout_logprobs + torch.tensor([0.3, -0.9, 1.0, 0.0]).unsqueeze(-1))
    part, _ = correct(config.correction, batch)
    part = narrow(part)
    weighed = balance(part)
    before = torch.ones(4, 4) if part.policy_weight is None else part.policy_weight
    assert weighed.policy_weight is not None
    torch.testing.assert_close(weighed.policy_weight, before * torch.tensor([1.5, 1.5, 0.5, 0.5]).unsqueeze(-1))
    assert weighed.policy_mask is not None
    assert torch.equal(weighed.policy_mask, part.response_mask if part.policy_mask is None else part.policy_mask)
    assert balance(replace(part, objective_weight=None)).policy_weight is part.policy_weight


def test_without_weights_a_batch_is_what_it_was(rollouts):
    config = compose(["objective_weights=recap"])
    batch, _ = with_advantages(config, collate(rollouts), rollouts, {})
    plain, _ = with_advantages(compose([]), collate(rollouts), rollouts)
    assert torch.equal(batch.advantages, plain.advantages)


def test_a_response_without_a_reward_has_no_say(rollouts):
    scored = [each for each in rollouts if each.reward is not None]
    assert rewards_by_objective(compose(["objective_weights=recap"]).objective_weights, scored[:2]) == {"math": 1.5}


def test_weights_are_measured_with_their_reasons():
    judged = {"a": Judged(convergence=0.5, instability=0.1, weight=1.0), "b": Judged(convergence=1.0, instability=0.0, weight=1.0)}
    metrics = objective_metrics(judged)
    assert metrics["recap/a/c"] == 0.5
    assert metrics["recap/b/weight"] == 1.0
    assert metrics["recap/weight_entropy"] == pytest.approx(0.6931, abs=1e-4)
    assert objective_metrics({}) == {}


SMALL = ["cluster=inprocess", "rollout=transformers", "evaluation=none", "prompts_per_step=4", "group_size=4", "num_steps=4"]
SMALL += ["reward.num_workers=1", "optimizer.learning_rate=1e-3", "model=tiny", "max_prompt_tokens=24", "max_response_tokens=8"]
MIXED = ["data=jsonl", "data.path=mixed.jsonl", "data.source_column=kind", "reward.fn=mine.py:digits", "data.held_out_fraction=0"]


@pytest.fixture
def mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two sources in one file: targets below 10 and above."""
    found = [row | {"kind": "large" if row["target"] > 9 else "small"} for row in rows("train")[:900:17]]
    (tmp_path / "mine.py").write_text(
        "def digits(completions, **columns):\n    return [sum(map(str.isdigit, text)) / 8 for text in completions]\n"
    )
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def measured(run_dir: str) -> list[dict]:
    return [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("apply_to", ["advantage", "loss"])
def test_several_sources_and_a_supervised_term_share_the_weight(apply_to, mixed, capsys):
    settings = ["objective_weights=recap", "objective_weights.window=2", "objective_weights.temperature=0.2", "imitation=positive"]
    settings += [f"objective_weights.apply_to={apply_to}", "run_dir=run"]
    loop.train(compose([*SMALL, *MIXED, *settings]), InProcessCluster())
    steps = measured("run")
    assert not any(name.startswith("recap/") for name in steps[0])  # nothing was measured before it
    for row in steps[2:]:
        weights = [row[f"recap/{name}/weight"] for name in ("small", "large", "imitation")]
        assert sum(weights) == pytest.approx(3)
        assert max(weights) > 1.001
    shown = capsys.readouterr().out
    assert re.search(
        r"^ +weights:  small \d\.\d+  large \d\.\d+  imitation \d\.\d+$|^ +weights:  large .*imitation", shown, re.MULTILINE
    )
    events = EventAccumulator("run/tensorboard").Reload()
    assert "recap/small/weight" in events.Tags()["scalars"]


def test_weights_move_what_is_learnt(mixed):
    """Equal seeds, one temperature at which weights are 1 and one at which they are not: the same first step, another third."""
    curves = {}
    for temperature in (1e9, 0.2):
        settings = ["objective_weights=recap", "objective_weights.window=2", f"objective_weights.temperature={temperature}"]
        loop.train(compose([*SMALL, *MIXED, *settings, f"run_dir=run-{temperature}"]), InProcessCluster())
        curves[temperature] = [row["policy/grad_norm"] for row in measured(f"run-{temperature}")]
    assert curves[1e9][:2] == curves[0.2][:2]  # a single value stands still: all weigh 1 in the second step
    assert curves[1e9][3] != curves[0.2][3]


def test_the_supervised_terms_weight_multiplies_its_loss(rollouts):
    strategy = compose(["imitation=positive", "imitation.above=1.5"]).strategy
    batch = collate(rollouts)
    coefs = []
    for weight in (1.0, 1.25):
        step = strategy.terms(
            logprobs=batch.rollout_logprobs,
            old_logprobs=batch.rollout_logprobs,
            rollout_logprobs=batch.rollout_logprobs,
            advantages=batch.advantages,
            response_mask=batch.response_mask,
            rewards=batch.rewards,
            knobs=loop.Knobs(imitation_weight=weight),
        )
        (term,) = [term for term in step.terms if term.name == "imitation"]
        assert term.mask.any(-1).tolist() == [True, False, False, False]
        coefs.append(term.coef)
    assert coefs == [0.1, 0.125]


def test_a_run_with_one_objective_is_told_that_nothing_is_weighed(tmp_path):
    settings = [*SMALL, "objective_weights=recap", "num_steps=1", f"run_dir={tmp_path / 'run'}"]
    loop.train(compose(settings), InProcessCluster())
    assert "objective_weights=recap: expressions is the only objective so far" in (tmp_path / "run" / "log.txt").read_text()


def test_a_source_may_not_be_called_as_the_loss_that_is_an_objective():
    def prompt(source):
        return Prompt(id="p", text="", prompt_ids=(1,), source=source, columns={})

    config = compose(["imitation=positive", "objective_weights=recap"])
    check_objectives(config, [prompt("math")])
    check_objectives(compose(["imitation=positive"]), [prompt("imitation")])
    with pytest.raises(ConfigError, match=r"^objective_weights=recap: a data source is called imitation, .* another name\.$"):
        check_objectives(config, [prompt("imitation")])
