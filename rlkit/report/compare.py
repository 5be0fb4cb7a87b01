"""What runs came to, side by side: final figures of every arm, with intervals. Tables and curves are made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlkit.controller.evaluate import Evaluation
from rlkit.controller.tracking.history import Estimate, History
from rlkit.core.evaluation import hierarchical_interval, pass_at_k_curve, support_loss
from rlkit.report.runs import Arm, Run, differing, find_runs, group_runs, shared_prompts

ENOUGH_SEEDS = 5  # of an arm, before a difference may be called one
TAIL = 10  # a figure of training is the mean of the last tenth of the steps
TRAINING = {"entropy/mean": "entropy", "kl/ref_token_mean": "KL to reference", "divergence/exact": "exact divergence"}
SAMPLED_BY = {"reward.fn", "reward.fns", "reward.weights", "max_response_tokens"} | {
    f"evaluation.{name}" for name in ("samples_per_prompt", "right_from", "temperature", "top_p", "top_k", "min_p")
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Arms in the order in which their runs were named; the first is what the others are held against."""

    arms: tuple[Arm, ...]
    prompt_ids: tuple[str, ...]  # the held-out prompts of every figure
    max_k: int  # samples that every prompt has in every evaluation
    figures: tuple[dict[str, np.ndarray], ...]  # by arm: name -> [S, P], one row a run; [S, 1] for what has no prompts
    notes: tuple[str, ...]

    @property
    def differing(self) -> list[str]:
        """Settings in which arms differ."""
        return differing([arm.settings for arm in self.arms])

    @property
    def names(self) -> list[str]:
        """Figures that some arm has."""
        return list(dict.fromkeys(name for figures in self.figures for name in figures))

    @property
    def may_claim(self) -> bool:
        """Whether every arm has the seeds that a claim about arms needs."""
        return all(len(arm.runs) >= ENOUGH_SEEDS for arm in self.arms)

    def estimate(self, arm: int, name: str) -> Estimate | None:
        """Mean over runs and prompts; None where the arm was not measured."""
        return _estimate(self.figures[arm].get(name))

    def difference(self, arm: int, name: str) -> Estimate | None:
        """From the first arm, on the same prompts."""
        mine, first = self.figures[arm].get(name), self.figures[0].get(name)
        return None if mine is None or first is None else _estimate(mine, first)

    def evaluations(self, arm: int, *, before: bool) -> list[Evaluation]:
        """Of its runs, on the shared prompts: those before the first step, or the newest."""
        found = [run.before if before else run.last for run in self.arms[arm].runs]
        return [each.select(self.prompt_ids) for each in found if each is not None]


def compare(folders: Sequence[Path]) -> Comparison:
    """Read and compare the runs in these folders. Raises ConfigError and DataError where they cannot be compared."""
    runs, notes = find_runs(folders)
    prompt_ids, left_out = shared_prompts(runs)
    arms = group_runs(runs)
    evaluations = [evaluation.select(prompt_ids) for run in runs for evaluation in run.evaluations.values()]
    max_k = min(int(evaluation.num_samples.min()) for evaluation in evaluations)
    figures = [[run_figures(run, prompt_ids, max_k) for run in arm.runs] for arm in arms]
    return Comparison(
        arms=tuple(arms),
        prompt_ids=prompt_ids,
        max_k=max_k,
        figures=tuple(_stack(each) for each in figures),
        notes=(*notes, *left_out, *_cautions(arms)),
    )


def run_figures(run: Run, prompt_ids: Sequence[str], max_k: int) -> dict[str, np.ndarray]:
    """Name -> [P], or [1] for a figure of training."""
    last = run.last.select(prompt_ids)
    found = {
        "pass@1": last.pass_at(1),
        f"pass@{max_k}": last.pass_at(max_k),
        "reward": last.rewards,
        "distinct right answers": last.distinct,
    }
    if run.before is not None and run.evaluated_at > 0:
        before = run.before.select(prompt_ids)
        found["pass@1 gained"] = last.pass_at(1) - before.pass_at(1)
        found["support lost"] = _lost(before, last)
        found["support gained"] = _lost(last, before)
    for metric, name in TRAINING.items():
        steps, values = run.history.series(metric)
        if steps:
            found[name] = np.array([np.mean(tail(values))])
    return found


def pass_at_k_means(evaluations: Sequence[Evaluation], max_k: int) -> list[float]:
    """pass@1 to pass@max_k, each the mean over prompts and evaluations; empty without evaluations."""
    if not evaluations:
        return []
    num_correct, num_samples = (
        np.concatenate(each) for each in zip(*((e.num_correct, e.num_samples) for e in evaluations), strict=True)
    )
    return list(pass_at_k_curve(num_correct, num_samples, range(1, max_k + 1)).values())


def tail(values: Sequence[float]) -> Sequence[float]:
    """The last tenth, at least one."""
    return values[-max(1, len(values) // TAIL) :]


def sequence_kl(history: History) -> float | None:
    """KL(policy || reference) of whole responses to training prompts, in nats, over the last tenth of the steps; None: not logged.

    The mean over responses of the sum of the log ratio over the tokens that the policy wrote: the k1 estimate.
    """
    logged = [row["kl/ref_sequence"] for row in history.steps if "kl/ref_sequence" in row]
    return float(np.mean(tail(logged))) if logged else None


def _lost(base: Evaluation, policy: Evaluation) -> np.ndarray:
    return support_loss(
        base.num_correct, policy.num_correct, num_samples_base=base.num_samples, num_samples_policy=policy.num_samples
    )


def _stack(runs: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Figures that all runs of an arm have."""
    return {name: np.stack([run[name] for run in runs]) for name in runs[0] if all(name in run for run in runs)}


def _estimate(values: np.ndarray | None, minus: np.ndarray | None = None) -> Estimate | None:
    if values is None:
        return None
    value = float(values.mean()) - (0.0 if minus is None else float(minus.mean()))
    if values.shape[1] == 1 and min(len(side) for side in (values, minus) if side is not None) == 1:
        return Estimate(value)  # one number: nothing to say how far it may be off
    return Estimate(value, *hierarchical_interval(values, minus))


def _cautions(arms: Sequence[Arm]) -> list[str]:
    """What a reader must know before comparing."""
    runs = [run for arm in arms for run in arm.runs]
    notes = [
        f"{key} differs between arms, so their held-out figures do not measure the same thing."
        for key in differing([arm.settings for arm in arms])
        if key in SAMPLED_BY
    ]
    if len({run.evaluated_at for run in runs}) > 1:
        ends = ", ".join(f"{run.folder} {run.evaluated_at}" for run in runs)
        notes.append(f"Runs were last evaluated at different steps: {ends}.")
    unfinished = [run for run in runs if run.evaluated_at < int(run.settings["num_steps"])]
    notes += [
        f"Unfinished: {run.folder}, evaluated at step {run.evaluated_at} of {run.settings['num_steps']}." for run in unfinished
    ]
    uneven = {arm.name: len(arm.runs) for arm in arms}
    if len(set(uneven.values())) > 1:
        notes.append(f"Arms have different numbers of seeds: {', '.join(f'{name} {count}' for name, count in uneven.items())}.")
    return notes
