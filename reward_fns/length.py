"""Reward between 0 and 1 for a completion close to the row's wanted length in words."""

import math


def reward(prompts, completions, num_words, **columns) -> list[float | None]:
    """1 at the column `num_words`, falling linearly to 0 at none and at twice as many. None where it is no positive number."""
    return [_score(len(text.split()), wanted) for text, wanted in zip(completions, num_words, strict=True)]


def _score(words, wanted) -> float | None:
    if isinstance(wanted, bool) or not isinstance(wanted, int | float) or not 0 < wanted < math.inf:
        return None
    return max(0.0, 1 - abs(words - wanted) / wanted)
