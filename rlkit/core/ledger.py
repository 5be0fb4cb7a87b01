"""What every divergence, estimator and place is worth: expectations over all sequences of a small vocabulary, beside autodiff.

Nothing is sampled, so a bias is a bias. What is measured are the functions that training calls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rlkit.core.divergences import Penalty
from rlkit.core.estimators import Estimator, Place, verdict
from rlkit.errors import ConfigError

VOCABULARY = 3
POSITIONS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Worth:
    """One line of the ledger. Biases are relative: |E[estimate] - exact| / |exact|; None where there is nothing to compare."""

    divergence: str
    place: Place
    estimator: Estimator
    descends: str
    gradient_bias: float  # under samples of the policy
    off_policy_bias: float | None  # under samples of another policy; None in a reward, where the objective's ratio answers for it
    gradient_spread: float  # standard deviation of one sequence's gradient, in units of the exact gradient's norm
    value_bias: float | None  # of the loss's own value; None for one that has no meaning as a number
    is_right: bool  # by the verdict of `core/estimators.py`, which the tests hold against the biases


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """Three tabular policies over all sequences of `POSITIONS` tokens: one trained, its reference, and one that sampled."""

    logits: Tensor  # [S, V] of the trained policy by state: the first token's, then the second's after each first token
    ref_logprobs: Tensor  # [S, V]
    behaviour_logprobs: Tensor  # [S, V]

    @classmethod
    def random(cls, seed: int, spread: float = 1.0) -> World:
        generator = torch.Generator().manual_seed(seed)
        tables = spread * torch.randn(3, 1 + VOCABULARY, VOCABULARY, generator=generator, dtype=torch.float64)
        logits, ref, behaviour = tables
        return cls(logits=logits, ref_logprobs=ref.log_softmax(-1), behaviour_logprobs=behaviour.log_softmax(-1))

    @property
    def sequences(self) -> Tensor:
        """[N, T]: all of them."""
        return torch.cartesian_prod(torch.arange(VOCABULARY), torch.arange(VOCABULARY))

    @property
    def states(self) -> Tensor:
        """[N, T]: the row of the tables that each token was drawn from."""
        first = self.sequences[:, 0]
        return torch.stack([torch.zeros_like(first), 1 + first], -1)

    def of_tokens(self, table: Tensor) -> Tensor:
        """[S, V] -> [N, T]: the sequences' own entries."""
        return table[self.states, self.sequences]


def exact_gradient(world: World, divergence: Penalty, *, off_policy: bool = False) -> tuple[float, Tensor]:
    """The value and the gradient in the logits [S, V] that the divergence has at its place, by autodiff.

    In the loss: the divergences at the visited states, whose frequencies are fixed. In a token reward: of a sum over states whose
    frequencies are the policy's as well. In a sequence reward: between distributions over whole sequences.
    """
    logits = world.logits.clone().requires_grad_()
    table = logits.log_softmax(-1)
    if divergence.place is Place.sequence_reward:
        total, ref_total = world.of_tokens(table).sum(-1), world.of_tokens(world.ref_logprobs).sum(-1)
        value = divergence.exact(total.unsqueeze(0), ref_total.unsqueeze(0)).sum()
    else:
        by_state = divergence.exact(table, world.ref_logprobs)
        reached = (world.behaviour_logprobs if off_policy else table)[0].exp()  # how often each first token is drawn
        if divergence.place is Place.loss:
            reached = reached.detach()
        value = by_state[0] + (reached * by_state[1:]).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    return value.item(), gradient


