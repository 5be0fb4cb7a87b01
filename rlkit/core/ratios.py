"""Importance ratios, and corrections for tokens sampled by a policy other than the one the update starts from."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

from rlkit.errors import ConfigError

MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8: beyond any meaningful ratio, and its products still fit float32


def masked_log_ratio(logprobs: Tensor, other_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """logprobs - other_logprobs, 0 off the mask; all [B, T].

    Selecting before anything is exponentiated keeps garbage in padding (NaN, inf) out of the gradient, where a product with
    the mask would not: NaN times zero is NaN.
    """
    return (logprobs - other_logprobs).masked_fill(~response_mask, 0.0)


def ratio(log_ratio: Tensor) -> Tensor:
    """exp(log_ratio), with log_ratio clamped to +-MAX_LOG_RATIO; the gradient is zero outside that range."""
    return torch.exp(log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO))


def mismatch_log_ratio(old_logprobs: Tensor, rollout_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """log rho = old_logprobs - rollout_logprobs, [B, T], no gradient; 0 off the mask and where it is not finite.

    An engine that reports NaN for a token leaves it uncorrected; `correction_metrics` counts such tokens.
    """
    log_ratio = masked_log_ratio(old_logprobs.detach(), rollout_logprobs.detach(), response_mask)
    return log_ratio.masked_fill(~log_ratio.isfinite(), 0.0)


class Level(Enum):
    """What one mismatch ratio is about."""

    token = "token"  # one token
    sequence = "sequence"  # the response: the product of its tokens' ratios
    mean = "mean"  # the response: their geometric mean


class Action(Enum):
    """What becomes of a weight outside its bounds."""

    clamp = "clamp"  # it is put on the bound
    mask = "mask"  # it is 0: the token has no gradient, and still counts in the denominators


class Statistic(Enum):
    """Which tokens of a response a divergence is taken over."""

    token = "token"  # each for itself
    sum = "sum"
    mean = "mean"
    max = "max"


class MismatchEstimator(Enum):
    """How far a token is from being as likely for the learner as for the engine; at least 0, in nats."""

    k2 = "k2"  # (log rho)^2 / 2
    k3 = "k3"  # rho - 1 - log rho: its mean over tokens of the engine estimates KL(engine || learner) without bias


def ratio_at(level: Level, log_ratio: Tensor, response_mask: Tensor) -> Tensor:
    """The ratio of each token or of its response, [B, T], from log-ratios [B, T] that are 0 off the mask."""
    if level is Level.token:
        return ratio(log_ratio)
    total = log_ratio.sum(-1, keepdim=True)
    if level is Level.mean:
        total = total / response_mask.sum(-1, keepdim=True).clamp(min=1)
    return ratio(total).expand_as(log_ratio)


@dataclass(kw_only=True, slots=True)
class Weights:
    """What a correction does to the policy term, and to no other; no field carries a gradient."""

    weight: Tensor  # [B, T], multiplies the per-token loss; a token weighted 0 still counts in the denominators
    keep: Tensor  # [B, T] bool, the response mask without rejected tokens, which leave the denominators as well
    below: Tensor | None = None  # [B, T] bool, tokens under the correction's lower bound; for metrics
    above: Tensor | None = None  # [B, T] bool, tokens over its upper bound; for metrics


@dataclass(kw_only=True, slots=True)
class Correction(ABC):
    """Base of the off-policy corrections."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @property
    def whole_batch(self) -> bool:
        """True if it must see all rows of an optimiser step at once, before the step's denominators are counted.

        Either `keep` loses tokens, and is what the policy term's denominators count, or a row's weight depends on other rows.
        """
        return False

    @abstractmethod
    def __call__(self, *, old_logprobs: Tensor, rollout_logprobs: Tensor, response_mask: Tensor) -> Weights | None:
        """All [B, T]. None stands for a weight of 1 on every token of response_mask, without the cost of a tensor of ones."""


@dataclass(kw_only=True, slots=True)
class NoCorrection(Correction):
    """No correction: the update's first policy is taken for the one that sampled."""

    def __call__(self, *, old_logprobs: Tensor, rollout_logprobs: Tensor, response_mask: Tensor) -> None:
        """Leaves the policy term as it is."""


