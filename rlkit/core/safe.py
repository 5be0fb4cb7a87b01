"""A KL penalty that acts only where a run is in danger: above a threshold, harder at low entropy, or while the KL climbs."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from statistics import fmean, pstdev
from typing import ClassVar

import torch
from torch import Tensor

from rlkit.errors import ConfigError

WINDOW = 50  # updates that a phase or a trend looks back over


class KLMode(Enum):
    """How a penalty that was computed from measured numbers reaches the policy; see `Safeguard`."""

    linearised = "linearised"
    direct = "direct"
    literal = "literal"


@dataclass(frozen=True, kw_only=True, slots=True)
class SafeState:
    """All that a safeguard remembers between batches, as plain numbers: JSON keeps every bit of them in a checkpoint."""

    kl: float = 0.0  # the KL that the penalty is about
    penalty: float = 0.0  # its value
    num_updates: int = 0  # that counted; one with a measurement that was not finite does not
    num_active: int = 0  # updates with a penalty above 0
    num_nonfinite: int = 0  # updates that were left out


@dataclass(kw_only=True, slots=True)
class Safeguard(ABC):
    """Base of the penalties that wait for danger."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def initial(self) -> SafeState:
        """The state before the first batch."""

    @abstractmethod
    def update(self, state: SafeState, *, kl: float, entropy: float, reward: float) -> SafeState:
        """The state after a batch of rollouts, called once for each.

        kl is the mean over tokens of logprobs - ref_logprobs, entropy the mean over responses of their tokens' mean entropy,
        reward the mean raw reward: of the whole batch, all ranks. Where one of them is not finite, the state stays as it was,
        and that is counted.
        """

    @abstractmethod
    def coef(self, state: SafeState) -> float:
        """What multiplies a KL term of the loss, where the penalty is linear in the KL; else 0."""

    @abstractmethod
    def loss(self, state: SafeState, kl: Tensor) -> Tensor | None:
        """What the loss gains, a scalar; None adds nothing.

        kl is that of the whole present step: a scalar whose gradient is the divergence's.
        """

    @abstractmethod
    def metrics(self, state: SafeState) -> dict[str, float]:
        """What to log after an update, by name; the caller puts `safe/` in front."""


@dataclass(kw_only=True, slots=True)
class NoSafeguard(Safeguard):
    """No penalty that waits for danger."""

    def initial(self) -> SafeState:
        """Nothing to remember."""
        return SafeState()

    def update(self, state: SafeState, *, kl: float, entropy: float, reward: float) -> SafeState:
        """The state itself."""
        return state

    def coef(self, state: SafeState) -> float:
        """0."""
        return 0.0

    def loss(self, state: SafeState, kl: Tensor) -> None:
        """Adds nothing."""

    def metrics(self, state: SafeState) -> dict[str, float]:
        """None."""
        return {}


@dataclass(kw_only=True, slots=True)
class KLPenalty(Safeguard):
    """Base of the penalties that are a function of one number, the KL of the policy from its reference.

    What a penalty of measured numbers does to the policy is the mode's choice, for a KL that carries a gradient:

        linearised  (slope of the penalty at the measured KL) * KL    gradient: that slope times the KL's; linear in the KL, so
                                                                      that it can be summed over microbatches as `coef` * KL
        direct      penalty(KL)                                       gradient: the penalty's at the present KL; needs the KL
                                                                      of the whole step at once
        literal     the penalty's value                               no gradient: the official code, whose KL is a number

    The slope leaves out that the measured KL may be an average over time, of which the present one is only a part.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"ref_logprobs", "old_pass", "old_entropy"})
    kl_mode: KLMode = KLMode.linearised  # how the penalty reaches the policy: linearised, direct or literal

    def update(self, state: SafeState, *, kl: float, entropy: float, reward: float) -> SafeState:
        """As in the base class."""
        if not all(map(math.isfinite, (kl, entropy, reward))):
            return replace(state, num_nonfinite=state.num_nonfinite + 1)
        state = self.observe(state, kl, entropy, reward)
        penalty = float(self.penalty(state, torch.tensor(state.kl, dtype=torch.float64)))
        num_active = state.num_active + (penalty > 0)
        return replace(state, penalty=penalty, num_active=num_active, num_updates=state.num_updates + 1)

    @abstractmethod
    def observe(self, state: SafeState, kl: float, entropy: float, reward: float) -> SafeState:
        """The state with its memory brought up to this batch, and the KL that the penalty is about."""

    @abstractmethod
    def penalty(self, state: SafeState, kl: Tensor) -> Tensor:
        """The penalty for a KL, a scalar; differentiable in it."""

    @abstractmethod
    def slope(self, state: SafeState) -> float:
        """The penalty's derivative at state.kl."""

    def coef(self, state: SafeState) -> float:
        """The slope where the penalty is linearised."""
        return self.slope(state) if self.kl_mode is KLMode.linearised else 0.0

    def loss(self, state: SafeState, kl: Tensor) -> Tensor:
        """By the mode."""
        match self.kl_mode:
            case KLMode.linearised:
                return self.slope(state) * kl
            case KLMode.direct:
                return self.penalty(state, kl)
            case KLMode.literal:
                return torch.full_like(kl, state.penalty, requires_grad=False)

    def metrics(self, state: SafeState) -> dict[str, float]:
        """The penalty, and the share of the updates that had one."""
        active = state.num_active / max(state.num_updates, 1)
        return {"penalty": state.penalty, "coef": self.coef(state), "active_frac": active, "nonfinite": state.num_nonfinite}


