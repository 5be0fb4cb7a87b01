"""Reward 1 for a Python program that passes all tests of its row, 0 otherwise. It runs in a sandbox, and is judged outside."""

import re

from rlkit.data.rewards import unparsable, wrong
from rlkit.data.rewards.verdicts import Verdict
from rlkit.data.sandbox import Case, Program, open_sandbox

SANDBOX = open_sandbox()  # here, so that a run without one stops before it starts
TAGGED = re.compile(r"```(?:python|py)\b[^\n]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
BARE = re.compile(r"```[ \t]*\n(.*?)```", re.DOTALL)


def reward(prompts, completions, tests, entry_point=None, **columns) -> list[float | None]:
    """The column `tests` is a list of `{"input": text, "output": text}`, for a program that reads standard input and prints, or of
    `{"call": [arguments], "returns": value}`, for one with a function of the name in the column `entry_point`.

    The program is the last ```python block of the completion, or the last unmarked one, or all of it where there is none. What it
    prints is compared line by line, without white space at the ends; what it returns as JSON has it (a tuple equals a list),
    numbers with the test's `tolerance` if it has one. None where a row has no tests.
    """
    return [
        wrong(0.0, share.message) if isinstance(share, Verdict) and share.status == "wrong" else share
        for share in fraction(prompts, completions, tests, entry_point)
    ]


def fraction(prompts, completions, tests, entry_point=None, **columns) -> list[float | None]:
    """As `reward`, but the share of the tests that it passes."""
    names = [None] * len(completions) if entry_point is None else entry_point
    return [_passed(text, own, name) for text, own, name in zip(completions, tests, names, strict=True)]


def _passed(text, tests, name) -> float | None:
    if not tests:
        return None
    blocks = TAGGED.findall(text) or BARE.findall(text)
    code = blocks[-1] if blocks else text
    if not code.strip():
        return unparsable()
    cases = [Case(arguments=test["call"]) if "call" in test else Case(stdin=test["input"]) for test in tests]
    outcomes = SANDBOX.run(Program(code=code, entry_point=name or ""), cases)
    passed = [_is_right(outcome, test) for outcome, test in zip(outcomes, tests, strict=True)]
    share = sum(passed) / len(passed)
    first = next((outcome for outcome, right in zip(outcomes, passed, strict=True) if not right), None)
    if first is None:
        return share
    said = first.stderr.strip().splitlines()
    return wrong(share, f"{first.status}: {said[-1][:100]}" if said else first.status)


def _is_right(outcome, test) -> bool:
    if outcome.status != "ok":
        return False
    if "call" in test:
        return _equal(outcome.value, test["returns"], test.get("tolerance", 0.0))
    return _lines(outcome.stdout) == _lines(test["output"])


def _close(found, wanted, tolerance) -> bool:
    try:
        return abs(found - wanted) <= tolerance
    except OverflowError:  # an integer that no float holds is close to none
        return False


def _lines(text) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _equal(found, wanted, tolerance) -> bool:
    if isinstance(wanted, bool) or isinstance(found, bool) or wanted is None:
        return found is wanted
    if isinstance(wanted, int | float):
        return isinstance(found, int | float) and (found == wanted or _close(found, wanted, tolerance))
    if isinstance(wanted, list):
        same = isinstance(found, list) and len(found) == len(wanted)
        return same and all(_equal(a, b, tolerance) for a, b in zip(found, wanted, strict=True))
    if isinstance(wanted, dict):
        return (
            isinstance(found, dict)
            and found.keys() == wanted.keys()
            and all(_equal(found[k], wanted[k], tolerance) for k in wanted)
        )
    return found == wanted
