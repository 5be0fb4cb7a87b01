"""How a divergence, known by its generator, becomes a loss or a reward on sampled tokens, and what each way really descends."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor

from rlkit.core.ratios import ratio


class Place(Enum):
    """Where a divergence acts."""

    loss = "loss"  # a term of its own: each token's distribution is moved, the prefixes that are visited are taken as given
    token_reward = "token_reward"  # in the advantages, token by token: a token also answers for the divergence of later ones
    sequence_reward = "sequence_reward"  # in the advantages: the divergence between whole responses
    target = "target"  # instead of the advantages: the distance from ref exp(reward / coef) / Z, what a KL penalty would lead to


class Estimator(Enum):
    """What is computed from the sampled tokens; `LOSSES` and `REWARDS` say what each one's gradient is of.

    With l = log policy - log ref, u = exp(l), f the generator and rho = policy / behaviour:
    """

    score = "score"  # f'(u) times the score
    reference_weighted = "reference_weighted"  # rho f(u) / u = (ref / behaviour) f(u), differentiated as a whole
    naive = "naive"  # f(u) / u, unbiased for the value, differentiated as if it were the loss
    k1 = "k1"  # l
    k2 = "k2"  # l^2 / 2
    k3 = "k3"  # l - 1 + exp(-l)
    k1_weighted = "k1_weighted"  # rho l, rho with its gradient
    k2_weighted = "k2_weighted"  # rho l^2 / 2, rho detached
    k3_weighted = "k3_weighted"  # rho k3, rho with its gradient
    k1_plus = "k1_plus"  # the value of k1 with the gradient of k2
    k3_plus = "k3_plus"  # the value of k3 with the gradient of k2
    absolute = "absolute"  # |l|
    exact = "exact"  # the whole vocabulary, or its likeliest tokens and one bucket for the others


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What the expected gradient of an estimator is of, at one place."""

    of: str = "its own"  # the divergence descended; "its own": the one that was chosen
    on_policy: bool = False  # true only under samples of the present policy
    is_named: bool = False  # a popular form that is kept under its own name: choosing it is asking for it

    @property
    def is_right(self) -> bool:
        return self.of == "its own"


FULL = frozenset({Estimator.exact})
GENERAL = frozenset({Estimator.score, Estimator.reference_weighted, Estimator.naive, Estimator.exact})
OF_REVERSE_KL = frozenset(Estimator) - {Estimator.naive}  # there it is k3

RIGHT, ON_POLICY = Verdict(), Verdict(on_policy=True)
# The rule behind the wrong ones: h(l) in the loss, under samples of the policy, has the gradient E[h'(l) grad log policy], which is
# that of the f-divergence with f'(u) = h'(log u), whatever the value of h estimates.
LOSSES = {
    Estimator.score: RIGHT,
    Estimator.reference_weighted: RIGHT,
    Estimator.naive: Verdict(of="the divergence with the slope f'(u) - f(u)/u", on_policy=True),
    Estimator.k1: Verdict(of="nothing: its expected gradient is zero", on_policy=True),
    Estimator.k2: ON_POLICY,
    Estimator.k3: Verdict(of="forward_kl", on_policy=True, is_named=True),
    Estimator.k1_weighted: RIGHT,
    Estimator.k2_weighted: RIGHT,
    Estimator.k3_weighted: RIGHT,
    Estimator.k1_plus: ON_POLICY,
    Estimator.k3_plus: ON_POLICY,
    Estimator.absolute: Verdict(of="2 * total_variation", on_policy=True),
    Estimator.exact: RIGHT,
}
REWARDS = {
    Estimator.score: RIGHT,
    Estimator.naive: Verdict(of="the divergence with the slope f(u)/u"),
    Estimator.k1: RIGHT,
    Estimator.k2: Verdict(of="the divergence with the slope log(u)^2 / 2"),
    Estimator.k3: Verdict(of="reverse_kl - forward_kl"),
}


TARGETS = {Estimator.score: RIGHT}


