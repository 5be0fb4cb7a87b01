"""Reward of the built-in task in two parts: an expression over the given digits, and one that is right."""

from rlkit.data.expressions import is_right, uses_digits
from rlkit.data.rewards.numbers import last_number, reference_text


def reward(prompts, completions, digits, target, **columns) -> list[dict[str, float] | None]:
    """`form` is 1 for four digits and three operators with each given digit once, `accuracy` for the target as well. None where
    the row has no digits or no target."""
    return [_score(*row) for row in zip(completions, digits, target, strict=True)]


def _score(text, digits, target) -> dict[str, float] | None:
    value = last_number(reference_text(target) or "")
    if value is None or not isinstance(digits, str):
        return None
    return {"form": float(uses_digits(digits, text)), "accuracy": float(is_right(digits, int(value), text))}
