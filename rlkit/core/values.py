"""Critics: what predicts a return for each token, and the loss that trains it."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(kw_only=True, slots=True)
class Critic:
    """Base of the critics."""

    needs: ClassVar[frozenset[str]] = frozenset()


@dataclass(kw_only=True, slots=True)
class NoCritic(Critic):
    """No critic: advantages compare responses to one prompt with each other."""
