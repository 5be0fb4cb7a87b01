"""The score that reasoning-gym's own verifier of the row's task gives, in [0, 1]. For `data=reasoning_gym`."""

from collections.abc import Callable
from functools import cache

import reasoning_gym

score_function = cache(reasoning_gym.get_score_answer_fn)


def reward(prompts, completions, prompt, answer, metadata, **columns) -> list[float]:
    """The completion, without white space around it, is the answer: `<answer>` tags are taken off when it has them."""
    return [
        _score(text, {"question": question, "answer": known, "metadata": about})
        for text, question, known, about in zip(completions, prompt, answer, metadata, strict=True)
    ]


def _score(text: str, entry: dict) -> float:
    score: Callable = score_function(entry["metadata"]["source_dataset"])
    return float(score(answer=_answer_in(text), entry=entry))


def _answer_in(text: str) -> str:
    _, tag, rest = text.rpartition("<answer>")
    return (rest.partition("</answer>")[0] if tag else text).strip()
