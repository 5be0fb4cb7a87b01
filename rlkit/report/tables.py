"""A comparison as text for the console, as Markdown and as JSON: all three say the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rlkit.controller.tracking.format import aligned, markdown_table, number
from rlkit.report.compare import ENOUGH_SEEDS, Comparison, pass_at_k_means
from rlkit.report.frontier import Point, best_of_n, point
from rlkit.report.runs import NO_PART_OF_AN_ARM

NONE = "-"
ARMS_ABREAST = 4  # more, and a table has a row for each arm instead of a column
EXPLAINED = {
    "pass@1": "share of a held-out prompt's samples that are right",
    "reward": "mean reward of held-out samples",
    "distinct right answers": "different right answers among a held-out prompt's samples",
    "pass@1 gained": "pass@1 less that before the first step",
    "support lost": "share of held-out prompts that some sample solved before the first step and none of as many does now",
    "support gained": "the reverse, which chance alone makes as large as what is lost",
    "entropy": "nats per token, on training prompts, mean of the last tenth of the steps",
    "KL to reference": "KL(policy || reference), nats per token, on training prompts, mean of the last tenth of the steps",
    "exact divergence": "of the divergence that was penalised, over the whole vocabulary, nats per token, likewise",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Section:
    title: str
    rows: list[list[str]] = field(default_factory=list)  # a heading first
    lines: list[str] = field(default_factory=list)  # below the table


def sections(comparison: Comparison) -> list[Section]:
    """In the order in which a reader who was not there needs them."""
    return [
        _who(comparison),
        _settings(comparison),
        _figures(comparison),
        *([_differences(comparison)] if len(comparison.arms) > 1 else []),
        _pass_at_k(comparison),
        _frontier(comparison),
    ]


def as_text(found: Sequence[Section]) -> str:
    lines: list[str] = []
    for section in found:
        lines += [section.title, *(f"  {line}" for line in [*(aligned(section.rows) if section.rows else []), *section.lines]), ""]
    return "\n".join(lines)


def as_markdown(found: Sequence[Section], pictures: Sequence[str]) -> str:
    """`pictures`: files beside the document."""
    lines = ["# Comparison of runs", ""]
    for section in found:
        lines += [f"## {section.title}", "", *([*markdown_table(section.rows), ""] if section.rows else [])]
        lines += [*(f"- {line}" for line in section.lines), *([""] if section.lines else [])]
    if pictures:
        lines += ["## Curves", "", "Thin lines are single runs, a bold line is their mean.", ""]
        lines += [line for name in pictures for line in (f"![{name.removesuffix('.png').replace('_', ' ')}]({name})", "")]
    return "\n".join(lines)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Every number of the comparison, unrounded."""
    differing = comparison.differing
    settings = comparison.arms[0].settings
    arms = []
    for place, arm in enumerate(comparison.arms):
        points = [point(run, comparison.prompt_ids) for run in arm.runs]
        minus_first = {name: comparison.difference(place, name) for name in comparison.names} if place else {}
        figures = comparison.figures[place]
        arms.append(
            {
                "name": arm.name,
                "settings": {key: arm.settings.get(key) for key in differing},
                "runs": [{"folder": str(r.folder), "seed": r.seed, "evaluated_at": r.evaluated_at} for r in arm.runs],
                "figures": {
                    name: asdict(estimate) | {"by_run": figures[name].mean(axis=1).tolist()}
                    for name in figures
                    if (estimate := comparison.estimate(place, name)) is not None
                },
                "minus_first_arm": {name: asdict(each) for name, each in minus_first.items() if each is not None},
                "pass_at_k": {
                    when: pass_at_k_means(comparison.evaluations(place, before=before), comparison.max_k)
                    for when, before in (("before", True), ("after", False))
                },
                "reward_and_kl": [asdict(each) if isinstance(each, Point) else {"unknown": each} for each in points],
            }
        )
    return {
        "num_prompts": len(comparison.prompt_ids),
        "max_k": comparison.max_k,
        "notes": list(comparison.notes),
        "common_settings": {key: value for key, value in settings.items() if key not in (*differing, *NO_PART_OF_AN_ARM)},
        "arms": arms,
        "best_of_n": [
            {"arms": list(each.arms)}
            | {name: getattr(each, name).tolist() for name in ("reward", "kl_bound", "kl_ties", "optimum_reward", "optimum_kl")}
            for each in best_of_n(comparison)
        ],
    }


def _who(comparison: Comparison) -> Section:
    rows = [["arm", "seeds", "evaluated at step", "folders"]]
    for arm in comparison.arms:
        steps = sorted({run.evaluated_at for run in arm.runs})
        seeds, folders = (", ".join(map(str, each)) for each in ([r.seed for r in arm.runs], [r.folder for r in arm.runs]))
        rows.append([arm.name, seeds, ", ".join(map(str, steps)), folders])
    num_runs = sum(len(arm.runs) for arm in comparison.arms)
    title = f"{num_runs} runs in {len(comparison.arms)} arms, on {len(comparison.prompt_ids)} held-out prompts"
    return Section(title=title, rows=rows, lines=list(comparison.notes))


def _settings(comparison: Comparison) -> Section:
    keys = comparison.differing
    common = len(comparison.arms[0].settings.keys() - {*keys, *NO_PART_OF_AN_ARM})
    lines = [f"{common} further settings are the same in all of them."]
    if not keys:
        return Section(title="Settings that differ", lines=["None but the seed.", *lines])
    rows = [["setting", *(arm.name for arm in comparison.arms)]]
    rows += [[key, *(arm.settings.get(key, NONE) for arm in comparison.arms)] for key in keys]
    return Section(title="Settings that differ", rows=_narrow(rows), lines=lines)


