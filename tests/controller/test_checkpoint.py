"""A process that dies at any point of saving leaves a whole checkpoint behind."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from rlkit.controller import checkpoint
from rlkit.controller.checkpoint import newest_valid, prune, save_checkpoint
from rlkit.controller.fleet import Learners


class Died(BaseException):
    """Stands for SIGKILL: nothing in the code may handle it."""


class FakeLearner:
    """Writes what a learner writes: some files, in a folder of its own too."""

    def save(self, folder: str) -> None:
        (Path(folder) / "state").mkdir()
        for name in ("model.safetensors", "config.json", "state/learner-0-of-1.safetensors"):
            (Path(folder) / name).write_text(name * 40)


@pytest.fixture
def points(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every call that changes the disk counts down `points[0]`; the one that reaches 0 dies, half done where it writes."""
    left = [0]

    def dying(real: Callable[..., Any], half: Callable[..., Any] | None = None) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                if half is not None:
                    half(*args, **kwargs)
                raise Died
            return real(*args, **kwargs)

        return call

    write = Path.write_text

    def half_written(path: Path, text: str, **kwargs: Any) -> None:
        write(path, text[: len(text) // 2])

    def half_deleted(folder: Path, **kwargs: Any) -> None:
        next(path for path in sorted(folder.rglob("*")) if path.is_file()).unlink()

    monkeypatch.setattr(Path, "write_text", dying(write, half_written))
    monkeypatch.setattr(Path, "mkdir", dying(Path.mkdir))
    monkeypatch.setattr(Path, "rename", dying(Path.rename))
    monkeypatch.setattr(os, "fsync", dying(os.fsync))
    monkeypatch.setattr(checkpoint.shutil, "rmtree", dying(checkpoint.shutil.rmtree, half_deleted))
    return left


def save(run_dir: Path, step: int) -> None:
    save_checkpoint(cast(Learners, FakeLearner()), run_dir, step, {"step": step})
    prune(run_dir, keep_last=1, best=None)


def test_a_death_at_any_point_of_a_save_leaves_a_whole_checkpoint_and_the_next_save_tidies_up(tmp_path, points):
    number_of_points = survived = 0
    while True:
        run_dir = tmp_path / f"died-at-{number_of_points + 1}"
        points[0] = 0
        save(run_dir, 1)
        number_of_points += 1
        points[0] = number_of_points
        try:
            save(run_dir, 2)
        except Died:
            points[0] = 0
            found, _ = newest_valid(run_dir)
            assert found is not None
            assert found.progress["step"] in (1, 2)
            survived += found.progress["step"] == 1
            save(run_dir, 3)
            assert [entry.name for entry in (run_dir / "checkpoints").iterdir()] == ["step_000003"]
            continue
        break
    # Every write, flush, rename and deletion was one of them; most come before the rename, after which the new one counts.
    assert number_of_points > 15
    assert 10 < survived < number_of_points - 1
