"""Reward 1 for the right letter of a multiple-choice question, 0 otherwise."""

import re
import string
from collections.abc import Iterator

from rlkit.data.rewards import unparsable, wrong
from rlkit.data.rewards.numbers import in_answer_tags, reference_text

BOX = re.compile(r"\\boxed\s*\{((?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*)\}")
STYLE = r"\\(?:text|textbf|textrm|textit|mathrm|mathbf|mathit|mbox)\s*"
EMPHASIS = re.compile(rf"(?:\*\*|\$|{STYLE}\{{)\s*\(?([A-Za-z])\)?[.:]?\s*(?:\*\*|\$|\}})")  # of a letter alone
STYLED = re.compile(rf"{STYLE}\{{([^{{}}]*)\}}")
LETTER = r"(?:\(\s*([A-Za-z])\s*\)|(?<![\w\\'\u2019(])([A-Za-z])(?![\w'\u2019#]|\+\+|-\w))"  # (B), (b), B; not Berlin, C++ or B's
BARE = re.compile(LETTER)
NOUN = r"(?:(?:the\s+)?(?:(?:final|correct|right|best)\s+)?(?:answer|choice|option|letter))"
VERB = r"(?:choos(?:e|ing)|pick(?:ing)?|select(?:ing)?|go(?:ing)?\s+with)"
MARKED = re.compile(
    rf"(?:\b{NOUN}\s*(?:\b(?:is|would\s+be|must\s+be|should\s+be)\b|[:=])|\b{VERB}\b)[\s:=]*(?:{NOUN}\s*:?\s*)?{LETTER}",
    re.IGNORECASE,
)
PRAISED = re.compile(rf"{LETTER}\s+is\s+(?:the\s+)?(?:right|correct|best)\b(?!\s+if|\s+only|[\s-]+angle)")
NAMED = re.compile(rf"(?:\b{NOUN}|\b{VERB})\s*[:=]?\s*$", re.IGNORECASE)  # before a letter
BLAMED = re.compile(
    r"\)?\s*(?:\?|(?:is|are|was|can|does|would|must)\s*(?:be\s+)?(?:n['\u2019]t|not|wrong|incorrect|false)\b)", re.IGNORECASE
)
DOUBTED = re.compile(
    r"(?:\b(?:not|never|cannot|if|whether|suppose|assum\w+|could|might|maybe|perhaps)|n['\u2019]t)\b[\w\s]{0,20}$", re.IGNORECASE
)
JOINED = r"(?:,?\s*\b(?:or|and)\b|[,/&+])\s*"
OTHER_AFTER = re.compile(rf"\s*{JOINED}(?:(?i:{NOUN})\s+)?{LETTER}")
OTHER_LATER = re.compile(rf"[^.;\n]{{0,60}}\bor\s+(?:(?i:{NOUN})\s+)?{LETTER}")
OTHER_BEFORE = re.compile(rf"{LETTER}\s*{JOINED}$")
SECOND_THOUGHT = re.compile(r"\b(?:wait|actually|instead|rather|correction|no,)", re.IGNORECASE)
NO_ARTICLE = re.compile(
    r"\s*(?:$|[).:;,!?]|\n)|\s+(?:is|was|because|since|as|with|due|given|but|so|and|or)\b"
)  # behind the letter A


def reward(prompts, completions, answer, choices=None, **columns) -> list[float | None]:
    """The column `answer` is the letter, or with the column `choices` (a list of texts) the number of the right one, from 0, which
    may be written as text. With `choices`, no other letters are read.

    The completion's answer is the last letter that is marked as one: `\\boxed{B}`, or `<answer>B</answer>`, or in words ("the
    answer is (B)", "I choose B", "B is right"); without a mark, a completion that names a single letter. One that names several
    has none, and neither has a mark with an alternative ("the answer is A or B"). None where `answer` is no letter of the row's.
    """
    options = [None] * len(completions) if choices is None else choices
    return [_score(text, expected, own) for text, expected, own in zip(completions, answer, options, strict=True)]


def _score(text, expected, options) -> float | None:
    letters = string.ascii_uppercase[: len(options)] if isinstance(options, list) and options else ""
    wanted = _expected(reference_text(expected), letters)
    if wanted is None:
        return None
    found = _letter_in(text, letters or string.ascii_uppercase)
    if found is None:
        return unparsable()
    return 1.0 if found == wanted else wrong()


def _expected(answer: str | None, letters: str) -> str | None:
    """`letters`: none without choices."""
    if answer is None:
        return None
    if re.fullmatch(r"[0-9]{1,2}(\.0)?", answer):  # a column with gaps has numbers with a point
        return letters[int(float(answer))] if float(answer) < len(letters) else None
    letter = re.fullmatch(r"\(?([A-Za-z])[).:]*", answer)
    return letter[1].upper() if letter and letter[1].upper() in (letters or string.ascii_uppercase) else None


