"""Reads the rows of each data source. What a row must hold is checked in `prompts.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from hashlib import sha256
from importlib import import_module
from pathlib import Path
from typing import Any

from rlkit.data import comparison, expressions, guessing
from rlkit.data.environments.verifiers import require_package
from rlkit.data.files import Row, numbered, read_jsonl, read_parquet, read_table, renamed
from rlkit.errors import ConfigError, DataError, ResourceError
from rlkit.settings import (
    ComparisonData,
    Data,
    ExpressionsData,
    GuessingData,
    HuggingFaceData,
    JsonlData,
    MixtureData,
    ParquetData,
    ReasoningGymData,
    TableData,
    VerifiersData,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """The rows of a data set, and what makes a prompt of one."""

    name: str
    train: list[Row]
    held_out: list[Row] | None  # None: a share of `train`
    prompt_column: str = "prompt"
    id_column: str | None = "id"
    source_column: str | None = None  # None: `name` is the source of every row
    chat: bool = False
    system_prompt: str | None = None
    tools: tuple[dict[str, Any], ...] = ()  # that its chat prompts name


def read(settings: Data) -> Source:
    """Reads everything into memory. Raises DataError, ConfigError or ResourceError, each naming the setting to change."""
    match settings:
        case ExpressionsData():
            return _read_expressions(settings)
        case ComparisonData():
            return _read_comparison(settings)
        case GuessingData():
            games = guessing.rows(settings.highest, settings.size, settings.question.replace("{highest}", str(settings.highest)))
            return Source(name="guessing", train=numbered(games), held_out=None, chat=settings.chat)
        case ReasoningGymData():
            return _read_reasoning_gym(settings)
        case VerifiersData():
            return _read_verifiers(settings)
        case JsonlData():
            return _table_in_files(settings, read_jsonl)
        case ParquetData():
            return _table_in_files(settings, read_parquet)
        case MixtureData():
            return _read_mixture(settings)
        case HuggingFaceData():
            split = settings.held_out_split
            held_out = None if split is None else _rows_of_split(settings, "held_out_split", split)
            return _table(settings, settings.path, _rows_of_split(settings, "split", settings.split), held_out)
        case _:
            raise ConfigError(f"data={type(settings).__name__}: rlkit/data/sources.py has no reader for it. Add one.")


def _read_expressions(settings: ExpressionsData) -> Source:
    want = expressions.HELD_OUT_PERCENT / 100
    if settings.held_out_fraction != want:
        raise ConfigError(
            f"data.held_out_fraction={settings.held_out_fraction}: the expressions task always holds out {want}, "
            f"because its model was prepared on the rest. Leave the setting away."
        )
    train, held_out = ([dict(row) for row in expressions.rows(split)] for split in ("train", "held_out"))
    return Source(name="expressions", train=numbered(train), held_out=numbered(held_out))


def _read_comparison(settings: ComparisonData) -> Source:
    train, held_out = (comparison.rows(split, settings.held_out_fraction) for split in ("train", "held_out"))
    return Source(name="comparison", train=numbered(train), held_out=numbered(held_out), chat=True)


def _read_reasoning_gym(settings: ReasoningGymData) -> Source:
    """The stream's seed is in `data.options`, 0 by default, and not the run's: all runs are evaluated on the same questions."""
    gym = _import("reasoning_gym", extra="reasoning-gym")
    factory = import_module("reasoning_gym.factory")
    if settings.task not in factory.DATASETS:
        raise ConfigError(
            f"data.task={settings.task}: reasoning-gym has no such task. Choose one of {', '.join(sorted(factory.DATASETS))}."
        )
    try:
        entries = gym.create_dataset(settings.task, **{"seed": 0, "size": settings.size, **settings.options})
    except (TypeError, ValueError, AssertionError) as error:  # how its task settings refuse a key or a value
        raise ConfigError(
            f"data.options={settings.options}: reasoning-gym's {settings.task} refuses them: {error}. Change them."
        ) from None
    distinct = {}  # a small task repeats its questions, and one of a pair could land in the held-out share
    for entry in entries:
        key = f"{settings.task}-{sha256(entry['question'].encode()).hexdigest()[:16]}"
        distinct.setdefault(key, {"id": key, "prompt": entry["question"], "answer": entry["answer"], "metadata": entry["metadata"]})
    return Source(
        name=f"reasoning_gym:{settings.task}",
        train=numbered(list(distinct.values())),
        held_out=None,
        chat=settings.chat,
        system_prompt=settings.system_prompt,
    )


def _read_verifiers(settings: VerifiersData) -> Source:
    """In another process, which the environment may do with as it likes: it takes over signals, and loads much."""
    require_package()
    command = [sys.executable, "-P", "-m", "rlkit.data.environments.verifiers", settings.env_id, json.dumps(settings.options)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=False)
    if done.returncode or not done.stdout:
        raise DataError(
            f"data.env_id={settings.env_id}: the process that loads it ended with code {done.returncode}. See what it printed "
            "before."
        )
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise ConfigError(answer["error"])
    return Source(
        name=f"verifiers:{settings.env_id}",
        train=numbered(answer["train"]),
        held_out=None if answer["held_out"] is None else numbered(answer["held_out"]),
        id_column="example_id",
    )


def _table_in_files(settings: JsonlData | ParquetData, read_file: Callable[[str, str], list[Row]]) -> Source:
    held_out = None if settings.held_out_path is None else read_file("data.held_out_path", settings.held_out_path)
    return _table(settings, Path(settings.path).name, read_file("data.path", settings.path), held_out)


def _table(settings: TableData, name: str, train: list[Row], held_out: list[Row] | None) -> Source:
    return Source(
        name=name,
        train=_rename(settings.columns, train),
        held_out=None if held_out is None else _rename(settings.columns, held_out),
        prompt_column=settings.prompt_column,
        id_column=settings.id_column,
        source_column=settings.source_column,
        chat=settings.chat,
        system_prompt=settings.system_prompt,
    )


def _read_mixture(settings: MixtureData) -> Source:
    """Rows of all files, one file after the other. A row knows its source, and ids are told apart by it."""
    rows = [
        # The source for functions that look at it; a column of that name in the file means something to them already.
        replace(row, label=f"{name} {row.label}", source=name, values={"data_source": name} | row.values if row.values else {})
        for name, path in settings.files.items()
        for row in read_table(f"data.files.{name}", path)
    ]
    rows = _rename(settings.columns, rows)  # together: a column to rename need not be in every file
    return Source(
        name="mixture",
        train=[replace(row, id=_mixed_id(settings, row)) for row in rows],
        held_out=None,
        prompt_column=settings.prompt_column,
        id_column=settings.id_column,
        chat=settings.chat,
        system_prompt=settings.system_prompt,
    )


def _mixed_id(settings: MixtureData, row: Row) -> str | None:
    """None where its place has to do, and for a row that lacks its id, which is reported as any other such row."""
    own = None if settings.id_column is None else row.values.get(settings.id_column)
    return None if own is None else f"{row.source}:{own}"


def _rename(columns: dict[str, str], rows: list[Row]) -> list[Row]:
    """A row that lacks a mapped column keeps what it has: `prompts.py` reports it if anybody needs that column."""
    existing = column_names(rows)
    for new, old in columns.items():
        if existing and old not in existing:
            raise DataError(f"data.columns.{new}={old}: there is no column {old}. The columns are {', '.join(existing)}.")
    if not columns:
        return rows
    return [replace(row, values=renamed(row.values, columns)) for row in rows]


def column_names(rows: list[Row]) -> list[str]:
    """Of any row, in the order they first appear."""
    return list(dict.fromkeys(name for row in rows for name in row.values))


def _rows_of_split(settings: HuggingFaceData, setting: str, split: str) -> list[Row]:
    datasets = _import("datasets", extra=None)
    folder = Path(settings.path)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():  # Dataset.save_to_disk wrote it
            loaded = datasets.load_from_disk(str(folder))
            if isinstance(loaded, datasets.DatasetDict):
                if split not in loaded:
                    raise DataError(
                        f"data.{setting}={split}: {settings.path} has no such split. Choose one of {', '.join(loaded)}."
                    )
                loaded = loaded[split]
        else:
            loaded = datasets.load_dataset(settings.path, settings.name, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"data.path={settings.path}, data.{setting}={split}: datasets could not load it: {type(error).__name__}: "
            f"{_first_line(error)} Write a folder, or a name on the hub that this machine can reach."
        ) from None
    return numbered(list(loaded))


def _import(module: str, *, extra: str | None) -> Any:
    try:
        return import_module(module)
    except ImportError as error:
        package = "rlkit-llm" if extra is None else f"rlkit-llm[{extra}]"
        raise ResourceError(f"data: the package {module} cannot be imported ({error}). Install {package}.") from None


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