@dataclass(kw_only=True, slots=True)
class Bypass(Correction):
    """The ratio of the objective is to the engine's own log-probabilities, so that it corrects the mismatch itself.

    old_logprobs are rollout_logprobs, and no pass of the policy before the update is needed. With objective=clipped the clip is
    around the policy that sampled; objective=cispo is REINFORCE with a truncated weight. A weight besides would correct twice.
    Source: verl's code (bypass mode of its rollout correction).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"rollout_as_old"})

    def __call__(self, *, old_logprobs: Tensor, rollout_logprobs: Tensor, response_mask: Tensor) -> None:
        """Leaves the policy term as it is."""


@dataclass(kw_only=True, slots=True)
class MismatchCorrection(Correction):
    """Base of the corrections that look at rho = exp(old_logprobs - rollout_logprobs), from the sampler to the update's start.

    They ask for proximal_logprobs: old_logprobs from a forward pass of the policy that the update starts from. With the engine's
    report in its place rho would be 1 everywhere, and nothing corrected.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"old_logprobs", "proximal_logprobs"})

    def __call__(self, *, old_logprobs: Tensor, rollout_logprobs: Tensor, response_mask: Tensor) -> Weights:
        """All [B, T]; off the mask the weight is 0."""
        return self.weigh(mismatch_log_ratio(old_logprobs, rollout_logprobs, response_mask), response_mask)

    @abstractmethod
    def weigh(self, log_ratio: Tensor, response_mask: Tensor) -> Weights:
        """log rho, [B, T], finite, 0 off the mask -> weights."""


@dataclass(kw_only=True, slots=True)
class BoundedRatio(MismatchCorrection):
    """Base of the corrections that bound rho itself; both bounds are inclusive."""

    floor: float
    cap: float

    def __post_init__(self):
        agree = "a token as likely for the engine as for the learner has a ratio of 1, so write"
        if not 0 <= self.floor <= 1:
            raise ConfigError(f"correction.floor={self.floor}: {agree} a value in [0, 1]; 0 is no lower bound.")
        if not self.cap >= 1:
            raise ConfigError(f"correction.cap={self.cap}: {agree} 1 or more; .inf is no upper bound.")

    def bounded(self, weight: Tensor, rho: Tensor, action: Action, response_mask: Tensor) -> Weights:
        """The weights, with the bounds put on rho; all [B, T]. To clamp, weight must be rho."""
        below, above = rho < self.floor, rho > self.cap
        weight = weight.clamp(self.floor, self.cap) if action is Action.clamp else weight.masked_fill(below | above, 0.0)
        return Weights(
            weight=weight.masked_fill(~response_mask, 0.0),
            keep=response_mask,
            below=below & response_mask,
            above=above & response_mask,
        )


@dataclass(kw_only=True, slots=True)
class TruncatedIS(BoundedRatio):
    """Each token's loss is weighted by its mismatch ratio, held between two bounds (TIS).

        weight = clip(rho, floor, cap), of the token or of its response

    Unbiased for the surrogate of the update's first policy where no bound acts, at level token up to the change in which
    prefixes are visited. Some code also raises small weights (OpenRLHF: floor 0.5, cap 5). Source: Yao et al., "Your Efficient
    RL Framework Secretly Brings You Off-Policy RL Training" (2025); cap as in verl and slime.
    """

    level: Level = Level.token
    floor: float = 0.0  # the smallest weight
    cap: float = 2.0  # the largest weight
    normalise: bool = False  # divide by the mean weight of the step: over tokens at level token, else over responses

    @property
    def whole_batch(self) -> bool:
        """True with normalise: the mean is one number for all rows."""
        return self.normalise

    def weigh(self, log_ratio: Tensor, response_mask: Tensor) -> Weights:
        """Shapes as in the base class."""
        rho = ratio_at(self.level, log_ratio, response_mask)
        weights = self.bounded(rho, rho, Action.clamp, response_mask)
        if self.normalise:
            weights.weight = (weights.weight / self._mean(weights.weight, response_mask)).masked_fill(~response_mask, 0.0)
        return weights

    def _mean(self, weight: Tensor, response_mask: Tensor) -> Tensor:
        per_row, num_tokens = weight.sum(-1), response_mask.sum(-1)
        if self.level is Level.token:
            return per_row.sum() / num_tokens.sum().clamp(min=1)
        return (per_row / num_tokens.clamp(min=1)).sum() / response_mask.any(-1).sum().clamp(min=1)


@dataclass(kw_only=True, slots=True)
class MaskedIS(BoundedRatio):
    """Responses are weighted by their mismatch ratio, and those outside the bounds have no weight (MIS).

        weight = rho where floor <= rho <= cap, else 0, of the response or of each token

    Tokens of weight 0 still count in the denominators. Source: Liu et al., "When Speed Kills Stability: Demystifying RL
    Collapse from the Training-Inference Mismatch" (2025); the defaults are TRL's.
    """

    level: Level = Level.sequence
    floor: float = 0.0  # a smaller ratio has no weight
    cap: float = 3.0  # nor has a larger one

    def weigh(self, log_ratio: Tensor, response_mask: Tensor) -> Weights:
        """Shapes as in the base class."""
        rho = ratio_at(self.level, log_ratio, response_mask)
        return self.bounded(rho, rho, Action.mask, response_mask)


