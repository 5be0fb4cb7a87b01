import os
import subprocess
import sys
from itertools import combinations_with_replacement, permutations, product
from pathlib import Path

import pytest

from reward_fns.expressions import reward
from rlkit.data import expressions


def test_evaluate_agrees_with_python_on_every_expression_it_accepts():
    for a, first, b, second, c, third, d in product("149", "+-", "128", "+-", "369", "+-", "57"):
        text = f"{a}{first}{b}{second}{c}{third}{d}"
        assert expressions.evaluate(text) == eval(text), text


@pytest.mark.parametrize(
    "text",
    [
        *("", "3", "7+5-3-2 ", " 7+5-3-2", "7 + 5-3-2", "7+5-3-2=", "7+5-3-2\n", "7+5--32", "-7+53-2", "(7+5)-3"),
        *("7+5-3", "7+5-3-2-1", "7+5-3-0", "7*5-3-2", "75-3-22", "7,5,3,2", "+7+5-32"),
        *("7+5-3-\N{SUPERSCRIPT TWO}", "7+5-3-\N{FULLWIDTH DIGIT TWO}", "7+5-3\N{MINUS SIGN}2"),
    ],
)
def test_anything_but_the_one_spelling_is_wrong(text):
    assert expressions.evaluate(text) is None
    assert not expressions.is_right("3572", 7, text)


def test_is_right_wants_each_digit_once_in_any_order_and_the_target():
    assert expressions.is_right("3572", 7, "7+5-3-2")
    assert expressions.is_right("2753", 7, "5-2+7-3")
    assert not expressions.is_right("3572", 8, "7+5-3-2")
    assert not expressions.is_right("3571", 7, "7+5-3-2")  # equals the target with another digit
    assert not expressions.is_right("3572", 9, "7+7-3-2")  # one digit twice
    assert not expressions.is_right("3377", 7, "7+5-3-2")
    assert expressions.is_right("5555", 10, "5+5+5-5")
    assert expressions.is_right("3572", -11, "3-5-7-2")  # minus is left to right: 3 - (5 - 7 - 2) would be 7


def test_right_answers_of_a_problem_worked_out_by_hand():
    # 1 + 2 + 3 + 9 = 15, so 11 needs negative digits that sum to 2: the 2 alone, anywhere but in front.
    expected = sorted(
        text
        for order in permutations("1239")
        for text in ["".join(digit if i == 0 else f"{'-' if digit == '2' else '+'}{digit}" for i, digit in enumerate(order))]
        if order[0] != "2"
    )
    assert len(expected) == 18  # 4! orders, less the 3! with the 2 in front
    assert expressions.right_answers("9321", 11) == expected
    assert expressions.right_answers("1111", 99) == []


def test_right_answers_are_exactly_the_texts_that_are_right():
    texts = [f"{a}{x}{b}{y}{c}{z}{d}" for a, x, b, y, c, z, d in product(*(["246", "+-"] * 3), "246")]
    for target in range(30):
        assert expressions.right_answers("2446", target) == sorted(t for t in texts if expressions.is_right("2446", target, t))


def test_an_example_is_right_in_range_and_depends_on_its_arguments_alone():
    stream = [expressions.example(3, index) for index in range(200)]
    assert stream[150:] == [expressions.example(3, index) for index in range(150, 200)]
    assert stream != [expressions.example(4, index) for index in range(200)]
    assert len({row["id"] for row, _ in stream}) > 150
    for row, answer in stream:
        assert expressions.is_right(row["digits"], row["target"], answer)
        assert 0 <= row["target"] <= 36
        assert row["prompt"] == f"{' '.join(row['digits'])} = {row['target']}:"


def test_examples_are_the_same_on_every_machine():
    row, answer = expressions.example(0, 0)
    assert (row, answer) == ({"id": "9379=10", "prompt": "9 3 7 9 = 10:", "digits": "9379", "target": 10}, "7+9+3-9")


def test_the_splits_share_no_problem_and_a_tenth_is_held_out():
    def problems(split):
        return {("".join(sorted(row["digits"])), row["target"]) for row in expressions.rows(split)}

    train, held = problems("train"), problems("held_out")
    assert train.isdisjoint(held)
    assert 0.08 < len(held) / (len(train) + len(held)) < 0.12
    assert expressions.split_of("3572", 7) == expressions.split_of("2735", 7)


def test_no_example_comes_from_the_other_split():
    for split in ("train", "held_out"):
        for index in range(300):
            row, _ = expressions.example(1, index, split)
            assert expressions.split_of(row["digits"], row["target"]) == split


def test_the_split_does_not_change_with_pythons_hash_seed():
    code = "from rlkit.data import expressions as e; print([e.split_of('3572', t) for t in range(100)])"
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_rows_are_every_solvable_problem_once():
    rows = [row for split in ("train", "held_out") for row in expressions.rows(split)]
    problems = [("".join(sorted(row["digits"])), row["target"]) for row in rows]
    values = {
        (digits, target)
        for digits in map("".join, combinations_with_replacement("123456789", 4))
        for signs in product((1, -1), repeat=4)
        if max(signs) == 1  # one digit stands in front, without a sign
        and (target := sum(sign * int(digit) for sign, digit in zip(signs, digits, strict=True))) >= 0
    }
    assert len(problems) == len(values) == 2835
    assert set(problems) == values
    assert sum(row["digits"] == "".join(sorted(row["digits"])) for row in rows) < 0.2 * len(rows)  # shown in any order


def test_the_reward_is_one_for_right_and_zero_for_anything_else():
    rewards = reward(
        prompts=["3 5 7 2 = 7:"] * 4,
        completions=["7+5-3-2", "7+5-3-1", "7+5-3-2<eos>", ""],
        digits=["3572"] * 4,
        target=[7, 7, 7, 7],
        id=["a", "b", "c", "d"],
    )
    assert rewards == [1.0, 0.0, 0.0, 0.0]
