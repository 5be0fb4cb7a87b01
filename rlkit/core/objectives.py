"""Policy-gradient losses, per token."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlkit.core.ratios import masked_log_ratio, ratio
from rlkit.errors import ConfigError


@dataclass(slots=True)
class Surrogate:
    """What an objective hands on: selectors change `loss`, and need to know which tokens the bound already holds."""

    loss: Tensor  # [B, T]
    clipped: Tensor  # [B, T] bool


@dataclass(kw_only=True, slots=True)
class Objective(ABC):
    """Base of the policy-gradient objectives."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def __call__(self, *, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, response_mask: Tensor) -> Surrogate:
        """All [B, T]. Only logprobs receive a gradient; cells off response_mask may hold anything and receive none.

        A sequence-level objective uses `response_mask` and broadcasts its result over T.
        """


@dataclass(kw_only=True, slots=True)
class ClippedSurrogate(Objective):
    """PPO's clipped surrogate, with separate lower and upper bounds.

        ratio = exp(logprobs - old_logprobs)
        loss  = -min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A)
        loss <- min(loss, -dual_clip * A) where A < 0, if dual_clip is set

    Gradient: the importance-weighted policy gradient; zero for a token already past the bound in the direction its
    advantage pushes, and, with dual_clip, for a token with A < 0 and a ratio above dual_clip, which `clipped` does not mark.
    Source: arXiv:1707.06347 eq. 7; separate bounds: arXiv:2503.14476; dual clip: arXiv:1912.09729.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"old_logprobs"})
    clip_low: float = 0.2  # no push below a ratio of 1 - clip_low; 1 is no lower bound
    clip_high: float = 0.2  # nor above 1 + clip_high
    dual_clip: float | None = None  # caps the loss of a token with negative advantage; 3 is usual where it is used

    def __post_init__(self):
        if not 0 < self.clip_low <= 1:
            raise ConfigError(f"objective.clip_low={self.clip_low}: write a value in (0, 1]; 0.2 is usual.")
        if not self.clip_high > 0:
            raise ConfigError(f"objective.clip_high={self.clip_high}: write a value above 0; 0.2 and 0.28 are usual.")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ConfigError(f"objective.dual_clip={self.dual_clip}: write a value above 1, or null for no dual clip; 3 is usual.")

    def __call__(self, *, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, response_mask: Tensor) -> Surrogate:
        """All [B, T]; the loss is 0 off the mask."""
        advantages = advantages.detach().masked_fill(~response_mask, 0.0)
        policy_ratio = ratio(masked_log_ratio(logprobs, old_logprobs.detach(), response_mask))
        unbounded = policy_ratio * advantages
        bounded = policy_ratio.clamp(1 - self.clip_low, 1 + self.clip_high) * advantages
        loss = -torch.minimum(unbounded, bounded)
        if self.dual_clip is not None:
            loss = torch.where(advantages < 0, torch.minimum(loss, -self.dual_clip * advantages), loss)
        return Surrogate(loss, bounded < unbounded)
