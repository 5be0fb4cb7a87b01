"""The rollouts of each step: prompts by order and curriculum, and further ones in the place of those that a filter drops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from rlkit.config import RunConfig, choice_of
from rlkit.controller.filtering import fewest_scored, trainable
from rlkit.controller.sampling import Sampled, Sampler, Submitted
from rlkit.core.curriculum import CurriculumState, NoCurriculum, Picked
from rlkit.core.shaping import DynamicSampling, PromptFilter
from rlkit.data.collate import group_index
from rlkit.data.order import Order
from rlkit.data.prompts import PromptSet
from rlkit.errors import DataError
from rlkit.types import Prompt, Rollout, SamplingSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """A batch under way, and what it took of the order."""

    submitted: Submitted
    prompts: list[Prompt]
    picked: Picked


@dataclass(frozen=True, kw_only=True, slots=True)
class Feed:
    """What `Lookahead` samples from."""

    config: RunConfig
    prompts: PromptSet
    order: Order
    sampler: Sampler
    sampling: SamplingSpec
    drawn_before: Callable[[int], int]  # step -> how many places of the order the steps before it take
    heat: Callable[[], float]  # of tempered samples, times the sampler's temperature
    known: Callable[[], CurriculumState]  # what the finished steps say of the prompts

    def submit(self, step: int) -> Drawn:
        """Start a step's first batch. Raises DataError where the curriculum leaves too few prompts."""
        return self._draw(step, f"step-{step}", self.drawn_before(step), self.known(), [])

    def collect(self, step: int, drawn: Drawn) -> Sampled:
        """A step's rollouts. Raises RewardError when too many rewards fail, and DataError where too few prompts are left."""
        return self._with_tempered(step, drawn, self._filled(step, drawn))

    def _filled(self, step: int, first: Drawn) -> Sampled:
        """With other prompts in the place of those that the filter drops, or too many of whose rewards failed."""
        prompt_filter, wanted, at_least = self.config.prompt_filter, self.config.prompts_per_step, fewest_scored(self.config)
        draws, batches = [first], [self.sampler.collect(first.submitted)]
        kept = kept_groups(prompt_filter, batches[0].rollouts, at_least=at_least)
        while isinstance(prompt_filter, DynamicSampling) and len(kept) < wanted:
            if len(batches) == prompt_filter.max_batches:
                raise DataError(
                    f"prompt_filter=dynamic: {len(batches)} batches gave {len(kept)} of {wanted} prompts whose responses score "
                    "differently. Take prompts that are neither too hard nor too easy, raise prompt_filter.max_batches, or write "
                    "prompt_filter=none."
                )
            start = self.drawn_before(step) + sum(each.picked.num_places for each in draws)
            draws.append(self._draw(step, f"step-{step}.{len(batches)}", start, draws[-1].picked.state, draws))
            batches.append(self.sampler.collect(draws[-1].submitted))
            kept += kept_groups(prompt_filter, batches[-1].rollouts, at_least=at_least)
        rollouts = [rollout for batch in batches for rollout in batch.rollouts]
        counts: dict[str, int] = {}
        if not isinstance(self.config.curriculum, NoCurriculum):
            counts["dropped_retired"] = sum(each.picked.num_retired for each in draws)
            counts["dropped_difficulty"] = sum(each.picked.num_difficulty for each in draws)
        visits = visits_of(rollouts)
        if isinstance(prompt_filter, DynamicSampling):
            num_failed = trainable(rollouts, at_least=at_least)[1]["group"]
            counts["dropped_failed"] = num_failed
            counts |= {"dropped_filter": len(visits) - num_failed - len(kept), "dropped_surplus": len(kept) - wanted}
            groups = set(kept[:wanted])
            rollouts = [rollout for rollout in rollouts if rollout.group_id in groups]
        return Sampled(
            rollouts=rollouts,
            generate_s=sum(batch.generate_s for batch in batches),
            reward_s=sum(batch.reward_s for batch in batches),
            environment_s=sum(batch.environment_s for batch in batches),
            num_prompts=sum(each.picked.num_places for each in draws),
            num_tokens=sum(batch.num_tokens for batch in batches),
            counts=counts,
            curriculum=self.config.curriculum.update(draws[-1].picked.state, visits),
        )

    def _with_tempered(self, step: int, first: Drawn, sampled: Sampled) -> Sampled:
        count = self.config.tempering.num_prompts(self.config.prompts_per_step)
        if not count:
            return sampled
        hot = replace(self.sampling, temperature=self.sampling.temperature * self.heat())
        submitted = self.sampler.submit(f"step-{step}.tempered", first.prompts[:count], self.config.group_size, hot)
        tempered = self.sampler.collect(submitted)
        return replace(
            sampled,
            tempered=tempered.rollouts,
            num_tokens=sampled.num_tokens + tempered.num_tokens,
            generate_s=sampled.generate_s + tempered.generate_s,
            reward_s=sampled.reward_s + tempered.reward_s,
            environment_s=sampled.environment_s + tempered.environment_s,
        )

    def _draw(self, step: int, label: str, start: int, state: CurriculumState, before: Sequence[Drawn]) -> Drawn:
        """As many prompts as a step has, from this place of the order on. `before`: the step's draws so far."""
        curriculum, count = self.config.curriculum, self.config.prompts_per_step
        skipped = sum(each.picked.num_places - len(each.picked.places) for each in before)
        picked = curriculum.pick(
            state, lambda place: self._at(place).id, start=start, count=count, skipped=skipped, seed=self.config.seed
        )
        if len(picked.places) < count:
            skipped += picked.num_places - len(picked.places)
            if all(curriculum.is_retired(state, prompt.id) for prompt in self.prompts.train):
                why = f"All {len(self.prompts.train)} prompts are solved. Take harder ones, raise curriculum.retire_from"
            else:
                why = "Raise curriculum.max_skipped or curriculum.min_accept"
            raise DataError(
                f"curriculum={choice_of('curriculum', curriculum)}: step {step} passed over {skipped} places of the "
                f"order, and found {len(picked.places)} of {count} prompts. {why}, or write curriculum=none."
            )
        prompts = [self._at(place) for place in picked.places]
        submitted = self.sampler.submit(label, prompts, self.config.group_size, self.sampling)
        return Drawn(submitted=submitted, prompts=prompts, picked=picked)

    def _at(self, place: int) -> Prompt:
        """The prompt at a place of the order."""
        [index] = self.order.take(place, 1)
        return self.prompts.train[index]


def visits_of(rollouts: Sequence[Rollout]) -> list[tuple[str, list[float]]]:
    """Of each group, in the order of their first response: its prompt's id, and the rewards that there are."""
    visits: dict[str, tuple[str, list[float]]] = {}
    for rollout in rollouts:
        _, rewards = visits.setdefault(rollout.group_id, (rollout.prompt_id, []))
        if rollout.reward is not None:
            rewards.append(rollout.reward)
    return list(visits.values())


def kept_groups(prompt_filter: PromptFilter, rollouts: Sequence[Rollout], *, at_least: int) -> list[str]:
    """The groups that the filter keeps, in the order of their first response, of those with at least so many scored responses.
    Responses without a reward have no say."""
    scored, _ = trainable(rollouts, at_least=at_least)
    keep = prompt_filter.keep(scores=torch.tensor([rollout.reward for rollout in scored]), group_ids=group_index(scored))
    return list(dict.fromkeys(rollout.group_id for rollout, kept in zip(scored, keep.tolist(), strict=True) if kept))
