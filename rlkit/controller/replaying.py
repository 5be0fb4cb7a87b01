"""Stored groups of rollouts that join a step's batch, and fresh ones that are stored after it (`replay`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rlkit.config import RunConfig
from rlkit.core.advantages import Groups
from rlkit.core.replay import StoredReplay, group_scores
from rlkit.data.buffer import ReplayBuffer
from rlkit.data.collate import group_index
from rlkit.types import Rollout, TrainBatch


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """What a step trains on: whole groups, the fresh ones first."""

    fresh: list[Rollout]
    stored: list[Rollout]

    def metrics(self, buffer: ReplayBuffer, version: int) -> dict[str, float]:
        """`version`: of the policy that learnt from it."""
        metrics = {"replay/buffer_groups": float(len(buffer.groups)), "replay/num_groups": 0.0, "replay/fraction": 0.0}
        if self.stored:
            ages = version - np.concatenate([rollout.policy_version for rollout in self.stored])
            metrics |= {
                "replay/num_groups": float(len({rollout.group_id for rollout in self.stored})),
                "replay/fraction": len(self.stored) / (len(self.stored) + len(self.fresh)),
                "replay/age_mean": float(ages.mean()),
                "replay/age_max": float(ages.max()),
                "replay/uses_mean": float(np.mean([rollout.num_uses for rollout in self.stored])),
            }
        return metrics


def open_buffer(config: RunConfig) -> ReplayBuffer | None:
    """Empty; None where nothing is replayed."""
    if not isinstance(config.replay, StoredReplay):
        return None
    return ReplayBuffer(settings=config.replay, seed=config.seed, uses_per_batch=config.epochs_per_batch)


def replayed(buffer: ReplayBuffer, rollouts: Sequence[Rollout], outcomes: Tensor, *, step: int, version: int) -> Replayed:
    """Stored groups beside a step's fresh ones, or in the place of those whose outcomes [B] are all equal."""
    groups = Groups.of(outcomes, group_index(rollouts), torch.ones(len(rollouts), dtype=torch.bool))
    names = list(dict.fromkeys(rollout.group_id for rollout in rollouts))
    differing = {rollout.group_id for rollout, differ in zip(rollouts, groups.differ.tolist(), strict=True) if differ}
    flat = [name for name in names if name not in differing]
    wanted = buffer.settings.num_groups(num_fresh=len(names), num_flat=len(flat))
    stored = buffer.draw(wanted, step=step, version=version)
    gone = set(flat[: len({rollout.group_id for rollout in stored})]) if buffer.settings.replaces else set()
    return Replayed(fresh=[rollout for rollout in rollouts if rollout.group_id not in gone], stored=stored)


def store(buffer: ReplayBuffer, fresh: Sequence[Rollout], batch: TrainBatch) -> None:
    """Keep a step's fresh groups, the batch's first rows; those without an advantage anywhere would teach nothing again."""
    rows = slice(len(fresh))
    assert batch.rewards is not None  # collate put them there
    scores, sizes = group_scores(
        advantages=batch.advantages[rows],
        response_mask=batch.response_mask[rows],
        rewards=batch.rewards[rows],
        group_ids=group_index(fresh),
    )
    kept = [index for index, size in enumerate(sizes.tolist()) if size > 0]
    buffer.add([fresh[index] for index in kept], scores[kept].tolist())
