"""Overrides -> settings. Every override is checked against the schema before anything is composed, so one report names them all.

Hydra parses the overrides and composes the choices (defaults list, experiment, `conf/`); the single values are put in here,
because Hydra stops at the first that does not fit. A sweep is expanded here too: all its runs are checked before one starts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from rlkit.config import CHOICES, RunConfig, base_of, class_of
from rlkit.errors import ConfigError
from rlkit.examine import examine, report
from rlkit.overrides import Problem, parse, put, sort, values_of
from rlkit.resources import conf_dir

DEFAULT_EXPERIMENT = "quickstart"


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """One run of a sweep, or the only run."""

    label: str  # the swept settings, such as divergence=none,seed=1; empty when nothing is swept
    overrides: tuple[str, ...]
    config: RunConfig


def compose(overrides: Sequence[str] = (), *, stored: Mapping[str, Any] | None = None) -> RunConfig:
    """The settings of one run. Raises one ConfigError that names every problem.

    `stored`: the settings of an earlier run, as `rlkit.config.to_dict` gives them; they stand where an experiment would.
    """
    parsed, found = parse(overrides)
    for override in parsed:
        if override.is_sweep_override():
            text = f"{override.input_line}: several values. Write -m to train one run for each."
            found.append(Problem(override.key_or_group, text))
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
    parsed, found = parse(overrides)
    if found:
        raise ConfigError(report([problem.text for problem in found]))
    return _product(parsed)


def compose_arms(overrides: Sequence[str]) -> list[Arm]:
    """Every run of a sweep, all checked. Raises one ConfigError that names every problem of every run.

    Their folders are `<run_dir>/<label>`, where an empty run_dir stands for runs/<experiment_name>-<date and time>.
    """
    sweep, unreadable = parse(overrides)
    lines = _product(sweep)
    swept = {override.key_or_group for override in sweep if override.is_sweep_override()}
    arms: list[tuple[str, list[str], DictConfig | None, list[Problem]]] = []
    for line in lines:
        parsed, _ = parse(line)
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


def _product(parsed: Sequence[Override]) -> list[list[str]]:
    return [[*line] for line in itertools.product(*(values_of(override) for override in parsed))]


def _settings(overrides: Sequence[Override], stored: Mapping[str, Any] | None) -> tuple[DictConfig | None, list[Problem]]:
    """Composed settings with every override in them that fits, and the problems of the others. None: the experiment is unknown."""
    parsed, found = sort(overrides)
    chosen = dict(parsed.choices)
    own_data = "data" in chosen or "data" in parsed.uncertain
    experiment = chosen.pop("experiment", "none" if own_data or stored else DEFAULT_EXPERIMENT)
    cfg = _stored(stored, chosen) if stored else _with_experiment(experiment, chosen)
    for override in parsed.values:
        problem = put(cfg, override, parsed.uncertain)
        if problem is not None:
            found.append(problem)
    return None if "experiment" in parsed.uncertain else cfg, found


def _with_experiment(experiment: str, chosen: dict[str, str]) -> DictConfig:
    """The experiment's settings under the user's choices."""
    composed, choices = _hydra(experiment)
    return _replace(composed.copy(), choices, chosen)


def _replace(cfg: DictConfig, choices: Mapping[str, str], chosen: Mapping[str, str]) -> DictConfig:
    """`cfg`, which was made of `choices`, with those of `chosen` in their place.

    A replaced group keeps, of what was set in it, what every choice of that group has (say, learning_rate) and the new one
    leaves alone; the rest belonged to the choice that is gone.
    """
    for group, name in chosen.items():
        if name == choices[group]:
            continue
        before, node = _option(group, choices[group]), _option(group, name)
        plain = OmegaConf.structured(class_of(node))
        for setting in fields(base_of(group)):
            if not _same(cfg[group], before, setting.name) and _same(node, plain, setting.name):
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
    composed, choices = _hydra("none")
    cfg, choices = composed.copy(), dict(choices)
    for key, value in stored.items():
        if key not in CHOICES:
            _put(cfg, key, value)
            continue
        name = value["choice"]
        if name not in CHOICES[key]:
            if key in chosen:
                continue
            known = ", ".join(CHOICES[key])
            raise ConfigError(f"{key}={name}: the stored run's choice is unknown here. Write {key}= and one of {known}.")
        choices[key], cfg[key] = name, _option(key, name)
        for inner in value.keys() - {"choice"}:
            _put(cfg, f"{key}.{inner}", value[inner])
    return _replace(cfg, choices, chosen)


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


def _finish(cfg: DictConfig | None, found: list[Problem]) -> tuple[RunConfig | None, list[Problem]]:
    """The checked settings, and the problems with what `rlkit.checks` adds about other keys."""
    if cfg is None:
        return None, found
    config, texts = examine(cfg)
    known = {problem.key for problem in found}
    more = [Problem(text.partition(":")[0].partition("=")[0], text) for text in texts]
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
                _joined(values_of(each), keep) if each is override else str(each.input_line)
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
