"""What a run came to, and how to go on: for a person, and as JSON."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlkit.controller.tracking import forecast
from rlkit.controller.tracking.format import aligned, duration, markdown_table, number
from rlkit.controller.tracking.history import Evaluated, History, step_parts


@dataclass(frozen=True, kw_only=True, slots=True)
class Best:
    """The step with the highest value of what the run was to raise."""

    metric: str
    step: int
    value: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Summary:
    """Every field is plain data; `text`, `markdown` and `to_json` show the same."""

    name: str
    run_dir: Path
    steps: int  # the last one done
    num_steps: int  # the last one planned
    stopped: str | None  # why the run ended early
    wall_s: float
    time_s: dict[str, float] = field(default_factory=dict)  # part -> seconds; their sum is wall_s
    first: Evaluated | None = None
    last: Evaluated | None = None  # None where there was only one
    best: Best | None = None
    forecast: str | None = None  # of the entropy-performance law
    checkpoint: Path | None = None

    @property
    def headline(self) -> str:
        if self.stopped is None:
            return f"{self.name}: {self.steps} steps in {duration(self.wall_s)}"
        return f"{self.name}: stopped after {self.steps} of {self.num_steps} steps, {duration(self.wall_s)}: {self.stopped}"

    @property
    def commands(self) -> list[str]:
        """How to go on."""
        evaluate = [] if self.checkpoint is None else [f"rlkit eval {shlex.quote(str(self.checkpoint))}"]
        return [*evaluate, f"tensorboard --logdir {shlex.quote(str(self.run_dir))}"]

    def table(self) -> list[list[str]]:
        """Before and after, a heading first. Empty where nothing was evaluated."""
        if self.first is None:
            return []
        if self.last is None:
            return [["held out", f"step {self.first.step}"], *([name, str(e)] for name, e in self.first.estimates.items())]
        rows = [["held out", f"before (step {self.first.step})", f"after (step {self.last.step})", "change"]]
        for name, after in self.last.estimates.items():
            before = self.first.estimates.get(name)
            change = (
                "" if before is None else f"{'+' if after.value >= before.value else '-'}{number(abs(after.value - before.value))}"
            )
            rows.append([name, "" if before is None else str(before), str(after), change])
        return rows

    def facts(self) -> list[tuple[str, str]]:
        """Name and value of everything else worth a line."""
        found = []
        if self.best is not None:
            found.append(("best", f"{self.best.metric} {number(self.best.value)} at step {self.best.step}"))
        if self.forecast is not None:
            found.append(("forecast", self.forecast))
        shares = sorted(self.time_s.items(), key=lambda item: -item[1])
        found.append(("time", ", ".join(f"{part} {100 * s / self.wall_s:.0f}%" for part, s in shares if s >= 0.005 * self.wall_s)))
        if self.checkpoint is not None:
            found.append(("checkpoint", str(self.checkpoint)))
        return [*found, ("run folder", str(self.run_dir))]

    def text(self) -> str:
        """For the console: aligned, the commands last."""
        lines = [self.headline]
        if rows := self.table():
            lines += ["", *(f"  {line}" for line in aligned(rows))]
        facts = self.facts()
        width = max(len(name) for name, _ in facts)
        lines += ["", *(f"  {name:<{width}}  {value}" for name, value in facts)]
        return "\n".join([*lines, "", "To go on:", *(f"  {command}" for command in self.commands)])

    def markdown(self) -> str:
        """The same for summary.md."""
        lines = [f"# {self.headline}", ""]
        if rows := self.table():
            lines += [*markdown_table(rows), ""]
        lines += [f"- {name}: {value}" for name, value in self.facts()]
        return "\n".join([*lines, "", "To go on:", "", "```bash", *self.commands, "```", ""])

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "run_dir": str(self.run_dir),
            "steps": self.steps,
            "num_steps": self.num_steps,
            "stopped": self.stopped,
            "wall_s": self.wall_s,
            "time_s": self.time_s,
            "evaluation": {key: asdict(e) for key, e in (("first", self.first), ("last", self.last)) if e is not None},
            "forecast": self.forecast,
            "best": None if self.best is None else asdict(self.best),
            "checkpoint": None if self.checkpoint is None else str(self.checkpoint),
            "commands": self.commands,
        }


def summarise(
    history: History,
    *,
    name: str,
    run_dir: Path,
    num_steps: int,
    start_step: int,
    wall_s: float,
    checkpoint: Path | None,
    stopped: str | None,
) -> Summary:
    """Time is that of the steps after `start_step`, the ones of this process; the evaluations are those of the whole run."""
    time_s: dict[str, float] = {}
    for row in history.after(start_step).steps:
        for part, seconds in step_parts(row).items():
            time_s[part] = time_s.get(part, 0.0) + seconds
    time_s["outside steps"] = max(0.0, wall_s - sum(time_s.values()))  # start-up, evaluation, checkpoints
    evaluations = history.evaluations
    return Summary(
        name=name,
        run_dir=run_dir,
        steps=int(history.steps[-1]["step"]) if history.steps else start_step,
        num_steps=num_steps,
        stopped=stopped,
        wall_s=wall_s,
        time_s=time_s,
        first=evaluations[0] if evaluations else None,
        last=evaluations[-1] if len(evaluations) > 1 else None,
        best=_best(history),
        forecast=forecast.fact(history),
        checkpoint=checkpoint,
    )


def _best(history: History) -> Best | None:
    """By held-out pass@1, else by held-out reward, else by training reward, which is the noisiest."""
    for name in ("pass@1", "reward"):
        if scored := [(e.estimates[name].value, e.step) for e in history.evaluations if name in e.estimates]:
            value, step = max(scored, key=lambda item: item[0])
            return Best(metric=f"held-out {name}", step=step, value=value)
    steps, rewards = history.series("reward/mean")
    if not steps:
        return None
    value, step = max(zip(rewards, steps, strict=True), key=lambda item: item[0])
    return Best(metric="training reward", step=int(step), value=value)
