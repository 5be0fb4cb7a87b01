"""Which of a step's rollouts are learnt from, and what all of them say before anything is learnt."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from rlkit.config import RunConfig
from rlkit.controller.sampling import Sampled
from rlkit.data.collate import group_index
from rlkit.types import FinishReason, Origin, RewardStatus, Rollout


def fewest_scored(config: RunConfig) -> int:
    """Of a group's responses, without which nothing is learnt from it: two, where they are compared."""
    return 2 if config.compares_groups else 1


def trainable(rollouts: Sequence[Rollout], *, at_least: int) -> tuple[list[Rollout], Counter[str]]:
    """The rollouts to learn from: scored ones whose group has at least so many. Also what was left out, by reason.

    A failed reward is not a zero: the sample leaves its group's mean, its std and every denominator.
    """
    dropped: Counter[str] = Counter()
    scored = [rollout for rollout in rollouts if rollout.reward is not None]
    for rollout in rollouts:
        if rollout.reward is None:
            dropped[rollout.status.value] += 1
    sizes = Counter(rollout.group_id for rollout in scored)
    kept = [rollout for rollout in scored if sizes[rollout.group_id] >= at_least]
    dropped["group"] = len({rollout.group_id for rollout in rollouts}) - sum(size >= at_least for size in sizes.values())
    return kept, dropped


def rollout_metrics(
    sampled: Sampled, kept: Sequence[Rollout], dropped: Counter[str], weights: Mapping[str, float]
) -> dict[str, float]:
    """What the rollouts say before anything is learnt from them. `weights`: of the functions, where there are several."""
    rollouts = sampled.rollouts
    lengths = np.array([rollout.num_sampled for rollout in rollouts], dtype=float)
    metrics = {
        "reward/scored_fraction": sum(r.reward is not None for r in rollouts) / len(rollouts),
        "length/mean": float(lengths.mean()),
        "length/max": float(lengths.max()),
        "length/frac_truncated": sum(r.finish_reason is FinishReason.length for r in rollouts) / len(rollouts),
        "data/issued": float(sampled.num_prompts),
        "data/kept": float(len({rollout.group_id for rollout in kept})),
        "data/dropped_failed": float(dropped["group"]),
    }
    metrics |= turn_metrics(rollouts)
    for name, count in sampled.counts.items():  # some of those that failed may have been replaced
        metrics[f"data/{name}"] = metrics.get(f"data/{name}", 0.0) + count
    metrics |= reward_metrics(rollouts, weights)
    if kept:
        rewards = np.array([rollout.reward for rollout in kept], dtype=float)
        groups = group_index(kept).numpy()
        spread = [np.ptp(rewards[groups == group]) for group in np.unique(groups)]
        metrics |= {
            "reward/mean": float(rewards.mean()),
            "reward/std": float(rewards.std()),
            "group/frac_zero_std": float(np.mean(np.array(spread) == 0)),
        }
    return metrics


def reward_metrics(rollouts: Sequence[Rollout], weights: Mapping[str, float]) -> dict[str, float]:
    """How many rewards of each status there are, of each function where there are several; for how many of its samples a function
    gave a reward; and each part's value, without its weight, over all samples that have it, also where another function failed.

    `weights` names the functions, so that the counts of one whose source is not drawn are 0 and not absent.
    """
    statuses = [status for status in RewardStatus if status is not RewardStatus.ok]
    counts = Counter(rollout.status for rollout in rollouts)
    metrics = {f"reward/{status.value}": float(counts[status]) for status in statuses}
    by_function: dict[str, Counter[RewardStatus]] = {name: Counter() for name in weights}
    parts: dict[str, list[float]] = {}
    for rollout in rollouts:
        for name, status in rollout.reward_statuses.items():
            by_function.setdefault(name, Counter())[status] += 1
        for name, reward in rollout.reward_components.items():
            parts.setdefault(name, []).append(reward / weights.get(name, 1.0))
        for name, reward in rollout.reward_subparts.items():
            parts.setdefault(name, []).append(reward)
    for name, found in by_function.items():
        metrics |= {f"reward/{name}/{status.value}": float(found[status]) for status in statuses}
        if judged := found.total():
            metrics[f"reward/{name}/scored_fraction"] = len(parts.get(name, ())) / judged
    for name, values in parts.items():
        metrics |= {f"reward/{name}/mean": float(np.mean(values)), f"reward/{name}/std": float(np.std(values))}
    return metrics


def turn_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Of rollouts with turns: how many, how much of a response is the environment's, and what had to be cut."""
    played = [rollout for rollout in rollouts if rollout.transcript and len(rollout.turn_index)]
    if not played:
        return {}
    told = np.concatenate([rollout.origin for rollout in played]) == Origin.environment
    return {
        "environment/turns_mean": float(np.mean([rollout.turn_index[-1] + 1 for rollout in played])),
        "environment/turns_max": float(max(rollout.turn_index[-1] + 1 for rollout in played)),
        "environment/token_fraction": float(told.mean()),
        "environment/cut_observations": float(sum("cut" in each for rollout in played for each in rollout.transcript or ())),
    }
