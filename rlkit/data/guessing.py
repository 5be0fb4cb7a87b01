"""The rows of the guessing game: one question, and behind it a number that no row tells."""

from __future__ import annotations

from hashlib import sha256
from typing import Any


def rows(highest: int, size: int, question: str) -> list[dict[str, Any]]:
    """`size` games: `id`, `prompt` and `secret`, from 1 to `highest`, drawn by the id."""
    return [{"id": f"game-{n}", "prompt": question, "secret": _secret(n, highest)} for n in range(size)]


def _secret(number: int, highest: int) -> int:
    # sha256, because Python's own hash of a string changes with every process.
    return int.from_bytes(sha256(f"game-{number}".encode()).digest()[:8], "big") % highest + 1
