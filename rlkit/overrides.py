"""One override at a time: reads it, checks it against the schema, and says what to write where it does not fit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlkit.config import ALIASES, CHOICES, RunConfig, class_of, nearest, suggest
from rlkit.resources import conf_dir


@dataclass(frozen=True, slots=True)
class Problem:
    """One sentence about one override."""

    key: str
    text: str
    group: str = ""  # set when the group has the setting under another of its choices


@dataclass(kw_only=True, slots=True)
class Sorted:
    """The overrides of one run, sorted."""

    choices: dict[str, str] = field(default_factory=dict)  # group -> name, all known
    values: list[Override] = field(default_factory=list)
    uncertain: set[str] = field(default_factory=set)  # groups of which no known choice was named


def parse(overrides: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    """Hydra's reading of each override; of two for the same key the later one holds."""
    parser = OverridesParser.create()
    parsed: dict[str, Override] = {}
    found: list[Problem] = []
    for line in overrides:
        key = line.partition("=")[0].strip()
        if line.startswith("--"):
            found.append(Problem(key, f"{line}: settings are written without dashes. Write {line.lstrip('-')}."))
            continue
        if "=" not in line and not line.startswith("~"):
            found.append(Problem(key, f"{line}: not a setting. Write key=value, such as seed=1."))
            continue
        try:
            override = parser.parse_override(line)
        except HydraException as error:
            why = str(error).splitlines()[0]
            found.append(Problem(key, f"{line}: cannot be read ({why}). Put quotes around the value: '{key}=\"...\"'."))
            continue
        key = override.key_or_group
        if override.is_delete():
            found.append(Problem(key, f"{line}: a setting cannot be removed. Off is a choice, such as entropy=none."))
        elif override.package is not None:
            found.append(Problem(key, f"{line}: there are no packages here. Write {key}={override.get_value_string()}."))
        elif override.is_hydra_override():
            found.append(Problem(key, f"{line}: Hydra only composes the settings here. run_dir names the run's folder."))
        elif override.value_type in (ValueType.GLOB_CHOICE_SWEEP, ValueType.INTERVAL_SWEEP):
            found.append(Problem(key, f"{line}: a sweep needs its values listed. Write {key}=a,b,c or {key}=range(1,4)."))
        else:
            parsed.pop(key, None)
            parsed[key] = override
    return list(parsed.values()), found


def values_of(override: Override) -> list[str]:
    """The override as it is, or one for each value of its sweep."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def sort(overrides: Sequence[Override]) -> tuple[Sorted, list[Problem]]:
    """Choices apart from values, and a problem for every choice that there is not."""
    parsed = Sorted()
    found: list[Problem] = []
    for override in overrides:
        group = override.key_or_group
        if group not in groups():
            parsed.values.append(override)
            continue
        value, known = override.value(), options(group)
        name = value if isinstance(value, str) else override.get_value_string()
        name = ALIASES.get(group, {}).get(name, name)
        if name in known:
            parsed.choices[group] = name
            continue
        parsed.uncertain.add(group)
        text = f"{group}={name}: no such choice.{suggest(name, known)} Choices: {', '.join(known)}."
        found.append(Problem(group, text))
    return parsed, found


def options(group: str) -> list[str]:
    """The names that can be chosen in a group: classes first, then the presets of `conf/`."""
    presets = sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
    names = CHOICES.get(group, {})
    return [*names, *(name for name in presets if name not in names)]


def groups() -> list[str]:
    """Everything that a name can be chosen for."""
    return [*CHOICES, "experiment"]


def put(cfg: DictConfig, override: Override, uncertain: set[str]) -> Problem | None:
    """Puts one value into the settings, or says why not. `uncertain`: groups whose choice could not be read."""
    key = override.key_or_group
    names = key.split(".")
    if names[0] in CHOICES and len(names) > 1:
        if names[0] in uncertain:
            return _check_loosely(key, names)
        cls = class_of(cfg[names[0]])
        if names[1] not in _settings_of(cls):
            return _unknown_in_group(override, names[0], names[1], _choice_in(cfg, names[0]))
        hint = get_type_hints(cls)[names[1]]
        depth = 2
    elif names[0] in _top_level() and names[0] not in CHOICES:
        hint = get_type_hints(RunConfig)[names[0]]
        depth = 1
    else:
        return Problem(key, f"{key}: no such setting.{_suggest_key(key)}")
    if len(names) > depth and get_origin(hint) is not dict:
        parent = ".".join(names[:depth])
        return Problem(key, f"{key}: no such setting. {parent} is {kind_of(hint)}.")
    value = override.value()
    if hint in (str, str | None) and not isinstance(value, str | list | dict | NoneType):
        value = override.get_value_string()  # a path such as 007 or 1e3, before it became a number
    try:
        OmegaConf.update(cfg, key, value, merge=False, force_add=len(names) > depth)
    except OmegaConfBaseException:
        kind = kind_of(get_args(hint)[1] if len(names) > depth else hint)
        return Problem(key, f"{key}={override.get_value_string()}: not {kind}. Write {key}={_example(cfg, key, hint)}.")
    return None


def _check_loosely(key: str, names: list[str]) -> Problem | None:
    """The group's choice is misspelt: all that can be said is that no choice has such a setting."""
    if any(names[1] in _settings_of(cls) for cls in CHOICES[names[0]].values()):
        return None
    return Problem(key, f"{key}: no such setting.{_suggest_key(key)}")


