"""Reward 1 for an expression over the given digits of the built-in task, right or wrong, 0 for anything else."""

from rlkit.data.expressions import uses_digits


def reward(prompts, completions, digits, **columns) -> list[float | None]:
    """Four digits and three operators with each given digit once. Meant beside `expressions`, which asks for the target as well.
    None where the row has no digits."""
    return [
        float(uses_digits(digits_, text)) if isinstance(digits_, str) else None
        for text, digits_ in zip(completions, digits, strict=True)
    ]
