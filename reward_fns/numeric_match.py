"""Reward 1 when the last number of the completion equals the answer, 0 otherwise."""

from rlkit.data.rewards import unparsable, wrong
from rlkit.data.rewards.numbers import last_number


def reward(prompts, completions, answer, **columns) -> list[float | None]:
    """Compares values, not notations: 1,234.50 equals 1234.5, 1/2 equals 0.5, and 50% equals 50, as signs of units are ignored.

    Nothing is rounded: 0.33 does not equal 1/3. None where the column `answer` holds no number.
    """
    return [_score(text, expected) for text, expected in zip(completions, answer, strict=True)]


def _score(text, expected) -> float | None:
    value, found = last_number(str(expected)), last_number(text)
    if value is None:
        return None
    if found is None:
        return unparsable()
    return 1.0 if found == value else wrong()
