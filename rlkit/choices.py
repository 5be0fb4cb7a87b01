"""What can be chosen and set, read from the code itself: names, first docstring lines, fields, defaults, comments beside them."""

from __future__ import annotations

import ast
import inspect
import io
import textwrap
import tokenize
from dataclasses import MISSING, Field, fields
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import omegaconf
from omegaconf import OmegaConf

from rlkit.config import CHOICES, RunConfig
from rlkit.overrides import groups, kind_of, options
from rlkit.resources import conf_dir


def describe() -> dict[str, Any]:
    """Everything, as plain data: `settings` that belong to no group, and `groups` -> option -> description and settings."""
    top = [_setting(RunConfig, field) for field in fields(RunConfig) if field.name not in CHOICES]
    return {"settings": top, "groups": {group: {name: _option(group, name) for name in options(group)} for group in groups()}}


def as_text(described: dict[str, Any], only: list[str]) -> str:
    """The same for people; with names in `only`, those groups alone."""
    lines: list[str] = []
    if not only:
        lines += ["settings of every run", *_setting_lines(described["settings"], "  ")]
    for group, found in described["groups"].items():
        if only and group not in only:
            continue
        lines += ["", group] if lines else [group]
        for name, option in found.items():
            lines.append(f"  {group}={name}: {option['description']}")
            if option["sets"]:
                lines.append("      " + " ".join(f"{key}={written(value)}" for key, value in option["sets"].items()))
            else:
                lines += _setting_lines(option["settings"], "      ")
    return "\n".join(lines)


def _setting_lines(settings: list[dict[str, Any]], indent: str) -> list[str]:
    assigned = [f"{each['name']}={'???' if each['required'] else written(each['default'])}" for each in settings]
    width = min(max(map(len, assigned), default=0), 34)
    return [
        f"{indent}{text:<{width}}  {each['type']}{'. ' + each['help'] if each['help'] else ''}"
        for text, each in zip(assigned, settings, strict=True)
    ]


def written(value: Any) -> str:
    """A value as one would write it in an override."""
    if isinstance(value, list):
        return f"[{','.join(map(written, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) or "''"


def _option(group: str, name: str) -> dict[str, Any]:
    cls = CHOICES.get(group, {}).get(name)
    if cls is None:
        return _preset(group, name)
    settings = [_setting(cls, field, prefix=f"{group}.") for field in fields(cls)]
    return {"description": (inspect.getdoc(cls) or "").partition("\n")[0], "settings": settings, "sets": {}}


def _preset(group: str, name: str) -> dict[str, Any]:
    """An option that is a file of `conf/`: the settings of the choice it starts from, and what it sets differently."""
    file = conf_dir() / group / f"{name}.yaml"
    content = OmegaConf.to_container(OmegaConf.load(file))
    assert isinstance(content, dict), file
    defaults = content.pop("defaults", [])
    start = next((entry for entry in defaults if isinstance(entry, str)), None)
    sets: dict[str, Any] = {"experiment" if group == "experiment" else group: start} if start else {}
    for entry in defaults:
        if isinstance(entry, dict):
            sets |= {key.removeprefix("override /"): value for key, value in entry.items()}
    sets |= flatten(content, "" if group == "experiment" else f"{group}.")
    settings = _option(group, start)["settings"] if start and group != "experiment" else []
    return {"description": _first_comment(file), "settings": settings, "sets": sets}


def _first_comment(file: Path) -> str:
    comments = (line[1:].strip() for line in file.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
    return next((text for text in comments if not text.startswith("@")), "")


def flatten(values: dict[Any, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _setting(cls: type, field: Field[Any], prefix: str = "") -> dict[str, Any]:
    default = field.default_factory() if field.default_factory is not MISSING else field.default
    required = default is MISSING or default == omegaconf.MISSING
    return {
        "name": prefix + field.name,
        "type": kind_of(get_type_hints(cls)[field.name]),
        "default": None if required else default.name if isinstance(default, Enum) else default,
        "required": required,
        "help": next((found[field.name] for owner in cls.__mro__ if field.name in (found := _comments(owner))), ""),
    }


@cache
def _comments(cls: type) -> dict[str, str]:
    """Field -> the comment behind it in the source; nothing for a class whose source is not at hand."""
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):
        return {}
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    by_line = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef), cls
    return {
        node.target.id: by_line[node.end_lineno]
        for node in definition.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno in by_line
    }
