"""Overrides -> settings. Every override is checked against the schema before anything is composed, so one report names them all.

Hydra parses the overrides and composes the choices (defaults list, experiment, `conf/`); the single values are put in here,
because Hydra stops at the first that does not fit. A sweep is expanded here too: all its runs are checked before one starts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from enum import Enum
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

import hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from rlkit.config import CHOICES, RunConfig, base_of, class_of, examine, nearest, report, suggest
from rlkit.errors import ConfigError
from rlkit.resources import conf_dir

DEFAULT_EXPERIMENT = "quickstart"


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One run of a sweep, or the only run."""

    label: str  # the swept settings, such as divergence=none,seed=1; empty when nothing is swept
    overrides: tuple[str, ...]
    config: RunConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One sentence about one override."""

    key: str
    text: str
    group: str = ""  # set when the group has the setting under another of its choices


@dataclass(kw_only=True, slots=True)
class _Parsed:
    """The overrides of one run, sorted."""

    choices: dict[str, str] = field(default_factory=dict)  # group -> name, all known
    values: list[Override] = field(default_factory=list)
    uncertain: set[str] = field(default_factory=set)  # groups of which no known choice was named


def compose(overrides: Sequence[str] = (), *, stored: Mapping[str, Any] | None = None) -> RunConfig:
    """The settings of one run. Raises one ConfigError that names every problem.

    `stored`: the settings of an earlier run, as `rlkit.config.to_dict` gives them; they stand where an experiment would.
    """
    parsed, found = _parse(overrides)
    for override in parsed:
        if override.is_sweep_override():
            text = f"{override.input_line}: several values. Write -m to train one run for each."
            found.append(_problem(override.key_or_group, text))
    cfg, more = _settings([each for each in parsed if not each.is_sweep_override()], stored)
    config, more = _finish(cfg, found + more)
    if config is None or more:
        raise ConfigError(report([problem.text for problem in more]))
    return config


def read_stored(run_dir: Path) -> dict[str, Any]:
    """The settings that a run folder keeps, as `compose(stored=...)` takes them. Raises ConfigError."""
    try:
        settings, chosen = (OmegaConf.to_container(OmegaConf.load(run_dir / name)) for name in ("config.yaml", "choices.yaml"))
    except OSError as error:
        raise ConfigError(f"{run_dir}: not the folder of a run ({error.strerror}: {error.filename}). Look in runs/.") from None
    assert isinstance(settings, dict), run_dir
    assert isinstance(chosen, dict), run_dir
    return {str(key): {"choice": chosen[key], **value} if key in chosen else value for key, value in settings.items()}


def expand(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every run of a sweep: the product of all lists of values, the last one changing fastest."""
    parsed, found = _parse(overrides)
    if found:
        raise ConfigError(report([problem.text for problem in found]))
    return _product(parsed)


def compose_arms(overrides: Sequence[str]) -> list[Arm]:
    """Every run of a sweep, all checked. Raises one ConfigError that names every problem of every run.

    Their folders are `<run_dir>/<label>`, where an empty run_dir stands for runs/<experiment_name>-<date and time>.
    """
    sweep, unreadable = _parse(overrides)
    lines = _product(sweep)
    swept = {override.key_or_group for override in sweep if override.is_sweep_override()}
    arms: list[tuple[str, list[str], DictConfig | None, list[Problem]]] = []
    for line in lines:
        parsed, _ = _parse(line)
        cfg, found = _settings(parsed, None)
        label = ",".join(text for text, override in zip(line, parsed, strict=True) if override.key_or_group in swept)
        arms.append((label, line, cfg, unreadable + found))
    folder = next((Path(cfg.run_dir or f"runs/{cfg.experiment_name}-{stamp()}") for *_, cfg, _ in arms if cfg is not None), Path())
    done: list[Arm] = []
    every: list[list[Problem]] = []
    for label, line, cfg, found in arms:
        if cfg is not None and swept:
            cfg.run_dir = str(folder / label.replace("/", "_"))
        config, found = _finish(cfg, found)
        every.append(found)
        if config is not None and not found:
            done.append(Arm(label=label, overrides=tuple(line), config=config))
    texts = _merge(sweep, lines, [label for label, *_ in arms], every)
    if len(done) == len(arms) and any(arm.config.cluster != done[0].config.cluster for arm in done):
        texts.append("cluster: the runs of a sweep share one cluster. Write one command for each cluster.")
    if texts:
        raise ConfigError(report(texts))
    return done


