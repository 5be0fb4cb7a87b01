import os
import subprocess
import sys
from itertools import permutations, product
from pathlib import Path

import pytest

from reward_fns.expressions import reward
from rlkit.data import expressions


def test_evaluate_agrees_with_python_on_every_expression_it_accepts():
    for a, first, b, second, c in product("1479", "+-*", "1258", "+-*", "3679"):
        text = f"{a}{first}{b}{second}{c}"
        assert expressions.evaluate(text) == eval(text), text


@pytest.mark.parametrize(
    "text",
    [
        *("", "3", "3*5", "3*5+7 ", " 3*5+7", "3 * 5+7", "3*5+7=", "3*5+7\n", "3*5+-7", "-3+57", "(3*5)"),
        *("3**57", "3*5+0", "3/5+7", "35+77", "3,5,7", "*3+57"),
        *("3*5+\N{SUPERSCRIPT SEVEN}", "3*5+\N{FULLWIDTH DIGIT SEVEN}", "3*5\N{FULLWIDTH PLUS SIGN}7"),
    ],
)
def test_anything_but_the_one_spelling_is_wrong(text):
    assert expressions.evaluate(text) is None
    assert not expressions.is_right("357", 22, text)


def test_is_right_wants_each_digit_once_in_any_order_and_the_target():
    assert expressions.is_right("357", 22, "3*5+7")
    assert expressions.is_right("753", 22, "7+5*3")
    assert not expressions.is_right("357", 23, "3*5+7")
    assert not expressions.is_right("358", 22, "3*5+7")  # equals the target with another digit
    assert not expressions.is_right("357", 13, "3+3+7")  # one digit twice
    assert not expressions.is_right("557", 15, "5+5+5")
    assert expressions.is_right("555", 15, "5+5+5")
    assert expressions.is_right("357", -9, "3-5-7")  # minus is left to right: 3 - (5 - 7) would be 5


def test_right_answers_of_a_problem_worked_out_by_hand():
    # 22 = 15 + 7: the product first or last, its factors either way round. No other product or sum of 3, 5, 7 reaches it:
    # 21 +- 5 is 26 or 16, 35 +- 3 is 38 or 32, 3 + 5 + 7 is 15.
    assert expressions.right_answers("735", 22) == ["3*5+7", "5*3+7", "7+3*5", "7+5*3"]
    assert expressions.right_answers("111", 99) == []


def test_right_answers_are_exactly_the_texts_that_are_right():
    texts = [f"{a}{x}{b}{y}{c}" for a, x, b, y, c in product("246", "+-*", "246", "+-*", "246")]
    for target in range(100):
        assert expressions.right_answers("246", target) == sorted(t for t in texts if expressions.is_right("246", target, t))


def test_an_example_is_right_in_range_and_depends_on_its_arguments_alone():
    stream = [expressions.example(3, index) for index in range(200)]
    assert stream[150:] == [expressions.example(3, index) for index in range(150, 200)]
    assert stream != [expressions.example(4, index) for index in range(200)]
    assert len({row["id"] for row, _ in stream}) > 150
    for row, answer in stream:
        assert expressions.is_right(row["digits"], row["target"], answer)
        assert 0 <= row["target"] <= 99
        assert row["prompt"] == f"{' '.join(row['digits'])} = {row['target']}:"


def test_examples_are_the_same_on_every_machine():
    row, answer = expressions.example(0, 0)
    assert (row, answer) == ({"id": "559=40", "prompt": "5 5 9 = 40:", "digits": "559", "target": 40}, "5*9-5")


def test_the_splits_share_no_problem_and_a_tenth_is_held_out():
    def problems(split):
        return {("".join(sorted(row["digits"])), row["target"]) for row in expressions.rows(split)}

    train, held = problems("train"), problems("held_out")
    assert train.isdisjoint(held)
    assert 0.08 < len(held) / (len(train) + len(held)) < 0.12
    assert expressions.split_of("357", 22) == expressions.split_of("735", 22)


def test_no_example_comes_from_the_other_split():
    for split in ("train", "held_out"):
        for index in range(300):
            row, _ = expressions.example(1, index, split)
            assert expressions.split_of(row["digits"], row["target"]) == split


def test_the_split_does_not_change_with_pythons_hash_seed():
    code = "from rlkit.data import expressions as e; print([e.split_of('357', t) for t in range(100)])"
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


def test_rows_are_every_solvable_prompt_once():
    ids = [row["id"] for split in ("train", "held_out") for row in expressions.rows(split)]
    # 54 ways to write an expression over each of 729 ordered triples, less the values out of range.
    values = {
        f"{digits}={target}"
        for digits in map("".join, product("123456789", repeat=3))
        for a, b, c in permutations(digits)
        for x, y in product("+-*", repeat=2)
        if 0 <= (target := eval(f"{a}{x}{b}{y}{c}")) <= 99
    }
    assert len(ids) == len(values) == 6396
    assert set(ids) == values


def test_the_reward_is_one_for_right_and_zero_for_anything_else():
    rewards = reward(
        prompts=["3 5 7 = 22:"] * 4,
        completions=["3*5+7", "3*5+8", "3*5+7<eos>", ""],
        digits=["357"] * 4,
        target=[22, 22, 22, 22],
        id=["a", "b", "c", "d"],
    )
    assert rewards == [1.0, 0.0, 0.0, 0.0]
