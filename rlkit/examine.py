"""Composed settings -> RunConfig, with every problem in one report."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, get_type_hints

from omegaconf import Container, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlkit.checks import problems, reward_names, with_keys
from rlkit.config import CHOICES, RunConfig, class_of, suggest
from rlkit.core.control import Control
from rlkit.errors import ConfigError
from rlkit.settings import (
    HuggingFaceData,
)


def load(cfg: DictConfig) -> RunConfig:
    """Type and check the composed settings. Raises one ConfigError that names every problem."""
    config, found = examine(cfg)
    if config is None or found:
        raise ConfigError(report(found))
    return config


def report(found: list[str]) -> str:
    """Problems as one message."""
    if len(found) == 1:
        return found[0]
    return f"{len(found)} settings are wrong.\n" + "\n".join(f"  {problem}" for problem in found)


def examine(cfg: DictConfig) -> tuple[RunConfig | None, list[str]]:
    """The settings, and everything wrong with them; None when too little is there to look at all of them together.

    A group whose own check fails is still built, unchecked, so that the problems between groups show in the same report.
    """
    found = [f"{key}: no such setting.{suggest(str(key), _names())}" for key in cfg if key not in _names()]
    values: dict[str, Any] = {}
    for name in _names():
        missing = name not in cfg or OmegaConf.is_missing(cfg, name)
        if name in CHOICES and (missing or OmegaConf.get_type(cfg, name) not in CHOICES[name].values()):
            found.append(f"{name}: nothing is chosen. Write {name}= and one of {', '.join(CHOICES[name])}.")
        elif name in CHOICES:
            settings, wrong = _examine_group(name, cfg[name])
            found += wrong
            if settings is not None:
                values[name] = settings
        else:
            try:
                values[name] = cfg[name]
            except OmegaConfBaseException as error:
                found.append(f"{name}: {str(error).splitlines()[0]}.")
    if len(values) < len(_names()):
        return None, found
    config = RunConfig(**values)
    return config, found + list(problems(config))


def _names() -> list[str]:
    return [field.name for field in fields(RunConfig)]


def _examine_group(group: str, node: DictConfig) -> tuple[object | None, list[str]]:
    cls = class_of(node)
    known = [field.name for field in fields(cls)]
    found = [f"{group}.{key}: no such setting.{suggest(str(key), known)}" for key in node if key not in known]
    values: dict[str, Any] = {}
    complete = True
    for name in known:
        key = f"{group}.{name}"
        if OmegaConf.is_missing(node, name):
            hint = get_type_hints(cls)[name]
            found.append(f"{key}: has no value.{_what_to_write(key, node)}")
            values[name] = "" if hint is str else None
            complete = complete and hint is str
            continue
        try:
            value = node[name]
            values[name] = OmegaConf.to_object(value) if isinstance(value, Container) else value
        except OmegaConfBaseException as error:
            found.append(f"{key}: {str(error).splitlines()[0]}.")
            complete = False
    if not complete:
        return None, found
    try:
        return cls(**values), found
    except ConfigError as error:
        sentence = with_keys(str(error), group, cls) if issubclass(cls, Control) else str(error)
        found += sentence.splitlines()
    settings = object.__new__(cls)
    for name, value in values.items():
        setattr(settings, name, value)
    return settings, found


def _what_to_write(key: str, group: DictConfig) -> str:
    match key:
        case "reward.fn":
            return f" Write reward.fn=my_rewards.py:my_function, or one of {', '.join(reward_names())}."
        case "data.path" if class_of(group) is HuggingFaceData:
            return " Write data.path=name/on-the-hub or data.path=folder."
        case "data.path":
            return " Write data.path=file."
        case "data.files":
            return " Write data.files={math:math.jsonl,chat:chat.parquet}."
        case "environment.env":
            return " Write environment.env=my_env.py:MyEnvironment, a class with reset and step."
        case "environment.env_id" | "data.env_id":
            return f" Write {key}=name-of-an-installed-environment, or {key}=my_env.py:load_environment."
        case "reward.fns":
            return " Write reward.fns={accuracy:numeric_match,form:format}."
        case "reward.path":
            return " Write reward.path=folder-or-hub-id of a reward model; `rlkit reward fit` makes one."
        case "data.task":
            return " Write data.task=chain_sum, or another task of reasoning-gym."
        case "reference.path":
            return " Write reference.path=folder-or-hub-id."
        case "reference.paths":
            return " Write reference.paths=[first-folder,second-folder]."
        case "model.path":
            return " Write model=tiny, model=smollm2_135m, or model.path=folder-or-hub-id."
        case _:
            return f" Write {key}=value."
