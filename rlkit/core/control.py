"""Controllers: a measured value -> the next coefficient of a loss term."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True, slots=True)
class ControlState:
    """All that a controller remembers between steps, as plain numbers: JSON keeps every bit of them in a checkpoint.

    A controller with a memory of its own extends this class.
    """

    coef: float  # what multiplies the term now


@dataclass(kw_only=True, slots=True)
class Control(ABC):
    """Base of the coefficient controllers."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def initial(self, coef: float) -> ControlState:
        """The state before the first step; coef is the term's own setting."""
        return ControlState(coef=coef)

    @abstractmethod
    def update(self, state: ControlState, measured: float, num_sequences: int) -> ControlState:
        """The state to use from the next step on, after one step over num_sequences responses.

        measured is a mean over the whole step, all ranks. A measurement that is not finite leaves the state as it was.
        """


@dataclass(kw_only=True, slots=True)
class Fixed(Control):
    """The coefficient stays where it was set."""

    def update(self, state: ControlState, measured: float, num_sequences: int) -> ControlState:
        """The state itself."""
        return state