def verdict(place: Place, estimator: Estimator) -> Verdict | None:
    """None: the estimator has no meaning at this place."""
    table = {Place.loss: LOSSES, Place.token_reward: REWARDS, Place.sequence_reward: REWARDS, Place.target: TARGETS}[place]
    return table.get(estimator)


class Generator(Protocol):
    """What an estimator asks of a divergence; all as functions of log u, elementwise."""

    def value(self, log_ratio: Tensor) -> Tensor: ...

    def slope(self, log_ratio: Tensor) -> Tensor: ...


def sampled_loss(
    divergence: Generator, estimator: Estimator, *, logprobs: Tensor, behaviour_logprobs: Tensor, ref_logprobs: Tensor
) -> Tensor:
    """The per-token loss of any estimator but `exact`, [B, T]; finite inputs. Only logprobs receive a gradient.

    Sources: Schulman, "Approximating KL Divergence" (2020) for the values; Tang and Munos, arXiv:2506.09477, for the gradients.
    """
    log_ratio, log_rho = logprobs - ref_logprobs, logprobs - behaviour_logprobs
    match estimator:
        case Estimator.score:
            return _score(divergence, logprobs, log_ratio, log_rho)
        case Estimator.reference_weighted | Estimator.k3_weighted:
            # d(rho f(u)/u) = rho f'(u) exactly: the gradient of `score`. Written apart, because autograd through the
            # clamped exponentials is wrong by orders of magnitude for a token the reference all but excludes.
            value = ratio(log_rho) * divergence.value(log_ratio)
            return with_gradient_of(value, _score(divergence, logprobs, log_ratio, log_rho))
        case Estimator.naive | Estimator.k3:
            return divergence.value(log_ratio)
        case Estimator.k1:
            return log_ratio
        case Estimator.k2:
            return log_ratio.square() / 2
        case Estimator.k1_weighted:
            return ratio(log_rho) * log_ratio
        case Estimator.k2_weighted:
            return ratio(log_rho).detach() * log_ratio.square() / 2
        case Estimator.k1_plus:
            return with_gradient_of(log_ratio, log_ratio.square() / 2)
        case Estimator.k3_plus:
            return with_gradient_of(divergence.value(log_ratio), log_ratio.square() / 2)
        case Estimator.absolute:
            return log_ratio.abs()
        case Estimator.exact:
            raise AssertionError("the exact form is computed where the whole vocabulary is")


def _score(divergence: Generator, logprobs: Tensor, log_ratio: Tensor, log_rho: Tensor) -> Tensor:
    """[B, T]. Gradient: unbiased for D at the visited states, whatever policy sampled the tokens. Value: meaningless."""
    return ratio(log_rho).detach() * divergence.slope(log_ratio.detach()) * logprobs


def with_gradient_of(value: Tensor, other: Tensor) -> Tensor:
    """The value of one with the gradient of the other (straight-through)."""
    return value.detach() + other - other.detach()


def penalty_to_go(divergence: Generator, estimator: Estimator, *, log_ratio: Tensor, response_mask: Tensor) -> Tensor:
    """What each token's advantage loses per unit of coefficient at `Place.token_reward`, [B, T] without a gradient, 0 off the mask.

        score       f'(u_t) + sum over s > t of f(u_s)/u_s
        k1, k2, k3  sum over s >= t of k_s
        naive       sum over s >= t of f(u_s)/u_s

    The gradient of sum_t E[D(s_t)] needs the slope for the token itself and the value for those after it: two functions, which
    agree in expectation for k1 alone. That is why a value in the reward is right for the reverse KL only.
    """
    log_ratio = log_ratio.detach().masked_fill(~response_mask, 0.0)
    if estimator is Estimator.score:
        values = divergence.value(log_ratio).masked_fill(~response_mask, 0.0)
        return (divergence.slope(log_ratio) + _to_go(values) - values).masked_fill(~response_mask, 0.0)
    values = _rewarded(divergence, estimator, log_ratio).masked_fill(~response_mask, 0.0)
    return _to_go(values).masked_fill(~response_mask, 0.0)


