"""Writes checkpoints so that a reader never meets half of one, and finds the newest that is whole.

A checkpoint is a folder in Hugging Face format, which transformers, vLLM and `rlkit eval` load as it is, with what a run needs
to go on beside it: `state/` (the learner's float32 weights and optimiser state by rank, a reference that moves, the controller's
progress as JSON) and, written last, `manifest.json` with the size and SHA-256 of every other file. Nothing in it is a pickle.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.controller.fleet import Learners, ReferenceScorer
from rlkit.controller.sampling import Sampled
from rlkit.controller.tracking.files import read_rollouts, write_rollouts
from rlkit.data.buffer import ReplayBuffer
from rlkit.errors import DataError, ResourceError

FORMAT = 1  # of the manifest and of state/; a reader refuses what is newer
MANIFEST = "manifest.json"
PROGRESS = "state/progress.json"
REPLAY, REPLAYED = "state/replay.json", "state/replay.parquet"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose files were all found as they were written."""

    folder: Path
    progress: dict[str, Any]  # what the controller wrote


def save_checkpoint(
    learner: Learners,
    run_dir: Path,
    step: int,
    progress: dict[str, Any],
    ahead: Mapping[int, Sampled] | None = None,
    buffer: ReplayBuffer | None = None,
    reference: ReferenceScorer | None = None,
) -> Path:
    """Everything under checkpoints/step_000123, by a temporary name and a rename. Raises ResourceError when it cannot be written.

    `ahead`: batches that are sampled and scored, and belong to later steps. `buffer`: what is kept for replay.

    The manifest comes last and the rename after it, each after the bytes before it are on the disk: a crash at any point leaves
    either no checkpoint of this step or a whole one.
    """
    final = checkpoint_folder(run_dir, step)
    temporary = final.with_name(f".tmp-{final.name}")
    try:
        remove_unfinished(run_dir)
        temporary.mkdir(parents=True)
        learner.save(str(temporary.resolve()))
        if reference is not None:
            reference.save(str(temporary.resolve()))
        (temporary / PROGRESS).write_text(json.dumps(progress, indent=1), encoding="utf-8")
        for later, sampled in (ahead or {}).items():
            write_rollouts(temporary / "state" / f"ahead_{later:06d}.parquet", sampled.rollouts, [math.nan] * len(sampled.rollouts))
        if buffer is not None:
            stored, beside = buffer.state()
            write_rollouts(temporary / REPLAYED, stored, [math.nan] * len(stored))
            (temporary / REPLAY).write_text(json.dumps(beside), encoding="utf-8")
        files = {name: _measure(temporary / name) for name in _files(temporary)}
        for name in files:
            _flush(temporary / name)
        (temporary / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "files": files}, indent=1), encoding="utf-8")
        for path in (temporary / MANIFEST, temporary / "state", temporary):
            _flush(path)
        if final.exists():  # of the same step but damaged: else the run would have gone on from it
            shutil.rmtree(final)
        temporary.rename(final)
        _flush(final.parent)
    except (OSError, ResourceError) as error:  # the controller's own writing, or a rank's
        shutil.rmtree(temporary, ignore_errors=True)
        cause = (error.strerror if isinstance(error, OSError) else None) or str(error)
        free = shutil.disk_usage(run_dir).free >> 20
        raise ResourceError(
            f"checkpoint of step {step}: cannot be written ({cause}; {free} MiB are free under {run_dir})."
        ) from error
    return final


def checkpoint_folder(run_dir: Path, step: int) -> Path:
    """Its name sorts by step."""
    return run_dir / "checkpoints" / f"step_{step:06d}"


def newest_valid(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and why each newer one was passed over. (None, []) where none was ever saved.

    Raises DataError when there are checkpoints and none of them is whole; nothing is deleted.
    """
    passed_over: list[str] = []
    for folder in sorted((run_dir / "checkpoints").glob("step_*"), reverse=True):
        try:
            return Checkpoint(folder, verify(folder)), passed_over
        except DataError as error:
            passed_over.append(str(error))
    if passed_over:
        raise DataError(
            f"{run_dir}: no checkpoint is whole. {' '.join(passed_over)} Restore one from a copy, or start a new run "
            "with model.path set to weights that load."
        )
    return None, []


def verify(folder: Path) -> dict[str, Any]:
    """The controller's progress, after every file was compared with the manifest. Raises DataError for the first that differs."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        version, files = manifest["format"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder.name}: its manifest cannot be read ({type(error).__name__}).") from error
    if version != FORMAT:
        raise DataError(f"{folder.name}: written in format {version}; this rlkit reads format {FORMAT}.")
    for name, expected in files.items():
        try:
            found = _measure(folder / name)
        except OSError as error:
            raise DataError(f"{folder.name}: {name} cannot be read ({error.strerror}).") from error
        for what, value in expected.items():
            if found[what] != value:
                raise DataError(f"{folder.name}: {name} is damaged ({what} {found[what]}, written {value}).")
    return json.loads((folder / PROGRESS).read_text(encoding="utf-8"))


def read_ahead(folder: Path) -> dict[int, Sampled]:
    """Step -> its batch, of those that were sampled before the checkpoint and not yet learnt from."""
    files = (folder / "state").glob("ahead_*.parquet")
    return {int(file.stem.removeprefix("ahead_")): Sampled.again(read_rollouts(file)) for file in files}


def restore_buffer(folder: Path, buffer: ReplayBuffer) -> None:
    """What was kept for replay; nothing, where that run replayed nothing."""
    if (folder / REPLAY).is_file():
        buffer.restore(read_rollouts(folder / REPLAYED), json.loads((folder / REPLAY).read_text(encoding="utf-8")))


def prune(run_dir: Path, *, keep_last: int, best: int | None) -> None:
    """Delete all but the newest `keep_last` checkpoints and that of step `best`. Called after a newer one is whole."""
    folders = sorted((run_dir / "checkpoints").glob("step_*"))
    for folder in folders[:-keep_last]:
        if best is None or folder != checkpoint_folder(run_dir, best):
            shutil.rmtree(folder)


def remove_unfinished(run_dir: Path) -> None:
    """What a run left behind that died while it saved."""
    for folder in (run_dir / "checkpoints").glob(".tmp-*"):
        shutil.rmtree(folder)


def _files(folder: Path) -> Iterator[str]:
    return (str(path.relative_to(folder)) for path in sorted(folder.rglob("*")) if path.is_file())


def _measure(path: Path) -> dict[str, int | str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"size": path.stat().st_size, "sha256": digest}


def _flush(path: Path) -> None:
    """To the disk; a folder too, whose entries are there only after it was flushed itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
