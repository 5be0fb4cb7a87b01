"""The score that reasoning-gym's own verifier of the row's task gives, in [0, 1]. For `data=reasoning_gym`."""

import re
from collections.abc import Callable
from functools import cache

import reasoning_gym

from rlkit.data.rewards import wrong
from rlkit.data.rewards.numbers import Late, within

MAX_SECONDS = 3.0  # below the usual reward.timeout_s
ENDLESS = re.compile(r"[0-9.][eE][+-]?[0-9]{5}")
score_function = cache(reasoning_gym.get_score_answer_fn)


def reward(prompts, completions, prompt, answer, metadata, **columns) -> list[float | None]:
    """The completion, without white space around it, is the answer: `<answer>` tags are taken off when it has them. None where
    the row's own answer cannot be scored."""
    return [
        _score(text, {"question": question, "answer": known, "metadata": about})
        for text, question, known, about in zip(completions, prompt, answer, metadata, strict=True)
    ]


def _score(text: str, entry: dict) -> float | None:
    if not isinstance(entry["metadata"], dict) or "source_dataset" not in entry["metadata"]:
        return None
    score: Callable = score_function(entry["metadata"]["source_dataset"])
    if ENDLESS.search(text):  # which nothing interrupts
        return wrong(message="a power of ten with an endless exponent")
    try:
        with within(MAX_SECONDS):
            return float(score(answer=_answer_in(text), entry=entry))
    except Late:
        return wrong(message=f"no verdict within {MAX_SECONDS:g} s")
    except Exception as error:  # a hundred verifiers of others, each with its own way to stumble
        return wrong(message=f"{type(error).__name__}: {error}"[:100]) if _judges(score, entry) else None


def _judges(score: Callable, entry: dict) -> bool:
    """Whether it is the completion that it stumbled over, and not the row."""
    try:
        score(answer=entry["answer"], entry=entry)
    except Exception:
        return False
    return True


def _answer_in(text: str) -> str:
    _, tag, rest = text.rpartition("<answer>")
    return (rest.partition("</answer>")[0] if tag else text).strip()
