"""Reward of the built-in task: 1 for a right expression, 0 for anything else."""

from rlkit.data.expressions import is_right


def reward(prompts, completions, digits, target, **columns) -> list[float]:
    """Completions are the text before the end-of-sequence token, without it; anything around the expression is wrong."""
    return [
        float(is_right(digits_, int(target_), text)) for text, digits_, target_ in zip(completions, digits, target, strict=True)
    ]
