"""The order of a run's prompts: a function of (seed, cursor), so a resumed run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from rlkit.errors import DataError
from rlkit.settings import Data, TableData
from rlkit.types import Prompt

BLOCK = 1000  # draws in which the sources' shares are exact, up to rounding


class Order(Protocol):
    """Which prompt each draw of the run gets."""

    def take(self, cursor: int, n: int) -> list[int]:
        """The indices of draws cursor .. cursor + n - 1."""
        ...


def order_of(prompts: Sequence[Prompt], settings: Data, seed: int) -> Order:
    """Each prompt once per epoch; or with weights by source, in these proportions."""
    weights = settings.source_weights if isinstance(settings, TableData) else {}
    if not weights:
        return PromptOrder(len(prompts), seed)
    members: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        members.setdefault(prompt.source, []).append(index)
    return WeightedOrder(members=list(members.values()), weights=[weights.get(name, 1.0) for name in members], seed=seed)


@dataclass(slots=True)
class PromptOrder:
    """Draws every index once per epoch, each epoch in an order of its own. The cursor is all there is to save."""

    num_prompts: int
    seed: int
    _epoch: int = field(default=-1, init=False)  # of the permutation held; a cache, not state
    _permutation: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), init=False)

    def __post_init__(self):
        if self.num_prompts < 1:
            raise DataError(f"PromptOrder: num_prompts={self.num_prompts}. Give it 1 or more.")

    def take(self, cursor: int, n: int) -> list[int]:
        """The indices of draws cursor .. cursor + n - 1; draw d belongs to epoch d // num_prompts.

        A batch that spans two epochs may hold one prompt twice.
        """
        return [int(self._order_of(draw // self.num_prompts)[draw % self.num_prompts]) for draw in range(cursor, cursor + n)]

    def _order_of(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            # Sorting Philox's raw words, because numpy may change Generator.permutation between versions but not these.
            words = np.random.Philox(key=np.array([self.seed % 2**64, epoch], dtype=np.uint64)).random_raw(self.num_prompts)
            self._permutation, self._epoch = np.argsort(words, kind="stable"), epoch
        return self._permutation


@dataclass(slots=True)
class WeightedOrder:
    """Draws from several sources in proportion to their weights; each goes through its own prompts, epoch by epoch.

    The sources alternate evenly, so that a batch holds close to the shares that the run does. The cursor is all there is to save.
    """

    members: list[list[int]]  # of each source: indices of its prompts
    weights: list[float]
    seed: int
    _orders: list[PromptOrder] = field(init=False)
    _pattern: list[tuple[int, int]] = field(init=False)  # of one block: a draw's source, and how many of its draws came before
    _counts: list[int] = field(init=False)  # of each source's draws in one block

    def __post_init__(self):
        total = sum(self.weights)
        self._counts = [max(round(BLOCK * weight / total), 1) for weight in self.weights]
        places = [((rank + 0.5) / count, source, rank) for source, count in enumerate(self._counts) for rank in range(count)]
        self._pattern = [(source, rank) for _, source, rank in sorted(places)]
        self._orders = [PromptOrder(len(each), self.seed + source) for source, each in enumerate(self.members)]

    def take(self, cursor: int, n: int) -> list[int]:
        """The indices of draws cursor .. cursor + n - 1."""
        found = []
        for draw in range(cursor, cursor + n):
            block, place = divmod(draw, len(self._pattern))
            source, rank = self._pattern[place]
            [index] = self._orders[source].take(block * self._counts[source] + rank, 1)
            found.append(self.members[source][index])
        return found
