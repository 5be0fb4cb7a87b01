"""Reward 1 for a completion whose answer is mathematically equal to the reference, 0 otherwise. Uses math-verify."""

import logging

from math_verify import parse, verify

# Its own limits rest on SIGALRM and turn a slow comparison into a silent "wrong"; rlkit kills the worker instead and says so.
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its limits are off


def reward(prompts, completions, answer, **columns) -> list[float | None]:
    """The column `answer` is LaTeX or plain text, with or without `$...$` or `\\boxed{...}`: `\\frac{1}{2}`, `(0, 1]`, `x^2 + 1`.

    The completion's answer is what math-verify finds in it: what is in `\\boxed{...}`, several boxes being a set, else its last
    expression. None is wrong.
    None where nothing can be read from `answer`.
    """
    return [_score(text, str(reference)) for text, reference in zip(completions, answer, strict=True)]


def _score(text: str, reference: str) -> float | None:
    marked = reference if "$" in reference or "\\boxed" in reference else f"${reference}$"
    expected = parse(marked, parsing_timeout=0, raise_on_error=True)
    if not expected:
        return None
    found = parse(text, parsing_timeout=0, raise_on_error=True)
    return float(verify(expected, found, timeout_seconds=None, raise_on_error=True))
