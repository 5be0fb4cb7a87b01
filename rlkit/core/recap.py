"""Weights of a run's objectives, moved by how each of them progresses: of data sources, reward components and supervised terms."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

from rlkit.errors import ConfigError

LIMIT = 10.0  # of both signals: a reward that was 0 throughout would otherwise take all weight
TINY = 1e-15  # in the denominators of RECAP's code
SUPERVISED = "imitation"  # the objective that is a loss


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectivesState:
    """What was measured of each objective in the newest batches that had it, oldest first; plain values, for a checkpoint."""

    rewards: dict[str, list[float]] = field(default_factory=dict)  # mean reward of a batch
    losses: dict[str, list[float]] = field(default_factory=dict)  # loss of a supervised term


@dataclass(frozen=True, kw_only=True, slots=True)
class Judged:
    """One objective between two steps."""

    convergence: float  # below 1: it improves; 1: it stands still
    instability: float  # at least 0
    weight: float  # of the next step; the mean over all objectives is 1


class ApplyTo(Enum):
    """What an objective's weight multiplies."""

    reward = "reward"  # its component of the reward, before advantages; an objective is a source's component
    advantage = "advantage"  # its rows' advantages, after they were normalised; an objective is a source
    loss = "loss"  # its rows' policy loss; an objective is a source


@dataclass(kw_only=True, slots=True)
class ObjectiveWeights(ABC):
    """Base of the weights of objectives."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def initial(self) -> ObjectivesState:
        """Before anything was measured."""
        return ObjectivesState()

    @abstractmethod
    def judge(self, state: ObjectivesState, *, done: float) -> dict[str, Judged]:
        """Every objective that was measured, with its weight for the next step. `done`: the share of the run's steps, in [0, 1).

        An objective that is not there weighs 1; so does all of an empty answer.
        """

    @abstractmethod
    def update(self, state: ObjectivesState, *, rewards: Mapping[str, float], losses: Mapping[str, float]) -> ObjectivesState:
        """With one batch's mean reward of each objective in it, and the loss of each supervised one."""


@dataclass(kw_only=True, slots=True)
class NoObjectiveWeights(ObjectiveWeights):
    """Every objective weighs 1."""

    def judge(self, state: ObjectivesState, *, done: float) -> dict[str, Judged]:
        """Nothing is weighed."""
        return {}

    def update(self, state: ObjectivesState, *, rewards: Mapping[str, float], losses: Mapping[str, float]) -> ObjectivesState:
        """Nothing is remembered."""
        return state


@dataclass(kw_only=True, slots=True)
class Reweighting(ObjectiveWeights, ABC):
    """Base of RECAP's two forms: a convergence and an instability of each objective, from its newest 2 * window values.

    While there are fewer, the halves are shorter; of a single value nothing is known, and it stands still (1 and 0). Both signals
    are held to [0, 10]. Weights follow from what was measured up to the batch before, and carry no gradient. A supervised term's
    loss is multiplied whatever apply_to says.
    """

    window: int = 10  # values in each of the two halves that are compared
    temperature: float = 5.0  # of the softmax over objectives: the larger, the nearer all weights are to 1
    apply_to: ApplyTo = ApplyTo.advantage

    def __post_init__(self):
        if self.window < 1:
            raise ConfigError(f"objective_weights.window={self.window}: nothing is compared. Write 1 or more; 10 is usual.")
        if not self.temperature > 0:
            raise ConfigError(f"objective_weights.temperature={self.temperature}: write a number above 0; 5 is usual.")

    @abstractmethod
    def signals(self, values: Sequence[float], *, is_loss: bool) -> tuple[float, float]:
        """Convergence and instability from two or more values, oldest first, not held to any range yet."""

    @abstractmethod
    def mix(self, convergence: Tensor, instability: Tensor, *, done: float) -> Tensor:
        """The objectives' shares, [K] float64, which sum to 1, from their signals [K]."""

    def judge(self, state: ObjectivesState, *, done: float) -> dict[str, Judged]:
        """As in the base class; the weights sum to the number of objectives."""
        kinds = ((state.rewards, False), (state.losses, True))
        found = {name: self._signals(values, is_loss) for histories, is_loss in kinds for name, values in histories.items()}
        if not found:
            return {}
        convergence, instability = torch.tensor(list(found.values()), dtype=torch.float64).unbind(-1)
        weights = (len(found) * self.mix(convergence, instability, done=done)).tolist()
        return {
            name: Judged(convergence=c, instability=i, weight=weight)
            for (name, (c, i)), weight in zip(found.items(), weights, strict=True)
        }

    def _signals(self, values: Sequence[float], is_loss: bool) -> tuple[float, float]:
        if len(values) < 2:
            return 1.0, 0.0
        convergence, instability = self.signals(values, is_loss=is_loss)
        return min(max(convergence, 0.0), LIMIT), min(max(instability, 0.0), LIMIT)

    def update(self, state: ObjectivesState, *, rewards: Mapping[str, float], losses: Mapping[str, float]) -> ObjectivesState:
        """A value that is not finite is left out."""
        return ObjectivesState(rewards=self._grown(state.rewards, rewards), losses=self._grown(state.losses, losses))

    def _grown(self, histories: Mapping[str, list[float]], values: Mapping[str, float]) -> dict[str, list[float]]:
        grown = dict(histories)
        for name, value in values.items():
            if math.isfinite(value):
                grown[name] = [*grown.get(name, []), value][-2 * self.window :]
        return grown


