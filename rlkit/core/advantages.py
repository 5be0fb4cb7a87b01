"""Rewards -> advantages."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlkit.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class Estimate:
    """What an estimator hands on; no gradient, zero off the response mask."""

    advantages: Tensor  # [B, T]
    returns: Tensor | None = None  # [B, T], the critic's targets; None where no critic is trained


@dataclass(kw_only=True, slots=True)
class Advantage(ABC):
    """Base of the advantage estimators."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def __call__(
        self, *, token_rewards: Tensor, response_mask: Tensor, group_ids: Tensor, values: Tensor | None = None
    ) -> Estimate:
        """token_rewards, response_mask (bool), values: [B, T]; group_ids: [B] int64, equal for responses to one prompt."""


@dataclass(kw_only=True, slots=True)
class GroupNormalized(Advantage):
    """Reward minus its group's mean, divided by the group's standard deviation (GRPO).

        A = (R - mean) / (std + std_eps)

    R is the sum of a row's token_rewards; A is the same on all of its tokens. std has Bessel's correction, as in every public
    implementation; the paper does not say. Zero for a group of one and for a group of equal rewards: neither ranks anything.
    Source: arXiv:2402.03300 sec. 4.1.2.
    """

    std_eps: float = 1e-6  # added to the standard deviation

    def __post_init__(self):
        if not self.std_eps > 0:
            raise ConfigError(
                f"advantage.std_eps={self.std_eps}: write a value above 0, or equal rewards divide by zero; 1e-6 is usual."
            )

    def __call__(
        self, *, token_rewards: Tensor, response_mask: Tensor, group_ids: Tensor, values: Tensor | None = None
    ) -> Estimate:
        """Shapes as in the base class; values are not used."""
        deviation, size, group = _group_deviation(token_rewards, response_mask, group_ids)
        std = (_group_sum(deviation.square(), group) / (size - 1).clamp(min=1)).sqrt()
        return _on_every_token(deviation / (std + self.std_eps), response_mask)


@dataclass(kw_only=True, slots=True)
class GroupCentered(Advantage):
    """Reward minus its group's mean (Dr. GRPO).

    A = R - mean, on all tokens of a row, with R the sum of its token_rewards; zero for a group of one. Not dividing by the
    standard deviation keeps nearly solved and nearly hopeless prompts from weighing more. Source: arXiv:2503.20783.
    """

    def __call__(
        self, *, token_rewards: Tensor, response_mask: Tensor, group_ids: Tensor, values: Tensor | None = None
    ) -> Estimate:
        """Shapes as in the base class; values are not used."""
        deviation, _, _ = _group_deviation(token_rewards, response_mask, group_ids)
        return _on_every_token(deviation, response_mask)


@dataclass(kw_only=True, slots=True)
class LeaveOneOut(Advantage):
    """Reward minus the mean reward of the other responses in its group (RLOO).

    A = G / (G - 1) * (R - mean), on all tokens of a row, with R the sum of its token_rewards; zero for a group of one, which
    has no others. The baseline does not depend on the response it is subtracted from, hence no bias.
    Source: arXiv:2402.14740.
    """

    def __call__(
        self, *, token_rewards: Tensor, response_mask: Tensor, group_ids: Tensor, values: Tensor | None = None
    ) -> Estimate:
        """Shapes as in the base class; values are not used."""
        deviation, size, _ = _group_deviation(token_rewards, response_mask, group_ids)
        return _on_every_token(size / (size - 1).clamp(min=1) * deviation, response_mask)


def _group_deviation(token_rewards: Tensor, response_mask: Tensor, group_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's reward minus its group's mean, its group's size, and its group's index; all [B].

    Rows without a response token are not members of their group: their deviation is 0 and nobody's mean sees them.
    """
    member = response_mask.any(-1)
    rewards = token_rewards.detach().masked_fill(~response_mask, 0.0).sum(-1)
    group = group_ids.unique(return_inverse=True)[1]
    # The mean of equal floats need not equal them; measured from the group's lowest reward it does, and zero stays zero.
    lowest = torch.full_like(rewards, torch.inf).scatter_reduce(0, group, rewards.masked_fill(~member, torch.inf), "amin")[group]
    above = (rewards - lowest).masked_fill(~member, 0.0)
    size = _group_sum(member.to(rewards.dtype), group)
    return (above - _group_sum(above, group) / size.clamp(min=1)).masked_fill(~member, 0.0), size, group


def _group_sum(x: Tensor, group: Tensor) -> Tensor:
    """The sum of x [B] over each row's group, [B]. There are at most B groups, so [B] sums suffice."""
    return torch.zeros_like(x).index_add(0, group, x)[group]


def _on_every_token(row_advantages: Tensor, response_mask: Tensor) -> Estimate:
    """[B] -> [B, T], zero off the mask."""
    return Estimate(advantages=row_advantages.unsqueeze(-1).expand(response_mask.shape).masked_fill(~response_mask, 0.0))
