"""The run folder: who may use it, what the run was, on what it ran, every rollout and every evaluation."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

import rlkit
from rlkit.config import CHOICES, RunConfig
from rlkit.controller.tracking.redaction import redact
from rlkit.errors import ConfigError, DataError
from rlkit.types import FinishReason, RewardStatus, Rollout

LOCK = ".lock"
EVALUATIONS = "evaluations"
_TOKENS = pa.list_(pa.int32())
_ROLLOUT_SCHEMA = pa.schema(
    {
        "sample_id": pa.string(),
        "group_id": pa.string(),
        "prompt_id": pa.string(),
        "source": pa.string(),
        "prompt_ids": _TOKENS,
        "response_ids": _TOKENS,
        "text": pa.string(),
        "transcript": pa.string(),  # a JSON list
        "finish_reason": pa.string(),
        "status": pa.string(),
        "reward_message": pa.string(),
        "reward_statuses": pa.string(),  # a JSON object
        "reward_subparts": pa.string(),  # a JSON object
        "reward": pa.float64(),
        "reward_components": pa.string(),  # a JSON object: its names differ between rewards
        "advantage": pa.float64(),
        "rollout_logprobs": pa.list_(pa.float32()),
        "policy_version": _TOKENS,
        "turn_index": _TOKENS,
        "origin": _TOKENS,
        "token_rewards": pa.list_(pa.float32()),
        "ref_version": pa.int64(),
        "num_uses": pa.int32(),
        "part_of": pa.string(),  # the sample_id of the row whose episode it is an earlier part of
    }
)


_ARRAYS = {
    "response_ids": np.int64,
    "rollout_logprobs": np.float32,
    "policy_version": np.int64,
    "turn_index": np.int64,
    "origin": np.int64,
    "token_rewards": np.float32,
}


def claim_folder(run_dir: Path, *, resumes: bool) -> TextIO:
    """Make the folder and hold it until the returned file is closed or this process ends.

    Raises ConfigError where another run's files would be mixed with this one's, or another process works in it.
    """
    if run_dir.exists() and not run_dir.is_dir():
        raise ConfigError(f"run_dir={run_dir} is a file. Choose the name of a new folder.")
    run_dir.mkdir(parents=True, exist_ok=True)
    if not resumes and any(entry.name != LOCK for entry in run_dir.iterdir()):
        raise ConfigError(
            f"run_dir={run_dir} already has files in it. Choose a new folder, leave run_dir unset to get one, or go on with that "
            f"run: rlkit train resume={run_dir}"
        )
    lock = (run_dir / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go of it however the process ends
    except OSError as error:
        lock.seek(0)
        holder = lock.read().strip() or "another process"
        lock.close()
        raise ConfigError(f"run_dir={run_dir}: {holder} is training there. Wait for it, or choose another folder.") from error
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {platform.node()}\n")
    lock.flush()
    return lock


def write_atomically(path: Path, text: str) -> None:
    """Whoever reads `path` sees the old text or the new, never a part."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_settings(run_dir: Path, config: RunConfig, settings: dict[str, Any]) -> None:
    """config.yaml, every setting with its value; choices.yaml, which option was taken in each group."""
    write_atomically(run_dir / "config.yaml", yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    write_atomically(run_dir / "choices.yaml", yaml.safe_dump(choices(config), sort_keys=False))


def choices(config: RunConfig) -> dict[str, str]:
    """Group -> the option whose dataclass was taken; the dataclass's own name where `CHOICES` does not list it."""
    taken = {}
    for group, options in CHOICES.items():
        kind = type(getattr(config, group))
        taken[group] = next((name for name, option in options.items() if option is kind), f"{kind.__module__}.{kind.__qualname__}")
    return taken


def write_versions(path: Path) -> None:
    """What a reader needs to repeat the run: code, packages, machine."""
    versions = {
        "rlkit": rlkit_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": {"model": _cpu_model(), "cores": len(os.sched_getaffinity(0))},
        "gpus": _output("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader").splitlines(),
        "packages": _packages(),
    }
    write_atomically(path, json.dumps(versions, indent=2) + "\n")


def rlkit_commit() -> dict[str, Any]:
    """Commit of the clone that rlkit runs from, and whether its files differ from it. Empty where it was installed as a wheel."""
    clone = Path(rlkit.__file__).resolve().parents[1]
    if not (clone / "pyproject.toml").is_file():  # else git would answer for whatever repository the virtual environment lies in
        return {}
    commit = _output("git", "-C", str(clone), "rev-parse", "HEAD").strip()
    return {"commit": commit, "modified": bool(_output("git", "-C", str(clone), "status", "--porcelain"))} if commit else {}


def write_rollouts(path: Path, rollouts: Sequence[Rollout], advantages: Sequence[float]) -> None:
    """One row a rollout. Raises DataError when there is not one advantage for each."""
    if len(rollouts) != len(advantages):
        raise DataError(f"{path.name}: {len(rollouts)} rollouts came with {len(advantages)} advantages. Send one for each.")
    rows = []
    for rollout, advantage in zip(rollouts, advantages, strict=True):
        rows += [_row(part, float(advantage), part_of=rollout.sample_id) for part in rollout.parts]
        rows.append(_row(rollout, float(advantage)))
    columns = {name: pa.array([row[name] for row in rows], type=_ROLLOUT_SCHEMA.field(name).type) for name in _ROLLOUT_SCHEMA.names}
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    pq.write_table(pa.table(columns, schema=_ROLLOUT_SCHEMA), temporary, compression="zstd")
    os.replace(temporary, path)


def read_rollouts(path: Path) -> list[Rollout]:
    """What `write_rollouts` wrote."""
    rollouts: list[Rollout] = []
    parts: dict[str, list[Rollout]] = {}  # by the sample_id of the rollout they are parts of
    for stored in pq.read_table(path).to_pylist():
        known = {name: stored[name] for name in _ROLLOUT_SCHEMA.names if name in stored}
        row: dict[str, Any] = {
            "reward_message": "",
            "reward_statuses": "{}",
            "reward_subparts": "{}",
        } | known  # which older files lack
        del row["advantage"]
        part_of = row.pop("part_of")
        arrays: dict[str, Any] = {name: np.array(row[name], dtype=dtype) for name, dtype in _ARRAYS.items()}
        read = Rollout(
            **row
            | arrays
            | {
                "prompt_ids": tuple(row["prompt_ids"]),
                "finish_reason": FinishReason[row["finish_reason"]],
                "status": RewardStatus[row["status"]],
                "reward_components": json.loads(row["reward_components"]),
                "reward_statuses": {name: RewardStatus[each] for name, each in json.loads(row["reward_statuses"]).items()},
                "reward_subparts": json.loads(row["reward_subparts"]),
                "transcript": None if row["transcript"] is None else tuple(json.loads(row["transcript"])),
                "parts": tuple(parts.get(row["sample_id"], ())),
            }
        )
        (rollouts if part_of is None else parts.setdefault(part_of, [])).append(read)
    return rollouts


def write_evaluation(run_dir: Path, step: int, evaluation: Mapping[str, Any]) -> None:
    """Plain values of one evaluation, in a file of its own."""
    folder = run_dir / EVALUATIONS
    folder.mkdir(exist_ok=True)
    write_atomically(folder / f"step_{step:06d}.json", json.dumps(evaluation) + "\n")


def read_evaluations(run_dir: Path) -> dict[int, dict[str, Any]]:
    """Step -> what `write_evaluation` wrote, in the order of the steps."""
    return {step: json.loads(path.read_text(encoding="utf-8")) for step, path in _evaluations(run_dir)}


def drop_evaluations(run_dir: Path, *, after: int) -> None:
    """A resumed run makes those after its checkpoint again."""
    for step, path in _evaluations(run_dir):
        if step > after:
            path.unlink()


def _evaluations(run_dir: Path) -> list[tuple[int, Path]]:
    return sorted((int(path.stem.removeprefix("step_")), path) for path in (run_dir / EVALUATIONS).glob("step_*.json"))


def _row(rollout: Rollout, advantage: float, *, part_of: str | None = None) -> dict[str, Any]:
    row = {name: getattr(rollout, name) for name in _ROLLOUT_SCHEMA.names if name not in ("advantage", "part_of")}
    return row | {
        "part_of": part_of,
        "finish_reason": rollout.finish_reason.name,
        "status": rollout.status.name,
        "reward_components": json.dumps(rollout.reward_components),
        "reward_statuses": json.dumps({name: status.name for name, status in rollout.reward_statuses.items()}),
        "reward_message": redact(rollout.reward_message) if rollout.reward_message else "",
        "reward_subparts": json.dumps(rollout.reward_subparts),
        "transcript": None if rollout.transcript is None else json.dumps(rollout.transcript),
        "advantage": advantage if math.isfinite(advantage) else None,
    }


@cache
def _packages() -> dict[str, str]:
    """Name -> version of everything installed. Cached: a sweep asks for every job, and each look reads hundreds of files."""
    found = {package.metadata["Name"]: package.version for package in distributions()}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _output(*command: str) -> str:
    """What a command printed, or nothing where it is missing, fails or hangs: no run stops for want of a version."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (subprocess.SubprocessError, OSError):
        return ""
