"""Reward between -1 and 0: the share of the completion's n-grams of words that repeat an earlier one, negated."""

N = 4


def reward(prompts, completions, **columns) -> list[float]:
    """0 for a text without a repeated 4-gram, or shorter than one. Meant beside another reward, with a small weight."""
    return [_penalty(text.split()) for text in completions]


def _penalty(words) -> float:
    grams = list(zip(*(words[start:] for start in range(N)), strict=False))
    return -(1 - len(set(grams)) / len(grams)) if grams else 0.0
