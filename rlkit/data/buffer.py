"""The replay buffer: whole groups of rollouts, drawn by weight and dropped by age. All that it does follows from seed and step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlkit.core.replay import StoredReplay, draw_distinct, draw_repeatedly
from rlkit.types import Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredGroup:
    """The responses to one prompt, as they were sampled and first trained on."""

    rollouts: tuple[Rollout, ...]
    score: float  # when it was fresh, see `core.replay.group_scores`
    number: int  # of the groups stored before it: breaks ties of equal scores

    @property
    def version(self) -> int:
        """Of the policy that sampled its oldest token."""
        return min((int(rollout.policy_version.min()) for rollout in self.rollouts if len(rollout.policy_version)), default=0)

    @property
    def num_uses(self) -> int:
        return max(rollout.num_uses for rollout in self.rollouts)

    def used(self, times: int) -> StoredGroup:
        """After so many more optimiser steps trained on it."""
        return replace(self, rollouts=tuple(replace(each, num_uses=each.num_uses + times) for each in self.rollouts))

    def copy(self, number: int) -> list[Rollout]:
        """Its rollouts for a batch that holds `number` copies of it already: a batch knows rows by id, and groups too."""
        if not number:
            return list(self.rollouts)
        end = f"/again-{number}"

        def again(rollout: Rollout) -> Rollout:
            parts = tuple(again(part) for part in rollout.parts)
            return replace(rollout, sample_id=rollout.sample_id + end, group_id=rollout.group_id + end, parts=parts)

        return [again(rollout) for rollout in self.rollouts]


@dataclass(kw_only=True, slots=True)
class ReplayBuffer:
    """What a run keeps of its rollouts to train on them again."""

    settings: StoredReplay
    seed: int
    uses_per_batch: int  # optimiser steps that train on a row of one batch
    groups: list[StoredGroup] = field(default_factory=list)  # in the order they came
    num_stored: int = 0  # so far

    def draw(self, count: int, *, step: int, version: int) -> list[Rollout]:
        """Up to `count` groups for a step, whole and one after the other, and counts their use. `version`: of the policy now."""
        self.drop(version)
        ages, scores = self.ages(version), torch.tensor([group.score for group in self.groups], dtype=torch.float64)
        probabilities = self.settings.probabilities(ages=ages, scores=scores)
        possible = int((probabilities > 0).sum())
        if count > possible > 0 and self.settings.repeats:
            drawn = draw_repeatedly(probabilities, self._uniforms(step, count))
        else:
            drawn = draw_distinct(probabilities, self._uniforms(step, len(self.groups)), count)
        rollouts, copies = [], dict.fromkeys(drawn, 0)
        for index in drawn:
            rollouts += self.groups[index].copy(copies[index])
            copies[index] += 1
        for index, times in copies.items():
            self.groups[index] = self.groups[index].used(times * self.uses_per_batch)
        return rollouts

    def drop(self, version: int) -> None:
        """The groups that are too old for a policy of this version, or used up."""
        oldest, most = version - self.settings.max_age, self.settings.max_uses - self.uses_per_batch
        self.groups = [group for group in self.groups if group.version >= oldest and group.num_uses <= most]

    def add(self, rollouts: Sequence[Rollout], scores: Sequence[float]) -> None:
        """Groups that were just trained on, with the score of its group for each rollout; the least of all then goes."""
        members: dict[str, list[int]] = {}
        for index, rollout in enumerate(rollouts):
            members.setdefault(rollout.group_id, []).append(index)
        for indices in members.values():
            group = StoredGroup(
                rollouts=tuple(rollouts[index] for index in indices), score=float(scores[indices[0]]), number=self.num_stored
            )
            self.groups.append(group.used(self.uses_per_batch))
            self.num_stored += 1
        if len(self.groups) > self.settings.max_groups:
            best = sorted(self.groups, key=lambda group: (group.score if self.settings.keeps_best else 0.0, group.number))
            self.groups = sorted(best[-self.settings.max_groups :], key=lambda group: group.number)

    def ages(self, version: int) -> Tensor:
        """[N] int64, in versions."""
        return torch.tensor([version - group.version for group in self.groups], dtype=torch.int64)

    def _uniforms(self, step: int, count: int) -> Tensor:
        """[count] float64 in (0, 1). From raw words, which numpy keeps between versions; the prompts' order has keys below 2^63."""
        words = np.random.Philox(key=np.array([self.seed, 2**63 + step], dtype=np.uint64)).random_raw(count)
        return torch.from_numpy(((words >> 11).astype(np.float64) + 0.5) * 2.0**-53)

    def state(self) -> tuple[list[Rollout], dict[str, Any]]:
        """All that is stored: its rollouts, and plain values beside them."""
        rollouts = [rollout for group in self.groups for rollout in group.rollouts]
        beside = {
            "num_stored": self.num_stored,
            "sizes": [len(group.rollouts) for group in self.groups],
            "scores": [group.score for group in self.groups],
            "numbers": [group.number for group in self.groups],
        }
        return rollouts, beside

    def restore(self, rollouts: Sequence[Rollout], beside: Mapping[str, Any]) -> None:
        """What `state` gave."""
        starts = np.cumsum([0, *beside["sizes"]])
        self.num_stored = beside["num_stored"]
        self.groups = [
            StoredGroup(rollouts=tuple(rollouts[start:end]), score=score, number=number)
            for start, end, score, number in zip(starts[:-1], starts[1:], beside["scores"], beside["numbers"], strict=True)
        ]
