"""Reward 1 for a completion that is the answer, 0 otherwise."""

from rlkit.data.rewards import unparsable, wrong
from rlkit.data.rewards.numbers import reference_text


def reward(prompts, completions, answer, **columns) -> list[float | None]:
    """Compares with the column `answer` (text or a number) as text, without the white space around either. None where the row has
    no answer."""
    return [_score(text.strip(), reference_text(expected)) for text, expected in zip(completions, answer, strict=True)]


def _score(text, expected) -> float | None:
    if expected is None:
        return None
    if not text:
        return unparsable()
    return 1.0 if text == expected else wrong()
