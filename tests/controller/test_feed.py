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
from rlkit.core.curriculum import CurriculumState
from rlkit.data.order import PromptOrder
from rlkit.errors import DataError
from rlkit.types import SamplingSpec

NUM_PROMPTS = 40
NOTHING = CurriculumState()


class Numbered(int):
    """A prompt that is known by its number."""

    @property
    def id(self) -> str:
        return str(int(self))


class Sampler:
    """Prompt i's responses score alike where i is in `alike`; else the first one alone is right. `failed`: of prompt i, how many of
    its last rewards did."""

    def __init__(self, make_rollout: Any, alike: Sequence[int], failed: dict[int, int]):
        self.make_rollout, self.alike, self.failed, self.labels, self.temperatures = make_rollout, set(alike), failed, [], []

    def submit(self, label: str, prompts: list[int], group_size: int, sampling: Any) -> Any:
        self.labels.append(label)
        self.temperatures.append(sampling.temperature)
        return label, prompts, group_size

    def collect(self, submitted: Any) -> Sampled:
        label, prompts, group_size = submitted
        rollouts = [self.make_rollout(10 * prompt + index, [5], [6]) for prompt in prompts for index in range(group_size)]
        for place, rollout in enumerate(rollouts):
            prompt = prompts[place // group_size]
            reward: float | None = float(prompt in self.alike or place % group_size == 0)
            if place % group_size >= group_size - self.failed.get(prompt, 0):
                reward = None
            rollouts[place] = replace(rollout, group_id=f"{label}/{prompt}", prompt_id=str(prompt), reward=reward)
        return Sampled(rollouts=rollouts, generate_s=1.0, reward_s=0.5, num_prompts=len(prompts), num_tokens=0)


@pytest.fixture
def feed(make_rollout):
    def build(
        alike: Sequence[int],
        *overrides: str,
        drawn: int = 0,
        known: CurriculumState = NOTHING,
        failed: dict[int, int] | None = None,
    ) -> Feed:
        sampler: Any = Sampler(make_rollout, alike, failed or {})
        prompts: Any = SimpleNamespace(train=[Numbered(index) for index in range(NUM_PROMPTS)])
        return Feed(
            config=compose(["prompts_per_step=4", "group_size=2", "prompt_filter=dynamic", *overrides]),
            prompts=prompts,
            order=PromptOrder(NUM_PROMPTS, 0),
            sampler=sampler,
            sampling=SamplingSpec(max_tokens=8, stop_token_ids=(2,), temperature=0.5),
            heat=lambda: 1.2,
            known=lambda: known,
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
    assert sampled.counts == {"dropped_failed": 0, "dropped_filter": 3, "dropped_surplus": 1}


def test_prompts_whose_rewards_failed_are_replaced_and_no_filters_doing(feed):
    order = PromptOrder(NUM_PROMPTS, 0).take(0, 8)
    filled = feed([order[4]], failed={order[0]: 2, order[3]: 1})
    sampled = filled.collect(1, filled.submit(1))
    assert prompts_of(sampled) == [order[1], order[2], order[5], order[6]]
    assert sampled.counts == {"dropped_failed": 2, "dropped_filter": 1, "dropped_surplus": 1}
    assert sampled.num_prompts == 8 == len(prompts_of(sampled)) + sum(sampled.counts.values())


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


# --- a curriculum ---------------------------------------------------------------------------------------------------------------

PASS_RATE = ("prompt_filter=none", "curriculum=pass_rate", "curriculum.min_accept=1")  # solved prompts alone are passed over


def solved(prompts: Sequence[int], **others: dict) -> CurriculumState:
    names = [str(prompt) for prompt in prompts]
    return CurriculumState(pass_rates=dict.fromkeys(names, 1.0), streaks=dict.fromkeys(names, 2), **others)


def test_a_prompt_that_is_passed_over_takes_a_place_of_the_order(feed):
    order = PromptOrder(NUM_PROMPTS, 0).take(0, 12)
    some = feed([], *PASS_RATE, known=solved([order[1], order[2], order[6]]))
    sampled = some.collect(1, some.submit(1))
    assert prompts_of(sampled) == [order[0], order[3], order[4], order[5]]
    assert sampled.num_prompts == 6
    assert sampled.counts == {"dropped_retired": 2, "dropped_difficulty": 0}
    assert sampled.curriculum.passed_over == {str(order[1]): 1, str(order[2]): 1}
    assert sampled.curriculum.pass_rates == dict.fromkeys(map(str, (order[1], order[2], order[6])), 1.0) | dict.fromkeys(
        map(str, prompts_of(sampled)), 0.5
    )


def test_what_the_filter_drops_was_visited_all_the_same_and_the_next_batch_goes_on_behind(feed):
    order = PromptOrder(NUM_PROMPTS, 0).take(0, 20)
    both = feed([order[0], order[3]], "curriculum=pass_rate", "curriculum.min_accept=1", known=solved([order[2], order[6]]))
    sampled = both.collect(1, both.submit(1))
    assert both.sampler.labels == ["step-1", "step-1.1"]
    assert prompts_of(sampled) == [order[1], order[4], order[5], order[7]]
    dropped = {"dropped_failed": 0, "dropped_filter": 2, "dropped_surplus": 2}
    assert sampled.counts == {"dropped_retired": 2, "dropped_difficulty": 0} | dropped
    assert sampled.num_prompts == 10 == len(prompts_of(sampled)) + sum(sampled.counts.values())
    assert {sampled.curriculum.pass_rates[str(order[place])] for place in (0, 3)} == {1.0}
    assert sampled.curriculum.streaks[str(order[0])] == 1


def test_difficulty_decides_by_the_place_and_not_by_what_was_drawn_before(feed):
    hard = CurriculumState(pass_rates={str(prompt): 0.0 for prompt in range(NUM_PROMPTS)})
    settings = ("prompt_filter=none", "curriculum=pass_rate", "curriculum.min_accept=0.3")
    first = feed([], *settings, known=hard)
    one = first.collect(1, first.submit(1))
    assert one.counts["dropped_difficulty"] == one.num_prompts - 4 > 0
    again = feed([], *settings, known=hard)
    assert prompts_of(again.collect(1, again.submit(1))) == prompts_of(one)
    later = feed([], *settings, known=hard, drawn=2)  # two places further on
    behind = [prompt for prompt in prompts_of(one) if prompt not in PromptOrder(NUM_PROMPTS, 0).take(0, 2)]
    assert prompts_of(later.collect(1, later.submit(1)))[: len(behind)] == behind
    other = feed([], *settings, "seed=1", known=hard)
    assert prompts_of(other.collect(1, other.submit(1))) != prompts_of(one)


def test_tempered_samples_are_of_prompts_that_the_step_drew(feed):
    order = PromptOrder(NUM_PROMPTS, 0).take(0, 12)
    hot = feed([], *PASS_RATE, "tempering=aepo", "tempering.prompt_fraction=0.5", known=solved([order[0]]))
    sampled = hot.collect(1, hot.submit(1))
    assert list(dict.fromkeys(rollout.prompt_id for rollout in sampled.tempered)) == [str(order[1]), str(order[2])]
    assert sampled.curriculum.streaks[str(order[1])] == 0


def test_a_step_that_finds_too_few_prompts_says_why(feed):
    everything = feed([], *PASS_RATE, "curriculum.revisit_every=0", "curriculum.max_skipped=100", known=solved(range(NUM_PROMPTS)))
    with pytest.raises(DataError, match=r"^curriculum=pass_rate: step 1 passed over 100 places .* found 0 of 4 prompts\. All 40"):
        everything.submit(1)
    most = feed([], *PASS_RATE, "curriculum.revisit_every=0", "curriculum.max_skipped=30", known=solved(range(1, NUM_PROMPTS)))
    with pytest.raises(DataError, match=r"found [01] of 4 prompts\. Raise curriculum\.max_skipped .*, or write curriculum=none\.$"):
        most.submit(1)
    again = feed([], *PASS_RATE, "curriculum.revisit_every=3", known=solved(range(NUM_PROMPTS)))  # then solved ones are revisited
    assert again.collect(1, again.submit(1)).counts["dropped_retired"] == 80


def test_the_budget_is_that_of_a_step_and_not_of_a_batch(feed):
    order = PromptOrder(NUM_PROMPTS, 0).take(0, 20)
    settings = ("curriculum=pass_rate", "curriculum.min_accept=1")
    known = solved([order[1], order[6]])
    enough = feed(order[:5], *settings, "curriculum.max_skipped=3", known=known)
    assert enough.collect(1, enough.submit(1)).num_prompts == 10
    little = feed(order[:5], *settings, "curriculum.max_skipped=1", known=known)
    with pytest.raises(DataError, match="step 1 passed over 1 places of the order, and found"):
        little.collect(1, little.submit(1))