class Phase(IntEnum):
    """Where a run stands, by its rewards."""

    warmup = 0  # too few rewards to tell
    climbing = 1
    plateau = 2
    converged = 3


PATIENCE = {Phase.warmup: 1.5, Phase.climbing: 1.2, Phase.plateau: 0.8, Phase.converged: 1.0}  # multiplies the threshold


@dataclass(frozen=True, kw_only=True, slots=True)
class EntropyGatedState(SafeState):
    """The memory of `EntropyGated`; `kl` is the short average."""

    kl_long: float = 0.0  # a slower average, for the log
    reward_ema: float = 0.0
    velocity: float = 0.0  # change of reward_ema in the last update
    velocity_error: float = 0.0
    integral: float = 0.0  # sum of the velocity's errors, bounded
    pid: float = 0.0  # what the threshold gains
    rewards: tuple[float, ...] = ()  # of the last two windows
    phase: int = int(Phase.warmup)
    threshold: float = 0.0
    gate: float = 0.0

    def __post_init__(self):
        object.__setattr__(self, "rewards", tuple(self.rewards))  # JSON has lists only


@dataclass(kw_only=True, slots=True)
class EntropyGated(KLPenalty):
    """Penalises KL above a threshold that follows the reward's progress, more the lower the entropy (SAFE).

        short     = .9 * short + .1 * kl
        velocity  = change of the reward's running mean;  error = velocity - target_velocity
        pid       = kp * error + ki * (sum of errors, within +-1) + kd * (change of error)
        threshold = clip((base_threshold + pid) * patience, low, high),  patience by the phase of the run
        gate      = max(0.5, entropy_floor / (entropy + 0.1))
        penalty   = coef * (short - threshold)^2 * gate where short > threshold, else 0

    The phase is warm-up until 50 rewards are known, climbing while the mean of the last 50 is more than 0.01 above that of the
    50 before, converged once they vary by less than 0.02 around more than 0.7, and a plateau otherwise.

    Source: the official code, ryyzn9/SAFE, where the penalty has no gradient (`literal`) and the controller runs once per pass
    over a batch, so that every second velocity is an echo; the linearised and the direct mode are rlkit's.
    """

    penalty_coef: float = 0.1
    base_threshold: float = 0.3  # of the KL, mean over tokens, in nats
    low: float = 0.1  # lower bound on the threshold
    high: float = 0.6  # upper bound on the threshold
    entropy_floor: float = 2.0  # nats; the gate is above 1 for an entropy of 0.1 less
    target_velocity: float = 0.001  # of the reward's running mean, per batch
    kp: float = 0.3  # of the velocity's error
    ki: float = 0.01  # of the errors' sum
    kd: float = 0.05  # of the error's change

    def __post_init__(self):
        for key in ("penalty_coef", "entropy_floor", "kp", "ki", "kd"):
            if not 0 <= (value := getattr(self, key)) < math.inf:
                raise ConfigError(f"safeguard.{key}={value}: write a finite value, 0 or more.")
        if not 0 < self.low <= self.high < math.inf:
            raise ConfigError(f"safeguard.low={self.low}, safeguard.high={self.high}: write bounds above 0, the lower one first.")
        for key in ("base_threshold", "target_velocity"):
            if not math.isfinite(value := getattr(self, key)):
                raise ConfigError(f"safeguard.{key}={value}: write a finite number.")

    def initial(self) -> EntropyGatedState:
        """The averages start at 0, and the first batch's reward starts its own."""
        return EntropyGatedState()

    def observe(self, state: SafeState, kl: float, entropy: float, reward: float) -> EntropyGatedState:
        """The state with the batch's averages, phase, threshold and gate."""
        assert isinstance(state, EntropyGatedState)
        state = self._follow_reward(state, reward)
        rewards = (*state.rewards, reward)[-2 * WINDOW :]
        phase = phase_of(rewards)
        return replace(
            state,
            kl=0.9 * state.kl + 0.1 * kl,
            kl_long=0.99 * state.kl_long + 0.01 * kl,
            rewards=rewards,
            phase=int(phase),
            threshold=min(max((self.base_threshold + state.pid) * PATIENCE[phase], self.low), self.high),
            gate=max(0.5, self.entropy_floor / (entropy + 0.1)),
        )

    def penalty(self, state: SafeState, kl: Tensor) -> Tensor:
        """0 up to the threshold."""
        assert isinstance(state, EntropyGatedState)
        return self.penalty_coef * (kl - state.threshold).relu().square() * state.gate

    def slope(self, state: SafeState) -> float:
        """0 up to the threshold."""
        assert isinstance(state, EntropyGatedState)
        return 2 * self.penalty_coef * max(state.kl - state.threshold, 0.0) * state.gate

    def metrics(self, state: SafeState) -> dict[str, float]:
        """With the averages, the threshold and what moved it."""
        assert isinstance(state, EntropyGatedState)
        return KLPenalty.metrics(self, state) | {
            "kl_short": state.kl,
            "kl_long": state.kl_long,
            "threshold": state.threshold,
            "gate": state.gate,
            "phase": state.phase,
            "pid": state.pid,
            "reward_velocity": state.velocity,
        }

    def _follow_reward(self, state: EntropyGatedState, reward: float) -> EntropyGatedState:
        """The state with the reward's running mean, its velocity and what the threshold gains from that."""
        if state.num_updates == 0:
            return replace(state, reward_ema=reward)
        reward_ema = 0.95 * state.reward_ema + 0.05 * reward
        velocity = reward_ema - state.reward_ema
        error = velocity - self.target_velocity
        integral = min(max(state.integral + error, -1.0), 1.0)
        pid = self.kp * error + self.ki * integral + self.kd * (error - state.velocity_error)
        return replace(state, reward_ema=reward_ema, velocity=velocity, velocity_error=error, integral=integral, pid=pid)


