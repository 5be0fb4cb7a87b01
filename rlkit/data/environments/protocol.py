"""What an environment is. Workers and users import this file, so it may not import torch.

class Maze:
    def __init__(self, *, width: int = 5): ...      # once, with environment.options
    def reset(self, row, seed): ...                 # an episode begins
    def step(self, action): ...                     # the policy has had a turn
    def cut(self): ...                              # may be left out: the episode ends for want of tokens or turns, and what it
                                                    # returns is the last turn's reward, on top of what that turn has earned
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol


class Step(NamedTuple):
    """What follows a turn of the policy. A plain tuple of the three is one too."""

    observation: str  # what the policy reads before its next turn; nobody reads it when the episode is over
    reward: float = 0.0  # for this turn
    done: bool = False


class Unavailable(Exception):
    """To be raised where an environment or a tool cannot do its work for a reason that is not the policy's: the episode is
    counted as failed, and not trained on. Any other exception of a tool is told to the policy."""


class Environment(Protocol):
    """One episode after another, in a process of its own; so it may keep its state in plain attributes.

    The class is imported, and made once, in a process from which the others are forked: connections are opened in `reset`.
    """

    def reset(self, row: Mapping[str, Any], seed: int) -> str | None:
        """A new episode, of which nothing before is known. Returns what the policy reads behind its prompt, if anything.

        `row`: of the data set. `seed`: the same for all samples that are compared with each other; `random` is seeded with it.
        """
        ...

    def step(self, action: str) -> Step:
        """`action`: what the policy wrote in this turn, without special tokens."""
        ...
