"""Reward 1 for a completion in the asked format, whatever it says, 0 otherwise."""

import re

TAGS = r"\s*<think>(?!\s*</)(?:(?!</?think>|</?answer>).)+</think>\s*<answer>(?!\s*</)(?:(?!</?think>|</?answer>).)+</answer>\s*"


def reward(prompts, completions, pattern=None, **columns) -> list[float | None]:
    """The whole completion must match the regular expression in the row's column `pattern`, in which `.` matches line breaks.

    Without that column: `<think>...</think> <answer>...</answer>`, once each, neither empty, nothing around them.
    None where the pattern is no regular expression.
    """
    patterns = [None] * len(completions) if pattern is None else pattern
    return [_score(text, own) for text, own in zip(completions, patterns, strict=True)]


def _score(text, pattern) -> float | None:
    try:
        wanted = re.compile(pattern or TAGS, re.DOTALL)
    except (re.error, TypeError):
        return None
    return float(wanted.fullmatch(text) is not None)
