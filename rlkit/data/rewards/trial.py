"""Tries a reward function on rows of data before any model is loaded: `rlkit reward test`."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlkit.data.files import renamed
from rlkit.data.processes.budget import ErrorBudget
from rlkit.data.rewards.pool import RewardItem, RewardPool
from rlkit.data.rewards.signatures import RewardSignature
from rlkit.errors import DataError, RlkitError
from rlkit.settings import Reward
from rlkit.types import RewardResult, RewardStatus

FAILED = (RewardStatus.error, RewardStatus.timeout)
OWN, OTHER = "its answer", "another answer"  # names of cases
MAX_REPEATED = 8  # calls, made once more
# Conventions that take arguments of the same names, and mean other things by them.
SIBLINGS = {"rlkit": ("trl",), "trl": ("rlkit",), "plain": ("verifiers",), "verifiers": ("plain",), "verl": ()}
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
    sees_columns: bool  # of the row; without any it cannot know a right answer
    remedy: str = ""  # what to write instead, where that was found out
    notes: tuple[str, ...] = ()  # what was not there to be tried
    traceback: str = ""  # of the first failure

    @property
    def verdict(self) -> str:
        """One line: what is wrong, the worst first; or that nothing was found."""
        return f"{self.fn}: {self._problem() or f'nothing wrong was found in {len(self.cases)} calls.'}"

    @property
    def is_sound(self) -> bool:
        return not self._problem()

    def _problem(self) -> str:
        failed = [case for case in self.cases if case.result.status in FAILED]
        if failed:
            first = failed[0]
            names = ", ".join(dict.fromkeys(case.name for case in failed))
            many = f"{len(failed)} of {len(self.cases)} calls" + ("" if len(failed) == len(self.cases) else f" ({names})")
            remedy = f"; it works with {self.remedy}" if self.remedy else ""
            return f"fails on {many}; first on row {first.row}, {first.name}: {first.result.message}{remedy}"
        if all(case.result.reward is None for case in self.cases):
            return "returns None for every sample, so nothing would be trained on."
        if not self.repeats:
            return "gives the same completion different rewards when it is called again."
        return self._blind()

    def _blind(self) -> str:
        rewards: dict[str, list[float]] = {}
        for case in self.cases:
            if case.result.reward is not None:
                rewards.setdefault(case.name, []).append(case.result.reward)
        if len({reward for found in rewards.values() for reward in found}) == 1:
            return f"gives every completion the same reward, {next(iter(rewards.values()))[0]:g}."
        if self.sees_columns and OWN in rewards and OTHER in rewards and np.mean(rewards[OWN]) <= np.mean(rewards[OTHER]):
            own, other = np.mean(rewards[OWN]), np.mean(rewards[OTHER])
            return f"gives a row's own answer {own:g} on average and another row's {other:g}. Does it want it in another form?"
        return ""

    def __str__(self) -> str:
        statuses = Counter(case.result.status.value for case in self.cases)
        milliseconds = [1000 * case.seconds for case in self.cases]
        marks = "  ".join(f"p{mark} {np.percentile(milliseconds, mark):.1f}" for mark in (50, 90, 99))
        lines = [
            self.verdict,
            f"convention {self.convention}; {', '.join(f'{count} {name}' for name, count in statuses.most_common())}",
            f"milliseconds per call: {marks}  max {max(milliseconds):.1f}",
            *self.notes,
            "",
            f"{'row':>4}  {'case':<15} {'status':<11} {'reward':>8} {'ms':>8}",
        ]
        for case in self.cases:
            result = case.result
            reward = "-" if result.reward is None else f"{result.reward:g}"
            parts = "  ".join(f"{name} {value:g}" for name, value in result.components.items())
            said = " ".join(result.message.split()) or parts
            row = f"{case.row:>4}  {case.name:<15} {result.status.value:<11} {reward:>8} {1000 * case.seconds:>8.1f}"
            lines.append(f"{row}  {said[:100]}".rstrip())
        if self.traceback:
            lines += ["", "the first failure's traceback:", self.traceback]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        return {
            "function": self.fn,
            "verdict": self.verdict,
            "sound": self.is_sound,
            "convention": self.convention,
            "notes": list(self.notes),
            "traceback": self.traceback,
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Wanted:
    """A case before it is scored."""

    row: int
    name: str
    item: RewardItem


def try_function(
    settings: Reward,
    rows: Sequence[Mapping[str, Any]],
    *,
    base_dir: Path,
    prompt_column: str | None = None,
    answer_column: str | None = None,
    columns: Mapping[str, str] | None = None,
    chat: bool = False,
) -> Trial:
    """Scores each row's own completions, if it has a column `completion` or `completions`, its answer, another row's answer, and on
    the first row everything hostile. Raises ConfigError and DataError for what would stop a run before its first step.

    `prompt_column`, `answer_column`: prompt and answer, which may be absent, unless they are named. `columns`, `chat`: as
    `data.columns` and `data.chat` in training.
    """
    columns = columns or {}
    _check_named(rows, prompt_column=prompt_column, answer_column=answer_column, columns=columns)
    seen = [renamed(row, columns) for row in rows]  # by the function
    known = [{**row, **own} for row, own in zip(rows, seen, strict=True)]  # by either name
    prompts = [row.get(prompt_column or "prompt") for row in known]
    wanted = list(_wanted(seen, prompts, list(_completions(known, answer_column or "answer"))))
    if chat:
        wanted = [_in_chat(each) for each in wanted]
    with _in_order() as tracebacks:
        with RewardPool(settings.fn, settings, base_dir=base_dir, convention=settings.signature) as pool:
            signature = pool.signature
            _check_needed(pool, seen)
            calls = _calls(pool, wanted)
            cases = [case for call in calls for case in _score(pool, call)]
            steady = [call for call in calls if all(_is_plain(each) or each.name == "empty" for each in call)] or calls
            again = [case for call in steady[:MAX_REPEATED] for case in _score(pool, call)]
        remedy = _remedy(settings, base_dir, signature.convention, wanted, cases)
    rewards = {(case.row, case.name): case.result.reward for case in again}
    return Trial(
        fn=settings.fn,
        convention=signature.convention,
        cases=cases,
        repeats=all(rewards.get((case.row, case.name), case.result.reward) == case.result.reward for case in cases),
        sees_columns=any(signature.select(row) for row in seen),
        remedy=remedy,
        notes=tuple(_notes(signature, seen, prompts, wanted, prompt_column, answer_column)),
        traceback=next(iter(tracebacks), ""),
    )


def _check_named(
    rows: Sequence[Mapping[str, Any]], *, prompt_column: str | None, answer_column: str | None, columns: Mapping[str, str]
) -> None:
    own = _names(rows)
    named = {f"--column {new}={old}": (old, own) for new, old in columns.items()}
    either = [*own, *columns]
    named |= {f"--prompt-column {prompt_column}": (prompt_column, either)} if prompt_column is not None else {}
    named |= {f"--answer-column {answer_column}": (answer_column, either)} if answer_column is not None else {}
    for option, (column, existing) in named.items():
        if column not in existing:
            raise DataError(f"{option}: no row has such a column. The columns are {', '.join(existing)}.")


def _check_needed(pool: RewardPool, rows: Sequence[Mapping[str, Any]]) -> None:
    lacking = [name for row in rows if (name := pool.missing("", row)) is not None]
    if lacking:
        name = lacking[0]
        raise DataError(
            f"reward.fn={pool.signature.name}: needs a column {name}, and {len(lacking)} of {len(rows)} rows have none. "
            f"The columns are {', '.join(_names(rows))}. Write --column {name}=<one of them>; in training "
            f"data.columns.{name}=<one of them>."
        )


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _notes(
    signature: RewardSignature,
    rows: Sequence[Mapping[str, Any]],
    prompts: Sequence[Any],
    wanted: Sequence[_Wanted],
    prompt_column: str | None,
    answer_column: str | None,
) -> Iterator[str]:
    """What the function or the trial would have used, had it been there."""
    names = _names(rows)
    if unfound := signature.unfound(names):
        yield f"takes but does not find: {', '.join(unfound)}; columns: {', '.join(names)}"
    if "prompt" in signature.fields and (lacking := sum(prompt is None for prompt in prompts)):
        yield (
            f"there is no column {prompt_column or 'prompt'}: the function saw an empty one in {lacking} of {len(rows)} rows. "
            "--prompt-column names another."
        )
    if not any(map(_is_plain, wanted)):
        yield (
            f"there is no column {answer_column or 'answer'}, completion or completions: only what breaks parsers was tried. "
            "--answer-column names one."
        )


@contextmanager
def _in_order() -> Iterator[list[str]]:
    """Within, the first failure is not logged: the trial says it, in its place. Yields the tracebacks that would have been."""
    logger, tracebacks = logging.getLogger(ErrorBudget.__module__), []

    def keep(record: logging.LogRecord) -> bool:
        tracebacks.append(record.getMessage().partition("\n")[2])
        return False

    logger.addFilter(keep)
    try:
        yield tracebacks
    finally:
        logger.removeFilter(keep)


def _completions(rows: Sequence[Mapping[str, Any]], answer_column: str) -> Iterator[tuple[int, str, str]]:
    answers = [row.get(answer_column) for row in rows]
    for index, row in enumerate(rows):
        own = row.get("completions", [row["completion"]] if "completion" in row else [])
        yield from ((index, f"completion {number}", _text(said)) for number, said in enumerate(own))
        if answers[index] is not None:
            yield index, OWN, str(answers[index])
            other = next((answer for answer in answers if answer is not None and answer != answers[index]), None)
            yield index, OTHER, f"{answers[index]}0" if other is None else str(other)
        if index == 0:
            yield from ((index, name, text) for name, text in HOSTILE.items())


def _text(said: Any) -> str:
    """Of text, or of chat messages."""
    if isinstance(said, list) and all(isinstance(message, dict) for message in said):
        return "\n".join(str(message.get("content", "")) for message in said)
    return str(said)


def _wanted(
    rows: Sequence[Mapping[str, Any]], prompts: Sequence[Any], completions: Sequence[tuple[int, str, str]]
) -> Iterator[_Wanted]:
    for index, name, text in completions:
        prompt = "" if prompts[index] is None else prompts[index]
        item = RewardItem(
            sample_id=f"row {index}, {name}",
            group_id=str(index),
            prompt=_text(prompt),
            completion=text,
            columns=rows[index],
            messages=prompt if isinstance(prompt, list) else None,
            source=str(rows[index].get("data_source", "")),
        )
        yield _Wanted(row=index, name=name, item=item)


def _is_plain(wanted: _Wanted) -> bool:
    """An answer or a completion of the data, not one that means harm."""
    return wanted.name not in HOSTILE


def _in_chat(wanted: _Wanted) -> _Wanted:
    item = wanted.item
    messages = item.messages or [{"role": "user", "content": item.prompt}]
    return replace(wanted, item=replace(item, messages=messages))


def _calls(pool: RewardPool, wanted: Sequence[_Wanted]) -> list[list[_Wanted]]:
    if not pool.signature.group_wise:
        return [[each] for each in wanted]
    return [[each for each in wanted if each.row == row] for row in dict.fromkeys(each.row for each in wanted)]


def _score(pool: RewardPool, call: Sequence[_Wanted]) -> list[Case]:
    began = time.monotonic()
    results = pool.score([each.item for each in call])
    seconds = time.monotonic() - began
    return [Case(row=each.row, name=each.name, result=result, seconds=seconds) for each, result in zip(call, results, strict=True)]


def _remedy(settings: Reward, base_dir: Path, convention: str, wanted: Sequence[_Wanted], cases: Sequence[Case]) -> str:
    """What to write so that a function works which raised on all that means no harm; "" where nothing here helps."""
    failed = [each for each in wanted if _is_plain(each)] or list(wanted)
    names = {(each.row, each.name) for each in failed}
    if any(case.result.status is not RewardStatus.error for case in cases if (case.row, case.name) in names):
        return ""
    tries = [(sibling, failed) for sibling in SIBLINGS[convention]]
    if any(each.item.messages is None for each in failed):
        tries += [(each, [_in_chat(one) for one in failed]) for each in (convention, *SIBLINGS[convention]) if each == "trl"]
    for other, those in tries:
        if _works(settings, base_dir, other, those):
            is_new, is_chat = other != convention, those is not failed
            options = [f"--signature {other}"] * is_new + ["--chat"] * is_chat
            keys = [f"reward.signature={other}"] * is_new + ["data.chat=true"] * is_chat
            return f"{' '.join(options)} ({' '.join(keys)})"
    return ""


def _works(settings: Reward, base_dir: Path, convention: str, wanted: Sequence[_Wanted]) -> bool:
    """Whether none fails."""
    try:
        with RewardPool(settings.fn, settings, base_dir=base_dir, convention=convention) as pool:
            return all(case.result.status not in FAILED for call in _calls(pool, wanted) for case in _score(pool, call))
    except RlkitError:  # that convention needs columns which are not there, or another kind of answer
        return False
