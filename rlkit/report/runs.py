"""Run folders as `rlkit compare` reads them, and the arms that they form: runs whose settings differ in the seed alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rlkit.choices import flatten, written
from rlkit.compose import read_stored
from rlkit.controller.evaluate import Evaluation
from rlkit.controller.tracking.files import read_evaluations
from rlkit.controller.tracking.history import History, read_history
from rlkit.errors import ConfigError, DataError

NO_PART_OF_AN_ARM = ("seed", "run_dir", "experiment_name")


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """One run, finished or not."""

    folder: Path
    settings: dict[str, str]  # each with its dots -> its value as an override writes it; a group's own name -> its choice
    history: History
    evaluations: dict[int, Evaluation]  # step -> the evaluation after it, in the order of the steps; at least one

    @property
    def seed(self) -> int:
        return int(self.settings["seed"])

    @property
    def before(self) -> Evaluation | None:
        """Of the model that the run began with."""
        return self.evaluations.get(0)

    @property
    def evaluated_at(self) -> int:
        """Step of the newest evaluation."""
        return max(self.evaluations)

    @property
    def last(self) -> Evaluation:
        return self.evaluations[self.evaluated_at]


@dataclass(frozen=True, kw_only=True, slots=True)
class Arm:
    """Runs with the same settings and different seeds."""

    name: str
    runs: tuple[Run, ...]

    @property
    def settings(self) -> dict[str, str]:
        return self.runs[0].settings


def find_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The runs in these folders, and a note on each run of a sweep that was left out because it has no evaluation.

    A folder is a run's, or holds runs. Raises ConfigError where it is neither, or where there is nothing to compare.
    """
    runs: dict[Path, Run] = {}
    notes = []
    for folder in folders:
        if (folder / "config.yaml").is_file():
            found = [folder]
        elif folder.is_dir():
            found = _runs_of_sweep(folder)
        else:
            raise ConfigError(f"{folder}: no such folder. Write run folders or the folder of a sweep; they are under runs/.")
        if not found:
            raise ConfigError(f"{folder}: neither a run (config.yaml) nor a folder of runs (*/config.yaml). Look in runs/.")
        read = {each: read_run(each) for each in found}
        without = [str(each) for each, run in read.items() if run is None]
        if len(without) == len(read):
            raise ConfigError(
                f"{', '.join(without)}: no held-out evaluation in it (evaluations/), so there is nothing to compare. Train with "
                "evaluation=held_out."
            )
        notes += [f"Left out: {each}, which has no held-out evaluation." for each in without]
        runs |= {each.resolve(): run for each, run in read.items() if run is not None}
    return list(runs.values()), notes


def _runs_of_sweep(folder: Path) -> list[Path]:
    """In the order in which the sweep ran them."""
    found = {each.parent.name: each.parent for each in sorted(folder.glob("*/config.yaml"))}
    if (folder / "sweep.json").is_file():
        names = [Path(each["run_dir"]).name for each in json.loads((folder / "sweep.json").read_text(encoding="utf-8"))]
        found = {name: found[name] for name in names if name in found} | found
    return list(found.values())


def read_run(folder: Path) -> Run | None:
    """None: nothing was evaluated. Raises ConfigError where a file of the run is missing."""
    flat = flatten(read_stored(folder), "")
    try:
        history = read_history(folder / "metrics.jsonl")
    except OSError as error:
        raise ConfigError(f"{folder}: not the folder of a run ({error.strerror}: {error.filename}). Look in runs/.") from None
    evaluations = {step: Evaluation.from_json(stored) for step, stored in read_evaluations(folder).items()}
    settings = {key.removesuffix(".choice"): written(value) for key, value in flat.items()}
    return Run(folder=folder, settings=settings, history=history, evaluations=evaluations) if evaluations else None


def group_runs(runs: Sequence[Run]) -> list[Arm]:
    """In the order of the runs. Raises DataError where one observation would count as two."""
    groups: dict[tuple[tuple[str, str], ...], list[Run]] = {}
    for run in runs:
        kind = tuple(sorted((key, value) for key, value in run.settings.items() if key not in NO_PART_OF_AN_ARM))
        for other in groups.setdefault(kind, []):
            if other.seed == run.seed:
                raise DataError(
                    f"{other.folder} and {run.folder}: the same settings and the same seed={run.seed}, so they are one observation "
                    "and not two. Name one of them, or train with another seed."
                )
        groups[kind].append(run)
    names = name_groups([group[0].settings for group in groups.values()])
    return [Arm(name=name, runs=tuple(group)) for name, group in zip(names, groups.values(), strict=True)]


def differing(settings: Sequence[dict[str, str]]) -> list[str]:
    """Settings whose values are not all the same; one that a choice does not have differs from any value."""
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if key not in NO_PART_OF_AN_ARM and len({each.get(key) for each in settings}) > 1]


def name_groups(settings: Sequence[dict[str, str]]) -> list[str]:
    """A name for each: that of its experiment where these tell them apart, else as few settings as do.

    Settings that all have come first, because those of a choice follow from the choice.
    """
    experiments = [each["experiment_name"] for each in settings]
    if len(set(experiments)) == len(settings):
        return experiments
    keys = differing(settings)
    chosen: list[str] = []
    for usable in ([key for key in keys if all(key in each for each in settings)], keys):
        while len(_values(settings, chosen)) < len(settings) and usable:
            best = max(usable, key=lambda key: len(_values(settings, [*chosen, key])))  # the first of equals
            if len(_values(settings, [*chosen, best])) == len(_values(settings, chosen)):
                break
            chosen.append(best)
    return [", ".join(f"{key}={each[key]}" for key in chosen if key in each) for each in settings]


def _values(settings: Sequence[dict[str, str]], keys: Sequence[str]) -> set[tuple[str | None, ...]]:
    return {tuple(each.get(key) for key in keys) for each in settings}


def shared_prompts(runs: Sequence[Run]) -> tuple[tuple[str, ...], list[str]]:
    """Ids of the prompts that every evaluation of every run has, and a note where some have more.

    An evaluation may lack prompts only where samples of it went without a reward: runs that were asked different prompts cannot
    be compared in pairs. Raises DataError there.
    """
    every = [
        (f"{run.folder}: its evaluation at step {step}", evaluation.num_failed, evaluation.rows)
        for run in runs
        for step, evaluation in run.evaluations.items()
    ]
    asked = dict.fromkeys(row for _, _, rows in every for row in rows)
    for name, num_failed, rows in every:
        missing = len(asked) - len(rows)
        if missing > num_failed:  # a prompt is left out for failed samples alone, so there is at least one for each
            raise DataError(
                f"{name} lacks {missing} of the {len(asked)} prompts that the runs were asked together, so they cannot be paired. "
                "Compare runs with the same data and the same evaluation.num_prompts."
            )
    have = [set(rows) for _, _, rows in every]
    shared = tuple(row[0] for row in asked if all(row in rows for rows in have))
    if not shared:
        raise DataError(
            "No prompt has enough scored samples in every evaluation, so the runs cannot be paired. See failed rewards."
        )
    left_out = len(asked) - len(shared)
    return shared, [f"{left_out} of {len(asked)} prompts left out: in some evaluation their rewards failed."] if left_out else []