def sequence_gradients(world: World, divergence: Penalty, *, off_policy: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """What training would compute from each sequence alone: probabilities [N], loss values [N], gradients [N, S, V]."""
    logits = world.logits.clone().requires_grad_()
    table = logits.log_softmax(-1)
    logprobs, ref_logprobs = world.of_tokens(table), world.of_tokens(world.ref_logprobs)
    sampler = world.of_tokens(world.behaviour_logprobs) if off_policy else logprobs.detach()
    mask = torch.ones(logprobs.shape, dtype=torch.bool)
    if divergence.place is Place.loss:
        exact = divergence.exact(table, world.ref_logprobs)[world.states] if divergence.estimator is Estimator.exact else None
        loss = divergence.loss(
            logprobs=logprobs,
            behaviour_logprobs=sampler,
            ref_logprobs=ref_logprobs,
            response_mask=mask,
            exact_values=exact,
        )
    else:
        # A group per sequence: the baseline, which changes no expectation, is a matter of groups and is left out.
        log_ratio, alone = (logprobs - ref_logprobs).detach(), torch.arange(len(logprobs))
        penalty = divergence.penalty(log_ratio=log_ratio, response_mask=mask, group_ids=alone)
        loss = None if penalty is None else penalty * logprobs  # the policy gradient of an advantage of -penalty
    assert loss is not None  # each place has one of the two
    rows = loss.sum(-1)
    gradients = torch.stack([torch.autograd.grad(row, logits, retain_graph=True)[0] for row in rows])
    return sampler.detach().sum(-1).exp(), rows.detach(), gradients


def worth(world: World, divergence: Penalty) -> Worth:
    """One line."""
    value, exact = exact_gradient(world, divergence)
    probabilities, values, gradients = sequence_gradients(world, divergence)
    mean = (probabilities[:, None, None] * gradients).sum(0)
    variance = (probabilities[:, None, None] * (gradients - mean).square()).sum()
    off_policy = None
    if divergence.place is Place.loss:
        weights, _, others = sequence_gradients(world, divergence, off_policy=True)
        _, wanted = exact_gradient(world, divergence, off_policy=True)
        off_policy = relative((weights[:, None, None] * others).sum(0), wanted)
    has_value = divergence.place is Place.loss and divergence.estimator is not Estimator.score
    return Worth(
        divergence=divergence.name,
        place=divergence.place,
        estimator=divergence.estimator,
        descends=divergence.name if divergence.verdict.is_right else divergence.verdict.of,
        gradient_bias=relative(mean, exact),
        off_policy_bias=off_policy,
        gradient_spread=float(variance.sqrt() / exact.norm()),
        value_bias=abs(float((probabilities * values).sum()) - value) / value if has_value else None,
        is_right=divergence.verdict.is_right,
    )


def relative(found: Tensor, wanted: Tensor) -> float:
    """|found - wanted| / |wanted|."""
    return float((found - wanted).norm() / wanted.norm())


def combinations(divergences: dict[str, type[Penalty]]) -> Iterator[Penalty]:
    """Every divergence at every place with every estimator that has a meaning there; biased ones with leave to be so.

    Not at `Place.target`, which has rewards in it and an estimate of Z from a group.
    """
    for cls in divergences.values():
        for place in (Place.loss, Place.token_reward, Place.sequence_reward):
            for estimator in sorted(cls.estimators, key=list(Estimator).index):
                found = verdict(place, estimator)
                if found is not None:
                    yield cls(place=place, estimator=estimator, allow_biased=not found.is_right and not found.is_named)


def refusals(divergences: dict[str, type[Penalty]]) -> Iterator[tuple[str, Place, Estimator, str]]:
    """The combinations that no run is given, or only with `allow_biased`, and why."""
    for name, cls in divergences.items():
        for place in Place:
            for estimator in Estimator:
                try:
                    cls(place=place, estimator=estimator)
                except ConfigError as error:
                    yield name, place, estimator, str(error)


def as_markdown(lines: list[Worth]) -> str:
    """A table."""

    def number(x: float | None) -> str:
        return "" if x is None else "0" if x < 1e-9 else f"{x:.2g}"

    head = "| divergence | place | estimator | descends | gradient bias | off-policy | gradient spread | value bias |"
    rule = "|---|---|---|---|---:|---:|---:|---:|"
    rows = [
        f"| {line.divergence} | {line.place.name} | {line.estimator.name} | {line.descends} | {number(line.gradient_bias)} "
        f"| {number(line.off_policy_bias)} | {number(line.gradient_spread)} | {number(line.value_bias)} |"
        for line in lines
    ]
    return "\n".join([head, rule, *rows])


def ledger(divergences: dict[str, type[Penalty]], seed: int = 0) -> list[Worth]:
    """The whole of it, for one world."""
    world = World.random(seed)
    return [worth(world, divergence) for divergence in combinations(divergences)]
