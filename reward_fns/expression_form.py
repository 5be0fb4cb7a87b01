"""Reward 1 for an expression over the given digits of the built-in task, right or wrong, 0 for anything else."""

from rlkit.data.expressions import uses_digits


def reward(prompts, completions, digits, **columns) -> list[float]:
    """Four digits and three operators with each given digit once. Meant beside `expressions`, which asks for the target as well."""
    return [float(uses_digits(digits_, text)) for text, digits_ in zip(completions, digits, strict=True)]
