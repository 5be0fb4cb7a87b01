"""Distance of the policy's next-token distribution from a reference's: one class per divergence.

To add one, write its generator (and what is known in closed form), name it in `rlkit/config.py`, and look at `rlkit divergences`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from rlkit.core.estimators import (
    FULL,
    GENERAL,
    OF_REVERSE_KL,
    Estimator,
    Place,
    Target,
    Verdict,
    distance_to_target,
    penalty_to_go,
    sampled_loss,
    sequence_penalty,
    verdict,
)
from rlkit.core.ratios import MAX_LOG_RATIO
from rlkit.errors import ConfigError

SMALLEST_TAIL = 1e-8  # probability of the tokens that are not among the likeliest


class Head(Enum):
    """By whose probability the likeliest tokens are chosen, where only those are told apart."""

    policy = "policy"
    ref = "ref"
    both = "both"  # the larger of the two


@dataclass(kw_only=True, slots=True)
class Divergence:
    """Base of the divergence penalties."""

    @property
    def needs(self) -> frozenset[str]:
        """What must be computed for the chosen estimator."""
        return frozenset()

    @property
    def verdict(self) -> Verdict:
        """What the chosen estimator descends at its place."""
        return Verdict()

    def loss(
        self,
        *,
        logprobs: Tensor,
        behaviour_logprobs: Tensor,
        ref_logprobs: Tensor | None,
        response_mask: Tensor,
        exact_values: Tensor | None = None,
    ) -> Tensor | None:
        """The per-token loss [B, T], 0 off the mask, without its coefficient; None adds no term. All inputs [B, T].

        behaviour_logprobs are of the policy that sampled the tokens. Only logprobs and exact_values receive a gradient.
        """

    def penalty(self, *, log_ratio: Tensor, response_mask: Tensor, group_ids: Tensor) -> Tensor | None:
        """What the advantages [B, T] lose per unit of coefficient; None where the divergence acts elsewhere."""

    def sharpness(self, rewards: Tensor) -> Tensor | None:
        """[B]: what multiplies the reference's logits, by the response's reward; None leaves the reference as it is."""

    def target(self, *, log_ratio: Tensor, response_mask: Tensor, group_ids: Tensor, rewards: Tensor, coef: float) -> Target | None:
        """What takes the advantages' place; None where the divergence is a penalty beside the rewards."""


@dataclass(kw_only=True, slots=True)
class NoDivergence(Divergence):
    """No divergence penalty, and no reference model."""


