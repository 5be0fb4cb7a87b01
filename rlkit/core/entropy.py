"""Entropy terms beside the objective, and selectors that change the loss of chosen tokens."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlkit.core.objectives import Surrogate
from rlkit.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class EntropyTerm(ABC):
    """Base of the entropy terms."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def loss(self, *, entropy: Tensor | None) -> Tensor | None:
        """The per-token loss [B, T], without its coefficient, from the policy's entropy [B, T] in nats; None adds no term."""


@dataclass(kw_only=True, slots=True)
class NoEntropy(EntropyTerm):
    """No entropy term."""

    def loss(self, *, entropy: Tensor | None) -> None:
        """Adds no term."""


@dataclass(kw_only=True, slots=True)
class EntropyBonus(EntropyTerm):
    """Rewards the entropy of every next-token distribution.

    The loss is -entropy, and its gradient flows through all logits of the vocabulary, not through the sampled token alone:
    the sampled entropy -logprobs has an expected gradient of zero. Source: Williams and Peng (1991); arXiv:1602.01783.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})
    coef: float = 0.01  # multiplies the loss; where a controller is chosen, its start

    def __post_init__(self):
        if not self.coef >= 0:
            raise ConfigError(f"entropy.coef={self.coef}: write 0 or more, or entropy=none to train without an entropy term.")

    def loss(self, *, entropy: Tensor | None) -> Tensor:
        """-entropy, [B, T]."""
        assert entropy is not None, "the entropy bonus needs entropy from token_statistics"
        return -entropy


@dataclass(kw_only=True, slots=True)
class Selector(ABC):
    """Base of the token selectors."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def __call__(
        self,
        surrogate: Surrogate,
        *,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        generator: torch.Generator | None,
    ) -> Surrogate:
        """The surrogate with the loss of some tokens changed; all tensors [B, T].

        Every random choice is drawn from `generator`, so that a resumed run draws the same; only a selector that makes none
        takes None.
        """


@dataclass(kw_only=True, slots=True)
class NoSelector(Selector):
    """Every token keeps its loss."""

    def __call__(
        self,
        surrogate: Surrogate,
        *,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        generator: torch.Generator | None,
    ) -> Surrogate:
        """The surrogate itself."""
        return surrogate
