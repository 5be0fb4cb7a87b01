"""Keeps secrets out of everything a run writes: by a setting's name, by a value's shape, and by the environment's own secrets."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

REDACTED = "<redacted>"

_NAME = re.compile(r"key|token(?!i[sz]e)|secret|passw|auth|credential", re.IGNORECASE)
_NAME_OF_ANY_TYPE = re.compile(r"api_?key|secret|passw|credential", re.IGNORECASE)
_SHAPES = (
    re.compile(r"\bhf_[A-Za-z0-9]{20,}"),  # Hugging Face
    re.compile(r"\bsk-[\w-]{20,}"),  # OpenAI, Anthropic
    re.compile(r"\bgh[pousr]_[A-Za-z0-9]{20,}|\bgithub_pat_\w{20,}|\bglpat-[\w-]{20,}"),
    re.compile(r"\bxox[abprs]-[\w-]{10,}"),  # Slack
    re.compile(r"\bA(?:KIA|SIA)[0-9A-Z]{16}|\bAIza[\w-]{35}"),  # AWS, Google
    re.compile(r"\beyJ[\w-]+\.[\w-]+\.[\w-]+"),  # JSON web token
    re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL),
    re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)"),  # user:password@host
    re.compile(r"(?i)(?<=\bbearer )\S{8,}"),
    re.compile(
        r"""(?ix)(?:api_?key|secret|passw(?:or)?d|credential|(?:access|auth)_token)s?["']?\s*[=:]\s*["']?(?P<value>[^\s"',]+)"""
    ),
)


def redact(text: str) -> str:
    """`text` without anything that looks like a secret, or that the environment names as one."""
    for value in _environment_secrets():
        text = text.replace(value, REDACTED)
    for shape in _SHAPES:
        text = shape.sub(_replace, text)
    return text


def plain_settings(value: Any, name: str = "") -> Any:
    """A config as dictionaries, lists and scalars, enums by name, secrets redacted.

    Below a secret-sounding name every string goes. Numbers stay, because `max_prompt_tokens` is a count, except below
    names that can mean nothing else (password, secret, api_key, credential).
    """
    if is_dataclass(value):
        return {field.name: plain_settings(getattr(value, field.name), _path(name, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain_settings(item, _path(name, str(key))) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_settings(item, name) for item in value]
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, bool) or value is None:
        return value
    if _NAME_OF_ANY_TYPE.search(name):
        return REDACTED
    if isinstance(value, int | float):
        return value
    return REDACTED if _NAME.search(name) and value else redact(str(value))


def _path(parent: str, name: str) -> str:
    return f"{parent}.{name}"


def _replace(match: re.Match[str]) -> str:
    if "value" in match.re.groupindex:  # keep the name, so that the line still says which setting it was
        return match[0][: match.start("value") - match.start()] + REDACTED
    return REDACTED


def _environment_secrets() -> list[str]:
    """Values of variables with secret-sounding names; longest first, so that none hides inside another.

    Short values, single words (`disabled`) and existing paths are no secrets, and replacing them would garble the text.
    """
    values = {value for name, value in os.environ.items() if _NAME.search(name) and len(value) >= 8}
    return sorted((v for v in values if not v.isalpha() and not os.path.exists(v)), key=len, reverse=True)
