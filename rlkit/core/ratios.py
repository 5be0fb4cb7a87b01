"""Importance ratios, and corrections for tokens sampled by a policy other than the one the update starts from."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

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


@dataclass(kw_only=True, slots=True)
class Weights:
    """What a correction does to the policy term, and to no other; neither field carries a gradient."""

    weight: Tensor  # [B, T], multiplies the per-token loss; a token weighted 0 still counts in the denominators
    keep: Tensor  # [B, T] bool, the response mask without rejected tokens, which leave the denominators as well


@dataclass(kw_only=True, slots=True)
class Correction(ABC):
    """Base of the off-policy corrections."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def __call__(self, *, old_logprobs: Tensor, rollout_logprobs: Tensor, response_mask: Tensor) -> Weights | None:
        """All [B, T]. None stands for a weight of 1 on every token of response_mask, without the cost of a tensor of ones."""


@dataclass(kw_only=True, slots=True)
class NoCorrection(Correction):
    """No correction: the update's first policy is taken for the one that sampled."""

    def __call__(self, *, old_logprobs: Tensor, rollout_logprobs: Tensor, response_mask: Tensor) -> None:
        """Leaves the policy term as it is."""
