"""The rollouts of each step: prompts in the order of the data, and further ones in the place of those that a filter drops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from rlkit.config import RunConfig
from rlkit.controller.sampling import Sampled, Sampler, Submitted
from rlkit.core.shaping import DynamicSampling, PromptFilter
from rlkit.data.collate import group_index
from rlkit.data.order import Order
from rlkit.data.prompts import PromptSet
from rlkit.errors import DataError
from rlkit.types import Rollout, SamplingSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Feed:
    """What `Lookahead` samples from."""

    config: RunConfig
    prompts: PromptSet
    order: Order
    sampler: Sampler
    sampling: SamplingSpec
    drawn_before: Callable[[int], int]  # step -> how many prompts the steps before it draw
    heat: Callable[[], float]  # of tempered samples, times the sampler's temperature

    def submit(self, step: int) -> Submitted:
        """Start a step's first batch."""
        return self._draw(f"step-{step}", self.drawn_before(step))

    def collect(self, step: int, submitted: Submitted) -> Sampled:
        """A step's rollouts. Raises RewardError when too many rewards fail, and DataError where the filter leaves too few."""
        return self._with_tempered(step, self._filled(step, self.sampler.collect(submitted)))

    def _filled(self, step: int, sampled: Sampled) -> Sampled:
        """With other prompts in the place of those that the filter drops."""
        prompt_filter, wanted = self.config.prompt_filter, self.config.prompts_per_step
        if not isinstance(prompt_filter, DynamicSampling):
            return sampled
        batches, kept = [sampled], kept_groups(prompt_filter, sampled.rollouts)
        while len(kept) < wanted:
            if len(batches) == prompt_filter.max_batches:
                raise DataError(
                    f"prompt_filter=dynamic: {len(batches)} batches gave {len(kept)} of {wanted} prompts whose responses score "
                    "differently. Take prompts that are neither too hard nor too easy, raise prompt_filter.max_batches, or write "
                    "prompt_filter=none."
                )
            label, start = f"step-{step}.{len(batches)}", self.drawn_before(step) + len(batches) * wanted
            batches.append(self.sampler.collect(self._draw(label, start)))
            kept += kept_groups(prompt_filter, batches[-1].rollouts)
        groups = set(kept[:wanted])
        everything = [rollout for batch in batches for rollout in batch.rollouts]
        return Sampled(
            rollouts=[rollout for rollout in everything if rollout.group_id in groups],
            generate_s=sum(batch.generate_s for batch in batches),
            reward_s=sum(batch.reward_s for batch in batches),
            environment_s=sum(batch.environment_s for batch in batches),
            num_prompts=sum(batch.num_prompts for batch in batches),
        )

    def _with_tempered(self, step: int, sampled: Sampled) -> Sampled:
        count = self.config.tempering.num_prompts(self.config.prompts_per_step)
        if not count:
            return sampled
        hot = replace(self.sampling, temperature=self.sampling.temperature * self.heat())
        tempered = self.sampler.collect(self._draw(f"step-{step}.tempered", self.drawn_before(step), count=count, sampling=hot))
        return replace(
            sampled,
            tempered=tempered.rollouts,
            generate_s=sampled.generate_s + tempered.generate_s,
            reward_s=sampled.reward_s + tempered.reward_s,
            environment_s=sampled.environment_s + tempered.environment_s,
        )

    def _draw(self, label: str, start: int, *, count: int | None = None, sampling: SamplingSpec | None = None) -> Submitted:
        """Prompts from this place of the order on: as many as a step has, at the run's sampling, unless said otherwise."""
        drawn = self.order.take(start, self.config.prompts_per_step if count is None else count)
        prompts = [self.prompts.train[index] for index in drawn]
        return self.sampler.submit(label, prompts, self.config.group_size, sampling or self.sampling)


def kept_groups(prompt_filter: PromptFilter, rollouts: Sequence[Rollout]) -> list[str]:
    """The groups that the filter keeps, in the order of their first response. Responses without a reward have no say."""
    scored = [rollout for rollout in rollouts if rollout.reward is not None]
    keep = prompt_filter.keep(scores=torch.tensor([rollout.reward for rollout in scored]), group_ids=group_index(scored))
    return list(dict.fromkeys(rollout.group_id for rollout, kept in zip(scored, keep.tolist(), strict=True) if kept))
