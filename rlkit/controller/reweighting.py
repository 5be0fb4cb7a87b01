"""Which objectives a batch of rollouts belongs to, and what their weights do to it (`objective_weights`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from rlkit.config import RunConfig, choice_of
from rlkit.core.imitation import NoImitation
from rlkit.core.recap import (
    SUPERVISED,
    ApplyTo,
    Judged,
    NoObjectiveWeights,
    ObjectiveWeights,
    Reweighting,
    weight_entropy,
)
from rlkit.errors import ConfigError
from rlkit.types import Prompt, Rollout, TrainBatch


def rewards_by_objective(objective_weights: ObjectiveWeights, rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Objective -> the mean reward that scored rollouts have in it."""
    found: dict[str, list[float]] = {}
    for rollout in rollouts:
        for name, reward in _rewards_of(rollout, by_part=weighs_parts(objective_weights)).items():
            found.setdefault(name, []).append(reward)
    return {name: sum(rewards) / len(rewards) for name, rewards in found.items()}


def check_objectives(config: RunConfig, prompts: Iterable[Prompt]) -> None:
    """Raises ConfigError for a data source that has the name of an objective that is none."""
    imitates = not isinstance(config.imitation, NoImitation) and not isinstance(config.objective_weights, NoObjectiveWeights)
    if imitates and any(prompt.source == SUPERVISED for prompt in prompts):
        raise ConfigError(
            f"objective_weights={choice_of('objective_weights', config.objective_weights)}: a data source is called {SUPERVISED}, "
            "which is the name of the imitation's loss among the objectives. Give the source another name."
        )


def weighs_parts(objective_weights: ObjectiveWeights) -> bool:
    """Whether each part of a source's reward is an objective, or the source is one as a whole."""
    return isinstance(objective_weights, Reweighting) and objective_weights.apply_to is ApplyTo.reward


def reward_gains(objective_weights: ObjectiveWeights, rollouts: Sequence[Rollout], weights: Mapping[str, float]) -> Tensor | None:
    """[B] float32: what the weights of their parts add to the rewards; None where weights act elsewhere."""
    if not weights or not weighs_parts(objective_weights):
        return None
    parts = [_rewards_of(rollout, by_part=True) for rollout in rollouts]
    return torch.tensor([sum((weights.get(name, 1.0) - 1) * reward for name, reward in each.items()) for each in parts])


def reweighted(
    objective_weights: ObjectiveWeights, batch: TrainBatch, rollouts: Sequence[Rollout], weights: Mapping[str, float]
) -> TrainBatch:
    """A batch with its rows' weights on their advantages, or beside them for the policy loss; unchanged where weights act on
    rewards. `rollouts` are its rows."""
    if not weights or weighs_parts(objective_weights):
        return batch
    assert isinstance(objective_weights, Reweighting)  # nothing else has weights
    by_row = torch.tensor([weights.get(rollout.source, 1.0) for rollout in rollouts])
    if objective_weights.apply_to is ApplyTo.loss:
        return replace(batch, objective_weight=by_row)
    column, second = by_row.unsqueeze(-1), batch.prompt_advantages
    return replace(batch, advantages=batch.advantages * column, prompt_advantages=None if second is None else second * column)


def objective_metrics(judged: Mapping[str, Judged]) -> dict[str, float]:
    """What the weights are, and why."""
    if not judged:
        return {}
    metrics = {"recap/weight_entropy": weight_entropy([each.weight for each in judged.values()])}
    for name, each in judged.items():
        metrics |= {f"recap/{name}/c": each.convergence, f"recap/{name}/i": each.instability, f"recap/{name}/weight": each.weight}
    return metrics


def _rewards_of(rollout: Rollout, *, by_part: bool) -> dict[str, float]:
    assert rollout.reward is not None  # nobody asks about others
    if by_part and rollout.reward_components:
        return {f"{rollout.source}.{part}": reward for part, reward in rollout.reward_components.items()}
    return {rollout.source: rollout.reward}
