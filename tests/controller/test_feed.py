"""Prompts in the order of the data, and further ones where a filter drops some."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from rlkit.compose import compose
from rlkit.controller.feed import Feed
from rlkit.controller.sampling import Sampled
from rlkit.data.order import PromptOrder
from rlkit.errors import DataError
from rlkit.types import SamplingSpec

NUM_PROMPTS = 40


class Sampler:
    """Prompt i's responses score alike where i is in `alike`."""

    def __init__(self, make_rollout: Any, alike: Sequence[int]):
        self.make_rollout, self.alike, self.labels, self.temperatures = make_rollout, set(alike), [], []

    def submit(self, label: str, prompts: list[int], group_size: int, sampling: Any) -> Any:
        self.labels.append(label)
        self.temperatures.append(sampling.temperature)
        return label, prompts, group_size

    def collect(self, submitted: Any) -> Sampled:
        label, prompts, group_size = submitted
        rollouts = [self.make_rollout(10 * prompt + index, [5], [6]) for prompt in prompts for index in range(group_size)]
        for place, rollout in enumerate(rollouts):
            prompt = prompts[place // group_size]
            reward = float(prompt in self.alike or place % group_size == 0)
            rollouts[place] = replace(rollout, group_id=f"{label}/{prompt}", reward=reward)
        return Sampled(rollouts=rollouts, generate_s=1.0, reward_s=0.5, num_prompts=len(prompts))


@pytest.fixture
def feed(make_rollout):
    def build(alike: Sequence[int], *overrides: str, drawn: int = 0) -> Feed:
        sampler: Any = Sampler(make_rollout, alike)
        prompts: Any = SimpleNamespace(train=list(range(NUM_PROMPTS)))
        return Feed(
            config=compose(["prompts_per_step=4", "group_size=2", "prompt_filter=dynamic", *overrides]),
            prompts=prompts,
            order=PromptOrder(NUM_PROMPTS, 0),
            sampler=sampler,
            sampling=SamplingSpec(max_tokens=8, stop_token_ids=(2,), temperature=0.5),
            heat=lambda: 1.2,
            drawn_before=lambda step: drawn + (step - 1) * 4,
        )

    return build


def prompts_of(sampled: Sampled) -> list[int]:
    return list(dict.fromkeys(int(rollout.group_id.rpartition("/")[2]) for rollout in sampled.rollouts))


def test_prompts_whose_responses_score_alike_are_replaced_in_the_order_of_arrival(feed):
    order = PromptOrder(NUM_PROMPTS, 0).take(0, 12)
    dropped = [order[1], order[2], order[4], order[11]]
    filled = feed(dropped)
    sampled = filled.collect(1, filled.submit(1))
    assert prompts_of(sampled) == [order[0], order[3], order[5], order[6]]
    assert len(sampled.rollouts) == 4 * 2
    assert filled.sampler.labels == ["step-1", "step-1.1"]
    assert (sampled.num_prompts, sampled.generate_s, sampled.reward_s) == (8, 2.0, 1.0)


def test_a_batch_that_needs_no_filling_is_the_one_without_a_filter(feed):
    whole, plain = feed([]), feed([], "prompt_filter=none")
    filled, bare = (each.collect(3, each.submit(3)) for each in (whole, plain))
    assert prompts_of(filled) == prompts_of(bare) == PromptOrder(NUM_PROMPTS, 0).take(8, 4)
    assert filled.num_prompts == bare.num_prompts == 4


def test_without_a_filter_prompts_that_score_alike_stay(feed):
    plain = feed(range(NUM_PROMPTS), "prompt_filter=none")
    assert prompts_of(plain.collect(1, plain.submit(1))) == PromptOrder(NUM_PROMPTS, 0).take(0, 4)


def test_a_budget_ends_the_search_and_says_how_far_it_came(feed):
    order = PromptOrder(NUM_PROMPTS, 0).take(0, 12)
    poor = feed([prompt for prompt in range(NUM_PROMPTS) if prompt != order[5]], "prompt_filter.max_batches=3")
    with pytest.raises(DataError, match=r"^prompt_filter=dynamic: 3 batches gave 1 of 4 prompts .* or write prompt_filter=none"):
        poor.collect(1, poor.submit(1))


def test_tempered_samples_are_of_the_first_prompts_at_another_temperature_and_draw_no_further_ones(feed):
    hot = feed([], "prompt_filter=none", "tempering=aepo", "tempering.prompt_fraction=0.5")
    sampled = hot.collect(2, hot.submit(2))
    order = PromptOrder(NUM_PROMPTS, 0).take(4, 4)
    assert prompts_of(sampled) == order
    assert [rollout.group_id for rollout in sampled.tempered] == [
        f"step-2.tempered/{prompt}" for prompt in order[:2] for _ in range(2)
    ]
    assert (hot.sampler.temperatures, sampled.num_prompts) == ([0.5, pytest.approx(0.6)], 4)
    assert (sampled.generate_s, sampled.reward_s) == (2.0, 1.0)
