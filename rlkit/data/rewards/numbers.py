"""Numbers in text, exactly: what the numeric reward functions compare."""

from __future__ import annotations

import re
from fractions import Fraction

_PLAIN = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9,])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9.])\.[0-9]+"
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w).])[+-])?"  # 5-3 is not 5 and -3
    r"(?:\\[dt]?frac\{(?P<top>[0-9]+)\}\{(?P<bottom>[0-9]+)\}"
    rf"|(?P<number>{_PLAIN})(?:[eE](?P<exponent>[+-]?[0-9]{{1,3}})(?!\w)|/(?P<divisor>[0-9]+))?)"
)
_NOTATION = str.maketrans({"\N{MINUS SIGN}": "-", "\N{FULLWIDTH HYPHEN-MINUS}": "-", "\N{FRACTION SLASH}": "/", "$": ""})
_MAX_DIGITS = 400  # more is no answer, and integers of any length are not free


def last_number(text: str) -> Fraction | None:
    """The value of the last number in `text`, or None.

    Reads signs (the Unicode minus too), thousands separators (1,234 and LaTeX's 1{,}234), decimals, fractions (3/4 and
    \\frac{3}{4}) and powers of ten (1e-3). A currency or percent sign is ignored: 50% is 50. Nothing is rounded: 0.33 is not 1/3.
    """
    found = None
    text = text.translate(_NOTATION).replace("{,}", ",").replace("\\%", "%")
    for match in _NUMBER.finditer(text):
        found = match
    return None if found is None else _value(found)


def whole_number(text: str) -> Fraction | None:
    """The value of a text that is one number and nothing else, read as `last_number` does; None for any other text."""
    match = _NUMBER.fullmatch(text.translate(_NOTATION).replace("{,}", ",").strip())
    return None if match is None else _value(match)


def _value(match: re.Match[str]) -> Fraction | None:
    if len(match.group()) > _MAX_DIGITS:
        return None
    if match["top"] is not None:
        top, bottom = Fraction(match["top"]), int(match["bottom"])
    else:
        top, bottom = Fraction(match["number"].replace(",", "")), int(match["divisor"] or 1)
        if match["exponent"] is not None:
            top *= Fraction(10) ** int(match["exponent"])
    if bottom == 0:
        return None
    return (-top if match["sign"] == "-" else top) / bottom