@dataclass(kw_only=True, slots=True)
class Recap(Reweighting):
    """Moves weight to objectives that stand still or waver, from those that improve (RECAP, as in the paper).

        c      = mean of the newest half / mean of the half before
        i      = std of the newest half / (both means together)
        weight = K * softmax over the K objectives of (c + i) / temperature

    of losses. A reward counts as the loss 1 - (reward - reward_low) / (reward_high - reward_low), held to [0, 1], because the
    loss of a policy gradient says nothing about progress; this, the values of c where a mean is 0 (1 if both are) and the bounds
    on c and i are this project's. The authors' README weighs the two signals by alpha and 1 - alpha: with alpha = 1/2, at half
    this temperature, that is the same. Source: arXiv:2510.21978 eq. 1, from a summary that quotes it.
    """

    reward_low: float = 0.0  # the reward of a useless response
    reward_high: float = 1.0  # and of a perfect one

    def __post_init__(self):
        Reweighting.__post_init__(self)
        if not self.reward_low < self.reward_high:
            raise ConfigError(
                f"objective_weights.reward_high={self.reward_high}: not above objective_weights.reward_low={self.reward_low}. "
                "Write the lowest and the highest reward that an objective can give; 0 and 1 are usual."
            )

    def signals(self, values: Sequence[float], *, is_loss: bool) -> tuple[float, float]:
        """As above."""
        losses = torch.tensor(values, dtype=torch.float64)
        if not is_loss:
            losses = (1 - (losses - self.reward_low) / (self.reward_high - self.reward_low)).clamp(0.0, 1.0)
        half = len(losses) // 2
        newest, before = losses[-half:], losses[-2 * half : -half]
        mean, mean_before = float(newest.mean()), float(before.mean())
        both = mean + mean_before
        convergence = mean / mean_before if mean_before > 0 else LIMIT if mean > 0 else 1.0
        return convergence, float(newest.std(correction=0)) / both if both > 0 else 0.0

    def mix(self, convergence: Tensor, instability: Tensor, *, done: float) -> Tensor:
        """One softmax of both signals together."""
        return ((convergence + instability) / self.temperature).softmax(-1)


@dataclass(kw_only=True, slots=True)
class RecapCode(Reweighting):
    """RECAP as its code has it: each signal has a softmax of its own, and rewards are tracked as they are.

        c      = sum of the older half / sum of the newer half, of rewards; newer / older, of losses
        i      = std of all values / their mean
        weight = K * (alpha * softmax(c / temperature) + (1 - alpha) * softmax(i / temperature))

    With apply_to=reward, the code's place, a weight changes the ratio between the components of one prompt's reward; a source
    with one component is untouched where advantages are divided by their group's standard deviation. The bounds on c and i are
    this project's: in the code a reward of 0 throughout makes c 1e15. Source: arXiv:2510.21978; VietHoang1512/recap.
    """

    apply_to: ApplyTo = ApplyTo.reward
    alpha: float | None = 0.5  # share of the convergence's softmax; null: from 1 to 0 over the run (the code's -1)

    def __post_init__(self):
        Reweighting.__post_init__(self)
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ConfigError(f"objective_weights.alpha={self.alpha}: write a share in [0, 1], or null to anneal; 0.5 is usual.")

    def signals(self, values: Sequence[float], *, is_loss: bool) -> tuple[float, float]:
        """As above."""
        tracked = torch.tensor(values, dtype=torch.float64)
        half = len(tracked) // 2
        newer, older = float(tracked[-half:].sum()), float(tracked[-2 * half : -half].sum())
        convergence = newer / (older + TINY) if is_loss else older / (newer + TINY)
        return convergence, float(tracked.std(correction=0)) / (float(tracked.mean()) + TINY)

    def mix(self, convergence: Tensor, instability: Tensor, *, done: float) -> Tensor:
        """Two softmaxes."""
        alpha = 1 - done if self.alpha is None else self.alpha
        shares = [(signal / self.temperature).softmax(-1) for signal in (convergence, instability)]
        return alpha * shares[0] + (1 - alpha) * shares[1]


def weight_entropy(weights: Sequence[float]) -> float:
    """Of the objectives' shares, in nats: log K where all weigh the same."""
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    return float(-torch.xlogy(shares, shares).sum())
