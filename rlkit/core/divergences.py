"""Distance of the policy from a frozen reference, from sampled tokens or over the full vocabulary."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

from rlkit.core.ratios import MAX_LOG_RATIO, ratio
from rlkit.errors import ConfigError


class Estimator(Enum):
    """How a divergence becomes a loss; see `FDivergence.loss` for what each one's gradient estimates."""

    score = "score"
    k2 = "k2"
    k3_weighted = "k3_weighted"
    k3 = "k3"
    exact = "exact"


@dataclass(kw_only=True, slots=True)
class Divergence(ABC):
    """Base of the divergence penalties."""

    @property
    def needs(self) -> frozenset[str]:
        """What must be computed for the chosen estimator."""
        return frozenset()

    @property
    def effective(self) -> str:
        """The divergence whose gradient the chosen estimator follows on tokens the current policy sampled."""
        return "none"

    @property
    def on_policy_only(self) -> bool:
        """True if the gradient is right only while the sampling policy is the current one: one optimiser step per fresh batch."""
        return False

    @abstractmethod
    def loss(
        self,
        *,
        logprobs: Tensor,
        behaviour_logprobs: Tensor,
        ref_logprobs: Tensor | None,
        response_mask: Tensor,
        exact_values: Tensor | None = None,
    ) -> Tensor | None:
        """The per-token loss [B, T], without its coefficient; None adds no term. All inputs [B, T].

        behaviour_logprobs are of the policy that sampled the tokens. Only logprobs and exact_values receive a gradient.
        """


@dataclass(kw_only=True, slots=True)
class NoDivergence(Divergence):
    """No divergence penalty, and no reference model."""

    def loss(
        self,
        *,
        logprobs: Tensor,
        behaviour_logprobs: Tensor,
        ref_logprobs: Tensor | None,
        response_mask: Tensor,
        exact_values: Tensor | None = None,
    ) -> None:
        """Adds no term."""


