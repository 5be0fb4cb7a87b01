"""A second anchor beside the reference: the policy as it was when the update on a batch began."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rlkit.core.divergences import Estimator, ReverseKL
from rlkit.errors import ConfigError

OLD_POLICY_KL = ReverseKL(estimator=Estimator.k3_weighted)  # made once: a divergence looks at its own generator when it is made


@dataclass(kw_only=True, slots=True)
class Anchor(ABC):
    """Base of the second anchors."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def loss(self, *, logprobs: Tensor, old_logprobs: Tensor, response_mask: Tensor) -> Tensor | None:
        """The per-token loss [B, T], without its coefficient; None adds no term. Only logprobs receive a gradient."""


@dataclass(kw_only=True, slots=True)
class NoAnchor(Anchor):
    """The policy is held to its reference alone, if to anything."""

    def loss(self, *, logprobs: Tensor, old_logprobs: Tensor, response_mask: Tensor) -> None:
        """Adds no term."""


@dataclass(kw_only=True, slots=True)
class OldPolicyAnchor(Anchor):
    """Penalises KL(policy || old policy), a trust region around the policy that sampled the batch (MDPO).

    Beside a divergence from the reference the policy has two anchors, near and far. Two reverse KLs pull towards one policy, which
    lies between them:

        coef * KL(p || old) + beta * KL(p || ref) = (coef + beta) * KL(p || old^w ref^(1 - w) / Z) + constant,
        w = coef / (coef + beta)

    Source: arXiv:2005.09814 eq. 6 for the term alone.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"old_logprobs"})
    coef: float = 0.1  # multiplies the loss

    def __post_init__(self):
        if not self.coef > 0:
            raise ConfigError(f"anchor.coef={self.coef}: write a number above 0, or anchor=none.")

    def loss(self, *, logprobs: Tensor, old_logprobs: Tensor, response_mask: Tensor) -> Tensor:
        """ratio * (log ratio - 1) + 1, [B, T], 0 off the mask. Value and gradient are unbiased for the KL under the old policy's
        samples; the gradient is 0 while the policy is the old one."""
        given = {"behaviour_logprobs": old_logprobs, "ref_logprobs": old_logprobs, "response_mask": response_mask}
        loss = OLD_POLICY_KL.loss(logprobs=logprobs, **given)
        assert loss is not None  # it acts in the loss
        return loss
