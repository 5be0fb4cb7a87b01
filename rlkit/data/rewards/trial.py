"""Tries a reward function on rows of data before any model is loaded: `rlkit reward test`."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlkit.data.rewards.pool import RewardItem, RewardPool
from rlkit.errors import DataError
from rlkit.settings import Reward
from rlkit.types import RewardResult, RewardStatus

FAILED = (RewardStatus.error, RewardStatus.timeout)
OWN, OTHER = "its answer", "another answer"  # names of cases
# What a policy comes up with, and what breaks parsers: every function meets it within a long run.
HOSTILE = {
    "empty": "",
    "spaces": " \n\t ",
    "huge": "word " * 40_000,
    "unicode": "\u2212\u0663 \U0001d7d9 \u202e\u0000\ufeff e\u0301 \U0001f469\u200d\U0001f680 \ud83d",
    "digits": "9" * 20_000,
    "exponent": "1e999999999",
    "not a number": "nan inf -inf 1/0",
    "tower": "9**9**9**9",
    "repetition": "a" * 5_000 + "!",
    "brackets": "(" * 5_000,
    "boxes": "\\boxed{" * 2_000,
    "fractions": "\\frac{" * 2_000 + "1",
    "tags": "<think>" * 1_000 + "</answer>" * 1_000,
    "json": "[" * 5_000 + '{"a":',
    "code": "```python\nwhile True: pass\n```",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One completion of one row, and what became of it."""

    row: int
    name: str
    result: RewardResult
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """All cases of a function."""

    fn: str
    convention: str
    cases: list[Case]
    repeats: bool  # the first cases, scored once more, got the same rewards

    @property
    def verdict(self) -> str:
        """One line: what is wrong, the worst first; or that nothing was found."""
        failed = [case for case in self.cases if case.result.status in FAILED]
        if failed:
            first = failed[0]
            names = ", ".join(dict.fromkeys(case.name for case in failed))
            many = f"{len(failed)} of {len(self.cases)} calls" + ("" if len(failed) == len(self.cases) else f" ({names})")
            return f"{self.fn}: fails on {many}; first on row {first.row}, {first.name}: {first.result.message}"
        if all(case.result.reward is None for case in self.cases):
            return f"{self.fn}: returns None for every sample, so nothing would be trained on."
        if not self.repeats:
            return f"{self.fn}: gives the same completion different rewards when it is called again."
        if problem := self._blind():
            return f"{self.fn}: {problem}"
        return f"{self.fn}: nothing wrong was found in {len(self.cases)} calls."

    def _blind(self) -> str:
        rewards: dict[str, list[float]] = {}
        for case in self.cases:
            if case.result.reward is not None:
                rewards.setdefault(case.name, []).append(case.result.reward)
        if len({reward for found in rewards.values() for reward in found}) == 1:
            return f"gives every completion the same reward, {next(iter(rewards.values()))[0]:g}."
        if OWN in rewards and OTHER in rewards and np.mean(rewards[OWN]) <= np.mean(rewards[OTHER]):
            own, other = np.mean(rewards[OWN]), np.mean(rewards[OTHER])
            return f"gives a row's own answer {own:g} on average and another row's {other:g}. Does it want it in another form?"
        return ""

    @property
    def is_sound(self) -> bool:
        return not any(case.result.status in FAILED for case in self.cases)

    def __str__(self) -> str:
        statuses = Counter(case.result.status.value for case in self.cases)
        milliseconds = [1000 * case.seconds for case in self.cases]
        marks = "  ".join(f"p{mark} {np.percentile(milliseconds, mark):.1f}" for mark in (50, 90, 99))
        lines = [
            self.verdict,
            f"convention {self.convention}; {', '.join(f'{count} {name}' for name, count in statuses.most_common())}",
            f"milliseconds per call: {marks}  max {max(milliseconds):.1f}",
            "",
            f"{'row':>4}  {'case':<15} {'status':<11} {'reward':>8} {'ms':>8}",
        ]
        for case in self.cases:
            result = case.result
            reward = "-" if result.reward is None else f"{result.reward:g}"
            parts = "  ".join(f"{name} {value:g}" for name, value in result.components.items())
            said = result.message or parts
            row = f"{case.row:>4}  {case.name:<15} {result.status.value:<11} {reward:>8} {1000 * case.seconds:>8.1f}"
            lines.append(f"{row}  {said[:100]}".rstrip())
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "function": self.fn,
            "verdict": self.verdict,
            "sound": self.is_sound,
            "convention": self.convention,
            "cases": [
                {
                    "row": case.row,
                    "case": case.name,
                    "status": case.result.status.value,
                    "reward": case.result.reward,
                    "components": case.result.components,
                    "message": case.result.message,
                    "seconds": round(case.seconds, 6),
                }
                for case in self.cases
            ],
        }


