"""Numbers, durations, tables and small curves as short text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

_LEVELS = "▁▂▃▄▅▆▇█"


def number(value: float) -> str:
    """Three decimals where that says something, a power of ten elsewhere; seven characters for most values."""
    if not math.isfinite(value):
        return str(float(value))
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-3 or size >= 1e6:
        mantissa, exponent = f"{value:.1e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    if size >= 1e3:
        return f"{value:,.0f}"
    return f"{value:.3f}" if size < 10 else f"{value:.2f}" if size < 100 else f"{value:.1f}"


def percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}%"


def duration(seconds: float) -> str:
    """The two largest units: `4.2s`, `38s`, `3m 05s`, `2h 07m`, `1d 03h`."""
    if seconds < 9.95:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m {whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h {whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d {whole % 86400 // 3600:02d}h"


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line a row, its cells under one another."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """The first row is the heading."""
    heading, *body = (f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
    return [heading, "|" + " --- |" * len(rows[0]), *body]


def sparkline(values: Sequence[float], width: int) -> str:
    """The whole series in at most `width` characters, each the mean of its share; values that are not finite are left out."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    bins = min(width, len(finite))
    edges = [len(finite) * i // bins for i in range(bins + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, span = min(means), max(means) - min(means)
    top = len(_LEVELS) - 1
    return "".join(_LEVELS[round((mean - low) / span * top) if span else top // 2] for mean in means)
