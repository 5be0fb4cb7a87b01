"""Controllers that hold a measured value at a target by moving a coefficient."""

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar

from rlkit.core.control import Control, ControlState
from rlkit.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class FeedbackState(ControlState):
    """The memory that all controllers with a target share."""

    sign: int  # 1: raising the coefficient raises what is measured; -1: lowers it
    measured: float = 0.0  # the newest that was finite; nothing yet while num_updates is 0


@dataclass(kw_only=True, slots=True)
class Feedback(Control):
    """Base of the controllers that hold a measured value at a target."""

    target: float  # of what is measured, in its unit: nats per token for entropy/mean and kl/ref_token_mean

    def __post_init__(self):
        if not math.isfinite(self.target):
            raise ConfigError(f"target={self.target}: nothing measured comes near it; write a finite number.")

    def initial(self, coef: float, *, sign: int) -> FeedbackState:
        """The state before the first step."""
        assert sign in (-1, 1), sign
        return FeedbackState(coef=coef, sign=sign)

    def update(self, state: ControlState, measured: float, num_sequences: int) -> FeedbackState:
        """The state after one step; see the base class."""
        assert isinstance(state, FeedbackState)
        if not math.isfinite(measured):
            return replace(state, num_nonfinite=state.num_nonfinite + 1)
        state = replace(state, measured=float(measured), num_updates=state.num_updates + 1)
        moved = self.respond(state, num_sequences)
        return replace(moved, action=moved.coef - state.coef)

    @abstractmethod
    def respond(self, state: FeedbackState, num_sequences: int) -> FeedbackState:
        """The state with the next coefficient; measured and num_updates are those of this update already."""

    def error(self, state: FeedbackState) -> float:
        """What the controller acts on: above 0 where the coefficient is too low."""
        return state.sign * (self.target - state.measured)

    def metrics(self, state: ControlState) -> dict[str, float]:
        """As in the base class, with the target and, once something was measured, the measurement and its error."""
        assert isinstance(state, FeedbackState)
        report = Control.metrics(self, state) | {"setpoint": self.target}
        if state.num_updates:
            report |= {"measured": state.measured, "error": self.error(state)}
        return report


@dataclass(kw_only=True, slots=True)
class Bounded(Feedback):
    """Base of the controllers that keep their coefficient within bounds."""

    by_factors: ClassVar[bool] = False  # whether they multiply it, so that it must stay above 0
    low: float = 0.0  # lower bound on the coefficient
    high: float = 1.0  # upper bound on the coefficient

    def __post_init__(self):
        Feedback.__post_init__(self)
        if self.by_factors and not self.low > 0:
            raise ConfigError(f"low={self.low}: the coefficient moves by factors, and 0 would hold it; write more than 0.")
        if not -math.inf < self.low <= self.high < math.inf:
            raise ConfigError(f"low={self.low}, high={self.high}: write finite bounds, the lower one first.")

    def check(self, *, coef: float, num_sequences: int) -> None:
        """Raises ConfigError where the term starts outside the bounds."""
        if not self.low <= coef <= self.high:
            raise ConfigError(f"coef={coef}: a start outside of low={self.low} and high={self.high}; move the start or a bound.")

    def lowest(self, coef: float) -> float:
        """The lower bound."""
        return self.low

    def saturated(self, state: ControlState) -> int:
        """-1 at the lower bound, 1 at the upper one, 0 between them."""
        return self._side(state.coef)

    def _side(self, coef: float) -> int:
        return (coef >= self.high) - (coef <= self.low)

    def _added(self, coef: float, step: float) -> float:
        """coef + step, or its bound; for `by_factors` coef * exp(step), exactly a bound where it is beyond, without an overflow."""
        if not self.by_factors:
            return _clip(coef + step, self.low, self.high)
        if step <= math.log(self.low / coef):
            return self.low
        return self.high if step >= math.log(self.high / coef) else coef * math.exp(step)


