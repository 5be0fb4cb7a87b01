"""The one object that the training loop tells what happened."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rlkit.config import RunConfig, WandbTracking
from rlkit.controller.tracking import files, forecast
from rlkit.controller.tracking.console import open_display, printable
from rlkit.controller.tracking.history import read_history
from rlkit.controller.tracking.plots import write_plots
from rlkit.controller.tracking.redaction import plain_settings, redact
from rlkit.controller.tracking.sinks import JsonlSink, Sink, TensorBoardSink, WandbSink
from rlkit.controller.tracking.summary import summarise
from rlkit.errors import ResourceError
from rlkit.types import Rollout


class Tracker:
    """Records a run in its folder and shows it on the console. Steps are numbered from 1; step 0 is before the first.

    `resume_after` is the last step that an interrupted run in this folder had saved, -1 if it saved none: what was measured
    after it is dropped, because it will be measured again. None: a new run. Raises ConfigError when the folder holds another run
    or a running one, ResourceError when a chosen sink cannot start.
    """

    def __init__(self, run_dir: Path, config: RunConfig, *, resume_after: int | None = None):
        keep_until = -1 if resume_after is None else resume_after
        start_step = max(keep_until, 0)
        self._lock = files.claim_folder(run_dir, resumes=resume_after is not None)
        self._run_dir, self._config, self._start_step = run_dir, config, start_step
        self._started = time.monotonic()
        settings = plain_settings(config)
        self._sinks: list[Sink] = []
        if isinstance(config.tracking, WandbTracking):  # first: where it fails, the folder is still empty
            try:
                self._sinks.append(WandbSink(config.tracking, run_dir=run_dir, name=run_dir.name, config=settings))
            except ResourceError:
                self._lock.close()
                (run_dir / files.LOCK).unlink()
                raise
        files.write_settings(run_dir, config, settings)
        files.drop_evaluations(run_dir, after=keep_until)
        files.write_versions(run_dir / "versions.json")
        self._log = (run_dir / "log.txt").open("a", encoding="utf-8")
        self._sinks.append(JsonlSink(run_dir / "metrics.jsonl", keep_until=keep_until))
        self._sinks.append(TensorBoardSink(run_dir / "tensorboard", keep_until=keep_until))
        self._display = open_display(
            title=config.experiment_name, subtitle=str(run_dir), num_steps=config.num_steps, start_step=start_step
        )
        self._sinks.append(self._display)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        if kind is not None:
            self._write_log(f"{kind.__name__}: {error}")  # the command line shows it; the folder keeps it
        with ExitStack() as closing:  # each is closed, even where another fails to
            closing.callback(self._lock.close)
            closing.callback(self._log.close)
            for sink in self._sinks:
                closing.callback(sink.close)

    def step(self, step: int, metrics: Mapping[str, float], timings: Mapping[str, float]) -> None:
        """One training step: `timings` are named `time/*_s`; `time/step_s` is the whole, the others are disjoint parts of it."""
        values = {name: float(value) for name, value in {**metrics, **timings}.items()}
        for sink in self._sinks:
            sink.step(step, values)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        """A held-out evaluation after `step`: names `evaluation/x`, intervals `evaluation/x_low` and `evaluation/x_high`.

        What the evaluations before it forecast is added.
        """
        values = {name: float(value) for name, value in metrics.items()}
        values |= forecast.metrics(read_history(self._run_dir / "metrics.jsonl"))
        for sink in self._sinks:
            sink.evaluation(step, values)

    def store_evaluation(self, step: int, evaluation: Mapping[str, Any]) -> None:
        """What each prompt of the evaluation after `step` came to, in a file that `rlkit compare` reads. Before `evaluation`."""
        files.write_evaluation(self._run_dir, step, evaluation)

    def rollouts(self, step: int, rollouts: Sequence[Rollout], advantages: Sequence[float]) -> None:
        """Store a step's rollouts, every `tracking.save_rollouts_every` steps."""
        every = self._config.tracking.save_rollouts_every
        if every and step % every == 0:
            files.write_rollouts(self._run_dir / "rollouts" / f"step_{step:06d}.parquet", rollouts, advantages)

    def workers(self, places: Mapping[str, str]) -> None:
        """Where every worker runs, in workers.json: what a debugger or a profiler is attached to."""
        files.write_atomically(self._run_dir / "workers.json", json.dumps(dict(places), indent=2) + "\n")

    def message(self, text: str) -> None:
        """A line for the person who watches, kept in log.txt."""
        text = redact(text)
        self._write_log(text)
        self._display.message(text)

    def finish(self, *, checkpoint: Path | None, stopped: str | None) -> None:
        """Plots and summary. `stopped` says why the run ended before its last step, None that it did not."""
        history = read_history(self._run_dir / "metrics.jsonl")
        summary = summarise(
            history,
            name=self._config.experiment_name,
            run_dir=self._run_dir,
            num_steps=self._config.num_steps,
            start_step=self._start_step,
            wall_s=time.monotonic() - self._started,
            checkpoint=checkpoint,
            stopped=None if stopped is None else redact(stopped),
        )
        files.write_atomically(self._run_dir / "summary.json", json.dumps(summary.to_json(), indent=2) + "\n")
        files.write_atomically(self._run_dir / "summary.md", summary.markdown())
        write_plots(history, self._run_dir / "plots")
        self._display.summary(summary.text())

    def _write_log(self, text: str) -> None:
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        self._log.write(f"{now}  {printable(redact(text))}\n")
        self._log.flush()
