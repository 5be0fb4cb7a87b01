"""Reward 1 for a completion that is the answer, 0 otherwise."""

from rlkit.data.rewards import unparsable, wrong


def reward(prompts, completions, answer, **columns) -> list[float | None]:
    """Compares with the column `answer` as text, without the white space around either. None where the row has no answer."""
    return [_score(text.strip(), expected) for text, expected in zip(completions, answer, strict=True)]


def _score(text, expected) -> float | None:
    if expected is None:
        return None
    if not text:
        return unparsable()
    return 1.0 if text == str(expected).strip() else wrong()
