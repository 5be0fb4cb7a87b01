"""Critics: what predicts a return for each token, and the loss that trains it."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from rlkit.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class Critic(ABC):
    """Base of the critics."""

    needs: ClassVar[frozenset[str]] = frozenset()
    num_heads: ClassVar[int] = 0  # numbers per token that the critic's model predicts; 0: there is no such model

    @abstractmethod
    def loss(self, *, values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor) -> Tensor | None:
        """The per-token loss [B, T], 0 off the mask, without its coefficient; None adds no term. All inputs [B, T].

        old_values are the values when this batch's update began. Only values receive a gradient.
        """


@dataclass(kw_only=True, slots=True)
class NoCritic(Critic):
    """No critic: advantages compare responses to one prompt with each other."""

    def loss(self, *, values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor) -> None:
        """Adds no term."""


class Backbone(Enum):
    """Which layers a critic's head reads."""

    own = "own"  # a copy of the policy's, which the value loss alone trains
    detached = "detached"  # the policy's, which the value loss leaves alone
    shared = "shared"  # the policy's, which the value loss trains as well


@dataclass(kw_only=True, slots=True)
class TrainedCritic(Critic):
    """Base of the critics that are models."""

    coef: float = 0.5  # multiplies the value loss
    learning_rate: float = 1e-5  # of the head, and of its own backbone
    warmup_steps: int = 0  # optimiser steps that train the critic alone, before the policy moves
    backbone: Backbone = Backbone.own  # own: a copy of the policy's layers; detached: the policy's; shared: and trains them
    value_clip: float | None = 0.5  # how far a value may move from old_values before its gradient stops; null: any distance

    def __post_init__(self):
        for key in ("coef", "learning_rate"):
            if not (value := getattr(self, key)) > 0:
                raise ConfigError(f"critic.{key}={value}: write a value above 0, or critic=none to train without a critic.")
        if self.warmup_steps < 0:
            raise ConfigError(f"critic.warmup_steps={self.warmup_steps}: write a number of optimiser steps, or 0 for none.")
        if self.warmup_steps > 0 and self.backbone is Backbone.shared:
            raise ConfigError(
                f"critic.warmup_steps={self.warmup_steps}: with critic.backbone=shared the value loss moves the policy's layers "
                "from the first step on. Write critic.backbone=own or detached, or critic.warmup_steps=0."
            )
        if self.value_clip is not None and not self.value_clip > 0:
            raise ConfigError(f"critic.value_clip={self.value_clip}: write a value above 0, or null for no bound; 0.5 is usual.")

    @abstractmethod
    def loss(self, *, values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor) -> Tensor:
        """As in the base class, and never None."""

    @abstractmethod
    def value(self, heads: Tensor) -> Tensor:
        """The value from what the model predicts, [..., num_heads] -> [...]."""

    @abstractmethod
    def vf_clipped(self, *, values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor) -> Tensor:
        """[B, T] bool: tokens whose loss the bound on values changes; False off the mask. All inputs [B, T]."""

    def _held(self, values: Tensor, old_values: Tensor) -> Tensor:
        """values, no further than value_clip from old_values; the very same numbers within it."""
        if self.value_clip is None:
            return values
        return values.clamp(old_values - self.value_clip, old_values + self.value_clip)