@dataclass(kw_only=True, slots=True)
class IcePop(BoundedRatio):
    """Tokens are weighted by their mismatch ratio, and those outside the bounds have no weight (IcePop).

        weight = rho where floor <= rho <= cap, else 0

    Tokens of weight 0 still count in the denominators. Source: the IcePop post of the Ring team (2025).
    """

    floor: float = 0.5  # a smaller ratio has no weight
    cap: float = 5.0  # nor has a larger one

    def weigh(self, log_ratio: Tensor, response_mask: Tensor) -> Weights:
        """Shapes as in the base class."""
        rho = ratio_at(Level.token, log_ratio, response_mask)
        return self.bounded(rho, rho, Action.mask, response_mask)


@dataclass(kw_only=True, slots=True)
class SequenceMaskedTIS(BoundedRatio):
    """Tokens are weighted by their mismatch ratio, in responses whose mean ratio is within narrow bounds (seq-mask-TIS).

        weight = rho where floor <= exp(mean over the row of log rho) <= cap, else 0

    A token's own weight is not bounded, and tokens of weight 0 still count in the denominators. Source: the code of OpenRLHF
    and NeMo RL, for the bounds too.
    """

    floor: float = 0.999  # a response with a smaller geometric mean of its ratios has no weight
    cap: float = 1.002  # nor has one with a larger

    def weigh(self, log_ratio: Tensor, response_mask: Tensor) -> Weights:
        """Shapes as in the base class."""
        weight = ratio_at(Level.token, log_ratio, response_mask)
        return self.bounded(weight, ratio_at(Level.mean, log_ratio, response_mask), Action.mask, response_mask)


@dataclass(kw_only=True, slots=True)
class DecoupledPPO(BoundedRatio):
    """Stale tokens are weighted by the ratio from the policy that sampled them to the one the clip is around.

        weight = rho where floor <= rho <= cap, else 0 (action mask), or clip(rho, floor, cap) (action clamp)

    With the clipped surrogate it is decoupled PPO: rollout_logprobs are of the behaviour policy, old_logprobs of a recent
    proximal one, and the clip knows nothing of the former. Level mean takes a response's geometric mean for both test and
    weight. Source: arXiv:2110.00641; arXiv:2505.24298, and its code (inclusionAI/AReaL) for the defaults.
    """

    level: Level = Level.token
    action: Action = Action.mask
    floor: float = 0.0  # the smallest ratio that is let through
    cap: float = 5.0  # the largest

    def weigh(self, log_ratio: Tensor, response_mask: Tensor) -> Weights:
        """Shapes as in the base class."""
        rho = ratio_at(self.level, log_ratio, response_mask)
        return self.bounded(rho, rho, self.action, response_mask)


@dataclass(kw_only=True, slots=True)
class Rejection(BoundedRatio):
    """Tokens or responses whose mismatch ratio is outside the bounds are dropped, the others keep a weight of 1.

        keep = floor <= rho <= cap, of each token or of the response

    Dropped tokens leave the denominators too. The bounds are on learner / engine; verl's `token_k1` and its like put them on
    engine / learner. Source: verl's code (rollout correction); default bounds of this project.
    """

    level: Level = Level.token
    floor: float = 0.5  # a smaller ratio is dropped
    cap: float = 2.0  # and so is a larger one

    @property
    def whole_batch(self) -> bool:
        """True: denominators count what is left."""
        return True

    def weigh(self, log_ratio: Tensor, response_mask: Tensor) -> Weights:
        """Shapes as in the base class."""
        rho = ratio_at(self.level, log_ratio, response_mask)
        below, above = (rho < self.floor) & response_mask, (rho > self.cap) & response_mask
        keep = response_mask & ~(below | above)
        return Weights(weight=keep.to(log_ratio.dtype), keep=keep, below=below, above=above)


