"""Several runs in one process, one after the other, on one cluster: the next run finds the engines of the last still there."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rlkit.compose import Arm
from rlkit.controller.cluster import Cluster, open_cluster
from rlkit.controller.evaluate import Evaluation
from rlkit.controller.loop import RunSummary
from rlkit.controller.tracking.format import aligned, duration, number
from rlkit.errors import Preempted, RlkitError


@dataclass(kw_only=True, slots=True)
class Outcome:
    """What became of one run."""

    label: str
    overrides: tuple[str, ...]
    run_dir: str
    exit_code: int | None = None  # None: not started
    message: str = ""  # why it failed
    result: str = ""  # held out, before and after
    seconds: float = 0.0

    @property
    def word(self) -> str:
        return {None: "not run", 0: "done"}.get(self.exit_code, f"failed ({self.exit_code})")


def run_sweep(arms: Sequence[Arm], train: Callable[..., RunSummary], show: Callable[[str], None] = print) -> int:
    """Train every arm; one that fails is recorded and the rest go on. Returns the worst exit code.

    `sweep.json` beside the run folders is up to date after every arm. An interrupt stops the whole sweep.
    """
    outcomes = [Outcome(label=arm.label, overrides=arm.overrides, run_dir=arm.config.run_dir) for arm in arms]
    folder = Path(arms[0].config.run_dir).parent
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open_cluster(arms[0].config.cluster) as cluster:
            for place, (arm, outcome) in enumerate(zip(arms, outcomes, strict=True), start=1):
                show(f"run {place} of {len(arms)}: {arm.label}")
                _run_one(arm, outcome, train, cluster, show)
                _write(folder / "sweep.json", outcomes)
                if outcome.exit_code == Preempted.exit_code:
                    break  # whoever stopped this run meant the process
    finally:
        _write(folder / "sweep.json", outcomes)
        show(table(outcomes))
    return max((outcome.exit_code or 0 for outcome in outcomes), default=0)


def _run_one(arm: Arm, outcome: Outcome, train: Callable[..., RunSummary], cluster: Cluster, show: Callable[[str], None]) -> None:
    started = time.monotonic()
    try:
        summary = train(arm.config, cluster)
        outcome.exit_code, outcome.result = 0, result(summary.before, summary.after)
    except RlkitError as error:
        outcome.exit_code, outcome.message = error.exit_code, str(error)
        show(f"error: {error}")
    except KeyboardInterrupt:
        outcome.exit_code, outcome.message = 130, "interrupted"
        raise
    except Exception as error:  # our own bug in one run: its traceback is shown, and the other runs still count
        outcome.exit_code, outcome.message = 1, f"{type(error).__name__}: {error}"
        show(traceback.format_exc())
    finally:
        outcome.seconds = time.monotonic() - started


def result(before: Evaluation | None, after: Evaluation | None) -> str:
    """Held-out reward and pass@1, before and after."""
    if after is None:
        return ""
    names = {"reward": "evaluation/reward", "pass@1": "evaluation/pass@1"}
    last = after.metrics()
    first = before.metrics() if before is not None else {}
    return ", ".join(
        f"{name} {number(first[key])} -> {number(last[key])}" if key in first else f"{name} {number(last[key])}"
        for name, key in names.items()
        if key in last
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """One line a run."""
    rows = [["run", "outcome", "time", "held out, before -> after", "folder"]]
    for outcome in outcomes:
        said = outcome.result or outcome.message.partition("\n")[0]
        rows.append([outcome.label, outcome.word, duration(outcome.seconds), said, outcome.run_dir])
    return "\n".join(aligned(rows))


def _write(file: Path, outcomes: Sequence[Outcome]) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=2) + "\n", encoding="utf-8")
    temporary.replace(file)