def sequence_penalty(
    divergence: Generator, estimator: Estimator, *, log_ratio: Tensor, response_mask: Tensor, group_ids: Tensor
) -> Tensor:
    """The same at `Place.sequence_reward`, for the log-ratio L of the whole response: f'(U) at U = exp(L) for `score`.

    Less the mean over the other responses to the prompt, a baseline that leaves the expected gradient alone; group_ids [B].
    """
    total = log_ratio.detach().masked_fill(~response_mask, 0.0).sum(-1)
    penalty = divergence.slope(total) if estimator is Estimator.score else _rewarded(divergence, estimator, total)
    return _over_tokens(_less_the_others(penalty, group_ids), response_mask)


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """How far a group's responses are from the target."""

    penalty: Tensor  # [B, T]: what their advantages are the negative of
    log_partition: Tensor  # [B]: log Z of the prompt, estimated from its other responses
    gap: Tensor  # [B]: log Z - (reward / coef - L), whose mean is KL(policy || target)


def distance_to_target(
    divergence: Generator, *, log_ratio: Tensor, response_mask: Tensor, group_ids: Tensor, rewards: Tensor, coef: float
) -> Target:
    """f-DPG: the score gradient of D_f(policy || target) with target = ref exp(reward / coef) / Z, for whole responses.

        log t = L - reward / coef + log Z,   penalty = f'(t) less the mean over the other responses to the prompt
        Z     = mean over the other responses of exp(reward / coef - L)

    rewards [B]. For the reverse KL this is KL-penalised RL divided by coef; forward_kl is DPG. Z is estimated from the same group
    instead of over the run as in the paper, and without the response itself, so that a response does not move its own target; a
    prompt with one response has Z = its own. Source: arXiv:2302.08215 eq. 4; the target: arXiv:2205.11275.
    """
    total = log_ratio.detach().masked_fill(~response_mask, 0.0).sum(-1)
    log_weight = rewards.to(total.dtype) / coef - total
    same = group_ids.unsqueeze(0) == group_ids.unsqueeze(1)
    others = same & ~torch.eye(len(total), dtype=torch.bool, device=total.device)
    alone = ~others.any(-1)
    others = torch.where(alone.unsqueeze(-1), same, others)
    log_partition = log_weight.expand_as(same).masked_fill(~others, -torch.inf).logsumexp(-1) - others.sum(-1).log()
    gap = log_partition - log_weight
    penalty = _less_the_others(divergence.slope(gap), group_ids)
    return Target(penalty=_over_tokens(penalty, response_mask), log_partition=log_partition, gap=gap)


def _less_the_others(values: Tensor, group_ids: Tensor) -> Tensor:
    """[B] -> less the mean of the group's other rows: a baseline that leaves the expected gradient alone."""
    same = (group_ids.unsqueeze(0) == group_ids.unsqueeze(1)).to(values.dtype)
    return values - (same @ values - values) / (same.sum(-1) - 1).clamp(min=1)


def _over_tokens(values: Tensor, response_mask: Tensor) -> Tensor:
    """[B] -> [B, T], 0 off the mask."""
    return values.unsqueeze(-1).expand(response_mask.shape).masked_fill(~response_mask, 0.0)


def _rewarded(divergence: Generator, estimator: Estimator, log_ratio: Tensor) -> Tensor:
    match estimator:
        case Estimator.k1:
            return log_ratio
        case Estimator.k2:
            return log_ratio.square() / 2
        case Estimator.k3 | Estimator.naive:
            return divergence.value(log_ratio)
        case _:
            raise AssertionError(f"{estimator.name} has no meaning in a reward")


def _to_go(values: Tensor) -> Tensor:
    """[B, T] -> at each t the sum over s >= t."""
    return torch.flip(torch.flip(values, (-1,)).cumsum(-1), (-1,))
