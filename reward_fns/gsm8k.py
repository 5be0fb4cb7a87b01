"""Reward 1 for the right final answer in GSM8K's style, 0 otherwise."""

from fractions import Fraction

from rlkit.data.rewards import unparsable, wrong
from rlkit.data.rewards.numbers import first_number, last_number, reference_text

MARK = "####"


def reward(prompts, completions, answer, **columns) -> list[float | None]:
    """The column `answer` is a worked solution that ends in `#### 42`, or the number alone.

    The completion's answer is the first number after its last `####`; without one, its last number. Values are compared exactly,
    as in numeric_match. None where the column `answer` holds no number.
    """
    return [_score(text, solution) for text, solution in zip(completions, answer, strict=True)]


def _score(text, solution) -> float | None:
    expected = _answer_in(reference_text(solution) or "")
    if expected is None:
        return None
    if (found := _answer_in(text)) is None:
        return unparsable()
    return 1.0 if found == expected else wrong()


def _answer_in(text: str) -> Fraction | None:
    _, mark, rest = text.rpartition(MARK)
    return first_number(rest) if mark else last_number(text)
