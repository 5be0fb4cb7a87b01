"""Detached weights that multiply the loss of single tokens."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from rlkit.core.ratios import ratio
from rlkit.core.selectors import Scope, entropy_score, row_quantile
from rlkit.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class TokenWeight(ABC):
    """Base of the token weights."""

    @property
    def needs(self) -> frozenset[str]:
        """What must be computed; `old_pass`, `old_entropy`, `old_expected_score`: of the policy before the step, as numbers."""
        return frozenset()

    @property
    def whole_batch(self) -> bool:
        """True: called once, before the first microbatch, on all rows of the optimiser step over all ranks, with old_logprobs
        for logprobs. False: called on every microbatch, with its present logprobs."""
        return False

    @abstractmethod
    def __call__(
        self,
        *,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        entropy: Tensor | None = None,
        expected_score: Tensor | None = None,
    ) -> Tensor | None:
        """Weights [B, T] without gradient, 0 off the mask, that multiply the policy term's loss and no other; all inputs [B, T].

        They do not touch the denominators. None stands for 1 on every token. entropy and expected_score are the old policy's
        where `needs` names them so; otherwise entropy is what the microbatch's own forward pass measured.
        """


@dataclass(kw_only=True, slots=True)
class NoTokenWeight(TokenWeight):
    """Every token weighs the same."""

    def __call__(
        self,
        *,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        entropy: Tensor | None = None,
        expected_score: Tensor | None = None,
    ) -> None:
        """Leaves the policy term as it is."""


class Shape(Enum):
    """How a weight falls as the entropy change that its token is expected to cause grows."""

    linear = "linear"  # from max_weight for the scope's smallest change to min_weight for its largest
    exponential = "exponential"  # from 1 for no change to min_weight for the scope's largest


class Omega(Enum):
    """How the entropy change that a token's update causes is estimated."""

    published = "published"  # as in STEER's code
    l5 = "l5"  # the exact first order in the logits of the token's own distribution


@dataclass(kw_only=True, slots=True)
class Steer(TokenWeight):
    """Weighs a token less the more its update is expected to change the entropy (STEER).

        omega = |A / old_p * p * (1 - p) * (log p + H)|   published: p = exp(logprobs) in [1e-8, 1 - 1e-8], H the old entropy
        omega = |A * ratio * (S - E[S])|                  l5: S = p (log p + H); the change's exact first order
        linear       w = max_weight - (max_weight - min_weight) * (omega - min omega) / (max omega - min omega)
        exponential  w = exp(-kappa * omega), at least min_weight, with kappa = -log(min_weight) / max(max omega, 0.02)

    Minimum and maximum over the scope's tokens; where all omegas are equal, linear weighs (min_weight + max_weight) / 2. The
    weights are not renormalised. In scope mini the scope is the whole optimiser step, with old_logprobs for logprobs, hence
    ratio = 1; in scope micro it is the microbatch with its present logprobs, as published. `omega=l5` is rlkit's own.
    Source: arXiv:2510.10150; code: zz-haooo/STEER.
    """

    shape: Shape = Shape.linear
    omega: Omega = Omega.published
    min_weight: float = 0.8  # of the token that changes the entropy most
    max_weight: float = 1.2  # of the one that changes it least; exponential has 1 there, whatever is written here
    scope: Scope = Scope.mini  # the published code's is micro

    def __post_init__(self):
        if not 0 < self.min_weight <= 1:
            raise ConfigError(f"token_weight.min_weight={self.min_weight}: write a value in (0, 1]; 0.8 is usual.")
        if not 1 <= self.max_weight < math.inf:
            raise ConfigError(f"token_weight.max_weight={self.max_weight}: write a finite value of 1 or more; 1.2 is usual.")

    @property
    def needs(self) -> frozenset[str]:
        extra = {"old_pass"} if self.whole_batch else set()
        if self.omega is Omega.l5:
            extra.add("old_expected_score")
        return frozenset({"old_logprobs", "old_entropy"} | extra)

    @property
    def whole_batch(self) -> bool:
        return self.scope is Scope.mini

    def __call__(
        self,
        *,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        entropy: Tensor | None = None,
        expected_score: Tensor | None = None,
    ) -> Tensor:
        """Shapes as in the base class."""
        assert entropy is not None, "token_weight=steer needs the old policy's entropy"
        given = {"logprobs": logprobs, "old_logprobs": old_logprobs, "advantages": advantages, "entropy": entropy}
        if self.omega is Omega.l5:
            assert expected_score is not None, "token_weight.omega=l5 needs the old policy's expected_score"
            given["expected_score"] = expected_score
        finite = {name: x.detach().masked_fill(~response_mask, 0.0) for name, x in given.items()}
        change = self._published(**finite) if self.omega is Omega.published else self._first_order(**finite)
        omega = change.abs().nan_to_num(nan=0.0, posinf=0.0).masked_fill(~response_mask, 0.0)
        if not response_mask.any():
            return omega
        smallest, largest = omega[response_mask].aminmax()
        match self.shape:
            case Shape.linear if largest == smallest:
                weight = torch.full_like(omega, (self.min_weight + self.max_weight) / 2)
            case Shape.linear:
                weight = self.max_weight - (omega - smallest) * (self.max_weight - self.min_weight) / (largest - smallest)
                weight = weight.clamp(self.min_weight, self.max_weight)
            case Shape.exponential:
                kappa = -math.log(self.min_weight) / largest.clamp(min=0.02)
                weight = torch.exp(-kappa * omega).clamp(self.min_weight, 1.0)
        return weight.masked_fill(~response_mask, 0.0)

    @staticmethod
    def _published(*, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, entropy: Tensor) -> Tensor:
        probs = logprobs.exp().clamp(1e-8, 1 - 1e-8)
        return advantages / old_logprobs.exp().clamp(1e-8, 1.0) * probs * (1 - probs) * (probs.log() + entropy)

    @staticmethod
    def _first_order(
        *, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, entropy: Tensor, expected_score: Tensor
    ) -> Tensor:
        return advantages * ratio(logprobs - old_logprobs) * (entropy_score(logprobs, entropy) - expected_score)


@dataclass(kw_only=True, slots=True)
class HighEntropy(TokenWeight):
    """Trains the tokens of the highest entropy only, by default a fifth of them (80/20).

        weight = 1 where H >= the (1 - fraction)-quantile of H over the scope, 0 elsewhere

    Tokens of weight 0 still count in the denominators. In scope mini H is the old policy's over the whole optimiser step; in
    scope micro it is the present policy's over the microbatch, as in TRL. Source: arXiv:2506.01939; code: huggingface/trl,
    `get_high_entropy_mask`.
    """

    fraction: float = 0.2  # of the scope's tokens that train; 1 trains all
    scope: Scope = Scope.mini

    def __post_init__(self):
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"token_weight.fraction={self.fraction}: write a value in (0, 1]; 0.2 is usual.")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"old_entropy"} if self.whole_batch else set())

    @property
    def whole_batch(self) -> bool:
        return self.scope is Scope.mini

    def __call__(
        self,
        *,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        entropy: Tensor | None = None,
        expected_score: Tensor | None = None,
    ) -> Tensor:
        """Shapes as in the base class; only entropy and response_mask are used."""
        assert entropy is not None, "token_weight=high_entropy needs the entropy"
        entropy = entropy.detach().masked_fill(~response_mask, 0.0)
        if not response_mask.any():
            return torch.zeros_like(entropy)
        threshold = row_quantile(entropy.flatten()[None], response_mask.flatten()[None], 1 - self.fraction)
        return ((entropy >= threshold) & response_mask).to(entropy.dtype)
