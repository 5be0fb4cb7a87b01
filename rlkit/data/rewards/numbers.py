"""Numbers in text, exactly: what the numeric reward functions compare."""

from __future__ import annotations

import math
import re
import signal
import threading
import time
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

_PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{3}){1,130}(?![0-9,])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9.])\.[0-9]+"
_POWER = r"10\s*\^\s*(?:\{{\s*(?P<{0}>[+-]?[0-9]{{1,3}})\s*\}}|(?P<{0}_bare>[+-]?[0-9]{{1,3}})(?![0-9]))"
_NUMBER = re.compile(
    r"(?P<whole>[0-9]{1,20})(?:\s*\\[dt]?frac\s*(?:\{(?P<mixed_top>[0-9]+)\}|(?P<mixed_top_bare>[0-9]))\s*"
    r"(?:\{(?P<mixed_bottom>[0-9]+)\}|(?P<mixed_bottom_bare>[0-9]))| (?P<mixed_top_plain>[0-9]+)/(?P<mixed_bottom_plain>[0-9]+))"
    r"|\\[dt]?frac\s*(?:\{\s*(?P<top>[+-]?\s*[0-9]+)\s*\}|(?P<top_bare>[0-9]))\s*"
    r"(?:\{\s*(?P<bottom>[+-]?\s*[0-9]+)\s*\}|(?P<bottom_bare>[0-9]))"
    rf"|{_POWER.format('power')}"
    rf"|(?P<number>{_PLAIN})(?:[eE](?P<exponent>[+-]?[0-9]{{1,3}})(?!\w)|/(?P<divisor>[0-9]+)|\s*\*\s*{_POWER.format('scale')})?"
)
_RAISED = dict(zip("\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b", "0123456789+-", strict=True))
_RAISED_RUN = re.compile(f"[{''.join(_RAISED)}]+")
_VULGAR = {
    character: unicodedata.normalize("NFKC", character)
    for character in "\u00bc\u00bd\u00be" + "".join(map(chr, range(0x2150, 0x215F)))
}
_VULGAR_AFTER = re.compile(f"([0-9]?)([{''.join(_VULGAR)}])")
_NOTATION = str.maketrans(
    {
        "\N{MINUS SIGN}": "-",
        "\N{FULLWIDTH HYPHEN-MINUS}": "-",
        "\N{FRACTION SLASH}": "/",
        "\N{MULTIPLICATION SIGN}": "*",
        "\N{DOT OPERATOR}": "*",
        "$": "",
    }
)
_TIMES = re.compile(r"\\(?:times|cdot)(?![A-Za-z])")
SEPARATOR = re.compile(r"(?<=[0-9])(?:\{,\}|\\[,!;: ]|[\u00a0\u2009\u202f])(?=[0-9]{3}(?![0-9]))")
_UNIT_POWER = re.compile(r"([A-Za-z]\}?)\^(?:\{[+-]?[0-9]+\}|[0-9]+)")  # 12 m^2 has one number
_SIGN = re.compile(r"(?:(?<![\w).])(?P<near>[+-])|(?:^|[=:(\[{,<>]|\bis) *(?P<far>[+-]) )$")  # 5-3 is not 5 and -3
_OPERATOR = "[-+*/^\u2013]"
# A number behind one of these is part of something that nobody calculates here: 5-42, x-3, 2^{10}, \frac{x}{2}, \sqrt{2}, \log_2 8.
_PART_OF_MORE = re.compile(
    rf"(?:[0-9}}] ?{_OPERATOR} ?|(?:\)|(?<![A-Za-z])[A-Za-z]){_OPERATOR}|\^\{{?|\}}\s*\{{|[A-Za-z}}]_\{{?(?:[0-9]+\}}? ?)?|\u221a"
    r"|\\(?:sqrt|log|ln|sin|cos|tan)[^0-9A-Za-z]{0,3})[-+]?$"
)
_MORE_FOLLOWS = re.compile(rf" ?{_OPERATOR} ?[{{(]?[-+]?(?:\.?[0-9]|\\[dt]?frac)")
_MAX_DIGITS = 400  # more is no answer, and integers of any length are not free
_LOOK = 12  # characters in which what stands before a number is looked for


def reference_text(answer: object) -> str | None:
    """A row's answer as text; None for what is none: null, empty, true and false, lists, NaN."""
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        return None
    if isinstance(answer, float) and not math.isfinite(answer):
        return None
    try:
        return str(answer).strip() or None
    except ValueError:  # an integer with more digits than Python writes
        return None


