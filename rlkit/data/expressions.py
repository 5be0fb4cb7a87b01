"""The built-in task: write an expression over four given digits that equals a target.

The prompt is `3 5 7 2 = 7:` and `7+5-3-2` is one right answer. Each digit (1-9) is used exactly once, in any order, with three
of `+ -` and no parentheses. Most prompts have many right answers, so pass@k and the number of distinct right answers say
something. A problem is (the digits in any order, target); a problem belongs to one split. There are thousands, and what solves
one solves all, so a policy that learns them does better on problems it has never seen.
"""

from functools import cache
from hashlib import sha256
from itertools import combinations_with_replacement, permutations, product
from typing import Literal, TypedDict

import numpy as np

Split = Literal["train", "held_out"]

DIGITS = "123456789"
OPERATORS = "+-"
NUM_DIGITS = 4
HELD_OUT_PERCENT = 10


class Row(TypedDict):
    """A problem as the data layer reads it."""

    id: str
    prompt: str
    digits: str  # as the prompt shows them, without spaces
    target: int


def evaluate(text: str) -> int | None:
    """The value of `digit operator digit operator digit operator digit`, or None when `text` is anything else, spaces included.

    A model is rewarded for what passes here, so this accepts one spelling only and never calls `eval`.
    """
    if len(text) != 2 * NUM_DIGITS - 1:
        return None
    # `in DIGITS`, not str.isdigit: that accepts superscripts and other scripts' digits.
    if not all(char in DIGITS for char in text[::2]) or not all(char in OPERATORS for char in text[1::2]):
        return None
    signs = (1 if operator == "+" else -1 for operator in text[1::2])
    return int(text[0]) + sum(sign * int(digit) for sign, digit in zip(signs, text[2::2], strict=True))


def is_right(digits: str, target: int, text: str) -> bool:
    """Whether `text` is an expression that uses each of `digits` ("3572") exactly once and equals `target`."""
    return uses_digits(digits, text) and evaluate(text) == target


def uses_digits(digits: str, text: str) -> bool:
    """Whether `text` is an expression that uses each of `digits` exactly once, whatever it equals."""
    return evaluate(text) is not None and sorted(text[::2]) == sorted(digits)


def right_answers(digits: str, target: int) -> list[str]:
    """Every distinct text that `is_right` accepts, sorted. Empty when the problem has no solution."""
    return list(_answers_by_target("".join(sorted(digits))).get(target, ()))


@cache
def _answers_by_target(digits: str) -> dict[int, tuple[str, ...]]:
    answers: dict[int, list[str]] = {}
    for order in sorted(set(permutations(digits))):
        for operators in product(OPERATORS, repeat=NUM_DIGITS - 1):
            text = order[0] + "".join(operator + digit for operator, digit in zip(operators, order[1:], strict=True))
            value = evaluate(text)
            assert value is not None, text
            answers.setdefault(value, []).append(text)
    return {value: tuple(sorted(texts)) for value, texts in answers.items()}


def split_of(digits: str, target: int) -> Split:
    """The split of a problem: the same on every machine and in every version, whatever the order of `digits`."""
    return "held_out" if _hash(digits, target) % 100 < HELD_OUT_PERCENT else "train"


def _hash(digits: str, target: int) -> int:
    # sha256, because Python's own hash of a string changes with every process.
    return int.from_bytes(sha256(f"{''.join(sorted(digits))}={target}".encode()).digest()[:8], "big")


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
        digits = "".join(DIGITS[i] for i in rng.integers(len(DIGITS), size=NUM_DIGITS))
        order = [digits[i] for i in rng.permutation(NUM_DIGITS)]
        operators = [OPERATORS[i] for i in rng.integers(len(OPERATORS), size=NUM_DIGITS - 1)]
        answer = order[0] + "".join(operator + digit for operator, digit in zip(operators, order[1:], strict=True))
        target = evaluate(answer)
        assert target is not None, answer
        if target >= 0 and split_of(digits, target) == split:
            return row(digits, target), answer


def rows(split: Split) -> list[Row]:
    """Every problem of `split` once, in a fixed order; the order in which a prompt shows its digits is drawn from the problem.

    All problems weigh the same here, while `example` shows those with many right answers more often.
    """
    found = []
    for digits in map("".join, combinations_with_replacement(DIGITS, NUM_DIGITS)):
        for target in sorted(_answers_by_target(digits)):
            if target >= 0 and split_of(digits, target) == split:
                orders = sorted(set(permutations(digits)))
                found.append(row("".join(orders[_hash(digits, target) // 100 % len(orders)]), target))
    return found
