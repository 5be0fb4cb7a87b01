"""What one sees while a run runs: a live panel on a terminal, one plain line a step anywhere else."""

from __future__ import annotations

import math
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from rlkit.controller.tracking.format import duration, number, percent, sparkline
from rlkit.controller.tracking.history import estimates, objective_weights, step_parts
from rlkit.controller.tracking.sinks import Sink

Format = Callable[[float], str]

# label, metric, format; one column of the panel each
_PANEL: tuple[tuple[tuple[str, str, Format], ...], ...] = (
    (
        ("reward", "reward/mean", number),
        ("held-out pass@1", "evaluation/pass@1", number),
        ("length", "length/mean", number),
        ("truncated", "length/frac_truncated", percent),
    ),
    (
        ("entropy", "entropy/mean", number),
        ("KL to reference", "kl/ref_token_mean", number),
        ("clip fraction", "policy/clip_fraction", percent),
        ("gradient norm", "policy/grad_norm", number),
    ),
    (
        ("mismatch mean", "mismatch/mean", number),
        ("mismatch max", "mismatch/max", number),
        ("mismatch k3", "mismatch/k3", number),
        ("tokens/s", "rate/generated_tokens_per_s", number),
    ),
)
# label, metric, format, width of the value
_LINE: tuple[tuple[str, str, Format, int], ...] = (
    ("reward", "reward/mean", number, 6),
    ("len", "length/mean", number, 5),
    ("entropy", "entropy/mean", number, 6),
    ("kl", "kl/ref_token_mean", number, 6),
    ("clip", "policy/clip_fraction", percent, 5),
    ("mismatch", "mismatch/mean", number, 6),
)
_PART_STYLES = {
    "generate": "cyan",
    "reward": "magenta",
    "score": "yellow",
    "learn": "blue",
    "sync": "green",
    "other": "bright_black",
}
_LINE_WIDTH = 120
_CONTROL = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # escape sequences; all else but tab and newline


class Display(Sink, Protocol):
    """A sink that people look at."""

    def message(self, text: str) -> None: ...

    def summary(self, text: str) -> None: ...


def open_display(*, title: str, subtitle: str, num_steps: int, start_step: int) -> Display:
    """The live panel on a terminal that can draw it, plain lines elsewhere."""
    console = Console()
    if sys.stdout.isatty() and not console.is_dumb_terminal:
        return LiveDisplay(console, title=title, subtitle=subtitle, num_steps=num_steps, start_step=start_step)
    return PlainDisplay(num_steps=num_steps, start_step=start_step)


def printable(text: str) -> str:
    """Text from a model or a reward function may hold escape sequences, which would act on the terminal."""
    return _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


class Pace:
    """Time left, from the last steps and whatever happened between them."""

    def __init__(self, *, num_steps: int, start_step: int):
        self.num_steps, self.done = num_steps, start_step
        self._ends: deque[float] = deque(maxlen=21)
        self._first_step_s = math.nan

    def step(self, step: int, step_s: float, now: float) -> None:
        self.done = step
        self._ends.append(now)
        self._first_step_s = step_s if len(self._ends) == 1 else self._first_step_s

    def left_s(self, now: float) -> float | None:
        """None before the first step that was timed."""
        if not self._ends:
            return None
        between = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1) if len(self._ends) > 1 else self._first_step_s
        if math.isnan(between):
            return None
        return max(0.0, (self.num_steps - self.done) * between - (now - self._ends[-1]))


class PlainDisplay:
    """One aligned line a step, without control characters: for logs, pipes and notebooks."""

    def __init__(self, *, num_steps: int, start_step: int = 0):
        self._pace = Pace(num_steps=num_steps, start_step=start_step)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        now = time.monotonic()
        self._pace.step(step, metrics.get("time/step_s", math.nan), now)
        fields = [f"{label} {form(metrics[name]):>{width}}" for label, name, form, width in _LINE if name in metrics]
        left_s = self._pace.left_s(now)
        if left_s is not None:
            fields += [f"{duration(metrics['time/step_s']):>6}" if "time/step_s" in metrics else "", f"left {duration(left_s):>6}"]
        if "rate/generated_tokens_per_s" in metrics:
            fields.append(f"tok/s {number(metrics['rate/generated_tokens_per_s']):>6}")
        line = self._counter(step)
        for field in fields:
            if len(line) + 2 + len(field) > _LINE_WIDTH:
                break
            line += f"  {field}"
        print(line, flush=True)
        if weights := objective_weights(metrics):
            found = [printable(f"{name} {number(weight)}") for name, weight in weights.items()]
            self._list(f"{' ' * len(self._counter(step))}  weights:", found)

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        found = [f"{name} {estimate}" for name, estimate in estimates(metrics).items()]
        self._list(f"{self._counter(step)}  held out:", found)

    def _list(self, line: str, fields: Sequence[str]) -> None:
        """As many lines as it takes, the later ones indented."""
        indent = " " * (2 * len(str(self._pace.num_steps)) + len("step /"))
        for field in fields:
            if len(line) + 2 + len(field) > _LINE_WIDTH:
                print(line, flush=True)
                line = indent
            line += f"  {field}"
        print(line, flush=True)

    def message(self, text: str) -> None:
        print(printable(text), flush=True)

    def summary(self, text: str) -> None:
        print(f"\n{printable(text)}", flush=True)

    def close(self) -> None:
        pass

    def _counter(self, step: int) -> str:
        return f"step {step:>{len(str(self._pace.num_steps))}}/{self._pace.num_steps}"


