"""A run's measurements as `metrics.jsonl` holds them, and what their names mean. Plots and summary are made from this alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlkit.controller.tracking.format import number

EVALUATION = "evaluation/"

_PARTS = {
    "wait": ("time/wait_s",),
    "generate": ("time/generate_s",),
    "reward": ("time/reward_s",),
    "score": ("time/score_s",),
    "learn": ("time/learn_s",),
    "sync": ("time/sync_s", "time/sync_check_s"),
}


def step_parts(metrics: Mapping[str, float]) -> dict[str, float]:
    """Part of a step -> its seconds; `other` is what no part accounts for. Empty where the step was not timed."""
    parts = {
        part: sum(metrics.get(name, 0.0) for name in names) for part, names in _PARTS.items() if any(n in metrics for n in names)
    }
    if "time/step_s" in metrics:
        parts["other"] = max(0.0, metrics["time/step_s"] - sum(parts.values()))  # parts that overlap can exceed the step
    return parts


def objective_weights(metrics: Mapping[str, float]) -> dict[str, float]:
    """Objective -> its weight in this step; empty where they are not moved."""
    found = {name: value for name, value in metrics.items() if name.startswith("recap/") and name.endswith("/weight")}
    return {name.removeprefix("recap/").removesuffix("/weight"): value for name, value in found.items()}


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured value and, where one was sent, its interval."""

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        interval = "" if self.low is None or self.high is None else f" [{number(self.low)}, {number(self.high)}]"
        return number(self.value) + interval


def estimates(metrics: Mapping[str, float]) -> dict[str, Estimate]:
    """Evaluation metrics without their prefix, each `x_low` and `x_high` folded into `x`."""
    names = [name for name in metrics if name.startswith(EVALUATION)]
    bounds = {f"{name}{end}" for name in names for end in ("_low", "_high")}
    return {
        name.removeprefix(EVALUATION): Estimate(metrics[name], metrics.get(f"{name}_low"), metrics.get(f"{name}_high"))
        for name in names
        if name not in bounds
    }


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One held-out evaluation."""

    step: int
    estimates: dict[str, Estimate]


@dataclass(frozen=True, slots=True)
class History:
    """Everything measured so far. A value that was not finite is absent."""

    steps: list[dict[str, float]]  # one a training step, its number under "step"
    evaluations: list[Evaluated]

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """(steps, values) of one training metric; both empty where it was never sent."""
        points = [(row["step"], row[name]) for row in self.steps if name in row]
        return [step for step, _ in points], [value for _, value in points]

    def after(self, step: int) -> History:
        """What was measured in later steps."""
        return History([row for row in self.steps if row["step"] > step], [e for e in self.evaluations if e.step > step])


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; None is a value that was not finite. A last line that a crash cut short is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def read_history(path: Path) -> History:
    """Training steps and evaluations of a `metrics.jsonl`."""
    steps, evaluations = [], []
    for row in read_rows(path):
        finite = {name: value for name, value in row.items() if value is not None}
        if any(name.startswith(EVALUATION) for name in row):
            evaluations.append(Evaluated(finite["step"], estimates(finite)))
        else:
            steps.append(finite)
    return History(steps, evaluations)