def _letter_in(text: str, letters: str) -> str | None:
    text = text if (tagged := in_answer_tags(text)) is None else tagged
    boxes = [(box, read) for box in BOX.finditer(text) if (read := _alone(box[1], letters)) is not None]
    if boxes:
        (box, last), before = boxes[-1], boxes[-2:-1]
        if before and before[0][1] != last and re.fullmatch(rf"[\s$]*{JOINED}[\s$]*", text[before[0][0].end() : box.start()]):
            return None
        return last or None
    if alone := _alone(text, letters):
        return alone
    text = _plain(text)
    marks = [match for pattern in (MARKED, PRAISED) for match in pattern.finditer(text)]
    said = [(match, letter) for match in marks if (letter := _said(text, match, letters)) is not None]
    if said:
        match, letter = max(said, key=lambda each: each[0].end())
        later = SECOND_THOUGHT.search(text, match.end())
        changed = later is not None and any(other != letter for _, other in _bare(text, letters, later.end()))
        return None if changed or _has_other(text, match, letter, letters) else letter
    bare = list(_bare(text, letters))
    if len({letter for _, letter in bare}) != 1 or any(_is_doubted(text, match) for match, _ in bare):
        return None
    return bare[0][1]


def _alone(text: str, letters: str) -> str | None:
    """The letter in a text that is one, with or without the choice behind it: B, (b), B: Paris. "" for several, None for none."""
    text = _plain(text).strip().rstrip(".")
    match = re.match(r"\(?\s*([A-Za-z])\s*(?:$|\)?[).:]?\s*$|\)?[).:]\s*(?=\S)|\)\s*)", text)
    letter = match[1].upper() if match else ""
    if match is None or letter not in letters:
        first = BARE.match(text)
        return "" if first and _has_other(text, first, "", letters) else None
    rest = text[match.end() :]
    if BLAMED.match(rest) or (rest and match[1].islower() and not text.startswith("(")):  # the beginning of e.g.
        return None
    return "" if any(other != letter for _, other in _bare(rest, letters)) else letter


def _plain(text: str) -> str:
    """Without bold and fonts; a letter alone in one stands in brackets instead."""
    text = EMPHASIS.sub(r"(\1)", text)
    for _ in range(3):
        text = STYLED.sub(r"\1", text)
    return text.replace("**", "").replace("((", "(").replace("))", ")")


def _said(text: str, match: re.Match[str], letters: str) -> str | None:
    """The letter of a mark, if it is one of the row's, no article and not ruled out."""
    bracketed, bare = match.groups()
    end = match.end(2) if bare else match.end(1)
    letter = (bracketed or bare).upper()
    if letter not in letters or _is_doubted(text, match):
        return None
    if bare and bare.islower():  # "the answer is a dog", but "the answer is b."
        return letter if re.match(r"[).:]|\s*$|\s*\n", text[end:]) else None
    is_article = bare and letter in "AI" and match.re is MARKED and not NO_ARTICLE.match(text, end)
    return None if is_article else letter


def _bare(text: str, letters: str, start: int = 0) -> Iterator[tuple[re.Match[str], str]]:
    """The letters that stand alone, without the words A and I."""
    for match in BARE.finditer(text, start):
        bracketed, bare = match.groups()
        if (bracketed or bare).upper() not in letters or (bare and bare.islower()):
            continue
        if bare and bare in "AI" and not _is_letter(text, match, letters):
            continue
        yield match, (bracketed or bare).upper()


def _is_letter(text: str, match: re.Match[str], letters: str) -> bool:
    before, after = text[max(0, match.start() - 40) : match.start()], text[match.end() :][:40]
    begins = not before.strip(" ") or before.rstrip(" ").endswith("\n")
    return (
        NAMED.search(before) is not None
        or (begins and re.match(r"[).:]|\s*$|\s*\n", after) is not None)
        or re.match(r"[.!?;,)]|\s*$", after) is not None
        or (match[0] == "A" and re.match(r"\s+(?:is|was|because|since)\b", after) is not None)
        or _has_other(text, match, "", letters)
    )


def _is_doubted(text: str, match: re.Match[str]) -> bool:
    before = text[max(0, match.start() - 40) : match.start()]
    return BLAMED.match(text, match.end()) is not None or DOUBTED.search(before) is not None


def _has_other(text: str, match: re.Match[str], letter: str, letters: str) -> bool:
    """Whether another letter stands beside it as an alternative: A or B, A, B."""
    start = match.start(1) if match[1] else match.start(2)
    after = (OTHER_AFTER.match(text, match.end()), OTHER_LATER.match(text, match.end()))
    for other in (*after, OTHER_BEFORE.search(text[max(0, start - 20) : start].rstrip("("))):
        if other is None:
            continue
        bracketed, bare = other.groups()
        found = bracketed or bare
        is_word = bare is not None and (bare.islower() or (bare == "I" and re.match(r"\s+[a-z]", text[other.end() :])))
        if found.upper() in letters and found.upper() != letter and not is_word:
            return True
    return False