class LiveDisplay:
    """A panel that stays at the bottom of the terminal. It appears with the first measurement."""

    def __init__(self, console: Console, *, title: str, subtitle: str, num_steps: int, start_step: int = 0):
        self._console, self._title, self._subtitle = console, title, subtitle
        self._pace = Pace(num_steps=num_steps, start_step=start_step)
        self._started = time.monotonic()
        self._metrics: dict[str, float] = {}
        self._evaluation: dict[str, float] = {}
        self._rewards: list[float] = []
        self._live = Live(get_renderable=self.render, console=console, refresh_per_second=2)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        self._pace.step(step, metrics.get("time/step_s", math.nan), time.monotonic())
        self._metrics = dict(metrics)
        self._rewards.append(metrics.get("reward/mean", math.nan))
        self._refresh()

    def evaluation(self, step: int, metrics: Mapping[str, float]) -> None:
        self._evaluation = dict(metrics)
        self._refresh()

    def message(self, text: str) -> None:
        self._console.print(Text(printable(text)), soft_wrap=True)

    def summary(self, text: str) -> None:
        self.close()
        first, _, rest = printable(text).partition("\n")
        self._console.print(Text.assemble("\n", (first, "bold"), f"\n{rest}"), soft_wrap=True)  # a wrapped path cannot be copied

    def close(self) -> None:
        self._live.stop()

    def render(self) -> RenderableType:
        """The panel as it stands."""
        metrics = {**self._metrics, **self._evaluation}
        blocks: list[RenderableType] = [self._progress(), ""]
        if columns := [column for fields in _PANEL if (column := _column(fields, metrics))]:
            blocks += [Columns(columns, padding=(0, 3)), ""]
        pictures = Table.grid(padding=(0, 2))
        pictures.add_column(style="dim")
        if len(curve := sparkline(self._rewards, 40)) > 1:
            pictures.add_row("reward", self._reward_curve(curve))
        if parts := step_parts(self._metrics):
            pictures.add_row("time", _time_bar(parts))
        if weights := objective_weights(self._metrics):
            pictures.add_row("weights", Text(printable("  ".join(f"{name} {number(weight)}" for name, weight in weights.items()))))
        blocks.append(pictures)
        return Panel(
            Group(*blocks),
            title=Text(self._title, style="bold"),
            title_align="left",
            subtitle=Text(self._subtitle, style="dim"),
            subtitle_align="left",
            border_style="bright_black",
            padding=(1, 2),
            width=min(self._console.width, 104),
        )

    def _refresh(self) -> None:
        if not self._live.is_started:
            self._live.start()
        self._live.refresh()

    def _progress(self) -> Table:
        now = time.monotonic()
        done, total, left_s = self._pace.done, self._pace.num_steps, self._pace.left_s(now)
        row = Table.grid(padding=(0, 2), expand=True)
        for ratio in (None, 1, None, None):
            row.add_column(ratio=ratio, no_wrap=True)
        row.add_row(
            Text(f"step {done}/{total}", style="bold"),
            ProgressBar(total=max(1, total), completed=done, complete_style="cyan", finished_style="cyan"),
            Text(f"{duration(now - self._started)} so far", style="dim"),
            Text("" if left_s is None else f"{duration(left_s)} left"),
        )
        return row

    def _reward_curve(self, curve: str) -> Text:
        finite = [reward for reward in self._rewards if math.isfinite(reward)]
        return Text.assemble((curve, "cyan"), ("  from ", "dim"), number(finite[0]), (" to ", "dim"), number(finite[-1]))


def _column(fields: Sequence[tuple[str, str, Format]], metrics: Mapping[str, float]) -> Table | None:
    """Labels and values of the metrics that were sent. Its width is fixed, so that the panel does not breathe."""
    present = [(label, form(metrics[name])) for label, name, form in fields if name in metrics]
    if not present:
        return None
    column = Table.grid(padding=(0, 1))
    column.add_column(min_width=max(len(label) for label, _, _ in fields), style="dim", no_wrap=True)
    column.add_column(min_width=7, justify="right", no_wrap=True)
    for label, value in present:
        column.add_row(label, value)
    return column


def _time_bar(parts: Mapping[str, float], width: int = 40) -> RenderableType:
    """Where the last step's time went: a bar, then the shares."""
    total = sum(parts.values())
    if not total:
        return Text(duration(0.0))
    bar, legend, end, filled = Text(), [], 0.0, 0
    for part, seconds in parts.items():
        end += seconds
        cells = round(width * end / total) - filled
        filled += cells
        bar.append("█" * cells, style=_PART_STYLES[part])
        if percentage := round(100 * seconds / total):
            legend.append(Text.assemble(("■ ", _PART_STYLES[part]), f"{part} {percentage}%"))
    return Group(bar.append(f"  {duration(total)} a step", style="default"), Columns(legend, padding=(0, 2)))
