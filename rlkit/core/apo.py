"""Weights of whole responses, by how hard their prompt is and how long they went wrong (APO)."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlkit.core.advantages import Groups
from rlkit.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class ResponseWeights(ABC):
    """Base of the weights of whole responses."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def __call__(self, *, advantages: Tensor, response_mask: Tensor, rewards: Tensor, group_ids: Tensor) -> Tensor | None:
        """What multiplies each response, [B], without a gradient; None leaves all as they are.

        advantages, response_mask (bool): [B, T]; rewards: [B], as the reward function gave them; group_ids: [B] int64, equal for
        responses to one prompt. Takes a whole batch of rollouts, as advantages do. A row without a response token counts in no
        group and weighs 1.
        """


@dataclass(kw_only=True, slots=True)
class NoResponseWeights(ResponseWeights):
    """Every response weighs the same."""

    def __call__(self, *, advantages: Tensor, response_mask: Tensor, rewards: Tensor, group_ids: Tensor) -> None:
        """Leaves all as they are."""


@dataclass(kw_only=True, slots=True)
class DifficultyAdaptiveDivergence(ResponseWeights):
    """Relaxes the divergence on responses that did better than others on a hard prompt (APO's DADS).

        difficulty = share of the prompt's responses that are wrong
        weight     = 1 - exp(-e * (1 - difficulty)) where A > 0, with e = 2.718...
        weight     = 1 elsewhere, and where all or none of the prompt's responses are right

    For the divergence term alone, per token, beside seq_mean_token_mean. A is the advantage of the row's first response token,
    after any other weights: a positive factor leaves its sign. The weight jumps from 0.934 to 1 where a prompt's last wrong
    response becomes right. Source: APO's code (Indolent-Kawhi/View-R1), with k3 as the divergence.
    """

    correct_at: float = 1.0  # a response with this reward or more is right

    def __call__(self, *, advantages: Tensor, response_mask: Tensor, rewards: Tensor, group_ids: Tensor) -> Tensor:
        """[B], in (0, 1]."""
        first, groups, num_correct = _outline(advantages, response_mask, rewards >= self.correct_at, group_ids)
        relaxed = -torch.expm1(-math.e * (num_correct / groups.size.clamp(min=1)))
        mixed = (num_correct > 0) & (num_correct < groups.size)
        return torch.where(groups.member & mixed & (first > 0), relaxed, 1.0)


@dataclass(kw_only=True, slots=True)
class TrajectoryComplexity(ResponseWeights):
    """Weighs wrong responses more the longer they are than the right ones to their prompt (APO's STCR).

        excess = length - mean length of the prompt's right responses
        weight = 2 - base^(-excess) where the response is wrong, excess > 0 and a right response exists, else 1

    For advantages, before anything that looks at their sign. Source: APO's code (Indolent-Kawhi/View-R1). There a wrong
    response with a positive advantage, from a reward for its format say, is encouraged the more the longer it is;
    only_negative, rlkit's own, leaves it alone. With the default base 1000 tokens of excess weigh 1 %.
    """

    correct_at: float = 1.0  # a response with this reward or more is right
    base: float = 1.00001  # above 1; how fast the weight approaches 2
    only_negative: bool = True  # whether only responses with a negative advantage are weighed; false: as in the code

    def __post_init__(self):
        if not 1 <= self.base < math.inf:
            raise ConfigError(f"advantage_weights.base={self.base}: write 1 (no weights) or a little more; 1.00001 is usual.")

    def __call__(self, *, advantages: Tensor, response_mask: Tensor, rewards: Tensor, group_ids: Tensor) -> Tensor:
        """[B], in [1, 2)."""
        correct = rewards >= self.correct_at
        first, groups, num_correct = _outline(advantages, response_mask, correct, group_ids)
        lengths = response_mask.sum(-1).to(first.dtype)
        right = groups.sum(lengths.masked_fill(~(groups.member & correct), 0.0)) / num_correct.clamp(min=1)
        excess = (lengths - right).clamp(min=0)  # none weighs 1
        weighed = groups.member & ~correct & (num_correct > 0)
        if self.only_negative:
            weighed &= first < 0
        return torch.where(weighed, 1 - torch.expm1(-excess * math.log(self.base)), 1.0)


def difficulty(correct: Tensor, response_mask: Tensor, group_ids: Tensor) -> Tensor:
    """[B]: the share of a prompt's responses that are wrong, on each of its rows; 0 for a row without a response token."""
    groups = Groups.of((~correct).double(), group_ids, response_mask.any(-1))
    wrong = groups.sum(groups.rewards.masked_fill(~groups.member, 0.0)) / groups.size.clamp(min=1)
    return wrong.masked_fill(~groups.member, 0.0)


def first_advantages(advantages: Tensor, response_mask: Tensor) -> Tensor:
    """[B]: the advantage of each row's first response token, 0 for a row without one; no gradient."""
    position = response_mask.int().argmax(-1, keepdim=True)
    return advantages.detach().masked_fill(~response_mask, 0.0).gather(-1, position).squeeze(-1)


def _outline(advantages: Tensor, response_mask: Tensor, correct: Tensor, group_ids: Tensor) -> tuple[Tensor, Groups, Tensor]:
    """The advantage of each row's first response token [B], the groups, and how many of its group are right [B]."""
    first = first_advantages(advantages, response_mask)
    groups = Groups.of(correct.to(first.dtype), group_ids, response_mask.any(-1))
    return first, groups, groups.sum(groups.rewards.masked_fill(~groups.member, 0.0))
