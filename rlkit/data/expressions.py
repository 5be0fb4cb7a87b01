"""The built-in task: write an expression over three given digits that equals a target.

The prompt is `3 5 7 = 22:` and `3*5+7` is one right answer. Each digit (1-9) is used exactly once, in any order, with two
of `+ - *` at their usual precedence and no parentheses. Most prompts have several right answers, so pass@k and the number
of distinct right answers say something. A problem is (the digits in any order, target); a problem belongs to one split.
"""

from functools import cache
from hashlib import sha256
from itertools import permutations, product
from typing import Literal, TypedDict

import numpy as np

Split = Literal["train", "held_out"]

DIGITS = "123456789"
OPERATORS = "+-*"
MAX_TARGET = 99  # targets are 0..MAX_TARGET
HELD_OUT_PERCENT = 10


class Row(TypedDict):
    """A problem as the data layer reads it."""

    id: str
    prompt: str
    digits: str  # as the prompt shows them, without spaces
    target: int


def evaluate(text: str) -> int | None:
    """The value of `digit operator digit operator digit`, or None when `text` is anything else, spaces included.

    A model is rewarded for what passes here, so this accepts one spelling only and never calls `eval`.
    """
    if len(text) != 5:
        return None
    # `in DIGITS`, not str.isdigit: that accepts superscripts and other scripts' digits.
    if not all(char in DIGITS for char in text[::2]) or not all(char in OPERATORS for char in text[1::2]):
        return None
    total, term = 0, int(text[0])
    for operator, char in zip(text[1::2], text[2::2], strict=True):
        digit = int(char)
        if operator == "*":
            term *= digit
        else:
            total, term = total + term, digit if operator == "+" else -digit
    return total + term


def is_right(digits: str, target: int, text: str) -> bool:
    """Whether `text` is an expression that uses each of `digits` ("357") exactly once and equals `target`."""
    value = evaluate(text)
    return value is not None and value == target and sorted(text[::2]) == sorted(digits)


def right_answers(digits: str, target: int) -> list[str]:
    """Every distinct text that `is_right` accepts, sorted. Empty when the problem has no solution."""
    return list(_answers_by_target("".join(sorted(digits))).get(target, ()))


@cache
def _answers_by_target(digits: str) -> dict[int, tuple[str, ...]]:
    answers: dict[int, list[str]] = {}
    for a, b, c in sorted(set(permutations(digits))):
        for first, second in product(OPERATORS, repeat=2):
            text = f"{a}{first}{b}{second}{c}"
            value = evaluate(text)
            assert value is not None, text
            answers.setdefault(value, []).append(text)
    return {value: tuple(sorted(texts)) for value, texts in answers.items()}


def split_of(digits: str, target: int) -> Split:
    """The split of a problem: the same on every machine and in every version, whatever the order of `digits`."""
    # sha256, because Python's own hash of a string changes with every process.
    key = sha256(f"{''.join(sorted(digits))}={target}".encode()).digest()
    return "held_out" if int.from_bytes(key[:8], "big") % 100 < HELD_OUT_PERCENT else "train"


def prompt_text(digits: str, target: int) -> str:
    """The prompt for a problem; it shows `digits` in the order given."""
    return f"{' '.join(digits)} = {target}:"


def row(digits: str, target: int) -> Row:
    """The data layer's row for a problem. The id names the prompt, so equal prompts have equal ids."""
    return {"id": f"{digits}={target}", "prompt": prompt_text(digits, target), "digits": digits, "target": target}


def example(seed: int, index: int, split: Split = "train") -> tuple[Row, str]:
    """Number `index` of the endless stream of `split` named by `seed`: a row and one right answer to it.

    The answer is a uniformly random expression and the target its value, among those whose value is in range and whose
    problem is in `split`. Depends on the arguments alone, so a stream can be resumed or cut anywhere. Both are 64-bit
    and not negative.
    """
    # Counter-based: one independent generator per (seed, index), without a state to save.
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, index], dtype=np.uint64)))
    while True:
        digits = "".join(DIGITS[i] for i in rng.integers(len(DIGITS), size=3))
        a, b, c = (digits[i] for i in rng.permutation(3))
        first, second = (OPERATORS[i] for i in rng.integers(len(OPERATORS), size=2))
        answer = f"{a}{first}{b}{second}{c}"
        target = evaluate(answer)
        assert target is not None, answer
        if 0 <= target <= MAX_TARGET and split_of(digits, target) == split:
            return row(digits, target), answer


def rows(split: Split) -> list[Row]:
    """Every prompt of `split` once, in a fixed order. The same digits in another order are another prompt, not another problem.

    All prompts weigh the same here, while `example` shows those with many right answers more often: a model's pass@1 is a
    few hundredths lower on these rows than on a stream.
    """
    return [
        row(digits, target)
        for digits in map("".join, product(DIGITS, repeat=3))
        for target in range(MAX_TARGET + 1)
        if right_answers(digits, target) and split_of(digits, target) == split
    ]
