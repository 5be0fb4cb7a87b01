"""What is decided about a batch before the learner sees it: shaped rewards, an off-policy correction's weights, chosen tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlkit.config import RunConfig
from rlkit.core.ratios import Correction, correction_metrics, effective_fraction
from rlkit.core.selectors import Selector
from rlkit.data.collate import token_rewards
from rlkit.metrics import Max, Mean, Metric, Min
from rlkit.types import Rollout, TrainBatch


def shaped_rewards(config: RunConfig, rollouts: Sequence[Rollout]) -> Tensor:
    """[B, T] float32: the rewards that advantages are computed from."""
    rewards = token_rewards(rollouts)
    lengths = torch.tensor([len(rollout.response_ids) for rollout in rollouts])
    gained = config.shaping(lengths=lengths, max_response_tokens=config.max_response_tokens)
    if gained is not None:
        rewards[torch.arange(len(rollouts)), (lengths - 1).clamp(min=0)] += gained
    return rewards


def correct(correction: Correction, batch: TrainBatch) -> tuple[TrainBatch, dict[str, Metric]]:
    """The batch of one optimiser step with its correction's weights, and what they were.

    Asked about all rows at once: a weight may depend on other rows, and rejected tokens leave the step's denominators.
    """
    if batch.old_logprobs is None:
        return batch, {}
    given = {"old_logprobs": batch.old_logprobs, "rollout_logprobs": batch.rollout_logprobs, "response_mask": batch.response_mask}
    weights = correction(**given)
    if weights is None:
        return batch, {}
    found = correction_metrics(weights, **given)
    metrics: dict[str, Metric] = {name: Mean(*pair) for name, pair in found.means.items()}
    metrics |= {name: Max(value) for name, value in found.maxima.items()} | {
        name: Min(value) for name, value in found.minima.items()
    }
    return replace(batch, policy_weight=weights.weight, policy_mask=weights.keep), metrics


def choose(selector: Selector, batch: TrainBatch, seed: int) -> tuple[TrainBatch, dict[str, Metric]]:
    """The batch of one optimiser step with the tokens that its selector picks, where it picks among all of them."""
    if not selector.whole_batch:
        return batch, {}
    assert batch.old_logprobs is not None  # such a selector needs old_pass
    chosen = selector.choose(
        logprobs=batch.old_logprobs,
        advantages=batch.advantages,
        response_mask=batch.response_mask,
        generator=torch.Generator().manual_seed(seed),
    )
    share = Mean(float(chosen.sum()), float(batch.response_mask.sum()))
    return replace(batch, chosen=chosen), {"selector/fraction": share}


def with_effective_sample_size(metrics: dict[str, float]) -> dict[str, float]:
    """A ratio of two means, so it is taken when they are complete."""
    if "is/square_mean" in metrics:
        metrics["is/ess"] = effective_fraction(metrics["is/mean"], metrics.pop("is/square_mean"))
    return metrics
