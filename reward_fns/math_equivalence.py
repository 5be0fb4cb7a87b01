"""Reward 1 for a completion whose answer is mathematically equal to the reference, 0 otherwise. Uses math-verify."""

import logging
import re
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any

from math_verify import parse, verify
from sympy import Basic, Float, Rational, UnevaluatedExpr
from sympy.core.relational import Relational
from sympy.matrices import MatrixBase

from rlkit.data.rewards import unparsable, wrong
from rlkit.data.rewards.numbers import SEPARATOR, Late, in_answer_tags, in_digits, reference_text, whole_number, within

MAX_SECONDS = 3.0  # for the reference, and for the completion: together below the usual reward.timeout_s
logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its own limits are off
logger = logging.getLogger(__name__)

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_CHARACTERS = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "\N{FULLWIDTH HYPHEN-MINUS}": "-",
        "\N{FRACTION SLASH}": "/",
        "\N{DIVISION SLASH}": "/",
        "\N{MULTIPLICATION SIGN}": r"\times ",
        "\N{DOT OPERATOR}": r"\cdot ",
        "\N{DIVISION SIGN}": r"\div ",
        "\N{INFINITY}": r"\infty ",
        "\N{GREEK SMALL LETTER PI}": r"\pi ",
        "\N{LESS-THAN OR EQUAL TO}": r"\le ",
        "\N{GREATER-THAN OR EQUAL TO}": r"\ge ",
        "\N{UNION}": r"\cup ",
        "\N{INTERSECTION}": r"\cap ",
        "\N{DEGREE SIGN}": r"^\circ ",
    }
)
_ROOT = re.compile(r"\u221a\s*(?:\(([^()]*)\)|\{([^{}]*)\}|([0-9]+(?:\.[0-9]+)?|[A-Za-z]))")
_SCIENTIFIC = re.compile(
    r"(?<![\w.^])([0-9]{1,40}(?:\.[0-9]{1,40})?)"
    r"(?:[eE]([+-]?[0-9]{1,2})(?!\w|\.[0-9])|\s*(?:\\times|\\cdot|\*)\s*10\s*\^\s*(?:\{\s*([+-]?[0-9]{1,2})\s*\}|([+-]?[0-9]{1,2})(?![0-9])))"
)
_MIXED = re.compile(r"(?<![\w./^])([0-9]{1,9}) ([0-9]{1,9})/([0-9]{1,9})(?![\w/]|\.[0-9])")
_PERCENT = re.compile(r"\s*(?:\\?%|\bpercent\b)$", re.IGNORECASE)
_QUANTITY = re.compile(
    r"[-+]?\s*(?:[0-9][0-9,]*(?:\.[0-9]+)?(?:/[0-9]+)?|\\[dt]?frac\{[0-9]+\}\{[0-9]+\}|\\sqrt\{[0-9]+\}|\\pi)"
    r"(?P<unit>(?:\s|~|\\[,;: ]|\\(?:text|mathrm|textrm|mbox|rm|operatorname)\b|\^?\\circ\b|[{}^/]|[A-Za-z\u00b5]+"
    r"|(?<=[\^{A-Za-z])-?[0-9])*)"
)
_FONT = re.compile(r"\\(?:text|mathrm|textrm|mbox|rm|operatorname)\b|\\[,;: ]|[\s~{}\\]")
_COMMAND = re.compile(r"(?<![^\s(])([^\s$(]*\\(?:sqrt|pi|infty|frac|dfrac|tfrac)\b(?:[^\s$]*[^\s$.,;:!?])?)")
_WORD = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{2,}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """One side: as written, and what math-verify makes of it."""

    text: str  # "" where it stands in a sentence
    parsed: list[Any]
    several: bool = False  # boxes

    @property
    def said(self) -> str:
        return self.text or next((each for each in self.parsed if isinstance(each, str)), "")

    @property
    def is_percent(self) -> bool:
        unit = UnevaluatedExpr(Rational(1, 100))  # as math-verify has it
        return _PERCENT.search(self.said) is not None or any(isinstance(each, Basic) and each.has(unit) for each in self.parsed)

    @property
    def number(self) -> Fraction | None:
        """Where it is a plain number, its value: of 50% it is 50."""
        return None if self.several else whole_number(_PERCENT.sub("", self.said))

    @property
    def unit(self) -> str:
        """What stands behind the number, in one spelling; empty where it is no number with a unit."""
        quantity = _QUANTITY.fullmatch(self.text)
        unit = _FONT.sub("", quantity["unit"]).strip("^").replace("circ", "degree") if quantity else ""
        return unit if len(unit) <= 3 else unit.lower().removesuffix("s")

    @property
    def is_set(self) -> bool | None:
        """Of several values: whether their order does not count. None for a single value, and for a list without brackets."""
        text = self.text.replace("\\left", "").replace("\\right", "").strip()
        if self.several or (text.startswith("\\{") and text.endswith("\\}")):
            return True
        return False if "," in text and text[0] in "([" and text[-1] in ")]" else None


def reward(prompts, completions, answer, **columns) -> list[float | None]:
    """The column `answer` is LaTeX or plain text, with or without `$...$` or `\\boxed{...}`: `\\frac{1}{2}`, `(0, 1]`, `x^2 + 1`.

    The completion's answer is what is in `\\boxed{...}`, several boxes being a set, else in `<answer>`, else the last expression
    that math-verify finds. None is unparsable. Plain numbers are compared exactly, other answers by math-verify, decimals at
    their exact value: 0.333 is not 1/3. A number with a percent sign is either of two, 50% being 50 or 0.5. A unit may be left
    out, but 12 cm is not 12 m; (1, 2) is not {1, 2}. What takes too long to compare is wrong.
    None where nothing can be read from `answer`.
    """
    return [_score(text, reference_text(reference)) for text, reference in zip(completions, answer, strict=True)]


