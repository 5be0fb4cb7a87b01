"""Reward 1 for a completion whose answer is mathematically equal to the reference, 0 otherwise. Uses math-verify."""

import logging
import re

from math_verify import parse, verify

from rlkit.data.rewards import unparsable, wrong
from rlkit.data.rewards.numbers import whole_number

# Its own limits rest on SIGALRM and turn a slow comparison into a silent "wrong"; rlkit kills the worker instead and says so.
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its limits are off
logger = logging.getLogger(__name__)
_MINUS = str.maketrans({"\N{MINUS SIGN}": "-"})  # which its grammar lacks


def reward(prompts, completions, answer, **columns) -> list[float | None]:
    """The column `answer` is LaTeX or plain text, with or without `$...$` or `\\boxed{...}`: `\\frac{1}{2}`, `(0, 1]`, `x^2 + 1`.

    The completion's answer is what math-verify finds in it: what is in `\\boxed{...}`, several boxes being a set, else its last
    expression. None is unparsable. Where the answer and the only box are plain numbers, their values are also compared exactly,
    and what math-verify sees otherwise is logged; its verdict stands.
    None where nothing can be read from `answer`.
    """
    return [_score(text, str(reference)) for text, reference in zip(completions, answer, strict=True)]


def _score(text: str, reference: str) -> float | None:
    marked = reference if "$" in reference or "\\boxed" in reference else f"${reference}$"
    expected = parse(marked.translate(_MINUS), parsing_timeout=0, raise_on_error=True)
    if not expected:
        return None
    found = parse(text.translate(_MINUS), parsing_timeout=0, raise_on_error=True)
    if not found:
        return unparsable()
    is_right = verify(expected, found, timeout_seconds=None, raise_on_error=True)
    exact = _same_numbers(text, reference)
    if exact is not None and exact != is_right:
        logger.warning("math-verify calls %r %s for %r, and as numbers they say otherwise.", text[-80:], is_right, reference)
    return 1.0 if is_right else wrong()


def _same_numbers(text: str, reference: str) -> bool | None:
    """Whether two plain numbers are equal; None where they are no plain numbers."""
    boxes = re.findall(r"\\boxed\{([^{}]*)\}", text)
    first, second = whole_number(boxes[0] if len(boxes) == 1 else ""), whole_number(reference.strip("$ "))
    return None if first is None or second is None else first == second
