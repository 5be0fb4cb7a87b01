"""Rows of files: JSON lines and parquet. A row that cannot be read says why, and whoever reads decides what that means."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rlkit.errors import DataError


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row as it was read, before it is checked."""

    label: str  # where it is, in the words of the source: line 3, row 17
    values: dict[str, Any]
    problem: str = ""  # why it could not be read; `values` is empty then
    id: str | None = None  # where the reader knows it; else a column has it, or its place is its id
    source: str | None = None  # the same


def numbered(rows: Sequence[dict[str, Any]]) -> list[Row]:
    return [Row(label=f"row {number}", values=values) for number, values in enumerate(rows, start=1)]


def read_jsonl(key: str, path: str) -> list[Row]:
    """`key`: what the path was given as, such as data.path. Raises DataError where there is no such file."""
    return list(_parse_lines(_existing(key, path)))


def read_parquet(key: str, path: str) -> list[Row]:
    """`key`: what the path was given as, such as data.path. Raises DataError where it is no such file."""
    import pyarrow
    import pyarrow.parquet

    file = _existing(key, path)
    try:
        table = pyarrow.parquet.read_table(file)
    except pyarrow.ArrowInvalid as error:
        said = str(error).strip().partition("\n")[0]
        raise DataError(f"{key}={path}: not a readable parquet file ({said}). Write the path of one.") from None
    try:
        return numbered(table.to_pylist())
    except UnicodeDecodeError:  # one bad string fails the whole table, so find it row by row
        return [_parquet_row(table, index) for index in range(table.num_rows)]


def read_table(key: str, path: str) -> list[Row]:
    """Parquet where the path says so, else JSON lines."""
    return read_parquet(key, path) if path.endswith(".parquet") else read_jsonl(key, path)


def first_rows(key: str, path: str, limit: int | None = None) -> list[dict[str, Any]]:
    """What the first rows of a file hold, or all. Raises DataError at one that cannot be read, and where there is none."""
    rows = list(islice(read_table(key, path), limit))
    if (bad := next((row for row in rows if row.problem), None)) is not None:
        raise DataError(f"{key}={path}: {bad.label} {bad.problem}. Write one object per line, or a parquet file.")
    if not rows:
        raise DataError(f"{key}={path}: it has no rows.")
    return [row.values for row in rows]


def renamed(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """A row's values with columns under new names, {new: old}: the old name is gone. One that it lacks stays lacking."""
    kept = {name: value for name, value in values.items() if name not in columns.values()}
    return kept | {new: values[old] for new, old in columns.items() if old in values}


def _existing(key: str, path: str) -> Path:
    file = Path(path)
    if not file.is_file():
        raise DataError(f"{key}={path}: there is no such file (looked in {Path.cwd()}). Write the path of an existing one.")
    return file


def _parse_lines(file: Path) -> Iterator[Row]:
    for number, line in enumerate(file.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        label = f"line {number}"
        try:
            values = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            yield Row(label=label, values={}, problem=f"is not UTF-8 at byte {error.start}")
        except (json.JSONDecodeError, RecursionError) as error:
            yield Row(label=label, values={}, problem=f"is not JSON: {error}")
        else:
            if isinstance(values, dict):
                yield Row(label=label, values=values)
            else:
                yield Row(label=label, values={}, problem=f"is a JSON {type(values).__name__}, not an object")


def _parquet_row(table: Any, index: int) -> Row:
    try:
        return Row(label=f"row {index + 1}", values=table.slice(index, 1).to_pylist()[0])
    except UnicodeDecodeError as error:
        return Row(label=f"row {index + 1}", values={}, problem=f"is not UTF-8 at byte {error.start} of a string")
