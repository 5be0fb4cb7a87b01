"""Which stored groups of rollouts join the fresh ones, and how likely each of them is drawn."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlkit.core.advantages import Groups
from rlkit.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class Replay:
    """Base of the replay strategies."""

    needs: ClassVar[frozenset[str]] = frozenset()


@dataclass(kw_only=True, slots=True)
class NoReplay(Replay):
    """Trains on fresh rollouts only, each batch once."""


@dataclass(kw_only=True, slots=True)
class StoredReplay(Replay, ABC):
    """Base of the strategies that keep groups of rollouts and train on some of them again.

    A stored group is drawn with a probability in proportion to

        weight = 0.5^(age / age_half_life) * score^score_power,  score = sum over the group's responses of |A| * std of its rewards

    Weights of drawing are no importance weights: the drawn tokens keep the log-probabilities they were sampled with, and the
    objective's ratio or the correction accounts for the policy they came from. Source of the power: arXiv:1511.05952 eq. 1, with
    this score for its error.
    """

    keeps_best: ClassVar[bool] = False  # which groups a full buffer gives up: those of the lowest score, or else the oldest
    replaces: ClassVar[bool] = False  # whether drawn groups take the place of fresh ones without a signal, or join all of them
    repeats: ClassVar[bool] = False  # whether a group may be drawn twice for one batch, where fewer are stored than are wanted
    max_groups: int = 256  # stored at most
    max_age: int = 8  # versions that a stored group's oldest token may be behind the policy
    max_uses: int = 4  # optimiser steps that may train on a response, those when it was fresh included
    age_half_life: float | None = None  # versions after which a group is half as likely to be drawn; null: its age does not matter
    score_power: float = 0.0  # 0: the score does not matter; 1: in proportion to it

    def __post_init__(self):
        for key in ("max_groups", "max_age", "max_uses"):
            if (value := getattr(self, key)) < 1:
                raise ConfigError(f"replay.{key}={value}: nothing is ever replayed. Write 1 or more, or replay=none.")
        if self.age_half_life is not None and not self.age_half_life > 0:
            raise ConfigError(f"replay.age_half_life={self.age_half_life}: write versions above 0, or null for no weight of age.")
        if not self.score_power >= 0:
            raise ConfigError(f"replay.score_power={self.score_power}: write 0 (any group alike) or more; 1 is usual.")

    @abstractmethod
    def num_groups(self, *, num_fresh: int, num_flat: int) -> int:
        """How many groups to draw for a batch of `num_fresh` groups, in `num_flat` of which all rewards are equal."""

    def probabilities(self, *, ages: Tensor, scores: Tensor) -> Tensor:
        """Of drawing each stored group first, [N] float64, from ages in versions [N] and scores [N]; all 0 where none weighs."""
        weights = scores.double() ** self.score_power  # 0^0 is 1
        if self.age_half_life is not None:
            weights = weights * 0.5 ** (ages.double() / self.age_half_life)
        total = weights.sum()
        return weights / total if total > 0 else torch.zeros_like(weights)


@dataclass(kw_only=True, slots=True)
class BufferReplay(StoredReplay):
    """Adds stored groups of earlier steps to each batch, drawn by their age and by how much they teach.

    The number drawn for n fresh groups is n * fraction / (1 - fraction), so that fraction of all groups in a batch are replayed;
    fewer while the buffer fills, none twice. The defaults are this project's.
    """

    fraction: float = 0.2  # of a batch's groups

    def __post_init__(self):
        StoredReplay.__post_init__(self)
        if not 0 < self.fraction < 1:
            raise ConfigError(f"replay.fraction={self.fraction}: write a share of the batch in (0, 1); 0.2 is usual.")

    def num_groups(self, *, num_fresh: int, num_flat: int) -> int:
        """Beside the fresh ones."""
        return round(num_fresh * self.fraction / (1 - self.fraction))


@dataclass(kw_only=True, slots=True)
class ZeroVarianceReplay(StoredReplay):
    """Groups whose rewards are all equal give way to stored ones, drawn in proportion to their score.

    A group of equal rewards has advantages of 0 and teaches nothing. The buffer keeps the groups of the highest score, and they
    are drawn without replacement, or with it where more are wanted than are stored. The source breaks ties of equal scores by
    comparing the groups, which can raise; here the older one goes. It never drops by age; max_age and max_uses are this project's.
    Source: TRL's code (experimental, GRPO with a replay buffer).
    """

    keeps_best: ClassVar[bool] = True
    replaces: ClassVar[bool] = True
    repeats: ClassVar[bool] = True
    max_groups: int = 64  # stored at most
    max_age: int = 16  # versions that a stored group's oldest token may be behind the policy
    max_uses: int = 16  # optimiser steps that may train on a response, those when it was fresh included
    score_power: float = 1.0  # 0: the score does not matter; 1: in proportion to it

    def num_groups(self, *, num_fresh: int, num_flat: int) -> int:
        """One for each group without a signal."""
        return num_flat


def group_scores(*, advantages: Tensor, response_mask: Tensor, rewards: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """What a group is worth, on each of its rows: (sum of |A|) * std, and sum of |A|; [B] each.

    advantages, response_mask (bool): [B, T]; rewards, group_ids: [B]. |A| is a row's mean over its tokens; std is of the group's
    rewards, with Bessel's correction. A row without a response token counts in no group.
    """
    num_tokens = response_mask.sum(-1)
    size = advantages.detach().abs().masked_fill(~response_mask, 0.0).sum(-1) / num_tokens.clamp(min=1)
    groups = Groups.of(rewards, group_ids, num_tokens > 0)
    std = (groups.sum(groups.deviation.square()) / (groups.size - 1).clamp(min=1)).sqrt()
    total = groups.sum(size)
    return total * std, total


def draw_distinct(probabilities: Tensor, uniforms: Tensor, count: int) -> list[int]:
    """`count` different indices, or all that have a probability: each next one in proportion to its share of those left.

    The largest of log(u) / p, which has that distribution (Efraimidis and Spirakis 2006). probabilities [N] float64; uniforms [N]
    in (0, 1), one for each.
    """
    keys = torch.where(probabilities > 0, uniforms.double().log() / probabilities, -torch.inf)
    order = keys.argsort(descending=True, stable=True)
    return order[: min(count, int((probabilities > 0).sum()))].tolist()


def draw_repeatedly(probabilities: Tensor, uniforms: Tensor) -> list[int]:
    """One index for each of uniforms [count] in (0, 1), whatever the others are; probabilities [N] sum to 1."""
    ends = probabilities.cumsum(0)
    found = torch.searchsorted(ends, uniforms.double() * ends[-1], right=True)
    return found.clamp(max=int(probabilities.nonzero()[-1])).tolist()  # rounding must not reach a group of probability 0