def _score(text: str, reference: str | None) -> float | None:
    if reference is None:
        return None
    try:
        with within(MAX_SECONDS):
            expected = _read_reference(reference)
    except (Late, Exception):  # of a grammar that raises whatever it stumbles over
        return None
    if expected is None:
        return None
    try:
        with within(MAX_SECONDS):
            found = _read(_in_latex(text))
            if found is None:
                return unparsable()
            return _compare(expected, found)
    except Late:
        return wrong(message=f"no verdict within {MAX_SECONDS:g} s")
    except Exception as error:  # the reference was read: it is the completion that no grammar or comparison is made for
        return unparsable(message=f"{type(error).__name__}: {error}"[:100])


def _in_latex(text: str) -> str:
    """With notations that math-verify's grammar lacks in those it has."""
    text = _ROOT.sub(lambda match: f"\\sqrt{{{match[1] or match[2] or match[3]}}}", in_digits(text).translate(_CHARACTERS))
    text = _SCIENTIFIC.sub(lambda m: format(Decimal(f"{m[1]}e{m[2] or m[3] or m[4]}"), "f"), SEPARATOR.sub("", text))
    return _MIXED.sub(lambda m: f"{int(m[1]) * int(m[3]) + int(m[2])}/{m[3]}" if int(m[2]) < int(m[3]) else m[0], text)


def _read_reference(reference: str) -> Answer | None:
    text = _in_latex(reference)
    if _BOX.search(text):
        return _read(text)
    inner = text.strip("$ \n")
    if not inner:
        return None
    return _answer(inner, text if "$" in inner else f"${inner}$")


def _read(text: str) -> Answer | None:
    boxes = list(dict.fromkeys(_boxes(text)))
    if boxes:
        return _answer(boxes[0], " and ".join(f"\\boxed{{{box}}}" for box in boxes), several=len(boxes) > 1)
    if (tagged := in_answer_tags(text)) is not None:
        return _read(tagged)
    bare = text.strip().rstrip(".").strip("$ ")
    if "$" not in bare and "\n" not in bare and len(bare) < 200:
        if _QUANTITY.fullmatch(bare):
            return _answer(bare, f"${bare}$")
        if not _WORD.search(bare) and not re.search(r"[0-9]\s+[0-9]", bare):
            return _answer(bare, f"${bare}$")
    answer = _answer("", text if "$" in text else _COMMAND.sub(r"$\1$", text))
    return None if answer is None or _goes_on(text, answer.said) else answer


def _answer(text: str, marked: str, several: bool = False) -> Answer | None:
    try:
        parsed = [_exactly(each) for each in parse(marked, parsing_timeout=0, raise_on_error=True)]
    except Exception:  # of a grammar that raises whatever it stumbles over
        parsed = []
    answer = Answer(text=text, parsed=parsed, several=several)
    return answer if parsed or answer.number is not None else None


def _goes_on(text: str, number: str) -> bool:
    """Whether it is the 2 of 2x, which math-verify finds in a sentence."""
    start = text.rfind(number) + len(number)
    return number.isdigit() and start < len(text) and re.match(r"[a-fh-kn-rt-z](?![A-Za-z])|[\^(]", text[start:]) is not None


def _exactly(parsed: Any) -> Any:
    """With decimals as the fractions they stand for, where math-verify would round."""
    if isinstance(parsed, Relational):
        return parsed.func(_exactly(parsed.lhs), _exactly(parsed.rhs), evaluate=False)  # 7/2 = 3.5 would become "true"
    if isinstance(parsed, Basic | MatrixBase) and (floats := parsed.atoms(Float)):
        return parsed.xreplace({each: Rational(str(each)) for each in floats})
    return parsed


def _boxes(text: str) -> list[str]:
    found, start = [], 0
    while (match := _BOX.search(text, start)) is not None:
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                break
        if depth:
            break
        found.append(text[match.end() : end].strip())
        start = end
    return [box for box in found if box]


def _compare(expected: Answer, found: Answer) -> float:
    if expected.unit and found.unit and sorted(expected.unit) != sorted(found.unit):  # x y and y x are no units
        return wrong(message=f"{found.unit}, not {expected.unit}")
    if None not in (expected.is_set, found.is_set) and expected.is_set != found.is_set:
        return wrong(message="order counts in one and not in the other")
    first, second = expected.number, found.number
    if first is None or second is None:
        is_right = verify(expected.parsed, found.parsed, timeout_seconds=None, raise_on_error=True)
    else:
        is_right = bool(_values(first, expected, found) & _values(second, found, expected))
        with suppress(Late):  # which would be math-verify's, and not the answer's
            if len(found.said) < 100 and verify(expected.parsed, found.parsed, timeout_seconds=None) != is_right:
                logger.warning("%r for %r is %s as numbers, and math-verify says otherwise.", found.said, expected.said, is_right)
    return 1.0 if is_right else wrong()


def _values(number: Fraction, own: Answer, other: Answer) -> set[Fraction]:
    return {number, number / 100} if own.is_percent and not other.is_percent else {number}
