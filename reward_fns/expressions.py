"""Reward of the built-in task: 1 for a right expression, 0 for anything else."""

from rlkit.data.expressions import is_right
from rlkit.data.rewards.numbers import last_number, reference_text


def reward(prompts, completions, digits, target, **columns) -> list[float | None]:
    """Completions are the text before the end-of-sequence token, without it; anything around the expression is wrong. None where
    the row has no digits or no target."""
    return [_score(*row) for row in zip(completions, digits, target, strict=True)]


def _score(text, digits, target) -> float | None:
    value = last_number(reference_text(target) or "")
    if value is None or not isinstance(digits, str):
        return None
    return float(is_right(digits, int(value), text))
