"""A task for a small pretrained model: the larger of two two-digit numbers, asked in words."""

from __future__ import annotations

from hashlib import sha256
from itertools import permutations
from typing import Literal

Split = Literal["train", "held_out"]


def prompt_text(a: int, b: int) -> str:
    return f"Which number is larger, {a} or {b}?"


def split_of(a: int, b: int, held_out_fraction: float) -> Split:
    """The split of a pair, whatever its order: a model that saw `47 or 23` knows the answer to `23 or 47`."""
    key = sha256(f"{max(a, b)}>{min(a, b)}".encode()).digest()
    return "held_out" if int.from_bytes(key[:8], "big") < held_out_fraction * 2**64 else "train"


def rows(split: Split, held_out_fraction: float) -> list[dict[str, str]]:
    """Every ordered pair of distinct two-digit numbers in `split`: `id`, `prompt` and `answer`."""
    return [
        {"id": f"{a},{b}", "prompt": prompt_text(a, b), "answer": str(max(a, b))}
        for a, b in permutations(range(10, 100), 2)
        if split_of(a, b, held_out_fraction) == split
    ]
