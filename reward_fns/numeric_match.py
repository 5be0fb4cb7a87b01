"""Reward 1 when the last number of the completion equals the answer, 0 otherwise."""

from rlkit.data.rewards import unparsable, wrong
from rlkit.data.rewards.numbers import last_number, reference_text


def reward(prompts, completions, answer, **columns) -> list[float | None]:
    """Compares values, not notations: 1,234.50 equals 1234.5, 1/2 equals 0.5, and 50% equals 50, as signs of units are ignored.

    Nothing is rounded: 0.33 does not equal 1/3. Nothing is calculated: a completion that ends in 5-42 or 2^{10} is unparsable.
    None where the column `answer` holds no number.
    """
    return [_score(text, expected) for text, expected in zip(completions, answer, strict=True)]


def _score(text, expected) -> float | None:
    value = last_number(reference_text(expected) or "")
    if value is None:
        return None
    if (found := last_number(text)) is None:
        return unparsable()
    return 1.0 if found == value else wrong()
