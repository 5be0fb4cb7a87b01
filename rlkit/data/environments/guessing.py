"""A game with a reward at its end alone: guess a number, hearing after each guess where it lies."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rlkit.data.environments.protocol import Step

_NUMBER = re.compile(r"[0-9]{1,9}")


class Guessing:
    """Implements `Environment`: the row's `secret` is to be found."""

    def __init__(self, *, higher: str, lower: str):
        self._higher, self._lower, self._secret = higher, lower, 0

    def reset(self, row: Mapping[str, Any], seed: int) -> str:
        self._secret = int(row["secret"])
        return ""

    def step(self, action: str) -> Step:
        """The last number in it is the guess. One without a number is a turn lost."""
        numbers = _NUMBER.findall(action)
        if not numbers:
            return Step(" ?:")
        guess = int(numbers[-1])
        if guess == self._secret:
            return Step("", 1.0, done=True)
        return Step(f" {self._higher if guess < self._secret else self._lower}:")
