"""Reward models as a run's rewards: in their own tokens, beside functions, refused before any worker starts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from rlkit.compose import compose
from rlkit.controller.evaluate import evaluate_checkpoint
from rlkit.controller.local import InProcessCluster
from rlkit.controller.loop import train
from rlkit.controller.rewards import ModelRewards, open_rewards, read_by_model
from rlkit.data.models.loading import load_tokenizer
from rlkit.data.models.reward_fit import fit
from rlkit.data.models.reward_model import RewardModel, encode
from rlkit.data.rewards.pool import RewardItem
from rlkit.errors import ConfigError, RewardError
from rlkit.settings import ModelKind
from rlkit.types import Prompt, RewardStatus

SEQUENCE, TOKEN = "ForSequenceClassification", "ForTokenClassification"
LOCAL = ["cluster=inprocess", "rollout=transformers"]


class NoCluster(InProcessCluster):
    """Starts nothing."""

    def worker(self, *args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a worker was started")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Threads that wait for each other on busy cores take many times as long as one alone, and the models here are tiny."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def item(completion: str, *, prompt: str = "1+1=", number: int = 0, **fields: Any) -> RewardItem:
    return RewardItem(sample_id=f"s{number}", group_id="g", prompt=prompt, completion=completion, columns={}, **fields)


def opened(*overrides: str, prompts: tuple[Prompt, ...] = ()) -> Any:
    """Started in this process."""
    rewards = open_rewards(compose([*LOCAL, *overrides]), InProcessCluster(), base_dir=Path.cwd())
    rewards.start(prompts)
    return rewards


def test_of_an_episode_a_model_reads_all_that_was_said_and_scores_the_last_turn():
    turns = [{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}, {"role": "assistant", "content": "c"}]
    chat = [{"role": "user", "content": "q"}]
    assert read_by_model(item("c", prompt="q", messages=chat, turns=turns)) == ([*chat, *turns[:2]], "c")
    assert read_by_model(item("c", prompt="q", turns=turns)) == ("qab", "c")
    assert read_by_model(item("c", prompt="q", messages=chat)) == (chat, "c")
    assert read_by_model(item("c", prompt="q")) == ("q", "c")


def test_an_outcome_reward_is_the_forward_pass_on_the_models_own_tokens(random_reward_model):
    folder = random_reward_model(SEQUENCE)  # whose vocabulary is not that of the policy, tiny
    completions = ["2", "2;3", "22222222"]
    with opened("reward=model", f"reward.path={folder}", "reward.max_rows=2") as rewards:
        results = rewards.score([item(text, number=number) for number, text in enumerate(completions)])
        assert rewards.missing("any", {}) is None
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForSequenceClassification.from_pretrained(folder)
    for number, (text, result) in enumerate(zip(completions, results, strict=True)):
        ids = [*tokenizer(f"1+1={text}")["input_ids"], tokenizer.eos_token_id]
        assert result.sample_id == f"s{number}"
        assert result.status is RewardStatus.ok
        assert result.reward == pytest.approx(model(input_ids=torch.tensor([ids])).logits.item(), abs=1e-5)
        assert result.earned == ()


@pytest.mark.parametrize("reduction", ["min", "last", "mean"])
def test_steps_earn_what_they_change_of_the_reward(random_reward_model, reduction):
    folder, steps = random_reward_model(TOKEN, 2), ["a", "bc", "def", "g"]
    settings = ["reward.kind=process", "reward.step_separator=';;'", f"reward.reduce={reduction}"]
    with opened("reward=model", f"reward.path={folder}", *settings) as rewards:
        result, single = rewards.score([item(";;".join(steps)), item("a")])
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForTokenClassification.from_pretrained(folder).eval()
    scores = []
    for count in range(1, 5):
        ids = [1, *tokenizer("1+1=" + "".join(f"{step};;" for step in steps[:count]))["input_ids"]]
        scores.append(float(model(input_ids=torch.tensor([ids])).logits[0, -1].softmax(-1)[1].detach()))
    of = {"min": min, "last": lambda found: found[-1], "mean": np.mean}[reduction]
    so_far = [0.0, *(float(of(scores[:count])) for count in range(1, 5))]
    assert result.reward == pytest.approx(so_far[-1], abs=1e-5)
    assert [end for end, _ in result.earned] == [3, 7, 12]  # a;; bc;; def;; and what g earns comes with the end
    assert [part for _, part in result.earned] == pytest.approx(np.diff(so_far)[:-1].tolist(), abs=1e-5)
    assert single.reward == pytest.approx(scores[0], abs=1e-5)
    assert single.earned == ()


def test_a_text_that_does_not_fit_the_model_is_an_error_and_no_zero(random_reward_model, caplog):
    folder = random_reward_model(SEQUENCE)
    with opened("reward=model", f"reward.path={folder}") as rewards:
        long, short = rewards.score([item("2" * 200), item("2", number=1)])
        assert (long.reward, long.status) == (None, RewardStatus.error)
        assert long.message == "it has 205 tokens of the reward model, which has positions for 128"  # 4 + 200 + <eos>
        assert caplog.messages == [f"reward.path={folder} failed on sample s0: {long.message}"]
        assert short.reward is not None
        assert rewards.score([item("2", number=1)])[0].reward == pytest.approx(short.reward, abs=1e-5)
        with pytest.raises(RewardError, match=r"none of 2 samples could be scored\. The first, s0: it has 205 tokens"):
            rewards.score([item("2" * 200), item("3" * 200)])


def test_scores_that_are_not_finite_are_errors(random_reward_model, monkeypatch):
    monkeypatch.setattr(RewardModel, "score", lambda self, texts, **limits: [np.array([np.nan]), np.array([1.0])])
    with opened("reward=model", f"reward.path={random_reward_model(SEQUENCE)}") as rewards:
        bad, good = rewards.score([item("1"), item("2")])
    assert (bad.status, bad.reward, bad.message) == (RewardStatus.error, None, "the reward model's score is not finite")
    assert good.reward == 1.0


def test_a_model_is_a_part_of_a_weighted_reward(random_reward_model, in_folder):
    (in_folder / "mine.py").write_text("def brief(completions):\n    return [float(len(c) < 3) for c in completions]\n")
    folder = random_reward_model(SEQUENCE)
    parts = ["reward=weighted", "reward.fns={brief:mine.py:brief}", f"reward.models={{taste:{folder}}}", "reward.num_workers=1"]
    asked = Prompt(id="p", text="1+1=", prompt_ids=(1,), source="chat", columns={})
    with opened(*parts, "reward.weights={taste:0.5}", "reward.sources={taste:[chat]}", prompts=(asked,)) as rewards:
        both, alone, long = rewards.score(
            [item("2", source="chat"), item("2", source="math"), item("2" * 200, source="chat", number=2)]
        )
    with opened("reward=model", f"reward.path={folder}") as model:
        taste = model.score([item("2")])[0].reward
    assert both.components == {"brief": 1.0, "taste": pytest.approx(0.5 * taste, abs=1e-5)}
    assert both.reward == pytest.approx(1 + 0.5 * taste, abs=1e-5)
    assert alone.components == {"brief": 1.0}
    assert (long.reward, long.status) == (None, RewardStatus.error)
    assert long.message.startswith("taste: it has 205 tokens")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward=model", "reward.path=nowhere/at/all"], r"^reward.path=nowhere/at/all: no config.json there"),
        (["reward=model", "reward.path=tiny"], r"^reward.path=tiny: its config.json names LlamaForCausalLM"),
        (
            ["reward=weighted", "reward.fns={form:format}", "reward.models={taste:tiny}"],
            r"^reward.models.taste=tiny: its config.json names LlamaForCausalLM",
        ),
    ],
)
def test_what_is_no_reward_model_ends_a_run_before_any_worker_starts(overrides, message, in_folder):
    with pytest.raises(ConfigError, match=message):
        train(compose([*LOCAL, *overrides, "run_dir=run"]), NoCluster())
    with pytest.raises(ConfigError, match=message):
        evaluate_checkpoint(compose([*LOCAL, *overrides]), NoCluster())
    assert not (in_folder / "run").exists()


def test_a_separator_without_a_token_is_refused(random_reward_model):
    folder = random_reward_model(TOKEN)  # no token has a line break in it
    with pytest.raises(ConfigError, match=r"^reward.step_separator='\\n\\n': no token of the reward model"):
        opened("reward=model", f"reward.path={folder}", "reward.kind=process")


def test_chat_needs_a_reward_model_with_a_chat_template(random_reward_model):
    folder = random_reward_model(SEQUENCE)
    prompt = Prompt(id="a", text="?", prompt_ids=(1,), source="s", columns={}, messages=({"role": "user", "content": "?"},))
    config = compose([*LOCAL, "reward=model", f"reward.path={folder}"])
    rewards = open_rewards(config, NoCluster(), base_dir=Path.cwd())
    with pytest.raises(ConfigError, match=r"prompts are chat messages, and the reward model's tokenizer has no chat template"):
        rewards.start([prompt])
    assert isinstance(rewards, ModelRewards)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["reward=model", "reward.path=x", "reward.reduce=last"], "reward.reduce=last: an outcome model has no steps"),
        (["reward=model", "reward.path=x", "reward.step_separator=';'"], "reward.step_separator: an outcome model has no steps"),
        (["reward=model", "reward.path=x", "reward.kind=process", "reward.step_separator=''"], "it ends every step"),
        (["reward=model", "reward.path=x", "reward.max_rows=0"], "reward.max_rows=0: no room for one response"),
        (["reward=model", "reward.path=x", "reward.tokens_per_microbatch=0"], "no room for one token"),
        (["reward=model", "reward.path=x", "reward.deadline_s=0"], "reward.deadline_s=0.0: no time to score"),
        (["reward=model", "reward.path=x", "reward.num_workers=3"], "reward.num_workers: reward=model has path, kind"),
        (
            ["reward=weighted", "reward.fns={a:format}", "reward.models={a:x}"],
            "reward.models.a: reward.fns has a part of that name",
        ),
    ],
)
def test_settings_that_say_nothing_are_refused(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose(overrides)


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_a_fitted_model_knows_unseen_pairs_and_a_policy_trains_with_it(tmp_path, expression_pairs, one_thread):
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in expression_pairs(1000)))
    fitted = fit(pairs, "tiny", tmp_path / "rm", steps=60, learning_rate=1e-3, batch_size=32, seed=0, report=lambda line: None)
    assert fitted.num_pairs + fitted.num_held_out == 1000
    assert fitted.accuracy > 0.8  # chance is 0.5, and over a hundred pairs its deviation 0.05
    judged = ["reward=model", f"reward.path={fitted.folder}"]
    small = ["num_steps=2", "prompts_per_step=4", "group_size=4", "evaluation=none", f"run_dir={tmp_path / 'run'}"]
    done = train(compose([*LOCAL, *judged, *small]), InProcessCluster())
    few = ["evaluation.num_prompts=4", "evaluation.samples_per_prompt=2", "evaluation.ks=[1]", f"model.path={done.checkpoint}"]
    evaluation = evaluate_checkpoint(compose([*LOCAL, *judged, *few]), InProcessCluster())
    assert len({reward for each in evaluation.sample_rewards for reward in each}) > 2  # scores, not verdicts
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(row["policy/grad_norm"] > 0 and row["reward/std"] > 0 for row in steps if "reward/mean" in row)
    rows = pq.read_table(tmp_path / "run" / "rollouts" / "step_000002.parquet").to_pylist()
    assert len(rows) == 16
    tokenizer, folder = load_tokenizer(str(fitted.folder)), str(fitted.folder)
    model = RewardModel.load(folder, ModelKind.outcome, dtype=torch.float32)
    for row in rows:
        prompt = str(tokenizer.decode(row["prompt_ids"], skip_special_tokens=True))
        (score,) = model.score([encode(tokenizer, prompt, row["text"], label="")], tokens_per_microbatch=999, max_rows=1)
        assert row["status"] == "ok"
        assert row["reward"] == pytest.approx(float(score[0]), abs=1e-4)
        assert row["token_rewards"] == [0.0] * (len(row["response_ids"]) - 1) + [pytest.approx(row["reward"], abs=1e-5)]
