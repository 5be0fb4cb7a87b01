"""Policy-gradient losses, per token."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlkit.core.ratios import MAX_LOG_RATIO, masked_log_ratio, ratio
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
    aggregations: ClassVar[frozenset[str] | None] = None  # the members of Aggregation it is right for; None: any
    is_sequence_level: ClassVar[bool] = False  # whether the tokens of a row share one ratio
    clips: ClassVar[bool] = False  # whether a token that `clipped` marks has no gradient

    @abstractmethod
    def __call__(self, *, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, response_mask: Tensor) -> Surrogate:
        """All [B, T]. Only logprobs receive a gradient; cells off response_mask may hold anything and receive none.

        A sequence-level objective puts its row's loss on each of the row's tokens, for an aggregation that takes the row's
        mean. A token's cell then holds that token's part of the row's gradient and no other's: what weighs or drops a token
        afterwards acts on this token.
        """


@dataclass(kw_only=True, slots=True)
class ScoreFunction(Objective):
    """The plain policy gradient of REINFORCE, without a ratio or a bound.

        loss = -A * logprobs

    Gradient: the policy gradient, unbiased only while one optimiser step follows each fresh batch. The value means nothing. It
    is also the loss of RLOO and GPG, whose advantages differ. Source: Williams (1992).
    """

    def __call__(self, *, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, response_mask: Tensor) -> Surrogate:
        """All [B, T]; the loss is 0 off the mask, and old_logprobs are not used."""
        loss = -_fixed(advantages, response_mask) * logprobs.masked_fill(~response_mask, 0.0)
        return Surrogate(loss, torch.zeros_like(response_mask))


@dataclass(kw_only=True, slots=True)
class UnclippedSurrogate(Objective):
    """The importance-weighted policy gradient, without a bound.

        ratio = exp(logprobs - old_logprobs)
        loss  = -ratio * A

    Gradient: unbiased for tokens that the old policy sampled at the states it visited, with a variance that grows with the
    distance from it. Source: arXiv:1707.06347 eq. 6; the base of KL-Cov, arXiv:2505.22617.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"old_logprobs"})

    def __call__(self, *, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, response_mask: Tensor) -> Surrogate:
        """All [B, T]; the loss is 0 off the mask."""
        policy_ratio = ratio(masked_log_ratio(logprobs, old_logprobs.detach(), response_mask))
        return Surrogate(-policy_ratio * _fixed(advantages, response_mask), torch.zeros_like(response_mask))


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
    clips: ClassVar[bool] = True
    clip_low: float = 0.2  # no push below a ratio of 1 - clip_low; 1 is no lower bound
    clip_high: float = 0.2  # nor above 1 + clip_high
    dual_clip: float | None = None  # caps the loss of a token with negative advantage; 3 is usual where it is used

    def __post_init__(self):
        _check_bounds(self.clip_low, self.clip_high, usual="0.2", usual_high="0.2 and 0.28")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ConfigError(f"objective.dual_clip={self.dual_clip}: write a value above 1, or null for no dual clip; 3 is usual.")

    def __call__(self, *, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, response_mask: Tensor) -> Surrogate:
        """All [B, T]; the loss is 0 off the mask."""
        advantages = _fixed(advantages, response_mask)
        policy_ratio = ratio(masked_log_ratio(logprobs, old_logprobs.detach(), response_mask))
        surrogate = _clip(policy_ratio, advantages, clip_low=self.clip_low, clip_high=self.clip_high)
        if self.dual_clip is not None:
            bounded = torch.minimum(surrogate.loss, -self.dual_clip * advantages)
            surrogate.loss = torch.where(advantages < 0, bounded, surrogate.loss)
        return surrogate