@dataclass(kw_only=True, slots=True)
class FDivergence(Divergence):
    """Base of the f-divergences of the next token given its prefix.

    D = sum_v ref_v f(u_v) with u = policy / ref, in nats, where f(1) = f'(1) = 0. A subclass is `value`, `slope` and `exact`.

    A per-token penalty moves each token's own distribution and takes the visited prefixes as given: it leaves out that a token
    changes which prefixes come later (Tang and Munos, arXiv:2506.09477).
    """

    name: ClassVar[str]
    estimators: ClassVar[frozenset[Estimator]] = frozenset({Estimator.score, Estimator.exact})  # k2 and k3 are about the KL
    coef: float = 0.05  # multiplies the loss; where a controller is chosen, its start
    estimator: Estimator = Estimator.score

    def __post_init__(self):
        if not self.coef >= 0:
            raise ConfigError(f"divergence.coef={self.coef}: write 0 or more, or divergence=none to train without a penalty.")
        if self.estimator not in self.estimators:
            usable = ", ".join(sorted(estimator.name for estimator in self.estimators))
            raise ConfigError(f"divergence.estimator={self.estimator.name}: has no meaning for {self.name}, write one of {usable}.")

    @property
    def needs(self) -> frozenset[str]:
        """The reference's log-probabilities of the sampled tokens, and for `exact` its hidden states."""
        return frozenset({"ref_logprobs", "ref_hidden"} if self.estimator is Estimator.exact else {"ref_logprobs"})

    @property
    def effective(self) -> str:
        """Differs from the name for `k3`, whose value estimates KL(policy || ref) and whose gradient KL(ref || policy)."""
        return "forward_kl" if self.estimator is Estimator.k3 else self.name

    @property
    def on_policy_only(self) -> bool:
        """True for `k2`. (`k3` knows nothing of the sampling policy either, but has no right gradient to lose.)"""
        return self.estimator is Estimator.k2

    @abstractmethod
    def value(self, log_ratio: Tensor) -> Tensor:
        """f(u) / u, with log_ratio = log u: unbiased for D under tokens the policy sampled. For metrics."""

    @abstractmethod
    def slope(self, log_ratio: Tensor) -> Tensor:
        """f'(u), with log_ratio = log u: what multiplies the score in D's gradient."""

    @abstractmethod
    def exact(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        """[n, V] log-probabilities -> D [n]. `core/logprobs.py` calls it on chunks, so [tokens, V] never exists."""

    def loss(
        self,
        *,
        logprobs: Tensor,
        behaviour_logprobs: Tensor,
        ref_logprobs: Tensor | None,
        response_mask: Tensor,
        exact_values: Tensor | None = None,
    ) -> Tensor:
        """The per-token loss of the chosen estimator, [B, T], 0 off the mask, without its coefficient.

        With l = logprobs - ref_logprobs and rho = exp(logprobs - behaviour_logprobs):

            estimator    loss                                gradient, in expectation                        value
            score        detach(rho * slope(l)) * logprobs   D's, under samples from any policy              none
            k2           l^2 / 2                             KL(policy || ref)'s, on-policy only             biased
            k3_weighted  rho * (l - 1 + exp(-l))             KL(policy || ref)'s, under samples from any     unbiased
            k3           l - 1 + exp(-l)                     KL(ref || policy)'s, on-policy only             unbiased on-policy
            exact        exact_values                        D's without sampling noise, whatever sampled    exact

        In k3_weighted the gradient is that of the product, rho included; with rho detached it would be k3's. Source: Schulman,
        "Approximating KL Divergence" (2020) for the values; Tang and Munos, arXiv:2506.09477, for the gradients.
        """
        if self.estimator is Estimator.exact:
            assert exact_values is not None, "divergence.estimator=exact needs exact_values from token_statistics"
            return exact_values.masked_fill(~response_mask, 0.0)
        assert ref_logprobs is not None, "a sampled divergence needs ref_logprobs"
        logprobs = logprobs.masked_fill(~response_mask, 0.0)
        behaviour_logprobs = behaviour_logprobs.detach().masked_fill(~response_mask, 0.0)
        ref_logprobs = ref_logprobs.detach().masked_fill(~response_mask, 0.0)
        log_ratio = logprobs - ref_logprobs
        match self.estimator:
            case Estimator.score:
                loss = score_surrogate(self, logprobs=logprobs, behaviour_logprobs=behaviour_logprobs, ref_logprobs=ref_logprobs)
            case Estimator.k2:
                loss = log_ratio.square() / 2
            case Estimator.k3_weighted:
                # d(rho * f(u)/u) = rho * f'(u) exactly: the gradient of `score`. Written apart, because autograd through the
                # clamped exponentials is wrong by orders of magnitude for a token the reference all but excludes.
                value = ratio(logprobs - behaviour_logprobs) * self.value(log_ratio)
                score = score_surrogate(self, logprobs=logprobs, behaviour_logprobs=behaviour_logprobs, ref_logprobs=ref_logprobs)
                loss = value.detach() + score - score.detach()
            case Estimator.k3:
                loss = self.value(log_ratio)
        return loss


def score_surrogate(divergence: FDivergence, *, logprobs: Tensor, behaviour_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """[B, T]. Gradient: unbiased for D at the visited states, whatever policy sampled the tokens. Value: meaningless."""
    weight = ratio(logprobs - behaviour_logprobs).detach()
    return weight * divergence.slope((logprobs - ref_logprobs).detach()) * logprobs


@dataclass(kw_only=True, slots=True)
class ReverseKL(FDivergence):
    """KL(policy || ref) of the next token given its prefix, in nats.

    As an f-divergence: f(u) = u log u - u + 1, f'(u) = log u.
    """

    name: ClassVar[str] = "reverse_kl"
    estimators: ClassVar[frozenset[Estimator]] = frozenset(Estimator)

    def value(self, log_ratio: Tensor) -> Tensor:
        """f(u) / u, known as k3: at least 0, unbiased for D under tokens the policy sampled."""
        log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)  # both terms, or k3's gradient would change sign beyond it
        return log_ratio - 1 + torch.exp(-log_ratio)

    def slope(self, log_ratio: Tensor) -> Tensor:
        """f'(u) = log u, known as k1."""
        return log_ratio

    def exact(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        """[n, V] log-probabilities -> sum_v policy_v (log policy_v - log ref_v), [n]."""
        return (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1)
