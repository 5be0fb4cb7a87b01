"""A comparison as pictures: thin lines are single runs, a bold line is the mean of an arm."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rlkit.controller.evaluate import Evaluation
from rlkit.controller.tracking.plots import COLOURS, draw_picture
from rlkit.report.compare import Comparison, pass_at_k_means
from rlkit.report.frontier import Point, best_of_n, point
from rlkit.report.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Series = Callable[[Run], tuple[Sequence[float], Sequence[float]]]  # steps, values

_DASHES = ("-", "--", "-.", ":")  # with the colours, styles for two dozen arms
_TRAINING = {  # metric -> title, label
    "reward/mean": ("Reward on training prompts", "mean reward"),
    "entropy/mean": ("Entropy of the policy", "nats per token"),
    "kl/ref_token_mean": ("KL divergence from the reference", "nats per token"),
    "divergence/exact": ("Exact divergence from the reference", "nats per token"),
    "length/mean": ("Response length", "tokens"),
}
_LEGEND_WIDTH = 90  # characters


def write_pictures(comparison: Comparison, folder: Path) -> list[str]:
    """One PNG for each that has something to show. Returns their names."""
    k, ids = comparison.max_k, comparison.prompt_ids
    held_out = {
        "pass_at_1": ("Held-out pass@1", "share of samples that are right", lambda e: e.pass_at(1)),
        "pass_at_max_k": (f"Held-out pass@{k}", f"chance that one of {k} is right", lambda e: e.pass_at(k)),
        "held_out_reward": ("Reward on held-out prompts", "mean reward", lambda e: e.rewards),
        "distinct": ("Different right answers to a held-out prompt", f"among its {k} samples", lambda e: e.distinct),
    }
    pictures: dict[str, tuple[str, str, Series]] = {
        name: (title, label, _evaluated(values, ids)) for name, (title, label, values) in held_out.items()
    }
    pictures |= {
        metric.replace("/", "_"): (title, label, lambda run, metric=metric: run.history.series(metric))
        for metric, (title, label) in _TRAINING.items()
    }
    drawn = {
        name: draw_picture(
            folder / f"{name}.png",
            lambda axes, title=title, label=label, series=series: _over_steps(axes, comparison, series, title=title, ylabel=label),
            legend_below=True,
        )
        for name, (title, label, series) in pictures.items()
    }
    drawn["pass_at_k"] = draw_picture(
        folder / "pass_at_k.png", lambda axes: _pass_at_k(axes, comparison), xlabel="k, samples", legend_below=True
    )
    drawn["reward_and_kl"] = draw_picture(
        folder / "reward_and_kl.png",
        lambda axes: _reward_and_kl(axes, comparison),
        xlabel="KL divergence from the model before training, nats per response",
        legend_below=True,
    )
    for name in (name for name, is_there in drawn.items() if not is_there):
        (folder / f"{name}.png").unlink(missing_ok=True)  # of an earlier comparison
    return [f"{name}.png" for name, is_there in drawn.items() if is_there]


def mean_line(lines: Sequence[tuple[Sequence[float], Sequence[float]]]) -> tuple[list[float], list[float]]:
    """(steps, mean values) at the steps that every line has: where a run is missing, a mean would jump."""
    tables = [dict(zip(*line, strict=True)) for line in lines]
    steps = sorted(set(tables[0]).intersection(*tables[1:]))
    return steps, [float(np.mean([table[step] for table in tables])) for step in steps]


def _evaluated(values: Callable[[Evaluation], np.ndarray], prompt_ids: Sequence[str]) -> Series:
    def series(run: Run) -> tuple[list[float], list[float]]:
        found = {step: float(values(each.select(prompt_ids)).mean()) for step, each in run.evaluations.items()}
        return list(found), list(found.values())

    return series


def _over_steps(axes: Axes, comparison: Comparison, series: Series, *, title: str, ylabel: str) -> bool:
    axes.set(title=title, ylabel=ylabel)
    found = False
    for place, arm in enumerate(comparison.arms):
        lines = [line for run in arm.runs if (line := series(run))[0]]
        if not lines:
            continue
        found = True
        for line in lines if len(lines) > 1 else []:
            axes.plot(*line, color=_colour(place), alpha=0.35, linewidth=0.8)
        steps, values = mean_line(lines)
        axes.plot(
            steps,
            values,
            color=_colour(place),
            linestyle=_dashes(place),
            linewidth=2.0,
            marker="o" if len(steps) < 10 else "",
            markersize=4,
            label=_label(arm.name, len(lines)),
        )
    return found


def _pass_at_k(axes: Axes, comparison: Comparison) -> bool:
    """After training in full lines; before it dashed and grey, one for each model that arms began with."""
    ks = range(1, comparison.max_k + 1)
    axes.set(title="Held-out pass@k before and after training", ylabel="chance that one of k is right", ylim=(0, 1.02))
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:.0f}")
    names = [arm.name for arm in comparison.arms]
    for base in best_of_n(comparison):
        before = [each for name in base.arms for each in comparison.evaluations(names.index(name), before=True)]
        axes.plot(ks, pass_at_k_means(before, comparison.max_k), color="#444444", linestyle="--", label=_before(base.arms, names))
    for place, arm in enumerate(comparison.arms):
        after = comparison.evaluations(place, before=False)
        for each in after if len(after) > 1 else []:
            axes.plot(ks, pass_at_k_means([each], comparison.max_k), color=_colour(place), alpha=0.35, linewidth=0.8)
        style = {"color": _colour(place), "linestyle": _dashes(place), "linewidth": 2.0, "marker": "o", "markersize": 3}
        axes.plot(ks, pass_at_k_means(after, comparison.max_k), label=_label(arm.name, len(after)), **style)
    return True


def _reward_and_kl(axes: Axes, comparison: Comparison) -> bool:
    from matplotlib.ticker import AutoLocator

    axes.set(title="Held-out reward and what it cost in divergence", ylabel="mean reward on held-out prompts")
    axes.xaxis.set_major_locator(AutoLocator())
    names, found = [arm.name for arm in comparison.arms], False
    for place, arm in enumerate(comparison.arms):
        points = [stands for run in arm.runs if isinstance(stands := point(run, comparison.prompt_ids), Point)]
        if not points:
            continue
        found = True
        kl, rewards = [each.kl for each in points], [each.reward for each in points]
        axes.plot(kl, rewards, "o", color=_colour(place), alpha=0.5, markersize=4)
        axes.plot([np.mean(kl)], [np.mean(rewards)], "D", color=_colour(place), markersize=8, label=_label(arm.name, len(points)))
    for base in best_of_n(comparison) if found else []:
        whose, last = _before(base.arms, names), len(base.reward)
        bound = f"best of n = 1 to {last}, {whose}, at the most KL that it can have"
        axes.plot(base.kl_bound, base.reward, color="#444444", marker=".", linewidth=1.2, label=_wrapped(bound))
        ties = f"the same at its KL with ties among rewards counted, an estimate from {last} samples a prompt"
        axes.plot(base.kl_ties, base.reward, color="#999999", marker=".", linewidth=1.2, label=_wrapped(ties))
        if len(base.optimum_kl) > 1:
            best = "highest reward at a KL, estimated from the same samples as far as they carry"
            axes.plot(base.optimum_kl, base.optimum_reward, color="#444444", linestyle=":", linewidth=1.5, label=_wrapped(best))
    return found


def _before(arms: Sequence[str], all_arms: Sequence[str]) -> str:
    return "before training" if len(arms) == len(all_arms) else f"before training of {'; '.join(arms)}"


def _label(name: str, num_runs: int) -> str:
    return _wrapped(f"{name} ({num_runs} seed{'s' if num_runs > 1 else ''})")


def _wrapped(text: str) -> str:
    return "\n".join(textwrap.wrap(text, _LEGEND_WIDTH))


def _colour(place: int) -> str:
    return COLOURS[place % len(COLOURS)]


def _dashes(place: int) -> str:
    return _DASHES[place // len(COLOURS) % len(_DASHES)]
