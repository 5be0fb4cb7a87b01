"""Reward 1 for the right final answer in GSM8K's style, 0 otherwise."""

from rlkit.data.rewards import unparsable, wrong
from rlkit.data.rewards.numbers import last_number

MARK = "####"


def reward(prompts, completions, answer, **columns) -> list[float | None]:
    """The column `answer` is a worked solution that ends in `#### 42`, or the number alone.

    The completion's answer is the number after its last `####`; without one, its last number. Values are compared exactly, as
    in numeric_match. None where the column `answer` holds no number.
    """
    return [_score(text, solution) for text, solution in zip(completions, answer, strict=True)]


def _score(text, solution) -> float | None:
    expected, found = (last_number(each.rpartition(MARK)[2]) for each in (str(solution), text))
    if expected is None:
        return None
    if found is None:
        return unparsable()
    return 1.0 if found == expected else wrong()
