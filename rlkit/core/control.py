"""Controllers: a measured value -> the next coefficient of a loss term."""

import math
from abc import ABC, abstractmethod
from bisect import bisect_right
from dataclasses import dataclass, replace
from enum import Enum
from typing import ClassVar

from rlkit.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlState:
    """All that a controller remembers between steps, as plain numbers: JSON keeps every bit of them in a checkpoint.

    A controller with a memory of its own extends this class.
    """

    coef: float  # what is moved: the multiplier of a term, or a threshold, as it is now
    action: float = 0.0  # how far the newest update that counted moved it
    num_updates: int = 0  # that counted; one whose measurement was not finite does not
    num_nonfinite: int = 0  # measurements that were left out


@dataclass(kw_only=True, slots=True)
class Control(ABC):
    """Base of the coefficient controllers.

    The coefficient may be any number that acts on what is measured: of a bonus, of a penalty, or a threshold. Each is moved by a
    controller of its own, chosen in a group of its own, so an error names the setting alone; rlkit/config.py puts the group there.
    """

    needs: ClassVar[frozenset[str]] = frozenset()

    def check(self, *, coef: float, num_sequences: int) -> None:
        """Raises ConfigError when the settings do not fit a term that starts at coef, or steps of up to num_sequences responses."""
        if not math.isfinite(coef):
            raise ConfigError(f"coef={coef}: a controller cannot start there; write a finite number.")

    def initial(self, coef: float, *, sign: int) -> ControlState:
        """The state before the first step; coef is the term's own setting.

        sign says what the coefficient does: 1 when raising it raises what is measured (an entropy bonus, a wider bound), -1
        when raising it lowers that (a KL penalty). It is a fact about the term, hence no setting.
        """
        return ControlState(coef=coef)

    @abstractmethod
    def lowest(self, coef: float) -> float:
        """No coefficient that it sets is below this, from a start at coef."""

    @abstractmethod
    def update(self, state: ControlState, measured: float, num_sequences: int) -> ControlState:
        """The state to use from the next step on, after one step over num_sequences responses.

        measured is a mean over the whole step, all ranks. One that is not finite leaves the state as it was, but is counted.
        """

    def metrics(self, state: ControlState) -> dict[str, float]:
        """What to log after an update, by name; the caller puts its prefix, `ctrl/<term>/`, in front."""
        return {
            "coef": state.coef,
            "action": state.action,
            "saturated": self.saturated(state),
            "nonfinite": state.num_nonfinite,
        }

    def saturated(self, state: ControlState) -> int:
        """-1 where a lower bound holds the coefficient, 1 where an upper one does, 0 where none does."""
        return 0


@dataclass(kw_only=True, slots=True)
class Fixed(Control):
    """The coefficient stays where it was set."""

    def lowest(self, coef: float) -> float:
        """The start."""
        return coef

    def update(self, state: ControlState, measured: float, num_sequences: int) -> ControlState:
        """The state itself."""
        return state


class Shape(Enum):
    """How a schedule goes from one point to the next."""

    constant = "constant"  # stays, and jumps at the next point
    linear = "linear"
    cosine = "cosine"  # half a wave, level at both points


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleState(ControlState):
    """A schedule's memory."""

    start: float


@dataclass(kw_only=True, slots=True)
class Schedule(Control):
    """The coefficient follows points in time, whatever is measured.

    It starts at the term's own coef, is coefs[i] after updates[i] updates, and stays at the last one. Two equal coefs in a row
    hold the coefficient between them.
    """

    updates: list[int]  # optimiser steps at which the points lie, ascending from 1
    coefs: list[float]  # the coefficient at each of them
    shape: Shape = Shape.linear  # of the way between two points: constant, linear or cosine

    def __post_init__(self):
        if len(self.updates) != len(self.coefs) or not self.updates:
            raise ConfigError(
                f"updates={self.updates}: has {len(self.updates)} points where coefs={self.coefs} has "
                f"{len(self.coefs)}; write as many of each, at least one."
            )
        if self.updates != sorted(set(self.updates)) or self.updates[0] < 1:
            raise ConfigError(f"updates={self.updates}: write whole numbers that ascend from 1 or more, as in [10,100].")
        if not all(math.isfinite(coef) for coef in self.coefs):
            raise ConfigError(f"coefs={self.coefs}: a loss has no use for a coefficient that is not finite; write numbers.")

    def initial(self, coef: float, *, sign: int) -> ScheduleState:
        """The state before the first step."""
        return ScheduleState(coef=coef, start=coef)

    def lowest(self, coef: float) -> float:
        """The start or one of the points: a shape goes from one to the next, and no further."""
        return min([coef, *self.coefs])

    def update(self, state: ControlState, measured: float, num_sequences: int) -> ScheduleState:
        """The state one update later; what was measured has no say, finite or not."""
        assert isinstance(state, ScheduleState)
        num_updates = state.num_updates + 1
        coef = self._at(num_updates, state.start)
        return replace(state, num_updates=num_updates, coef=coef, action=coef - state.coef)

    def _at(self, num_updates: int, start: float) -> float:
        times, coefs = [0, *self.updates], [start, *self.coefs]
        i = bisect_right(times, num_updates) - 1
        if i == len(times) - 1 or self.shape is Shape.constant:
            return coefs[i]
        done = (num_updates - times[i]) / (times[i + 1] - times[i])
        if self.shape is Shape.cosine:
            done = (1 - math.cos(math.pi * done)) / 2
        return coefs[i] + (coefs[i + 1] - coefs[i]) * done


@dataclass(frozen=True, kw_only=True, slots=True)
class Controlled:
    """One number of the loss that a controller moves, and what it watches meanwhile."""

    group: str  # that the controller is chosen in
    control: Control
    key: str  # the number's own setting, `group.name`: where it starts
    start: float | None  # None: what was chosen in the key's group has no such number
    sign: int  # 1: raising the number raises what is measured; -1: lowers it
    measured: str  # the metric of an optimiser step that the controller is given