@dataclass(kw_only=True, slots=True)
class Proportional(Feedback):
    """Multiplies the coefficient by a little more or less than 1, as the measurement's distance from its target says.

        error = clip(sign * (1 - measured / target), -max_error, max_error)
        coef <- coef * (1 + error * num_sequences / horizon)

    Source: arXiv:1909.08593 sec. 2.2, for the KL penalty; the horizon as in its code and in volcengine/verl. There a target of
    6 is the KL of a whole response: one for the mean over tokens is far smaller.
    """

    horizon: float = 10000.0  # responses over which an error of 1 would double the coefficient
    max_error: float = 0.2  # bound on the relative error

    def __post_init__(self):
        _check_positive(self.target)
        for key in ("horizon", "max_error"):
            if not 0 < (value := getattr(self, key)) < math.inf:
                raise ConfigError(f"{key}={value}: write a finite value above 0; horizon=10000, max_error=0.2 are usual.")

    def check(self, *, coef: float, num_sequences: int) -> None:
        """Raises ConfigError where the coefficient is 0, or one step could take it to 0 or below."""
        Control.check(self, coef=coef, num_sequences=num_sequences)
        if not coef > 0:
            raise ConfigError(f"coef={coef}: is where it starts, and it moves by factors; start above 0.")
        self._check_step(num_sequences)

    def lowest(self, coef: float) -> float:
        """Above 0, however little."""
        return math.ulp(0.0)

    def respond(self, state: FeedbackState, num_sequences: int) -> FeedbackState:
        """Raises ConfigError as `check` does."""
        self._check_step(num_sequences)
        return replace(state, coef=state.coef * (1 + self.error(state) * num_sequences / self.horizon))

    def error(self, state: FeedbackState) -> float:
        """Relative to the target, within its bound."""
        return _clip(Feedback.error(self, state) / self.target, -self.max_error, self.max_error)

    def _check_step(self, num_sequences: int) -> None:
        if not self.max_error * num_sequences < self.horizon:
            raise ConfigError(
                f"horizon={self.horizon}: one step over {num_sequences} responses could take the coefficient to 0 or "
                f"below, for good; write more than {self.max_error * num_sequences:g}, 10000 is usual."
            )


@dataclass(kw_only=True, slots=True)
class Doubling(Bounded):
    """Halves or doubles the coefficient when the measurement is far from its target (PPO's adaptive penalty).

    For a penalty, coef / 2 where measured < target / tolerance, 2 * coef where measured > target * tolerance; for a bonus the
    other way round. Source: arXiv:1707.06347 sec. 4, which has no bounds: they keep a long one-sided run from an overflow.
    """

    by_factors: ClassVar[bool] = True
    tolerance: float = 1.5  # factor around the target within which nothing changes
    low: float = 1e-6  # lower bound on the coefficient
    high: float = 100.0  # upper bound on the coefficient

    def __post_init__(self):
        Bounded.__post_init__(self)
        _check_positive(self.target)
        if not self.tolerance >= 1:
            raise ConfigError(f"tolerance={self.tolerance}: is a factor around the target, write 1 or more; 1.5 is usual.")

    def respond(self, state: FeedbackState, num_sequences: int) -> FeedbackState:
        """num_sequences does not matter."""
        below = state.measured < self.target / self.tolerance
        above = state.measured > self.target * self.tolerance
        factor = 2.0 ** (state.sign * (below - above))
        return replace(state, coef=_clip(factor * state.coef, self.low, self.high))


@dataclass(frozen=True, kw_only=True, slots=True)
class SkyworkState(FeedbackState):
    """The memory of a coefficient that is switched off while it is not needed."""

    held: float  # the coefficient, whether it is on or not


