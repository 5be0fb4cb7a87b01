"""Reward of the built-in task in two parts: an expression over the given digits, and one that is right."""

from rlkit.data.expressions import is_right, uses_digits


def reward(prompts, completions, digits, target, **columns) -> list[dict[str, float]]:
    """`form` is 1 for four digits and three operators with each given digit once, `accuracy` for the target as well."""
    return [
        {
            "form": float(uses_digits(digits_, text)),
            "accuracy": float(is_right(digits_, int(target_), text)),
        }
        for text, digits_, target_ in zip(completions, digits, target, strict=True)
    ]