def try_function(
    settings: Reward,
    rows: Sequence[Mapping[str, Any]],
    *,
    base_dir: Path,
    prompt_column: str = "prompt",
    answer_column: str = "answer",
) -> Trial:
    """Scores each row's own completions, if it has a column `completion` or `completions`, its answer, another row's answer, and on
    the first row everything hostile. Raises ConfigError and DataError for what would stop a run before its first step."""
    with _in_order(), RewardPool(settings.fn, settings, base_dir=base_dir, convention=settings.signature) as pool:
        lacking = [name for row in rows if (name := pool.missing("", row)) is not None]
        if lacking:
            raise DataError(
                f"reward.fn={settings.fn}: needs a column {lacking[0]}, and {len(lacking)} of {len(rows)} rows have none. "
                f"The columns are {', '.join(dict.fromkeys(name for row in rows for name in row))}."
            )
        wanted = list(_completions(rows, answer_column))
        groups = [[each for each in wanted if each[0] == row] for row in range(len(rows))]
        calls = [[each] for each in wanted] if not pool.signature.group_wise else [group for group in groups if group]
        cases = [case for call in calls for case in _score(pool, rows, call, prompt_column)]
        steady = [call for call in calls if all(name in (OWN, OTHER, "empty") for _, name, _ in call)][:3]
        again = {(case.row, case.name): case.result.reward for call in steady for case in _score(pool, rows, call, prompt_column)}
    repeats = all(again.get((case.row, case.name), case.result.reward) == case.result.reward for case in cases)
    return Trial(fn=settings.fn, convention=pool.signature.convention, cases=cases, repeats=repeats)


@contextmanager
def _in_order() -> Iterator[None]:
    """Within, the pool does not report the first failure by itself: the trial says it, in its place."""
    logger = logging.getLogger(RewardPool.__module__)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _completions(rows: Sequence[Mapping[str, Any]], answer_column: str) -> Iterator[tuple[int, str, str]]:
    answers = [row.get(answer_column) for row in rows]
    for index, row in enumerate(rows):
        own = row.get("completions", [row["completion"]] if "completion" in row else [])
        yield from ((index, f"completion {number}", str(text)) for number, text in enumerate(own))
        if answers[index] is not None:
            yield index, OWN, str(answers[index])
            other = next((answer for answer in answers if answer is not None and answer != answers[index]), None)
            yield index, OTHER, f"{answers[index]}0" if other is None else str(other)
        if index == 0:
            yield from ((index, name, text) for name, text in HOSTILE.items())


def _score(
    pool: RewardPool, rows: Sequence[Mapping[str, Any]], call: Sequence[tuple[int, str, str]], prompt_column: str
) -> list[Case]:
    items = []
    for index, name, text in call:
        prompt = rows[index].get(prompt_column, "")
        messages = prompt if isinstance(prompt, list) else None
        said = "\n".join(str(message.get("content", "")) for message in messages) if messages else str(prompt)
        items.append(
            RewardItem(
                sample_id=f"row {index}, {name}",
                group_id=str(index),
                prompt=said,
                completion=text,
                columns=rows[index],
                messages=messages,
                source=str(rows[index].get("data_source", "")),
            )
        )
    began = time.monotonic()
    results = pool.score(items)
    seconds = time.monotonic() - began
    return [
        Case(row=index, name=name, result=result, seconds=seconds) for (index, name, _), result in zip(call, results, strict=True)
    ]