@dataclass(kw_only=True, slots=True)
class Penalty(Divergence, ABC):
    """Base of the divergences that there are: a coefficient, a place and an estimator."""

    name: ClassVar[str]
    estimators: ClassVar[frozenset[Estimator]] = FULL
    head: ClassVar[Head] = Head.both
    coef: float = 0.05  # multiplies the term, or the target's temperature; where a controller is chosen, its start
    estimator: Estimator = Estimator.exact
    place: Place = Place.loss
    top_k: int = 0  # with estimator exact: so many tokens told apart and one bucket for the others; 0: all
    allow_biased: bool = False  # train with an estimator that descends something else than it is named after

    def __post_init__(self):
        if not self.coef >= 0:
            raise ConfigError(f"divergence.coef={self.coef}: write 0 or more, or divergence=none to train without a penalty.")
        if self.place is Place.target and not self.coef > 0:
            raise ConfigError(
                f"divergence.coef={self.coef}: with divergence.place=target rewards are divided by it. Write a number above 0."
            )
        chosen, found = f"divergence.estimator={self.estimator.name}", verdict(self.place, self.estimator)
        if found is None or self.estimator not in self.estimators:
            usable = sorted(each.name for each in self.estimators if verdict(self.place, each) is not None)
            where = f"has no meaning for {self.name} with divergence.place={self.place.name}"
            instead = f"write one of {', '.join(usable)}" if usable else "write divergence.place=loss"
            raise ConfigError(f"{chosen}: {where}, {instead}.")
        if not found.is_right and not found.is_named and not self.allow_biased:
            raise ConfigError(
                f"{chosen}: with divergence.place={self.place.name} it descends {found.of}, not {self.name}. Write "
                "divergence.estimator=score, or divergence.allow_biased=true if that is what you want."
            )
        if self.allow_biased and (found.is_right or found.is_named):
            raise ConfigError(f"divergence.allow_biased=true: {chosen} needs no leave. Write divergence.allow_biased=false.")
        if self.top_k < 0 or (self.top_k and self.estimator is not Estimator.exact):
            raise ConfigError(
                f"divergence.top_k={self.top_k}: write 0, or with divergence.estimator=exact the number of tokens told apart."
            )

    @property
    def needs(self) -> frozenset[str]:
        """The reference's log-probabilities of the sampled tokens, for `exact` its hidden states, in a reward the policy's."""
        extra = {"ref_hidden"} if self.estimator is Estimator.exact else set()
        return frozenset({"ref_logprobs"} | extra | (set() if self.place is Place.loss else {"old_pass"}))

    @property
    def verdict(self) -> Verdict:
        found = verdict(self.place, self.estimator)
        assert found is not None, "__post_init__ has refused it"
        return found

    @abstractmethod
    def exact(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        """[n, V] log-probabilities -> D [n], differentiable in logprobs."""

    def between(self, logprobs: Tensor, ref_logprobs: Tensor, embeddings: Tensor) -> Tensor:
        """[n, V] log-probabilities -> D [n] as the settings have it. `core/logprobs.py` calls it on chunks, so [tokens, V] never
        exists. embeddings [V, H] say how alike tokens are, to a divergence that asks."""
        if 0 < self.top_k < logprobs.shape[-1]:
            logprobs, ref_logprobs = head_and_tail(logprobs, ref_logprobs, top_k=self.top_k, head=self.head)
        return self._compared(logprobs, ref_logprobs)

    def _compared(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        """`exact`, of whatever tokens are told apart."""
        return self.exact(logprobs, ref_logprobs)

    def loss(
        self,
        *,
        logprobs: Tensor,
        behaviour_logprobs: Tensor,
        ref_logprobs: Tensor | None,
        response_mask: Tensor,
        exact_values: Tensor | None = None,
    ) -> Tensor | None:
        if self.place is not Place.loss:
            return None
        if self.estimator is Estimator.exact:
            assert exact_values is not None, "divergence.estimator=exact needs exact_values from token_statistics"
            return exact_values.masked_fill(~response_mask, 0.0)
        assert ref_logprobs is not None, "a sampled divergence needs ref_logprobs"
        return self._sampled(
            logprobs=logprobs.masked_fill(~response_mask, 0.0),
            behaviour_logprobs=behaviour_logprobs.detach().masked_fill(~response_mask, 0.0),
            ref_logprobs=ref_logprobs.detach().masked_fill(~response_mask, 0.0),
        ).masked_fill(~response_mask, 0.0)

    def _sampled(self, *, logprobs: Tensor, behaviour_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        """[B, T] of finite inputs, for a divergence with estimators that look at sampled tokens alone."""
        raise AssertionError(f"{self.name} has no estimator but exact")


def head_and_tail(logprobs: Tensor, ref_logprobs: Tensor, *, top_k: int, head: Head) -> tuple[Tensor, Tensor]:
    """[n, V] -> [n, top_k + 1]: the likeliest tokens, and last all others as one.

    A coarser view of both distributions: no f-divergence grows by it, and none is negative (without the bucket it could be).
    """
    by = {Head.policy: logprobs, Head.ref: ref_logprobs, Head.both: torch.maximum(logprobs, ref_logprobs)}[head]
    chosen = by.detach().topk(top_k, dim=-1).indices

    def coarse(x: Tensor) -> Tensor:
        kept = x.gather(-1, chosen)
        rest = (1 - kept.exp().sum(-1, keepdim=True)).clamp(min=SMALLEST_TAIL).log()
        return torch.cat([kept, rest], -1)

    return coarse(logprobs), coarse(ref_logprobs)


@dataclass(kw_only=True, slots=True)
class FDivergence(Penalty):
    """Base of the f-divergences of the next token given its prefix.

    D = sum_v ref_v f(u_v) with u = policy / ref, in nats, where f is convex and f(1) = f'(1) = 0. A subclass is its `generator`;
    `slope`, `value` and `exact` follow from it, and are overridden where a closed form is stabler.
    """

    estimators: ClassVar[frozenset[Estimator]] = GENERAL
    estimator: Estimator = Estimator.score

    def __post_init__(self):
        Penalty.__post_init__(self)  # by name: `slots=True` makes a second class
        _check_generator(self)

    @abstractmethod
    def generator(self, log_ratio: Tensor) -> Tensor:
        """f(u), with log_ratio = log u: unbiased for D under tokens that the reference sampled."""

    def value(self, log_ratio: Tensor) -> Tensor:
        """f(u) / u: unbiased for D under tokens that the policy sampled."""
        log_ratio = bounded(log_ratio)
        return self.generator(log_ratio) * torch.exp(-log_ratio)

    def slope(self, log_ratio: Tensor) -> Tensor:
        """f'(u): what multiplies the score in D's gradient. Without a gradient of its own."""
        with torch.enable_grad():
            at = bounded(log_ratio).detach().requires_grad_()
            (by_log,) = torch.autograd.grad(self.generator(at).sum(), at)
        return by_log * torch.exp(-at.detach())

    def exact(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return (ref_logprobs.exp() * self.generator(bounded(logprobs - ref_logprobs))).sum(-1)

    def _compared(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        value: Tensor = _Lean.apply(logprobs, ref_logprobs, self)  # pyright: ignore[reportAssignmentType]
        return value

    def conjugate(self, t: Tensor) -> Tensor:
        """sup over u of t u - f(u), elementwise; inf outside its domain. Its derivative is the u at which f'(u) = t."""
        raise NotImplementedError(f"{self.name}: its convex conjugate is not known in closed form.")

    def _sampled(self, *, logprobs: Tensor, behaviour_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        given = {"logprobs": logprobs, "behaviour_logprobs": behaviour_logprobs, "ref_logprobs": ref_logprobs}
        return sampled_loss(self, self.estimator, **given)

    def penalty(self, *, log_ratio: Tensor, response_mask: Tensor, group_ids: Tensor) -> Tensor | None:
        match self.place:
            case Place.loss | Place.target:
                return None
            case Place.token_reward:
                return penalty_to_go(self, self.estimator, log_ratio=log_ratio, response_mask=response_mask)
            case Place.sequence_reward:
                given = {"log_ratio": log_ratio, "response_mask": response_mask, "group_ids": group_ids}
                return sequence_penalty(self, self.estimator, **given)

    def target(self, *, log_ratio: Tensor, response_mask: Tensor, group_ids: Tensor, rewards: Tensor, coef: float) -> Target | None:
        if self.place is not Place.target:
            return None
        given = {"log_ratio": log_ratio, "response_mask": response_mask, "group_ids": group_ids}
        return distance_to_target(self, **given, rewards=rewards, coef=coef)


class _Lean(torch.autograd.Function):
    """`exact` with one [n, V] buffer kept for the backward pass, where autograd would keep one for every operation.

    d/dlogprobs sum_v ref_v f(u_v) = policy_v f'(u_v). What closed forms add is a multiple of policy_v, which moves no logit.
    """

    @staticmethod
    def forward(ctx, logprobs: Tensor, ref_logprobs: Tensor, divergence: FDivergence) -> Tensor:
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(divergence.slope(bounded(logprobs - ref_logprobs)).mul_(logprobs.exp()))
        return divergence.exact(logprobs, ref_logprobs)

    @staticmethod
    def backward(ctx, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        (by_logprobs,) = ctx.saved_tensors
        return by_logprobs * grad_outputs[0].unsqueeze(-1), None, None


def bounded(log_ratio: Tensor) -> Tensor:
    """Within +-MAX_LOG_RATIO, beyond which nothing has a gradient."""
    return log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)


def _check_generator(divergence: FDivergence) -> None:
    """Raises ConfigError for a generator that is no divergence's: a user may have written it."""
    equal = torch.zeros(1, dtype=torch.float64)
    at_one, slope = float(divergence.generator(equal)), float(divergence.slope(equal))
    if abs(at_one) > 1e-6 or abs(slope) > 1e-6:
        raise ConfigError(
            f"divergence={divergence.name}: its generator has f(1)={at_one:.3g} and f'(1)={slope:.3g}. Write it so that both are "
            "0: subtract f(1) + f'(1) (u - 1)."
        )
    if bool((divergence.slope(torch.linspace(-3, 3, 61, dtype=torch.float64)).diff() < -1e-6).any()):
        raise ConfigError(f"divergence={divergence.name}: its generator is not convex in u, so it measures no distance.")


@dataclass(kw_only=True, slots=True)
class ReverseKL(FDivergence):
    """KL(policy || ref) of the next token given its prefix, in nats: seeks a mode of the reference.

    f(u) = u log u - u + 1, f'(u) = log u. Source: arXiv:1909.08593 (as a reward); gradients: arXiv:2506.09477.
    """

    name: ClassVar[str] = "reverse_kl"
    estimators: ClassVar[frozenset[Estimator]] = OF_REVERSE_KL
    head: ClassVar[Head] = Head.policy

    def generator(self, log_ratio: Tensor) -> Tensor:
        log_ratio = bounded(log_ratio)
        return log_ratio.exp() * log_ratio - torch.expm1(log_ratio)

    def value(self, log_ratio: Tensor) -> Tensor:
        """f(u) / u, known as k3: at least 0, unbiased for D under tokens the policy sampled."""
        log_ratio = bounded(log_ratio)  # both terms, or k3's gradient would change sign beyond it
        return log_ratio + torch.expm1(-log_ratio)

    def slope(self, log_ratio: Tensor) -> Tensor:
        """f'(u) = log u, known as k1."""
        return log_ratio

    def exact(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return (logprobs.exp() * (logprobs - ref_logprobs)).sum(-1)

    def conjugate(self, t: Tensor) -> Tensor:
        return torch.expm1(t)


@dataclass(kw_only=True, slots=True)
class ForwardKL(FDivergence):
    """KL(ref || policy): keeps all of the reference's mass.

    f(u) = u - 1 - log u, f'(u) = 1 - 1/u. Explodes where the policy gives up a token of the reference.
    """

    name: ClassVar[str] = "forward_kl"
    head: ClassVar[Head] = Head.ref

    def generator(self, log_ratio: Tensor) -> Tensor:
        log_ratio = bounded(log_ratio)
        return torch.expm1(log_ratio) - log_ratio

    def slope(self, log_ratio: Tensor) -> Tensor:
        return -torch.expm1(-bounded(log_ratio))

    def exact(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return (ref_logprobs.exp() * (ref_logprobs - logprobs)).sum(-1)

    def conjugate(self, t: Tensor) -> Tensor:
        return outside(-torch.log1p(-t.clamp(max=1)), t >= 1)


@dataclass(kw_only=True, slots=True)
class RAPO(ForwardKL):
    """Forward KL from a reference that is flatter the less a response was rewarded (RAPO).

        ref^ = softmax(phi * ref's logits),  phi = phi_min + (1 - phi_min) * clip(reward, 0, 1)

    Over the whole vocabulary, so that the normalisation of ref^ is exact; the paper's sampled estimate descends
    E_ref[(log policy / ref)^2] / 2 instead. Source: arXiv:2510.03865, which leaves phi and the level open: token by token, and this
    phi, are ours.
    """

    name: ClassVar[str] = "rapo"
    estimators: ClassVar[frozenset[Estimator]] = FULL
    estimator: Estimator = Estimator.exact
    phi_min: float = 0.2  # 1: the reference as it is; 0: uniform for a response without reward

    def __post_init__(self):
        if not 0 <= self.phi_min <= 1:
            raise ConfigError(f"divergence.phi_min={self.phi_min}: write a number in [0, 1]; 0.2 is usual.")
        ForwardKL.__post_init__(self)

    def sharpness(self, rewards: Tensor) -> Tensor:
        return self.phi_min + (1 - self.phi_min) * rewards.clamp(0, 1)


@dataclass(kw_only=True, slots=True)
class JensenShannon(FDivergence):
    """Jensen-Shannon: the mean KL of both to their mean; symmetric, at most scale * log 2.

    f(u) = scale / 2 [u log u - (u + 1) log((u + 1) / 2)]. scale=2 is the form of GANs, f-DPO (arXiv:2309.16240) and DPH-RL
    (arXiv:2509.07430).
    """

    name: ClassVar[str] = "jensen_shannon"
    scale: float = 1.0

    def __post_init__(self):
        if not self.scale > 0:
            raise ConfigError(f"divergence.scale={self.scale}: write 1, or 2 for the form that GANs and f-DPO use.")
        FDivergence.__post_init__(self)

    def generator(self, log_ratio: Tensor) -> Tensor:
        log_ratio = bounded(log_ratio)
        u, log_mean = log_ratio.exp(), softplus(log_ratio) - math.log(2)
        return self.scale / 2 * (u * log_ratio - (u + 1) * log_mean)

    def slope(self, log_ratio: Tensor) -> Tensor:
        return self.scale / 2 * (math.log(2) - softplus(-log_ratio))

    def exact(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return self.scale * _mixed(logprobs, ref_logprobs, 0.5)

    def conjugate(self, t: Tensor) -> Tensor:
        x = t / self.scale
        edge = math.log(2) / 2
        return self.scale * outside(-torch.log(2 - torch.exp(2 * x.clamp(max=edge))) / 2, x >= edge)


def _mixed(logprobs: Tensor, ref_logprobs: Tensor, ref_share: float) -> Tensor:
    """[n]: ref_share KL(ref || M) + (1 - ref_share) KL(policy || M), with M their mixture."""
    log_mixture = torch.logaddexp(logprobs + math.log(1 - ref_share), ref_logprobs + math.log(ref_share))
    of_ref = (ref_logprobs.exp() * (ref_logprobs - log_mixture)).sum(-1)
    of_policy = (logprobs.exp() * (logprobs - log_mixture)).sum(-1)
    return ref_share * of_ref + (1 - ref_share) * of_policy


@dataclass(kw_only=True, slots=True)
class GeneralizedJensenShannon(FDivergence):
    """Jensen-Shannon with a share b of the reference in the mixture (GKD).

    D = b KL(ref || M) + (1 - b) KL(policy || M), M = b ref + (1 - b) policy. Near b = 0 it is b KL(ref || policy), near 1
    (1 - b) KL(policy || ref); normalize divides by b (1 - b), which leaves the KLs themselves. Source: arXiv:2306.13649.
    """

    name: ClassVar[str] = "generalized_js"
    b: float = 0.5  # the reference's share in the mixture, in (0, 1)
    normalize: bool = False

    def __post_init__(self):
        if not 0 < self.b < 1:
            raise ConfigError(
                f"divergence.b={self.b}: write a share in (0, 1); at its ends write divergence=forward_kl or reverse_kl."
            )
        FDivergence.__post_init__(self)

    @property
    def _scale(self) -> float:
        return 1 / (self.b * (1 - self.b)) if self.normalize else 1.0

    def _log_mixture(self, log_ratio: Tensor) -> Tensor:
        """log (b + (1 - b) u)."""
        return torch.logaddexp(log_ratio + math.log(1 - self.b), torch.full_like(log_ratio, math.log(self.b)))

    def generator(self, log_ratio: Tensor) -> Tensor:
        log_ratio = bounded(log_ratio)
        log_mixture = self._log_mixture(log_ratio)
        return self._scale * ((1 - self.b) * log_ratio.exp() * (log_ratio - log_mixture) - self.b * log_mixture)

    def slope(self, log_ratio: Tensor) -> Tensor:
        return self._scale * (1 - self.b) * (log_ratio - self._log_mixture(log_ratio))

    def exact(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return self._scale * _mixed(logprobs, ref_logprobs, self.b)

    def conjugate(self, t: Tensor) -> Tensor:
        b, x = self.b, t / self._scale
        edge = -(1 - b) * math.log(1 - b)
        inside = b * (math.log(b) - torch.log(1 - (1 - b) * torch.exp(x.clamp(max=edge) / (1 - b))))
        return self._scale * outside(inside, x >= edge)


@dataclass(kw_only=True, slots=True)
class Alpha(FDivergence):
    """The alpha-divergence of f-DPO: a -> 0 is the reverse KL, a -> 1 the forward KL, a = 1/2 four squared Hellingers.

    f(u) = (u^(1 - a) - (1 - a) u - a) / (a (a - 1)), f'(u) = (1 - u^-a) / a. Source: arXiv:2309.16240. (TRL's is 1 - a.)
    """

    name: ClassVar[str] = "alpha"
    a: float = 0.5

    def __post_init__(self):
        if not math.isfinite(self.a):
            raise ConfigError(f"divergence.a={self.a}: write a finite number; 0.5 lies half-way between the two KLs.")
        FDivergence.__post_init__(self)

    @property
    def _limit(self) -> FDivergence | None:
        """The KL that it is within rounding at the ends, where the formula divides by zero."""
        for end, limit in ((0, ReverseKL), (1, ForwardKL)):
            if abs(self.a - end) < 1e-4:
                return limit()
        return None

    def generator(self, log_ratio: Tensor) -> Tensor:
        if limit := self._limit:
            return limit.generator(log_ratio)
        a, log_ratio = self.a, bounded(log_ratio)
        return (torch.expm1((1 - a) * log_ratio) - (1 - a) * torch.expm1(log_ratio)) / (a * (a - 1))

    def slope(self, log_ratio: Tensor) -> Tensor:
        if limit := self._limit:
            return limit.slope(log_ratio)
        return -torch.expm1(-self.a * bounded(log_ratio)) / self.a

    def conjugate(self, t: Tensor) -> Tensor:
        if limit := self._limit:
            return limit.conjugate(t)
        a, base = self.a, 1 - self.a * t
        # Past a bound f' never reaches t: for a < 1 below it the best u is 0, where f is 1 / (1 - a); above it there is no best.
        at_bound = torch.full_like(t, -1 / (1 - a)) if a < 0 else torch.full_like(t, torch.inf)
        return torch.where(base > 0, (base.clamp(min=1e-300) ** ((a - 1) / a) - 1) / (1 - a), at_bound)


@dataclass(kw_only=True, slots=True)
class TotalVariation(FDivergence):
    """Half the L1 distance, in [0, 1]: a gradient of bounded size that says which way, not how far.

    f(u) = |u - 1| / 2, f'(u) = sign(u - 1) / 2, 0 at u = 1.
    """

    name: ClassVar[str] = "total_variation"

    def generator(self, log_ratio: Tensor) -> Tensor:
        return torch.expm1(bounded(log_ratio)).abs() / 2

    def slope(self, log_ratio: Tensor) -> Tensor:
        return log_ratio.sign() / 2

    def exact(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return (logprobs.exp() - ref_logprobs.exp()).abs().sum(-1) / 2

    def conjugate(self, t: Tensor) -> Tensor:
        return outside(t.clamp(min=-0.5), t > 0.5)


@dataclass(kw_only=True, slots=True)
class ChiSquaredPolicyRef(FDivergence):
    """sum (policy - ref)^2 / ref: grows without bound where the policy likes what the reference excludes.

    f(u) = (u - 1)^2, f'(u) = 2 (u - 1). Source: arXiv:2407.13399 (beside the KL, as chi-squared preference optimisation).
    """

    name: ClassVar[str] = "chi2_policy_ref"
    head: ClassVar[Head] = Head.policy

    def generator(self, log_ratio: Tensor) -> Tensor:
        return torch.expm1(bounded(log_ratio)).square()

    def slope(self, log_ratio: Tensor) -> Tensor:
        return 2 * torch.expm1(bounded(log_ratio))

    def conjugate(self, t: Tensor) -> Tensor:
        return torch.where(t >= -2, t + t.square() / 4, -1.0)


@dataclass(kw_only=True, slots=True)
class ChiSquaredRefPolicy(FDivergence):
    """sum (policy - ref)^2 / policy: grows without bound where the policy gives up a token of the reference.

    f(u) = (u - 1)^2 / u, f'(u) = 1 - 1 / u^2.
    """

    name: ClassVar[str] = "chi2_ref_policy"
    head: ClassVar[Head] = Head.ref

    def generator(self, log_ratio: Tensor) -> Tensor:
        log_ratio = bounded(log_ratio)
        return torch.expm1(log_ratio) * -torch.expm1(-log_ratio)

    def slope(self, log_ratio: Tensor) -> Tensor:
        return -torch.expm1(-2 * bounded(log_ratio))

    def conjugate(self, t: Tensor) -> Tensor:
        return outside(2 - 2 * (1 - t.clamp(max=1)).sqrt(), t > 1)


@dataclass(kw_only=True, slots=True)
class SquaredHellinger(FDivergence):
    """Half the squared distance of the square roots, in [0, 1]: bounded and symmetric.

    f(u) = (sqrt(u) - 1)^2 / 2, f'(u) = (1 - u^(-1/2)) / 2.
    """

    name: ClassVar[str] = "squared_hellinger"

    def generator(self, log_ratio: Tensor) -> Tensor:
        return torch.expm1(bounded(log_ratio) / 2).square() / 2

    def slope(self, log_ratio: Tensor) -> Tensor:
        return -torch.expm1(-bounded(log_ratio) / 2) / 2

    def exact(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return (torch.exp(logprobs / 2) - torch.exp(ref_logprobs / 2)).square().sum(-1) / 2

    def conjugate(self, t: Tensor) -> Tensor:
        return outside(t / (1 - 2 * t.clamp(max=0.5)), t >= 0.5)


@dataclass(kw_only=True, slots=True)
class Jeffreys(FDivergence):
    """KL(policy || ref) + KL(ref || policy).

    f(u) = (u - 1) log u, f'(u) = log u + 1 - 1/u.
    """

    name: ClassVar[str] = "jeffreys"

    def generator(self, log_ratio: Tensor) -> Tensor:
        log_ratio = bounded(log_ratio)
        return torch.expm1(log_ratio) * log_ratio

    def slope(self, log_ratio: Tensor) -> Tensor:
        return log_ratio - torch.expm1(-bounded(log_ratio))

    def exact(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return ((logprobs.exp() - ref_logprobs.exp()) * (logprobs - ref_logprobs)).sum(-1)

    def conjugate(self, t: Tensor) -> Tensor:
        """1/w + w + t - 2 with w = 1/u the root of w + log w = 1 - t (Lambert's W)."""
        wanted = 1 - t
        log_w = torch.where(wanted > 1, wanted.clamp(min=1).log(), wanted - 1)
        for _ in range(50):  # Newton in log w, on a function that is convex and increasing
            log_w = log_w - (log_w.exp() + log_w - wanted) / (log_w.exp() + 1)
        return torch.exp(-log_w) + log_w.exp() + t - 2


def outside(values: Tensor, is_outside: Tensor) -> Tensor:
    """inf where a conjugate's argument is outside of its domain."""
    return torch.where(is_outside, torch.inf, values)


@dataclass(kw_only=True, slots=True)
class Renyi(Penalty):
    """Renyi's divergence of order a of the policy from the reference: a -> 1 is the reverse KL.

    D = log(sum_v policy_v^a ref_v^(1 - a)) / (a - 1). Not a mean over tokens, so only the whole vocabulary gives its gradient:
    a / (a - 1) sum_v w_v grad log policy_v with w proportional to policy^a ref^(1 - a).
    """

    name: ClassVar[str] = "renyi"
    head: ClassVar[Head] = Head.policy
    a: float = 0.5  # order, above 0 and not 1

    def __post_init__(self):
        if not (0 < self.a < math.inf and abs(self.a - 1) >= 1e-4):
            raise ConfigError(f"divergence.a={self.a}: write an order above 0 other than 1; for 1 write divergence=reverse_kl.")
        Penalty.__post_init__(self)

    def exact(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        return (self.a * logprobs + (1 - self.a) * ref_logprobs).logsumexp(-1) / (self.a - 1)


@dataclass(kw_only=True, slots=True)
class CauchySchwarz(Penalty):
    """-2 log of the cosine between the two distributions: symmetric, blind to rare tokens.

    D = log sum policy^2 + log sum ref^2 - 2 log sum policy ref. The full form; the half one is -log cos. Ours as a penalty on
    language models: no published one is known.
    """

    name: ClassVar[str] = "cauchy_schwarz"

    def exact(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        own, other = (2 * logprobs).logsumexp(-1), (2 * ref_logprobs).logsumexp(-1)
        return own + other - 2 * (logprobs + ref_logprobs).logsumexp(-1)


class Cost(Enum):
    """What it costs to move probability from one token to another."""

    cosine = "cosine"  # 1 - the cosine of their embeddings
    zero_one = "zero_one"  # 1 for any other token: the distance is then total variation as epsilon -> 0


@dataclass(kw_only=True, slots=True)
class Sinkhorn(Penalty):
    """The debiased Sinkhorn divergence between the likeliest tokens, by a cost that says which tokens are alike.

        OT(p, q) = min over plans with margins p, q of <plan, C> + epsilon KL(plan || p q)
        D        = OT(p, q) - OT(p, p) / 2 - OT(q, q) / 2

    The other tokens are one more atom at the largest cost. Gradient: that of the potentials, exact when the iterations have
    converged (Danskin); none goes through them. Source: arXiv:1810.08278 eq. 3. (SinKD, arXiv:2402.17110, transports between
    samples of a batch, not between tokens.)
    """

    name: ClassVar[str] = "sinkhorn"
    top_k: int = 32  # tokens told apart
    epsilon: float = 0.05  # how much the plan is blurred
    iterations: int = 100
    cost: Cost = Cost.cosine

    def __post_init__(self):
        if self.top_k < 1 or not self.epsilon > 0 or self.iterations < 1:
            raise ConfigError(
                f"divergence.top_k={self.top_k}, epsilon={self.epsilon}, iterations={self.iterations}: write numbers above 0; "
                "32, 0.05 and 100 are usual."
            )
        Penalty.__post_init__(self)

    def exact(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        """With the cost 0 or 1."""
        size = logprobs.shape[-1]
        costs = 1 - torch.eye(size, dtype=logprobs.dtype, device=logprobs.device)
        return self.transport(logprobs, ref_logprobs, costs.expand(len(logprobs), size, size))

    def between(self, logprobs: Tensor, ref_logprobs: Tensor, embeddings: Tensor) -> Tensor:
        k = min(self.top_k, logprobs.shape[-1] - 1)
        chosen = torch.maximum(logprobs, ref_logprobs).detach().topk(k, dim=-1).indices
        coarse, ref_coarse = head_and_tail(logprobs, ref_logprobs, top_k=k, head=Head.both)
        if self.cost is Cost.zero_one:
            return self.exact(coarse, ref_coarse)
        with torch.no_grad():
            vectors = torch.nn.functional.normalize(embeddings[chosen].to(logprobs.dtype), dim=-1)  # [n, k, H]
            near = (1 - vectors @ vectors.mT).clamp(min=0)
            costs = near.new_zeros(len(near), k + 1, k + 1)
            costs[:, :k, :k] = near
            costs[:, k, :k] = costs[:, :k, k] = near.amax((-2, -1)).unsqueeze(-1)
        return self.transport(coarse, ref_coarse, costs)

    def transport(self, logprobs: Tensor, ref_logprobs: Tensor, costs: Tensor) -> Tensor:
        """[n, m] log-probabilities, [n, m, m] symmetric costs -> D [n]."""
        across, back = self._potentials(logprobs, ref_logprobs, costs)
        # Of equal margins the two potentials are one, up to a constant that goes from one to the other.
        own, other = (sum(self._potentials(each, each, costs)) / 2 for each in (logprobs, ref_logprobs))
        # <p, f - f_pp> + <q, g - g_qq>; its gradient in p is f - f_pp.
        return (logprobs.exp() * (across - own)).sum(-1) + (ref_logprobs.exp() * (back - other)).sum(-1)

    @torch.no_grad()
    def _potentials(self, logprobs: Tensor, ref_logprobs: Tensor, costs: Tensor) -> tuple[Tensor, Tensor]:
        """f of the first, g of the second, each [n, m]. The blur shrinks from the largest cost to epsilon over the first half of
        the iterations: at a small one from the start, potentials creep."""
        f, g = torch.zeros_like(logprobs), torch.zeros_like(ref_logprobs)
        widest = max(float(costs.max()), self.epsilon)
        for iteration in range(self.iterations):
            eps = max(widest * (self.epsilon / widest) ** (2 * iteration / self.iterations), self.epsilon)
            f = -eps * ((g.unsqueeze(-2) - costs) / eps + ref_logprobs.unsqueeze(-2)).logsumexp(-1)
            g = -eps * ((f.unsqueeze(-1) - costs) / eps + logprobs.unsqueeze(-1)).logsumexp(-2)
        return f, g
