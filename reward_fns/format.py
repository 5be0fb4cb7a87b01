"""Reward 1 for a completion in the asked format, whatever it says, 0 otherwise."""

import re

TAGS = r"\s*<think>(?:(?!</?think>|</?answer>).)+</think>\s*<answer>(?:(?!</?think>|</?answer>).)+</answer>\s*"


def reward(prompts, completions, pattern=None, **columns) -> list[float]:
    """The whole completion must match the regular expression in the row's column `pattern`, in which `.` matches line breaks.

    Without that column: `<think>...</think> <answer>...</answer>`, once each, neither empty, nothing around them.
    """
    patterns = [None] * len(completions) if pattern is None else pattern
    return [float(re.fullmatch(own or TAGS, text, re.DOTALL) is not None) for text, own in zip(completions, patterns, strict=True)]
