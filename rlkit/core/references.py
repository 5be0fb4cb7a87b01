"""Which policy divergences are measured from: a frozen one, or one that follows the policy by a rule on its weights."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from rlkit.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class Reference:
    """Base of the references that divergences are measured against."""


@dataclass(kw_only=True, slots=True)
class InitialReference(Reference):
    """The model that the run starts from, frozen. No worker starts unless a strategy needs it."""


@dataclass(kw_only=True, slots=True)
class ModelReference(Reference):
    """Another model with the policy's vocabulary, frozen."""

    path: str  # a model that rlkit knows by name, a folder in Hugging Face format, or a hub id


@dataclass(kw_only=True, slots=True)
class Soup(Reference):
    """The average of several models' weights, frozen (SALSA).

        theta_ref = sum_i share_i * theta_i

    in float32, over all parameters. The models have one architecture and the policy's vocabulary; their average means something
    where they were trained from one base. Source: arXiv:2411.01798, with two models of half a share each.
    """

    paths: list[str]  # of the models, each as model.path
    weights: list[float] = field(default_factory=list)  # each model's share, 1 together; empty: the same of each

    def __post_init__(self):
        paths, weights = list(self.paths), list(self.weights)
        if len(paths) < 2:
            raise ConfigError(
                f"reference.paths=[{','.join(paths)}]: an average needs two models. Write two or more, or reference=model."
            )
        if weights and len(weights) != len(paths):
            raise ConfigError(
                f"reference.weights={weights}: {len(weights)} shares for the {len(paths)} models of reference.paths. Write one for "
                "each, or [] for the same of each."
            )
        if weights and not (all(share >= 0 for share in weights) and math.isclose(sum(weights), 1, abs_tol=1e-6)):
            raise ConfigError(f"reference.weights={weights}: not shares of one model. Write numbers from 0 that sum to 1.")

    @property
    def shares(self) -> list[float]:
        """Of each model."""
        return list(self.weights) or [1 / len(self.paths)] * len(self.paths)


