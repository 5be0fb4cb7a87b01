"""Parts of a reward find their tokens, and token rewards sum to the reward."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlkit.controller.sampling import Sampler, SubmittedResponses
from rlkit.types import Completion, FinishReason, Prompt, RewardResult, RewardStatus, SamplingSpec

VOCABULARY = ["<eos>", "ab;", "c", ";d", "e", ";"]


class Engines:
    """Returns the completions it was made with."""

    def __init__(self, *completions: Completion):
        self.completions = completions

    def generate(self, requests: Any, sampling: SamplingSpec) -> Any:
        return self

    def result(self) -> tuple[Completion, ...]:
        return self.completions


class Rewards:
    """Scores every item alike."""

    def __init__(self, reward: float | None, earned: tuple[tuple[int, float], ...]):
        self.reward, self.earned = reward, earned

    def score(self, items: Any) -> list[RewardResult]:
        self.items = items
        return [
            RewardResult(sample_id=item.sample_id, status=RewardStatus.ok, reward=self.reward, earned=self.earned) for item in items
        ]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Tokens that do not end where steps do."""
    tokenizer = Tokenizer(models.WordLevel({token: place for place, token in enumerate(VOCABULARY)}, unk_token="<eos>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", clean_up_tokenization_spaces=False)


def collect(tokenizer, tokens: list[str], reward: float | None, *earned: tuple[int, float]):
    ids = np.array([VOCABULARY.index(token) for token in tokens])
    completion = Completion(
        sample_id="s/0/p/0",
        response_ids=ids,
        rollout_logprobs=np.zeros(len(ids), dtype=np.float32),
        policy_version=np.zeros(len(ids), dtype=np.int64),
        finish_reason=FinishReason.stop,
    )
    prompt = Prompt(id="p", text="q", prompt_ids=(1,), source="", columns={})
    engines: Any = Engines(completion)
    rewards: Any = Rewards(reward, earned)
    sampler = Sampler(engines=engines, rewards=rewards, tokenizer=tokenizer, seed=0)
    (rollout,) = sampler.collect(SubmittedResponses(owners=[prompt], generation=engines, started=0.0)).rollouts
    return rollout


def test_a_part_is_earned_by_the_token_that_completes_its_text(tokenizer):
    rollout = collect(tokenizer, ["ab;", "c", ";d", "e", "<eos>"], 2.0, (3, 0.5), (5, 0.25))  # ab; c; de
    assert rollout.text == "ab;c;de"
    assert rollout.token_rewards.tolist() == [0.5, 0.0, 0.25, 0.0, 1.25]
    assert rollout.token_rewards.sum() == rollout.reward


def test_parts_of_one_token_add_up_and_what_lies_beyond_the_text_is_the_last_tokens(tokenizer):
    rollout = collect(tokenizer, ["ab;", "c", "<eos>"], 1.0, (1, 0.5), (3, 0.25), (99, 2.0))
    assert rollout.token_rewards.tolist() == [0.75, 0.0, 0.25]


def test_an_outcome_sits_on_the_last_token_and_no_reward_on_none(tokenizer):
    assert collect(tokenizer, ["ab;", "c"], 0.5).token_rewards.tolist() == [0.0, 0.5]
    assert collect(tokenizer, ["ab;", "c"], None).token_rewards.tolist() == [0.0, 0.0]
    assert collect(tokenizer, [], 1.0, (0, 0.5)).token_rewards.tolist() == []