@dataclass(kw_only=True, slots=True)
class ValueModel(TrainedCritic):
    """One value per token, by least squares, with PPO's bound on how far it moves.

        held = clip(values, old_values - value_clip, old_values + value_clip)
        loss = max((values - returns)^2, (held - returns)^2) / 2

    Gradient: values - returns; zero for a value that is past the bound and nearer to its return than held is.
    Source: PPO's code (openai/baselines); default of value_clip: volcengine/verl.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"values"})
    num_heads: ClassVar[int] = 1

    def value(self, heads: Tensor) -> Tensor:
        """[..., 1] -> [...]."""
        return heads.squeeze(-1)

    def loss(self, *, values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor) -> Tensor:
        """All [B, T]."""
        return torch.maximum(*self._squared_errors(values, old_values, returns, response_mask)) / 2

    def vf_clipped(self, *, values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor) -> Tensor:
        """Where the held value is further from its return than the value."""
        free, held = self._squared_errors(values, old_values, returns, response_mask)
        return held > free

    def _squared_errors(self, values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
        values, old_values, returns = _selected(values, old_values, returns, response_mask)
        return (values - returns).square(), (self._held(values, old_values) - returns).square()


@dataclass(kw_only=True, slots=True)
class DoubleSoftMin(TrainedCritic):
    """The soft minimum of two values per token: pessimistic where they disagree (SAFE).

        V    = -softness * log((exp(-v1 / softness) + exp(-v2 / softness)) / 2)
        held = clip(V, old_values - value_clip, old_values + value_clip)
        loss = (huber(V - returns) + huber(held - returns)) / 2,  huber(x) = x^2 / 2, linear beyond huber_delta

    The sum of the two errors, not their maximum: a value past the bound keeps half its gradient. The gradient reaches both
    heads, the lower one more. In the source there is one value per response, read off its last token; here as many as tokens,
    for GAE. Source: arXiv:2602.04651 and its code (ryyzn9/SAFE).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"values"})
    num_heads: ClassVar[int] = 2
    backbone: Backbone = Backbone.detached  # as for the other critics; the source's code has shared
    value_clip: float | None = 0.2  # how far a value may move from old_values before its gradient halves; null: any distance
    softness: float = 0.3  # towards 0: the minimum of both; large: their mean
    huber_delta: float = 0.5  # error from which on the loss grows linearly

    def __post_init__(self):
        TrainedCritic.__post_init__(self)
        for key, usual in (("softness", 0.3), ("huber_delta", 0.5)):
            if not (value := getattr(self, key)) > 0:
                raise ConfigError(f"critic.{key}={value}: write a value above 0; {usual} is usual.")

    def value(self, heads: Tensor) -> Tensor:
        """[..., 2] -> [...]."""
        return soft_min(heads[..., 0], heads[..., 1], self.softness)

    def loss(self, *, values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor) -> Tensor:
        """All [B, T]; values are V."""
        values, old_values, returns = _selected(values, old_values, returns, response_mask)
        free = F.huber_loss(values, returns, reduction="none", delta=self.huber_delta)
        held = F.huber_loss(self._held(values, old_values), returns, reduction="none", delta=self.huber_delta)
        return (free + held) / 2

    def vf_clipped(self, *, values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor) -> Tensor:
        """Where the value has left the bound."""
        values, old_values, _ = _selected(values, old_values, returns, response_mask)
        return self._held(values, old_values) != values


def soft_min(first: Tensor, second: Tensor, softness: float) -> Tensor:
    """-softness * log of the mean of exp(-x / softness): between the minimum and the mean of both; first where they are equal.

    Gradient: softmin weights, so that both are trained, the lower one more.
    """
    return -softness * (torch.logaddexp(-first / softness, -second / softness) - math.log(2))


def _selected(values: Tensor, old_values: Tensor, returns: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each 0 off the mask; only values keep their gradient."""
    off = ~response_mask
    return values.masked_fill(off, 0.0), old_values.detach().masked_fill(off, 0.0), returns.detach().masked_fill(off, 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Moments:
    """Count, mean and sum of squared deviations of some numbers. A sum of squares in their place would drown a small variance."""

    count: float
    mean: float
    squares: float

    @classmethod
    def of(cls, x: Tensor) -> Self:
        """x: [n]."""
        if not len(x):
            return cls(count=0.0, mean=0.0, squares=0.0)
        x = x.detach().double()
        above = x - x[0]  # equal numbers have a mean that equals them
        return cls(count=float(len(x)), mean=float(x[0] + above.mean()), squares=float((above - above.mean()).square().sum()))

    def merge(self, other: Self) -> Self:
        """Of both together."""
        count = max(self.count + other.count, 1.0)
        shift = other.mean - self.mean
        return type(self)(
            count=self.count + other.count,
            mean=self.mean + shift * other.count / count,
            squares=self.squares + other.squares + shift**2 * self.count * other.count / count,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class ExplainedVariance:
    """1 - Var(returns - values) / Var(returns) over tokens, as parts that merge over microbatches and ranks.

    1: the critic foresees every return; 0: no better than their mean; below 0: worse. A mean of the parts' ratios would be
    wrong, and so would be a ratio of summed variances: the parts' means differ.
    """

    returns: Moments
    errors: Moments

    @classmethod
    def of(cls, *, values: Tensor, returns: Tensor, response_mask: Tensor) -> Self:
        """One part's share; all [B, T]."""
        returns, values = returns[response_mask], values[response_mask]
        return cls(returns=Moments.of(returns), errors=Moments.of(returns - values))

    def merge(self, other: Self) -> Self:
        """Of both parts together."""
        return type(self)(returns=self.returns.merge(other.returns), errors=self.errors.merge(other.errors))

    @property
    def value(self) -> float:
        """NaN where the returns do not vary, or there are none."""
        return 1 - self.errors.squares / self.returns.squares if self.returns.squares else float("nan")