@dataclass(kw_only=True, slots=True)
class Skywork(Bounded):
    """A coefficient that rises or falls by a fixed step, and acts only while the measurement is on the wrong side (Skywork-OR1).

        too_low = sign * (target - measured) > 0
        held   <- clip(held + step where too_low, held - step elsewhere, low, high)
        coef    = held where too_low, 0 elsewhere

    For the entropy bonus, whose coef starts at 0: entropy above its target is left alone. Source: Skywork Open Reasoner 1
    Technical Report and its code (SkyworkAI/Skywork-OR1), which measures the sampled entropy.
    """

    step: float = 1e-4  # how far one update moves the held coefficient
    high: float = 0.005  # upper bound on the held coefficient

    def __post_init__(self):
        Bounded.__post_init__(self)
        if not self.step >= 0:
            raise ConfigError(f"step={self.step}: write 0 or more; 0.0001 is usual.")

    def initial(self, coef: float, *, sign: int) -> SkyworkState:
        """Switched on."""
        assert sign in (-1, 1), sign
        return SkyworkState(coef=coef, sign=sign, held=coef)

    def lowest(self, coef: float) -> float:
        """0 while it is off, or the lower bound below that."""
        return min(self.low, 0.0)

    def respond(self, state: FeedbackState, num_sequences: int) -> SkyworkState:
        """num_sequences does not matter."""
        assert isinstance(state, SkyworkState)
        too_low = self.error(state) > 0
        held = _clip(state.held + (self.step if too_low else -self.step), self.low, self.high)
        return replace(state, held=held, coef=held if too_low else 0.0)

    def metrics(self, state: ControlState) -> dict[str, float]:
        """`coef` is what acts, `integral` the held coefficient."""
        assert isinstance(state, SkyworkState)
        return Bounded.metrics(self, state) | {"integral": state.held}

    def saturated(self, state: ControlState) -> int:
        """Of the held coefficient."""
        assert isinstance(state, SkyworkState)
        return self._side(state.held)


@dataclass(frozen=True, kw_only=True, slots=True)
class SmoothedState(FeedbackState):
    """The memory of a running mean."""

    smoothed: float = 0.0  # of what was measured


@dataclass(kw_only=True, slots=True)
class Smoothed(Bounded):
    """Base of the controllers that act on a running mean of the measurement, and only watch at first.

        y = smoothing * y + (1 - smoothing) * measured                         the first measurement as it is

    While warmup_updates last, y is followed and nothing else changes.
    """

    smoothing: float = 0.0  # of the measurement: share of the old value; 0: none
    warmup_updates: int = 0  # first updates that leave the coefficient alone

    def __post_init__(self):
        Bounded.__post_init__(self)
        _check_share("smoothing", self.smoothing)
        if self.warmup_updates < 0:
            raise ConfigError(f"warmup_updates={self.warmup_updates}: write a number of updates, or 0 for none.")

    def initial(self, coef: float, *, sign: int) -> SmoothedState:
        """Nothing measured yet."""
        assert sign in (-1, 1), sign
        return SmoothedState(coef=coef, sign=sign)

    def respond(self, state: FeedbackState, num_sequences: int) -> SmoothedState:
        """num_sequences does not matter: one update is the unit of time."""
        assert isinstance(state, SmoothedState)
        state = self.follow(state)
        return state if state.num_updates <= self.warmup_updates else self.move(state)

    def follow(self, state: SmoothedState) -> SmoothedState:
        """The state with this update's running mean."""
        if state.num_updates == 1:
            return replace(state, smoothed=state.measured)
        return replace(state, smoothed=self.smoothing * state.smoothed + (1 - self.smoothing) * state.measured)

    @abstractmethod
    def move(self, state: SmoothedState) -> SmoothedState:
        """The state with the next coefficient; the running mean is this update's already."""

    def error(self, state: FeedbackState) -> float:
        """Of the running mean."""
        assert isinstance(state, SmoothedState)
        return state.sign * (self.target - state.smoothed)

    def metrics(self, state: ControlState) -> dict[str, float]:
        """With the running mean."""
        assert isinstance(state, SmoothedState)
        return Bounded.metrics(self, state) | ({"measured_ema": state.smoothed} if state.num_updates else {})


class AntiWindup(Enum):
    """What keeps the integral from growing while the coefficient is at a bound; see `PID`."""

    conditional = "conditional"
    back_calculation = "back_calculation"


@dataclass(frozen=True, kw_only=True, slots=True)
class PIDState(SmoothedState):
    """The memory of a PID controller."""

    start: float  # the term's own coefficient, which the three parts are added to
    slope: float = 0.0  # of the smoothed measurement, smoothed and turned so that it acts with its sign
    integral: float = 0.0  # sum of the errors
    saturated: int = 0  # -1 or 1 where the sum of the parts is beyond a bound


