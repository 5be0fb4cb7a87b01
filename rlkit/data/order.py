"""The order of a run's prompts: a function of (seed, cursor), so a resumed run goes on where it stopped."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from rlkit.errors import DataError


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
