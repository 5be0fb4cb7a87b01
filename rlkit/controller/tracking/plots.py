"""The main curves of a run as PNG files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlkit.controller.tracking.history import History, step_parts

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito: told apart by everybody
_PART_COLOURS: dict[str, str] = dict(
    zip(("generate", "learn", "score", "reward", "sync", "other"), (*COLOURS[:5], "#BBBBBB"), strict=True)
)
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "lines.linewidth": 1.7,
}


def write_plots(history: History, folder: Path) -> list[Path]:
    """One PNG for each picture that has something to show. Returns the files written."""
    folder.mkdir(exist_ok=True)
    written = []
    for name, draw in _PICTURES.items():
        if draw_picture(file := folder / f"{name}.png", lambda axes, draw=draw: draw(axes, history)):
            written.append(file)
    return written


def draw_picture(file: Path, draw: Callable[[Axes], bool], *, xlabel: str = "step", legend_below: bool = False) -> bool:
    """One PNG, on axes of integers unless `draw` chooses others. False, and no file, where it says there is nothing to show.

    A legend stands beside the curves; below, where its texts are long, and there the picture is as large as it needs to be.
    """
    from matplotlib import rc_context  # takes a second to import
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with rc_context(_STYLE):  # not pyplot: its global state and its windows have no place in a library
        figure = Figure(figsize=(6.0, 3.5), dpi=160)  # fixed margins: a layout engine draws everything twice
        FigureCanvasAgg(figure)
        axes = figure.add_subplot(xlabel=xlabel)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        if not draw(axes):
            return False
        if legend_below:
            axes.legend(loc="upper left", bbox_to_anchor=(0.0, -0.16), borderaxespad=0.0, fontsize=8)
            figure.savefig(file, bbox_inches="tight")
        else:
            has_legend = _legend(axes)
            figure.subplots_adjust(left=0.12, right=0.74 if has_legend else 0.97, bottom=0.14, top=0.89)
            figure.savefig(file)
    return True


def _reward(axes: Axes, history: History) -> bool:
    axes.set(title="Reward on training prompts", ylabel="mean reward")
    return _curve(axes, history, "reward/mean", COLOURS[0])


def _evaluation(axes: Axes, history: History) -> bool:
    """pass@k where it was measured, the mean reward where it was not."""
    names = list(dict.fromkeys(name for evaluated in history.evaluations for name in evaluated.estimates))
    shown = [name for name in names if name.startswith("pass@")] or [name for name in names if name == "reward"]
    for i, name in enumerate(shown):
        points = [(evaluated.step, evaluated.estimates[name]) for evaluated in history.evaluations if name in evaluated.estimates]
        steps, colour = [step for step, _ in points], COLOURS[i % len(COLOURS)]
        axes.plot(steps, [estimate.value for _, estimate in points], color=colour, marker="o", markersize=4, label=name)
        bounds = [(step, e.low, e.high) for step, e in points if e.low is not None and e.high is not None]
        for step, low, high in bounds:
            axes.plot([step, step], [low, high], color=colour, linewidth=1.0)
        if bounds:
            at, lows, highs = zip(*bounds, strict=True)
            axes.fill_between(at, lows, highs, color=colour, alpha=0.12, linewidth=0)
    is_pass = bool(shown) and shown[0] != "reward"
    axes.set(title="Held-out prompts, with intervals", ylabel="share of prompts solved" if is_pass else "mean reward")
    if is_pass:
        axes.set_ylim(0, 1.02)
    return bool(shown)


def _entropy(axes: Axes, history: History) -> bool:
    axes.set(title="Entropy of the policy", ylabel="nats per token")
    return _curve(axes, history, "entropy/mean", COLOURS[2])


def _kl(axes: Axes, history: History) -> bool:
    axes.set(title="KL divergence from the reference and within a step", ylabel="nats per token")
    axes.axhline(0, color="#666666", linewidth=0.8)
    return _lines(axes, history, {"policy/approx_kl_k3": "this step (k3)", "kl/ref_token_mean": "reference"})


def _length(axes: Axes, history: History) -> bool:
    axes.set(title="Response length", ylabel="tokens")
    found = _lines(axes, history, {"length/mean": "mean", "length/max": "longest"})
    axes.set_ylim(bottom=0)
    return found


def _mismatch(axes: Axes, history: History) -> bool:
    axes.set(title="Log-prob difference between engine and learner", ylabel="nats per token", yscale="log")
    names = {"mismatch/k3": "k3", "mismatch/mean": "mean", "mismatch/max": "largest"}
    return _lines(axes, history, names, positive=True)


def _time(axes: Axes, history: History) -> bool:
    """Seconds of each step, stacked."""
    timed = [(row["step"], parts) for row in history.steps if (parts := step_parts(row))]
    present = [part for part in _PART_COLOURS if any(parts.get(part) for _, parts in timed)]
    if not present:
        return False
    steps = [step for step, _ in timed]
    layers = [[parts.get(part, 0.0) for _, parts in timed] for part in present]
    colours = [_PART_COLOURS[part] for part in present]
    axes.set(title="Where the time of a step goes", ylabel="seconds")
    if len(steps) > 1:
        axes.stackplot(steps, layers, labels=present, colors=colours, linewidth=0.5, edgecolor="white")
        axes.margins(x=0)
    else:  # an area needs two points
        for i, (part, layer, colour) in enumerate(zip(present, layers, colours, strict=True)):
            axes.bar(steps, layer, bottom=sum(below[0] for below in layers[:i]), label=part, color=colour, width=0.5)
    axes.set_ylim(bottom=0)
    return True


_PICTURES: dict[str, Callable[[Axes, History], bool]] = {
    "reward": _reward,
    "evaluation": _evaluation,
    "entropy": _entropy,
    "kl": _kl,
    "length": _length,
    "mismatch": _mismatch,
    "time": _time,
}


def _curve(axes: Axes, history: History, name: str, colour: str) -> bool:
    """One noisy series: every step thin, its running mean bold once there are enough steps for one."""
    steps, values = history.series(name)
    reach = len(steps) // 20  # to either side: a tenth of the run in all
    if reach:
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=1.0, label="each step")
        values = [_mean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]
    axes.plot(
        steps, values, color=colour, marker="" if len(steps) > 1 else "o", label=f"mean of {2 * reach + 1} steps" if reach else None
    )
    return bool(steps)


def _lines(axes: Axes, history: History, names: dict[str, str], *, positive: bool = False) -> bool:
    """Several series of one unit; `positive` leaves out what a logarithmic axis cannot show."""
    found = False
    for colour, (name, label) in zip(COLOURS, names.items(), strict=False):
        points = [(step, value) for step, value in zip(*history.series(name), strict=True) if value > 0 or not positive]
        if points:
            axes.plot(*map(list, zip(*points, strict=True)), color=colour, marker="" if len(points) > 1 else "o", label=label)
            found = True
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _legend(axes: Axes) -> bool:
    """Beside the curves, never on them. The pictures draw from below, so the last is the uppermost. False: nothing to tell."""
    if found := bool(axes.get_legend_handles_labels()[1]):
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0.0, fontsize=8, reverse=True)
    return found