@dataclass(kw_only=True, slots=True)
class PID(Smoothed):
    """Adds to the coefficient in proportion to the error, to its sum so far and to the measurement's fall.

        y    = smoothing * y + (1 - smoothing) * measured                         the first measurement as it is
        e    = clip(sign * (target - y) / scale, -max_error, max_error)
        D    = slope_smoothing * D - (1 - slope_smoothing) * sign * (change of y) / scale
        I    = sum of e, within what ki * I needs to reach a bound
        coef = clip(start + kp * e + ki * I + kd * D, low, high)

    start is the term's own coef. The slope is that of the measurement, not of the error: a new target does not kick. At a bound
    `conditional` leaves out of I the errors that push beyond it; `back_calculation` takes back what was cut off:
    I + e + (coef - unbounded) / (ki * tracking_updates), with the coefficient's distance in log_pid's case in logarithms. While
    warmup_updates last, y and D are followed, and coef and I stay.

    Standard control practice; the form and its gains are rlkit's own, a place to start from. These gains are for the entropy bonus.
    """

    kp: float = 0.02  # per unit of error
    ki: float = 0.005  # per unit of error and update
    kd: float = 0.01  # per unit of change in one update
    high: float = 0.02  # upper bound on the coefficient
    scale: float | None = 1.0  # what the error is measured in; null: the target
    max_error: float = 1.0  # bound on the error of one update
    smoothing: float = 0.5  # of the measurement: share of the old value; 0: none
    slope_smoothing: float = 0.5  # of the slope; 0: none
    warmup_updates: int = 5  # first updates that leave the coefficient alone
    anti_windup: AntiWindup = AntiWindup.conditional  # of the integral at a bound: conditional or back_calculation
    tracking_updates: float = 4.0  # over which back_calculation takes back what was cut off

    def __post_init__(self):
        Smoothed.__post_init__(self)
        for key in ("kp", "ki", "kd"):
            if not 0 <= (gain := getattr(self, key)) < math.inf:
                raise ConfigError(f"{key}={gain}: a gain is finite, 0 or more; the term says which way its coefficient acts.")
        _check_share("slope_smoothing", self.slope_smoothing)
        for key in ("max_error", "tracking_updates"):
            if not (value := getattr(self, key)) > 0:
                raise ConfigError(f"{key}={value}: write a value above 0.")
        if not 0 < self._scale < math.inf:
            written = "null" if self.scale is None else self.scale
            raise ConfigError(f"scale={written}: the error would be divided by {self._scale}; write a finite value above 0.")

    def initial(self, coef: float, *, sign: int) -> PIDState:
        """Without an error so far."""
        assert sign in (-1, 1), sign
        return PIDState(coef=coef, sign=sign, start=coef)

    def follow(self, state: SmoothedState) -> PIDState:
        """The state with this update's smoothed measurement and slope."""
        assert isinstance(state, PIDState)
        last, state = state.smoothed, Smoothed.follow(self, state)
        assert isinstance(state, PIDState)
        if state.num_updates == 1:
            return state
        fall = -state.sign * (state.smoothed - last) / self._scale
        return replace(state, slope=self.slope_smoothing * state.slope + (1 - self.slope_smoothing) * fall)

    def move(self, state: SmoothedState) -> PIDState:
        """The state with the sum of the three parts, within its bounds."""
        assert isinstance(state, PIDState)
        error, (low, high) = self.error(state), self._reach(state.start)
        integral = _clip(state.integral + error, low / self.ki, high / self.ki) if self.ki > 0 else 0.0
        offset = self._offset(state, integral)
        pushes_beyond = (offset > high and error > 0) or (offset < low and error < 0)
        if self.anti_windup is AntiWindup.conditional and pushes_beyond:
            integral = state.integral
            offset = self._offset(state, integral)
        saturated = (offset > high) - (offset < low)
        coef = self._added(state.start, offset)
        if self.anti_windup is AntiWindup.back_calculation and saturated and self.ki > 0:
            cut_off = offset - (high if saturated > 0 else low)
            untracked = state.integral + error - cut_off / (self.ki * self.tracking_updates)
            integral = _clip(untracked, low / self.ki, high / self.ki)
        return replace(state, coef=coef, integral=integral, saturated=saturated)

    def error(self, state: FeedbackState) -> float:
        """Of the smoothed measurement, in units of the scale, within its bound."""
        return _clip(Smoothed.error(self, state) / self._scale, -self.max_error, self.max_error)

    def metrics(self, state: ControlState) -> dict[str, float]:
        """With the three parts and the integral."""
        assert isinstance(state, PIDState)
        report = Smoothed.metrics(self, state)
        if state.num_updates:
            report |= {"p": self.kp * self.error(state), "i": self.ki * state.integral, "d": self.kd * state.slope}
        return report | {"integral": state.integral}

    def saturated(self, state: ControlState) -> int:
        """-1 or 1 where the sum of the parts was beyond a bound."""
        assert isinstance(state, PIDState)
        return state.saturated

    @property
    def _scale(self) -> float:
        return abs(self.target) if self.scale is None else self.scale

    def _offset(self, state: PIDState, integral: float) -> float:
        """The sum of the parts: how far from start the coefficient is to be, in its logarithm for `by_factors`."""
        return self.kp * self.error(state) + self.ki * integral + self.kd * state.slope

    def _reach(self, start: float) -> tuple[float, float]:
        """The offsets that lead to the bounds."""
        if self.by_factors:
            return math.log(self.low / start), math.log(self.high / start)
        return self.low - start, self.high - start