@dataclass(kw_only=True, slots=True)
class GSPO(Objective):
    """The clipped surrogate with one ratio per response, the geometric mean of its tokens' ratios (GSPO).

        s    = exp(mean over the row of (logprobs - old_logprobs))
        loss = -min(s * A, clip(s, 1 - clip_low, 1 + clip_high) * A)

    on each token of the row, with s written as exp(logprobs - detach(logprobs) + detach(log s)): under seq_mean_token_mean the
    value and the gradient of a row are those of s, -A s / num_tokens for each token of an unclipped row, and no token of a
    clipped row has any. Advantages that differ within a row make it the paper's GSPO-token. s differs from 1 by far less than
    a token's ratio does, hence the narrow bounds.

    Source: arXiv:2507.18071, bounds from its sec. 5.1.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"old_logprobs"})
    aggregations: ClassVar[frozenset[str] | None] = frozenset({"seq_mean_token_mean"})
    is_sequence_level: ClassVar[bool] = True
    clips: ClassVar[bool] = True
    clip_low: float = 3e-4  # no push below a row's ratio of 1 - clip_low; 1 is no lower bound
    clip_high: float = 4e-4  # nor above 1 + clip_high

    def __post_init__(self):
        _check_bounds(self.clip_low, self.clip_high, usual="0.0003", usual_high="0.0004")

    def __call__(self, *, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, response_mask: Tensor) -> Surrogate:
        """All [B, T]; the loss is 0 off the mask."""
        log_ratio = masked_log_ratio(logprobs, old_logprobs.detach(), response_mask)
        row_ratio = _row_ratio(log_ratio, response_mask)
        return _clip(row_ratio, _fixed(advantages, response_mask), clip_low=self.clip_low, clip_high=self.clip_high)


@dataclass(kw_only=True, slots=True)
class GMPO(Objective):
    """The geometric mean of a response's token ratios, each of them clipped (GMPO).

        log_ratio = logprobs - old_logprobs
        bounded   = min(log_ratio, clip_high) where A > 0, else max(log_ratio, -clip_low)
        loss      = -A * exp(mean over the row of bounded)

    on each token of the row, with A the row's mean advantage. Under seq_mean_token_mean the gradient of a token is A times the
    row's ratio / num_tokens, and zero for a token past the bound in the direction A pushes; such a token still counts in the
    mean. Unlike in the clipped surrogate, the bounds are on the log-ratio: 0.4 allows ratios from exp(-0.4) to exp(0.4).

    Source: arXiv:2507.20673; bounds from its code (callsys/GMPO).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"old_logprobs"})
    aggregations: ClassVar[frozenset[str] | None] = frozenset({"seq_mean_token_mean"})
    is_sequence_level: ClassVar[bool] = True
    clips: ClassVar[bool] = True
    clip_low: float = 0.4  # no push below a log-ratio of -clip_low, in nats
    clip_high: float = 0.4  # nor above clip_high

    def __post_init__(self):
        for name, bound in (("clip_low", self.clip_low), ("clip_high", self.clip_high)):
            if not bound > 0:
                raise ConfigError(f"objective.{name}={bound}: it bounds the log-ratio, write a value above 0; 0.4 is usual.")

    def __call__(self, *, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, response_mask: Tensor) -> Surrogate:
        """All [B, T]; the loss is 0 off the mask."""
        advantages = _row_mean(_fixed(advantages, response_mask), response_mask)
        log_ratio = masked_log_ratio(logprobs, old_logprobs.detach(), response_mask)
        bounded = torch.where(advantages > 0, log_ratio.clamp(max=self.clip_high), log_ratio.clamp(min=-self.clip_low))
        loss = (-advantages * _row_ratio(bounded, response_mask)).masked_fill(~response_mask, 0.0)
        return Surrogate(loss, (bounded != log_ratio) & (advantages != 0))


@dataclass(kw_only=True, slots=True)
class CISPO(Objective):
    """REINFORCE weighted by a truncated importance ratio: every token keeps a gradient (CISPO).

        weight = detach(clip(exp(logprobs - old_logprobs), 1 - clip_low, 1 + clip_high))
        loss   = -weight * A * logprobs

    Gradient: the importance-weighted policy gradient with bounded weights. `clipped` marks the tokens whose weight is at a
    bound. The defaults keep only the upper one, a weight of at most 5. With the engine's log-probabilities in the place of
    old_logprobs it is REINFORCE with truncated importance weights from the sampling policy to the current one.

    Source: arXiv:2506.13585; the cap of 5 from arXiv:2510.13786, which writes it as 5 and not as 1 + 4.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"old_logprobs"})
    clip_low: float = 1.0  # no weight below 1 - clip_low; 1 is no lower bound
    clip_high: float = 4.0  # nor above 1 + clip_high

    def __post_init__(self):
        _check_bounds(self.clip_low, self.clip_high, usual="1", usual_high="4")

    def __call__(self, *, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, response_mask: Tensor) -> Surrogate:
        """All [B, T]; the loss is 0 off the mask."""
        policy_ratio = ratio(masked_log_ratio(logprobs, old_logprobs, response_mask)).detach()
        weight = policy_ratio.clamp(1 - self.clip_low, 1 + self.clip_high)
        loss = -weight * _fixed(advantages, response_mask) * logprobs.masked_fill(~response_mask, 0.0)
        return Surrogate(loss, weight != policy_ratio)


def _check_bounds(clip_low: float, clip_high: float, *, usual: str, usual_high: str) -> None:
    if not 0 < clip_low <= 1:
        raise ConfigError(f"objective.clip_low={clip_low}: write a value in (0, 1]; {usual} is usual.")
    if not clip_high > 0:
        raise ConfigError(f"objective.clip_high={clip_high}: write a value above 0; {usual_high} is usual.")


def _fixed(advantages: Tensor, response_mask: Tensor) -> Tensor:
    """Advantages without a gradient, 0 off the mask."""
    return advantages.detach().masked_fill(~response_mask, 0.0)


def _clip(policy_ratio: Tensor, advantages: Tensor, *, clip_low: float, clip_high: float) -> Surrogate:
    """-min(ratio * A, clip(ratio) * A), and where the second is the smaller."""
    unbounded = policy_ratio * advantages
    bounded = policy_ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return Surrogate(-torch.minimum(unbounded, bounded), bounded < unbounded)


def _row_mean(x: Tensor, response_mask: Tensor) -> Tensor:
    """[B, T], 0 off the mask -> [B, 1], its mean over the mask."""
    return x.sum(-1, keepdim=True) / response_mask.sum(-1, keepdim=True).clamp(min=1)


def _row_ratio(log_ratio: Tensor, response_mask: Tensor) -> Tensor:
    """exp of the row's mean log-ratio on each of its tokens, [B, T]; through each cell flows the gradient of its own token.

    The mean of the cells over the row has the value of the row's ratio, and its gradient: ratio / num_tokens for each token. Each
    token's log-ratio is clamped as in `ratio`, so that an infinite one leaves the row finite.
    """
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.exp(log_ratio - log_ratio.detach() + _row_mean(log_ratio, response_mask).detach())