def stamp() -> str:
    """Date and time for a folder's name."""
    return datetime.now().strftime("%Y%m%d-%H%M%S")


def options(group: str) -> list[str]:
    """The names that can be chosen in a group: classes first, then the presets of `conf/`."""
    presets = sorted(path.stem for path in (conf_dir() / group).glob("*.yaml"))
    names = CHOICES.get(group, {})
    return [*names, *(name for name in presets if name not in names)]


def groups() -> list[str]:
    """Everything that a name can be chosen for."""
    return [*CHOICES, "experiment"]


def _parse(overrides: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    """Hydra's reading of each override; of two for the same key the later one holds."""
    parser = OverridesParser.create()
    parsed: dict[str, Override] = {}
    found: list[Problem] = []
    for line in overrides:
        key = line.partition("=")[0].strip()
        if line.startswith("--"):
            found.append(_problem(key, f"{line}: settings are written without dashes. Write {line.lstrip('-')}."))
            continue
        if "=" not in line and not line.startswith("~"):
            found.append(_problem(key, f"{line}: not a setting. Write key=value, such as seed=1."))
            continue
        try:
            override = parser.parse_override(line)
        except HydraException as error:
            why = str(error).splitlines()[0]
            found.append(_problem(key, f"{line}: cannot be read ({why}). Put quotes around the value: '{key}=\"...\"'."))
            continue
        key = override.key_or_group
        if override.is_delete():
            found.append(_problem(key, f"{line}: a setting cannot be removed. Off is a choice, such as entropy=none."))
        elif override.package is not None:
            found.append(_problem(key, f"{line}: there are no packages here. Write {key}={override.get_value_string()}."))
        elif override.is_hydra_override():
            found.append(_problem(key, f"{line}: Hydra only composes the settings here. run_dir names the run's folder."))
        elif override.value_type in (ValueType.GLOB_CHOICE_SWEEP, ValueType.INTERVAL_SWEEP):
            found.append(_problem(key, f"{line}: a sweep needs its values listed. Write {key}=a,b,c or {key}=range(1,4)."))
        else:
            parsed.pop(key, None)
            parsed[key] = override
    return list(parsed.values()), found


def _problem(key: str, text: str, group: str = "") -> Problem:
    return Problem(key=key, text=text, group=group)


def _product(parsed: Sequence[Override]) -> list[list[str]]:
    return [[*line] for line in itertools.product(*(_values_of(override) for override in parsed))]


def _values_of(override: Override) -> list[str]:
    if not override.is_sweep_override():
        return [str(override.input_line)]
    return [f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()]


def _settings(overrides: Sequence[Override], stored: Mapping[str, Any] | None) -> tuple[DictConfig | None, list[Problem]]:
    """Composed settings with every override in them that fits, and the problems of the others. None: the experiment is unknown."""
    parsed, found = _sort(overrides)
    chosen = dict(parsed.choices)
    own_data = "data" in chosen or "data" in parsed.uncertain
    experiment = chosen.pop("experiment", "none" if own_data or stored else DEFAULT_EXPERIMENT)
    cfg = _stored(stored, chosen) if stored else _with_experiment(experiment, chosen)
    for override in parsed.values:
        problem = _check(cfg, override, parsed.uncertain)
        if problem is not None:
            found.append(problem)
    return None if "experiment" in parsed.uncertain else cfg, found


def _sort(overrides: Sequence[Override]) -> tuple[_Parsed, list[Problem]]:
    parsed = _Parsed()
    found: list[Problem] = []
    for override in overrides:
        group = override.key_or_group
        if group not in groups():
            parsed.values.append(override)
            continue
        value, known = override.value(), options(group)
        name = value if isinstance(value, str) else override.get_value_string()
        if name in known:
            parsed.choices[group] = name
            continue
        parsed.uncertain.add(group)
        text = f"{group}={name}: no such choice.{suggest(name, known)} Choices: {', '.join(known)}."
        found.append(_problem(group, text))
    return parsed, found


def _with_experiment(experiment: str, chosen: dict[str, str]) -> DictConfig:
    """The experiment's settings under the user's choices.

    A group whose choice the user replaced keeps, of what the experiment sets there, what every choice of that group has
    (say, learning_rate); the rest belonged to the choice that is gone.
    """
    composed, choices = _hydra(experiment)
    cfg = composed.copy()
    for group, name in chosen.items():
        if name == choices[group]:
            continue
        before, node = _option(group, choices[group]), _option(group, name)
        for setting in fields(base_of(group)):
            if not _same(cfg[group], before, setting.name):
                node[setting.name] = cfg[group][setting.name]
        cfg[group] = node
    return cfg


def _option(group: str, name: str) -> DictConfig:
    """One choice as Hydra composes it: the class's defaults, and over them a preset's differences."""
    if name in CHOICES[group]:
        return OmegaConf.structured(CHOICES[group][name])
    file = conf_dir() / group / f"{name}.yaml"
    try:
        differences = OmegaConf.load(file)
        assert isinstance(differences, DictConfig), file
        (start,) = differences.pop("defaults")
        merged = OmegaConf.merge(_option(group, start), differences)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{file}: {str(error).splitlines()[0]}.") from error
    assert isinstance(merged, DictConfig), file
    return merged


def _same(mine: DictConfig, other: DictConfig, name: str) -> bool:
    if OmegaConf.is_missing(mine, name) or OmegaConf.is_missing(other, name):
        return OmegaConf.is_missing(mine, name) and OmegaConf.is_missing(other, name)
    return mine[name] == other[name]


def _stored(stored: Mapping[str, Any], chosen: dict[str, str]) -> DictConfig:
    """The settings of an earlier run under the user's choices."""
    before = {group: str(stored[group]["choice"]) for group in CHOICES if group in stored}
    for group, name in before.items():
        if name not in CHOICES[group] and group not in chosen:
            known = ", ".join(CHOICES[group])
            raise ConfigError(f"{group}={name}: the stored run's choice is unknown here. Write {group}= and one of {known}.")
    now = before | chosen
    cfg = _with_experiment("none", now)
    for key, value in stored.items():
        if key not in CHOICES:
            _put(cfg, key, value)
            continue
        shared = {setting.name for setting in fields(base_of(key))}
        for name, inner in value.items():
            if name in shared or (name != "choice" and now[key] == before[key]):
                _put(cfg, f"{key}.{name}", inner)
    return cfg


def _put(cfg: DictConfig, key: str, value: Any) -> None:
    try:
        OmegaConf.update(cfg, key, value, merge=False)
    except OmegaConfBaseException as error:
        why = str(error).splitlines()[0]
        raise ConfigError(f"{key}={value}: this version of rlkit cannot read the stored setting ({why}).") from None


@cache
def _hydra(experiment: str) -> tuple[DictConfig, dict[str, str]]:
    """What Hydra makes of an experiment, and the name chosen in each group. Callers copy before they change it."""
    try:
        with hydra.initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
            cfg = hydra.compose("config", [f"experiment={experiment}"], return_hydra_config=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(f"experiment={experiment}: {conf_dir()} cannot be composed: {error}") from error
    choices = {group: cfg.hydra.runtime.choices[group] for group in CHOICES}
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, choices


def _check(cfg: DictConfig, override: Override, uncertain: set[str]) -> Problem | None:
    """Puts one value into the settings, or says why not."""
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
        return _problem(key, f"{key}: no such setting.{_suggest_key(key)}")
    if len(names) > depth and get_origin(hint) is not dict:
        parent = ".".join(names[:depth])
        return _problem(key, f"{key}: no such setting. {parent} is {kind_of(hint)}.")
    value = override.value()
    if hint in (str, str | None) and not isinstance(value, str | list | dict | NoneType):
        value = override.get_value_string()  # a path such as 007 or 1e3, before it became a number
    try:
        OmegaConf.update(cfg, key, value, merge=False, force_add=len(names) > depth)
    except OmegaConfBaseException:
        kind = kind_of(get_args(hint)[1] if len(names) > depth else hint)
        return _problem(key, f"{key}={override.get_value_string()}: not {kind}. Write {key}={_example(cfg, key, hint)}.")
    return None


def _check_loosely(key: str, names: list[str]) -> Problem | None:
    """The group's choice is misspelt: all that can be said is that no choice has such a setting."""
    if any(names[1] in _settings_of(cls) for cls in CHOICES[names[0]].values()):
        return None
    return _problem(key, f"{key}: no such setting.{_suggest_key(key)}")


def _unknown_in_group(override: Override, group: str, name: str, choice: str) -> Problem:
    key, mine = f"{group}.{name}", _settings_of(CHOICES[group][choice])
    elsewhere = [option for option, cls in CHOICES[group].items() if name in _settings_of(cls)]
    if elsewhere:
        has = f"has {', '.join(mine)}" if mine else "has no settings"
        fix = f"{group}={elsewhere[0]} {override.input_line}"
        return _problem(key, f"{key}: {group}={choice} {has}. Write {fix}, or leave {key} out.", group)
    if near := nearest(name, mine):
        return _problem(key, f"{key}: no such setting. Did you mean {group}.{near}?")
    has = f"{group}={choice} has {', '.join(mine)}" if mine else f"{group}={choice} has no settings"
    namesake = next((f" Did you mean {full}?" for full in _keys() if full.rpartition(".")[2] == name), "")
    return _problem(key, f"{key}: no such setting.{namesake} {has}.")


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
    match get_origin(hint) or hint:
        case _ if hint is NoneType:
            return "null"
        case _ if hint is bool:
            return "true or false"
        case _ if hint is int:
            return "a whole number"
        case _ if hint is float:
            return "a number"
        case _ if get_origin(hint) is list:
            return f"a list like [a,b], each {kind_of(get_args(hint)[0])}"
        case _ if get_origin(hint) is dict:
            return "a table like {a: b}"
        case _:
            return "text"


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


def _finish(cfg: DictConfig | None, found: list[Problem]) -> tuple[RunConfig | None, list[Problem]]:
    """The checked settings, and the problems with what the checks of `rlkit.config` add about other keys."""
    if cfg is None:
        return None, found
    config, texts = examine(cfg)
    known = {problem.key for problem in found}
    more = [_problem(text.partition(":")[0].partition("=")[0], text) for text in texts]
    return config, found + [problem for problem in more if problem.key not in known and problem.key.partition(".")[0] not in known]


def _merge(sweep: Sequence[Override], lines: list[list[str]], labels: list[str], every: list[list[Problem]]) -> list[str]:
    """The problems of all runs of a sweep, each once; what is wrong in some runs only says in which."""
    texts: dict[str, str] = {}
    for problem in itertools.chain(*every):
        same = "key" if problem.group else "text"  # the value may be swept too
        having = [getattr(problem, same) in [getattr(other, same) for other in found] for found in every]
        if all(having):
            texts[problem.text] = problem.text
        elif problem.group:
            texts[problem.key] = _two_commands(sweep, lines, problem, having)
        else:
            runs = [label for label, has in zip(labels, having, strict=True) if has]
            more = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
            texts[problem.text] = f"{problem.text} (In run {runs[0]}{more}.)"
    return list(texts.values())


def _two_commands(sweep: Sequence[Override], lines: list[list[str]], problem: Problem, lacking: list[bool]) -> str:
    """Only some runs have the setting: says how to write the sweep as one command with it and one without."""
    why = f"{problem.key}: only some runs of this sweep have it."
    for place, override in enumerate(sweep):
        if not override.is_sweep_override():
            continue
        without = {line[place] for line, lacks in zip(lines, lacking, strict=True) if lacks}
        with_it = {line[place] for line, lacks in zip(lines, lacking, strict=True) if not lacks}
        if without & with_it:
            continue
        one, two = (
            " ".join(
                _joined(_values_of(each), keep) if each is override else str(each.input_line)
                for each in sweep
                if keep is with_it or each.key_or_group != problem.key
            )
            for keep in (with_it, without)
        )
        return f"{why} Write two commands:\n    rlkit train -m {one}\n    rlkit train -m {two}"
    return f"{why} Write two commands, one for the runs that have it and one, without it, for the others."


def _joined(values: list[str], keep: set[str]) -> str:
    """["seed=1", "seed=2"] -> "seed=1,2", of those to keep."""
    key = values[0].partition("=")[0]
    return f"{key}={','.join(value.partition('=')[2] for value in values if value in keep)}"