def average(tensors: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """sum_i shares[i] * tensors[i] of equal shapes, in at least float32."""
    total = torch.zeros_like(tensors[0], dtype=torch.promote_types(tensors[0].dtype, torch.float32))
    for tensor, share in zip(tensors, shares, strict=True):
        total.add_(tensor.to(total.dtype), alpha=share)
    return total


@dataclass(kw_only=True, slots=True)
class GeometricMixture(Reference):
    """The initial model and a second one multiplied, each to the power of its share, and normalised; both frozen.

        log ref = log_softmax((1 - share) * log initial + share * log second)

    over the whole vocabulary, at the sampler's temperature. Source: Nash-MD, arXiv:2312.00886, whose opponent it is.
    """

    path: str  # of the second model, as model.path
    share: float = 0.5  # of the second model

    def __post_init__(self):
        if not 0 < self.share < 1:
            raise ConfigError(
                f"reference.share={self.share}: one model alone. Write a number in (0, 1), or reference=initial or model."
            )


def side_by_side(first: Tensor, second: Tensor, *, share: float) -> Tensor:
    """[n, H + H']: what the heads [V, H] and [V, H'] side by side turn into the geometric mixture's logits.

    A log-probability is a logit less a constant of its position, which the mixture's own softmax takes out again:

        log_softmax((1 - share) * log a + share * log b) = log_softmax((1 - share) * logits_a + share * logits_b)

    and that is one linear head, so that a mixture is computed, sent and compared as any other model's hidden states are.
    """
    return torch.cat([(1 - share) * first, share * second], dim=-1)


@dataclass(frozen=True, slots=True)
class Weights:
    """One tensor of a reference that moves, in float32."""

    ref: Tensor  # what scores
    average: Tensor | None = None  # what a rule with `has_average` remembers beside it


@dataclass(kw_only=True, slots=True)
class MovingReference(Reference, ABC):
    """Base of the references that follow the policy. They start as the initial model.

    Steps are batches of rollouts, counted from 1. The reference moves between two of them: its log-probabilities are computed
    once a batch, and optimiser steps on one batch compare with one reference.
    """

    has_average: ClassVar[bool] = False
    uses_initial: ClassVar[bool] = False  # whether `update` is to be given the initial weights

    def start(self, initial: Tensor) -> Weights:
        """Before the first step."""
        return Weights(ref=initial, average=initial.clone() if self.has_average else None)

    def due(self, step: int) -> bool:
        """Whether it moves after this step."""
        return step > 0

    @abstractmethod
    def update(self, weights: Weights, *, policy: Tensor, initial: Tensor | None, step: int) -> Weights:
        """The next version of one tensor, from the policy's after `step`. All of one shape, float32; none is changed."""


@dataclass(kw_only=True, slots=True)
class PeriodicReference(MovingReference):
    """Base of the references that move now and then."""

    every: int = 512  # steps

    def __post_init__(self):
        if self.every < 1:
            raise ConfigError(f"reference.every={self.every}: write 1 (after every step) or more.")

    def due(self, step: int) -> bool:
        """After every so many steps."""
        return step > 0 and step % self.every == 0


@dataclass(kw_only=True, slots=True)
class Refresh(PeriodicReference):
    """The policy as it was at the last of every so many steps.

        ref <- policy

    Source: TR-DPO's hard update, arXiv:2404.09656, with an interval of 512; with a new optimiser it is ProRL's reset,
    arXiv:2505.24864, which has no fixed interval.
    """

    reset_optimizer: bool = False  # the optimiser forgets its moments then, too

    def update(self, weights: Weights, *, policy: Tensor, initial: Tensor | None, step: int) -> Weights:
        """The policy."""
        return Weights(ref=policy)


@dataclass(kw_only=True, slots=True)
class SoftRefresh(PeriodicReference):
    """Goes a share of the way to the policy after every so many steps (TR-DPO).

        ref <- (1 - alpha) * ref + alpha * policy

    Source: arXiv:2404.09656; defaults as in TRL. alpha=1 is `refresh`.
    """

    alpha: float = 0.6  # share of the way

    def __post_init__(self):
        PeriodicReference.__post_init__(self)
        if not 0 < self.alpha <= 1:
            raise ConfigError(f"reference.alpha={self.alpha}: not a share of the way to the policy. Write a number in (0, 1].")

    def update(self, weights: Weights, *, policy: Tensor, initial: Tensor | None, step: int) -> Weights:
        """A point between reference and policy."""
        return Weights(ref=torch.lerp(weights.ref, policy, self.alpha))


@dataclass(kw_only=True, slots=True)
class EMAReference(MovingReference):
    """The exponential moving average of the policy over all steps.

        ref <- decay * ref + (1 - decay) * policy

    Source: WARP, arXiv:2406.16768, whose anchor of the KL it is, with a rate of 0.01.
    """

    decay: float = 0.99  # what stays of the old average; 0.99 to 0.9999 are usual

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ConfigError(f"reference.decay={self.decay}: write a number in [0, 1), or reference=initial for one that stays.")

    def update(self, weights: Weights, *, policy: Tensor, initial: Tensor | None, step: int) -> Weights:
        """A little nearer to the policy."""
        return Weights(ref=torch.lerp(weights.ref, policy, 1 - self.decay))


@dataclass(kw_only=True, slots=True)
class BEMAReference(PeriodicReference):
    """A moving average of the policy without its lag: bias-corrected by how far the policy has got (BEMA).

        average <- (1 - b) * average + b * policy          with b = (rho + gamma * step)^-kappa
        ref      = average + a * (policy - initial)        with a = (rho + gamma * step)^-eta

    The average starts at the initial weights. Source: arXiv:2508.00180; defaults and the order of the two as in TRL.
    """

    has_average: ClassVar[bool] = True
    uses_initial: ClassVar[bool] = True
    every: int = 400  # steps
    kappa: float = 0.5  # how fast a step's weight in the average falls
    eta: float = 0.2  # how fast the correction fades
    rho: float = 10.0  # lag
    gamma: float = 1.0  # of one step

    def __post_init__(self):
        PeriodicReference.__post_init__(self)
        wrong = [f"reference.{key}={getattr(self, key)}" for key in ("kappa", "eta", "gamma") if not getattr(self, key) >= 0]
        if wrong:
            raise ConfigError(f"{', '.join(wrong)}: write 0 or more; kappa=0.5, eta=0.2 and gamma=1 are usual.")
        if not self.rho >= 1:
            raise ConfigError(
                f"reference.rho={self.rho}: the first steps would go beyond the policy. Write 1 or more; 10 is usual."
            )

    def rates(self, step: int) -> tuple[float, float]:
        """(a, b): of the correction, and of the policy in the average."""
        time = self.rho + self.gamma * step
        return time**-self.eta, time**-self.kappa

    def update(self, weights: Weights, *, policy: Tensor, initial: Tensor | None, step: int) -> Weights:
        """The next average, and the reference from it."""
        assert weights.average is not None
        assert initial is not None
        correction, rate = self.rates(step)
        following = torch.lerp(weights.average, policy, rate)
        return Weights(ref=following + correction * (policy - initial), average=following)