def phase_of(rewards: tuple[float, ...]) -> Phase:
    """From the rewards of up to two windows, oldest first; with less than two, the older window is the newer one."""
    if len(rewards) < WINDOW:
        return Phase.warmup
    recent, old = rewards[-WINDOW:], rewards[:WINDOW] if len(rewards) >= 2 * WINDOW else rewards[-WINDOW:]
    if fmean(recent) > fmean(old) + 0.01:
        return Phase.climbing
    return Phase.converged if pstdev(recent) < 0.02 and fmean(recent) > 0.7 else Phase.plateau


@dataclass(frozen=True, kw_only=True, slots=True)
class AsymmetricState(SafeState):
    """The memory of `Asymmetric`; `kl` is the newest."""

    kls: tuple[float, ...] = ()  # of the last window

    def __post_init__(self):
        object.__setattr__(self, "kls", tuple(self.kls))  # JSON has lists only


@dataclass(kw_only=True, slots=True)
class Asymmetric(KLPenalty):
    """Penalises KL above a fixed threshold, and KL that climbs; a falling one is let alone (SAFE's asymmetric variant).

        trend   = (kl - the kl 49 batches earlier) / 50, from the 50th batch on
        penalty = coef * (kl - threshold)^2 where kl > threshold  +  trend_coef * trend^2 where trend > 0

    Source: the official code, ryyzn9/SAFE.
    """

    penalty_coef: float = 0.1
    threshold: float = 0.3  # of the KL, mean over tokens, in nats
    trend_coef: float = 5.0

    def __post_init__(self):
        for key in ("penalty_coef", "threshold", "trend_coef"):
            if not 0 <= (value := getattr(self, key)) < math.inf:
                raise ConfigError(f"safeguard.{key}={value}: write a finite value, 0 or more.")

    def initial(self) -> AsymmetricState:
        """Without a history."""
        return AsymmetricState()

    def observe(self, state: SafeState, kl: float, entropy: float, reward: float) -> AsymmetricState:
        """The state with the batch's KL; entropy and reward have no say."""
        assert isinstance(state, AsymmetricState)
        return replace(state, kl=kl, kls=(*state.kls, kl)[-WINDOW:])

    def penalty(self, state: SafeState, kl: Tensor) -> Tensor:
        """For kl in the place of the newest."""
        above = (kl - self.threshold).relu().square()
        return self.penalty_coef * above + self.trend_coef * self._trend(state, kl).relu().square()

    def slope(self, state: SafeState) -> float:
        """0 for a KL below the threshold that does not climb."""
        trend = float(self._trend(state, torch.tensor(state.kl, dtype=torch.float64)))
        return 2 * (self.penalty_coef * max(state.kl - self.threshold, 0.0) + self.trend_coef * max(trend, 0.0) / WINDOW)

    def metrics(self, state: SafeState) -> dict[str, float]:
        """With the KL and its trend."""
        trend = float(self._trend(state, torch.tensor(state.kl, dtype=torch.float64)))
        return KLPenalty.metrics(self, state) | {"kl": state.kl, "kl_trend": trend}

    def _trend(self, state: SafeState, kl: Tensor) -> Tensor:
        assert isinstance(state, AsymmetricState)
        return (kl - state.kls[0]) / WINDOW if len(state.kls) == WINDOW else torch.zeros_like(kl)
