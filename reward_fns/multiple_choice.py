"""Reward 1 for the right letter of a multiple-choice question, 0 otherwise."""

import re

from rlkit.data.rewards import unparsable, wrong

MARKED = (
    r"\\boxed\{\s*(?:\\text\{)?\(?([A-Z])\)?\}?\s*\}",
    r"<answer>\s*\(?([A-Z])\)?[.:]?\s*</answer>",
    r"(?i:answer|choice|option)\W{0,4}(?i:is\W{0,4})?(?:\*\*)?\(?([A-Z])\b",
)
BARE = r"(?<![A-Za-z'\u2019])\(?([A-Z])\)?(?![A-Za-z'\u2019])"


def reward(prompts, completions, answer, choices=None, **columns) -> list[float | None]:
    """The column `answer` is the letter, or with the column `choices` (a list of texts) the number of the right one, from 0.

    The completion's answer is the last letter that is marked as one (`\\boxed{B}`, `<answer>B</answer>`, "the answer is (B)");
    without a mark, a completion that names a single letter. One that names several has none. None where `answer` is no letter.
    """
    options = [None] * len(completions) if choices is None else choices
    return [_score(text, expected, own) for text, expected, own in zip(completions, answer, options, strict=True)]


def _score(text, expected, options) -> float | None:
    if isinstance(expected, int) and options is not None and 0 <= expected < len(options):
        expected = chr(ord("A") + expected)
    letter = re.fullmatch(r"\(?([A-Za-z])\)?\.?", str(expected).strip())
    if letter is None:
        return None
    found = _letter_in(text)
    if found is None:
        return unparsable()
    return 1.0 if found == letter[1].upper() else wrong()


def _letter_in(text: str) -> str | None:
    for pattern in MARKED:
        if found := re.findall(pattern, text):
            return found[-1]
    # The article and the pronoun are words, unless they are all there is.
    bare = {each for each in re.findall(BARE, text) if each not in "AI" or text.strip(" ().\n") == each}
    return bare.pop() if len(bare) == 1 else None
