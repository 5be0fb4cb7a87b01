"""Reward 1 for the right final answer in GSM8K's style, 0 otherwise."""

from rlkit.data.rewards.numbers import last_number

MARK = "####"


def reward(prompts, completions, answer, **columns) -> list[float | None]:
    """The column `answer` is a worked solution that ends in `#### 42`, or the number alone.

    The completion's answer is the number after its last `####`; without one, its last number. Values are compared exactly, as
    in numeric_match. None where the column `answer` holds no number.
    """
    return [_score(text, solution) for text, solution in zip(completions, answer, strict=True)]


def _score(text, solution) -> float | None:
    expected = last_number(str(solution).rpartition(MARK)[2])
    return None if expected is None else float(last_number(text.rpartition(MARK)[2]) == expected)
