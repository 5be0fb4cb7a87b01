"""Which stored rollouts join the fresh ones, and with what weight."""

from dataclasses import dataclass
from typing import ClassVar


@dataclass(kw_only=True, slots=True)
class Replay:
    """Base of the replay strategies."""

    needs: ClassVar[frozenset[str]] = frozenset()


@dataclass(kw_only=True, slots=True)
class NoReplay(Replay):
    """Trains on fresh rollouts only, each batch once."""