def _unknown_in_group(override: Override, group: str, name: str, choice: str) -> Problem:
    key, mine = f"{group}.{name}", _settings_of(CHOICES[group][choice])
    elsewhere = [option for option, cls in CHOICES[group].items() if name in _settings_of(cls)]
    if elsewhere:
        has = f"has {', '.join(mine)}" if mine else "has no settings"
        fix = f"{group}={elsewhere[0]} {override.input_line}"
        return Problem(key, f"{key}: {group}={choice} {has}. Write {fix}, or leave {key} out.", group)
    if near := nearest(name, mine):
        return Problem(key, f"{key}: no such setting. Did you mean {group}.{near}?")
    has = f"{group}={choice} has {', '.join(mine)}" if mine else f"{group}={choice} has no settings"
    namesake = next((f" Did you mean {full}?" for full in _keys() if full.rpartition(".")[2] == name), "")
    return Problem(key, f"{key}: no such setting.{namesake} {has}.")


def _suggest_key(key: str) -> str:
    """The nearest setting anywhere: by its whole key, or by its own name for one that was written without its group."""
    by_name: dict[str, str] = {}
    for full in _keys():
        by_name.setdefault(full.rpartition(".")[2], full)
    name = key.rpartition(".")[2]
    if name in by_name:
        return f" Did you mean {by_name[name]}?"
    if near := nearest(key, _keys()):
        return f" Did you mean {near}?"
    if near := nearest(name, by_name):
        return f" Did you mean {by_name[near]}?"
    return " `rlkit choices` lists them."


def _keys() -> list[str]:
    """Every key of every choice."""
    classes = [(group, cls) for group, choices in CHOICES.items() for cls in choices.values()]
    inner = {f"{group}.{name}": None for group, cls in classes for name in _settings_of(cls)}
    return [*_top_level(), "experiment", *inner]


def _settings_of(cls: type) -> list[str]:
    return [setting.name for setting in fields(cls)]


def _top_level() -> list[str]:
    return _settings_of(RunConfig)


def _choice_in(cfg: DictConfig, group: str) -> str:
    cls = class_of(cfg[group])
    return next(name for name, node in CHOICES[group].items() if node is cls)


def kind_of(hint: Any) -> str:
    """A field's type in words."""
    if get_origin(hint) is UnionType:
        return " or ".join(kind_of(part) for part in get_args(hint))
    if isinstance(hint, type) and issubclass(hint, Enum):
        return f"one of {', '.join(member.name for member in hint)}"
    if get_origin(hint) is list:
        return f"a list like [a,b], each {kind_of(get_args(hint)[0])}"
    if get_origin(hint) is dict:
        return "a table like {a: b}"
    return {NoneType: "null", bool: "true or false", int: "a whole number", float: "a number"}.get(hint, "text")


def _example(cfg: DictConfig, key: str, hint: Any) -> str:
    """A value of the right type: the one that holds now."""
    node = OmegaConf.select(cfg, key)
    if isinstance(node, Enum):
        return node.name
    if node is None:
        return "null" if get_origin(hint) is UnionType else "value"
    if OmegaConf.is_list(node):
        return f"[{','.join(str(item) for item in node)}]"
    return str(node).lower() if isinstance(node, bool) else str(node)