@dataclass(kw_only=True, slots=True)
class LogPID(PID):
    """A PID controller of the coefficient's logarithm: equal errors act by equal factors, up and down.

        coef = clip(start * exp(kp * e + ki * I + kd * D), low, high)

    and the rest as in `pid`. These gains are for a KL penalty, with the error in units of the target.
    """

    by_factors: ClassVar[bool] = True
    kp: float = 0.1  # per unit of error
    ki: float = 0.1  # per unit of error and update
    kd: float = 0.0  # per unit of change in one update
    low: float = 1e-4  # lower bound on the coefficient
    high: float = 1.0  # upper bound on the coefficient
    scale: float | None = None  # what the error is measured in; null: the target


@dataclass(kw_only=True, slots=True)
class DualAscent(Smoothed):
    """Gradient ascent on the multiplier of a constraint whose budget is the target.

        coef <- clip(coef + learning_rate * sign * (target - y), low, high),  y the measurement, or its running mean with smoothing

    The multiplier grows while the constraint is violated and falls to low once it is slack: for a penalty the budget is an
    upper bound on what is measured, for a bonus a lower one. With the entropy of the first step as the target it is the rule in
    SIREN's code (Linn3a/siren). Source: Arrow, Hurwicz and Uzawa (1958).
    """

    learning_rate: float = 1e-3  # per unit of violation

    def __post_init__(self):
        Smoothed.__post_init__(self)
        if not 0 <= self.learning_rate < math.inf:
            raise ConfigError(f"learning_rate={self.learning_rate}: write a finite value, 0 or more; 0.001 is usual.")

    def move(self, state: SmoothedState) -> SmoothedState:
        """The state with the multiplier one step further."""
        return replace(state, coef=self._added(state.coef, self.learning_rate * self.error(state)))


@dataclass(kw_only=True, slots=True)
class LogDualAscent(DualAscent):
    """Dual ascent on the multiplier's logarithm, which keeps it positive.

        coef <- clip(coef * exp(learning_rate * sign * (target - y)), low, high)

    Source: the temperature's update in arXiv:1812.05905 sec. 5, as its public implementations write it, with plain gradient
    steps in Adam's place.
    """

    by_factors: ClassVar[bool] = True
    learning_rate: float = 0.1  # per unit of violation
    low: float = 1e-6  # lower bound on the multiplier


def _check_share(key: str, share: float) -> None:
    if not 0 <= share < 1:
        raise ConfigError(f"{key}={share}: is the share of the old value; write a value in [0, 1), 0.5 is usual.")


def _check_positive(target: float) -> None:
    if not 0 < target < math.inf:
        raise ConfigError(f"target={target}: the measurement is divided by it; write a finite value above 0.")


def _clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)
