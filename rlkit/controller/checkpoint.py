"""Writes the policy to disk so that a reader never meets half of it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from rlkit.controller.fleet import Learners


def save_checkpoint(learner: Learners, run_dir: Path, step: int) -> Path:
    """Weights and tokenizer in Hugging Face format under checkpoints/step_000123, by a temporary name and a rename."""
    final = run_dir / "checkpoints" / f"step_{step:06d}"
    temporary = final.with_name(f".tmp-{final.name}")
    shutil.rmtree(temporary, ignore_errors=True)  # of a run that died while saving
    temporary.mkdir(parents=True)
    learner.save(str(temporary.resolve()))
    for file in temporary.iterdir():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
    temporary.rename(final)
    return final
