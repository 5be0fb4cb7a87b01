"""How many samples may fail before the run stops."""

from __future__ import annotations

import logging
from collections import deque

from rlkit.errors import RewardError

logger = logging.getLogger(__name__)

WINDOW = 200  # samples over which a limit on the share of failures is judged
MIN_ALL_FAILED = 8  # code that failed on all of its first samples is not waited for any longer


class ErrorBudget:
    """Counts a user's code as it succeeds and fails."""

    def __init__(self, what: str, *, key: str, limit: float, fix: str):
        """`what`: the setting and its value; `key`: the setting that gives `limit`, a share of the samples."""
        self._what, self._key, self._limit, self._fix = what, key, limit, fix
        self._recent: deque[bool] = deque(maxlen=WINDOW)  # True: failed
        self._num_seen = self._num_failed = 0
        self._first = ""

    def count(self, sample_id: str, failure: str = "", details: str = "") -> RewardError | None:
        """One more sample, which failed if `failure` says how. What to stop with, once too many have.

        Before the window is full, only a count that no later success could make acceptable counts, or nothing but failures.
        """
        self._recent.append(bool(failure))
        self._num_seen += 1
        self._num_failed += bool(failure)
        if failure and not self._first:
            self._first = f"sample {sample_id}: {failure}"
            logger.warning("%s failed on %s%s", self._what, self._first, details and f"\n{details}")
        num_failed = sum(self._recent)
        hopeless = self._num_failed == self._num_seen >= MIN_ALL_FAILED and self._limit < 1
        if num_failed <= self._limit * WINDOW and not hopeless:
            return None
        return RewardError(
            f"{self._what}: {num_failed} of the last {len(self._recent)} samples failed, more than "
            f"{self._key}={self._limit:g} of {WINDOW} allows. The first was {self._first}. {self._fix}"
        )