def in_answer_tags(text: str) -> str | None:
    """What stands in the last `<answer>...</answer>`, in time that grows with the text's length alone."""
    head, end, _ = text.rpartition("</answer>")
    _, tag, inner = head.rpartition("<answer>")
    return inner.partition("</answer>")[0] if end and tag else None


def in_digits(text: str) -> str:
    """Raised digits as powers (10^{3}), characters for fractions as digits with a slash."""
    text = _RAISED_RUN.sub(lambda match: "^{" + "".join(_RAISED[each] for each in match.group()) + "}", text)
    return _VULGAR_AFTER.sub(lambda match: f"{match[1]}{' ' if match[1] else ''}{_VULGAR[match[2]]}", text)


def last_number(text: str) -> Fraction | None:
    """The value of the last number in `text`, or None.

    Reads signs (the Unicode minus too), thousands separators (1,234 and LaTeX's 1{,}234 and 1\\,234), decimals, fractions (3/4,
    \\frac{3}{4}, \\frac34), mixed numbers (3 1/2) and powers of ten (1e-3, 1.2 \\times 10^{3}). A currency or percent sign is
    ignored: 50% is 50. Nothing is rounded: 0.33 is not 1/3. Nothing is calculated: the last number of 5-42 is no answer.
    """
    found, clean = None, _clean(text)
    for match in _NUMBER.finditer(clean):
        found = match
    return None if found is None else _value(clean, found)


def first_number(text: str) -> Fraction | None:
    """As `last_number`, of the first."""
    clean = _clean(text)
    first = _NUMBER.search(clean)
    return None if first is None else _value(clean, first)


def whole_number(text: str) -> Fraction | None:
    """The value of a text that is one number and nothing else, read as `last_number` does; None for any other text."""
    clean = _clean(text).strip()
    start = re.match(r"[+-] ?", clean)
    match = _NUMBER.fullmatch(clean, start.end() if start else 0)
    return None if match is None else _value(clean, match)


def _clean(text: str) -> str:
    text = _TIMES.sub("*", in_digits(text).translate(_NOTATION)).replace("\\%", "%")
    return _UNIT_POWER.sub(r"\1", SEPARATOR.sub(",", text)).strip()


def _value(text: str, match: re.Match[str]) -> Fraction | None:
    before = text[max(0, match.start() - _LOOK) : match.start()]
    before = before if match.start() <= _LOOK else f"?{before}"  # so that `^` is the text's beginning
    if len(match.group()) > _MAX_DIGITS or _PART_OF_MORE.search(before) or _MORE_FOLLOWS.match(text, match.end()):
        return None
    sign = _SIGN.search(before)
    found = _magnitude({name: value for name, value in match.groupdict().items() if value is not None})
    return -found if found is not None and sign is not None and "-" in (sign["near"], sign["far"]) else found


def _magnitude(parts: dict[str, str]) -> Fraction | None:
    def part(name: str) -> str | None:
        return next((parts[each] for each in (name, f"{name}_bare", f"{name}_plain") if each in parts), None)

    if power := part("power"):
        return Fraction(10) ** int(power)
    if (number := parts.get("number")) is not None:
        top, bottom = Fraction(number.replace(",", "")), parts.get("divisor", "1")
        top *= Fraction(10) ** int(parts.get("exponent") or part("scale") or 0)
    else:
        top, bottom = (part("mixed_top"), part("mixed_bottom")) if "whole" in parts else (part("top"), part("bottom"))
        top, bottom = Fraction("".join(str(top).split())), "".join(str(bottom).split())
    return None if int(bottom) == 0 else int(parts.get("whole", 0)) + top / int(bottom)


class Late(BaseException):
    """No exception that a package would catch."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises Late inside when it takes longer: what a policy writes may ask for a number that nobody can finish. It is stopped in
    the main thread alone, where a reward worker's calls run."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    armed = True

    def stop(*_: object) -> None:
        if armed:
            raise Late

    before, began = signal.signal(signal.SIGALRM, stop), time.monotonic()
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)  # again, should a bare except have swallowed it
    try:
        yield
    finally:
        try:
            armed = False
        finally:  # also if it is late just now
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before or signal.SIG_DFL)
            if left:  # somebody else's
                signal.setitimer(signal.ITIMER_REAL, max(0.001, left - (time.monotonic() - began)), interval)