@dataclass(kw_only=True, slots=True)
class DivergenceRejection(MismatchCorrection):
    """Tokens or responses with a large divergence between engine and learner are dropped, the others keep a weight of 1.

        keep = statistic <= cap, of k2 = (log rho)^2 / 2 or k3 = rho - 1 - log rho, in nats

    Unlike a mean ratio, whose deviations up and down cancel, it sees that a response is noisy. Dropped tokens leave the
    denominators too. Source: verl's code (rollout correction); default bound of this project.
    """

    estimator: MismatchEstimator = MismatchEstimator.k3
    statistic: Statistic = Statistic.mean
    cap: float = 0.05  # a larger statistic is dropped

    def __post_init__(self):
        if not self.cap > 0:
            raise ConfigError(f"correction.cap={self.cap}: a divergence is never negative, write a value above 0; 0.05 is usual.")

    @property
    def whole_batch(self) -> bool:
        """True: denominators count what is left."""
        return True

    def weigh(self, log_ratio: Tensor, response_mask: Tensor) -> Weights:
        """Shapes as in the base class."""
        above = (self._measured(log_ratio, response_mask) > self.cap) & response_mask
        keep = response_mask & ~above
        return Weights(weight=keep.to(log_ratio.dtype), keep=keep, above=above)

    def _measured(self, log_ratio: Tensor, response_mask: Tensor) -> Tensor:
        """[B, T] or [B, 1]."""
        divergence = log_ratio.square() / 2 if self.estimator is MismatchEstimator.k2 else _k3(log_ratio)
        match self.statistic:
            case Statistic.token:
                return divergence
            case Statistic.sum:
                return divergence.sum(-1, keepdim=True)
            case Statistic.mean:
                return divergence.sum(-1, keepdim=True) / response_mask.sum(-1, keepdim=True).clamp(min=1)
            case Statistic.max:
                return divergence.amax(-1, keepdim=True)


def _k3(log_ratio: Tensor) -> Tensor:
    """rho - 1 - log rho, without the cancellation that would lose small values."""
    log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return torch.expm1(log_ratio) - log_ratio


@dataclass(frozen=True, kw_only=True, slots=True)
class CorrectionMetrics:
    """What was measured on some rows, in a form that merges over rows in any order."""

    means: dict[str, tuple[float, float]]  # numerator and denominator, each of which adds up
    maxima: dict[str, float]
    minima: dict[str, float]


def correction_metrics(
    weights: Weights | None, *, old_logprobs: Tensor, rollout_logprobs: Tensor, response_mask: Tensor
) -> CorrectionMetrics:
    """How far engine and learner are apart (`mismatch/`), and what a correction's weights did about it (`is/`).

    All [B, T]; no mean is over anything but response_mask, so a rejected token counts as one of weight 0. The effective sample
    size is `effective_fraction` of the merged is/mean and is/square_mean. Empty without a token.
    """
    mask, num_tokens = response_mask, float(response_mask.sum())
    if not num_tokens:
        return CorrectionMetrics(means={}, maxima={}, minima={})

    def mean(x: Tensor) -> tuple[float, float]:
        return float(x[mask].double().sum()), num_tokens

    def row_mean(x: Tensor) -> tuple[float, float]:
        return float(x[mask.any(-1)].double().sum()), float(mask.any(-1).sum())

    log_ratio = mismatch_log_ratio(old_logprobs, rollout_logprobs, mask)
    finite = masked_log_ratio(old_logprobs.detach(), rollout_logprobs.detach(), mask).isfinite()
    gap = (old_logprobs.detach().exp() - rollout_logprobs.detach().exp()).abs().masked_fill(~(mask & finite), 0.0)
    means = {
        "mismatch/k1": mean(-log_ratio),
        "mismatch/k3": mean(_k3(log_ratio)),
        "mismatch/log_perplexity_difference": row_mean(-log_ratio.sum(-1) / mask.sum(-1).clamp(min=1)),
        "mismatch/nonfinite_fraction": mean(~finite),
    }
    maxima, minima = {"mismatch/probability_difference_max": float(gap.max())}, {}
    if weights is not None:
        weight = weights.weight.masked_fill(~weights.keep, 0.0)
        masked = weight == 0
        means |= {
            "is/mean": mean(weight),
            "is/square_mean": mean(weight.square()),
            "is/masked_token_fraction": mean(masked),
            "is/masked_sequence_fraction": row_mean(masked.all(-1)),
        }
        sides = {"is/low_fraction": weights.below, "is/high_fraction": weights.above}
        means |= {name: mean(side) for name, side in sides.items() if side is not None}
        maxima["is/max"], minima["is/min"] = float(weight[mask].max()), float(weight[mask].min())
    return CorrectionMetrics(means=means, maxima=maxima, minima=minima)


def effective_fraction(mean: float, square_mean: float) -> float:
    """Kish's effective sample size of weights as a fraction of their number, (sum w)^2 / (N sum w^2); NaN if all are 0."""
    return mean**2 / square_mean if square_mean > 0 else float("nan")
