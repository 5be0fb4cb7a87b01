"""Where scalar measurements go. Each sink is told of a step once, after it ended, and of an evaluation when it is done."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rlkit.config import WandbTracking
from rlkit.controller.tracking.files import write_atomically
from rlkit.controller.tracking.history import read_rows
from rlkit.errors import ResourceError


class Sink(Protocol):
    """Takes measurements. `close` may be called twice."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonlSink:
    """One JSON object a line, on disk before the call returns. A value that is not finite is null: JSON has no NaN."""

    def __init__(self, path: Path, *, keep_until: int):
        if path.exists():  # a resumed run measures the steps after keep_until again
            kept = [row for row in read_rows(path) if row["step"] <= keep_until]
            write_atomically(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, **finite}) + "\n")
        self._file.flush()

    evaluation = step

    def close(self) -> None:
        self._file.close()


class TensorBoardSink:
    """Event files for `tensorboard --logdir`."""

    def __init__(self, folder: Path, *, keep_until: int):
        from torch.utils.tensorboard import SummaryWriter  # seconds to import

        self._writer = SummaryWriter(str(folder), purge_step=keep_until + 1 if folder.exists() else None)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    evaluation = step

    def close(self) -> None:
        self._writer.close()


class WandbSink:
    """Weights & Biases. Raises ResourceError when the package is missing or refuses to start."""

    def __init__(self, settings: WandbTracking, *, run_dir: Path, name: str, config: dict[str, Any]):
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ResourceError(
                f'tracking=wandb needs the wandb package ({error}). Run `pip install -e ".[wandb]"` in the clone of rlkit, or '
                "write tracking=files."
            ) from None
        # Left to itself it also records the command line, the git remote and the console: whatever secrets are in them.
        quiet = {"console": "off", "disable_git": True, "x_disable_meta": True, "quiet": True}
        try:
            self._run = wandb.init(
                project=settings.project, entity=settings.entity, name=name, dir=str(run_dir), config=config, settings=quiet
            )
        except wandb.Error as error:
            raise ResourceError(
                f"tracking=wandb: Weights & Biases did not start ({error}). Run `wandb login`, or set WANDB_MODE=offline, "
                "or write tracking=files."
            ) from error

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    evaluation = step

    def close(self) -> None:
        self._run.finish()