def _figures(comparison: Comparison) -> Section:
    rows = [["figure", *(arm.name for arm in comparison.arms)]]
    for name in comparison.names:
        found = [comparison.estimate(place, name) for place in range(len(comparison.arms))]
        rows.append([name, *(NONE if each is None else str(each) for each in found)])
    lines = [
        "Means over seeds and prompts, with 95 % percentile intervals of a bootstrap that draws seeds, then prompts, the same "
        "prompts for every arm. What has no prompts has an interval over seeds.",
        _seeds(comparison),
    ]
    explained = EXPLAINED | {f"pass@{comparison.max_k}": f"chance that one of {comparison.max_k} samples is right, unbiased"}
    explained["pass@1"] = EXPLAINED["pass@1"]  # where max_k is 1
    return Section(
        title="Final figures", rows=_narrow(rows), lines=[*lines, *(f"{name}: {explained[name]}." for name in comparison.names)]
    )


def _seeds(comparison: Comparison) -> str:
    fewest = min(len(arm.runs) for arm in comparison.arms)
    if comparison.may_claim:
        return (
            f"Every arm has {ENOUGH_SEEDS} seeds or more. The intervals are not corrected for looking at several figures and arms."
        )
    alone = " An arm with one seed has an interval over prompts alone: how seeds differ is not in it." if fewest == 1 else ""
    return (
        f"An arm has {fewest} seed{'s' if fewest > 1 else ''}, fewer than {ENOUGH_SEEDS}: intervals over so few are too narrow, "
        f"and no significance is claimed.{alone}"
    )


def _differences(comparison: Comparison) -> Section:
    rows = [["figure", *(arm.name for arm in comparison.arms[1:])]]
    for name in comparison.names:
        found = [comparison.difference(place, name) for place in range(1, len(comparison.arms))]
        if any(each is not None for each in found):
            marks = ["*" if each and each.low and each.high and each.low * each.high > 0 else "" for each in found]
            marks = marks if comparison.may_claim else [""] * len(found)
            rows.append([name, *(NONE if each is None else f"{each}{mark}" for each, mark in zip(found, marks, strict=True))])
    lines = ["* the interval excludes 0."] if comparison.may_claim else []
    return Section(title=f"Difference from {comparison.arms[0].name}, on the same prompts", rows=_narrow(rows), lines=lines)


def _pass_at_k(comparison: Comparison) -> Section:
    ks = [k for k in (2**power for power in range(comparison.max_k.bit_length())) if k < comparison.max_k] + [comparison.max_k]
    rows = [["arm", "", *(f"k={k}" for k in ks)]]
    lines = []
    for place, arm in enumerate(comparison.arms):
        before, after = (pass_at_k_means(comparison.evaluations(place, before=when), comparison.max_k) for when in (True, False))
        for word, curve in (("before", before), ("after", after)):
            if curve:
                rows.append([arm.name, word, *(number(curve[k - 1]) for k in ks)])
        below = next((k for k, (old, new) in enumerate(zip(before, after, strict=False), start=1) if new < old), None)
        if below is not None and below > 1:
            lines.append(f"{arm.name}: from k={below} on its curve is below the one before training.")
        elif below == 1:
            lines.append(f"{arm.name}: its curve begins below the one before training.")
    lines.append(f"Every k up to {comparison.max_k} is in comparison.json and in pass_at_k.png.")
    return Section(title="pass@k before and after training", rows=rows, lines=lines)


def _frontier(comparison: Comparison) -> Section:
    baselines = best_of_n(comparison)
    rows = [["arm", "seed", "KL, nats a response", "reward", "best of n that reaches it", "whose KL is at most", "with ties about"]]
    lines = []
    for arm in comparison.arms:
        points = {run.seed: point(run, comparison.prompt_ids) for run in arm.runs}
        for reason in dict.fromkeys(stands for stands in points.values() if isinstance(stands, str)):
            seeds = ", ".join(str(seed) for seed, stands in points.items() if stands == reason)
            lines.append(f"{arm.name}, seed {seeds}: no point, because {reason}.")
        for seed, stands in points.items():
            if isinstance(stands, str):
                continue
            base = next(each for each in baselines if arm.name in each.arms)
            n = base.matches(stands.reward)
            reaches = [f"more than {comparison.max_k}", NONE, NONE]
            if n is not None:
                reaches = [str(n), number(float(base.kl_bound[n - 1])), number(float(base.kl_ties[n - 1]))]
            rows.append([arm.name, str(seed), number(stands.kl), number(stands.reward), *reaches])
    if len(rows) == 1:
        return Section(title="Reward and divergence", lines=lines)
    lines += [
        "KL: from the model before training, on training prompts, k1 over the last tenth of the steps. Reward: held out, last "
        "evaluation.",
        "Best of n: the expected best of n samples of the model before training, unbiased, from its first evaluation. Its KL is at "
        "most log n - (n - 1) / n; where rewards tie, as 0 and 1 do, it is less, and the last column estimates how much.",
        "A run right of both paid more divergence for its reward than choosing among samples does.",
    ]
    return Section(title="Reward and divergence", rows=rows, lines=lines)


def _narrow(rows: list[list[str]]) -> list[list[str]]:
    """A column for each arm while they fit beside one another, else a row."""
    if len(rows[0]) - 1 <= ARMS_ABREAST:
        return rows
    return [["arm", *(row[0] for row in rows[1:])], *([*column] for column in list(zip(*rows, strict=True))[1:])]
