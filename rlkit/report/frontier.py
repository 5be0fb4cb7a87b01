"""Where runs stand between reward and divergence, beside what the model before training reaches without any: best of n."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlkit.controller.evaluate import Evaluation
from rlkit.core.evaluation import best_of_n_exact_kl, best_of_n_kl, best_of_n_reward, optimal_frontier
from rlkit.report.compare import Comparison, sequence_kl
from rlkit.report.runs import Run

LAMS = (0.0, *np.geomspace(0.05, 50, 60).tolist())


@dataclass(frozen=True, kw_only=True, slots=True)
class BestOfN:
    """What the model before training reaches on the held-out prompts, choosing among its samples. Means over prompts and runs."""

    arms: tuple[str, ...]  # that began with this model
    reward: np.ndarray  # [N] expected best reward of n = 1 .. N samples, unbiased
    kl_bound: np.ndarray  # [N] nats: the most that its divergence can be
    kl_ties: np.ndarray  # [N] nats: with the ties among the samples' rewards counted, a plug-in estimate
    optimum_reward: np.ndarray  # [L] highest reward at a divergence, estimated from the samples as far as these carry
    optimum_kl: np.ndarray  # [L] nats

    def matches(self, reward: float) -> int | None:
        """The smallest n whose best reaches this reward; None: more than the samples show."""
        reached = np.flatnonzero(self.reward >= reward)
        return int(reached[0]) + 1 if len(reached) else None


@dataclass(frozen=True, kw_only=True, slots=True)
class Point:
    """A run: divergence of its policy from the model before training, on training prompts, and held-out reward after it."""

    kl: float  # nats a response
    reward: float


def best_of_n(comparison: Comparison) -> list[BestOfN]:
    """One for each model that arms began with."""
    groups: dict[tuple[tuple[str, str], ...], list[int]] = {}
    for place, arm in enumerate(comparison.arms):
        model = tuple(sorted((key, value) for key, value in arm.settings.items() if key == "model" or key.startswith("model.")))
        groups.setdefault(model, []).append(place)
    found = []
    for places in groups.values():
        evaluations = [each for place in places for each in comparison.evaluations(place, before=True)]
        if evaluations:
            names = tuple(comparison.arms[place].name for place in places)
            found.append(_best_of_n(evaluations, comparison.max_k, names))
    return found


def _best_of_n(evaluations: Sequence[Evaluation], max_n: int, arms: tuple[str, ...]) -> BestOfN:
    seen = Counter(tuple(sorted(rewards)) for evaluation in evaluations for rewards in evaluation.sample_rewards)
    prompts = [np.array(rewards) for rewards in seen]  # those that scored alike are worked out once
    shares = np.array(list(seen.values())) / seen.total()
    sizes = range(1, max_n + 1)
    tilted = [optimal_frontier(rewards, LAMS) for rewards in prompts]
    far = min(len(each.lams) for each in tilted)  # a policy has one lam for all prompts: as far as every prompt carries it
    alike = [np.full(len(rewards), 1 / len(rewards)) for rewards in prompts]
    ties = [[best_of_n_exact_kl(probs, rewards, n) for n in sizes] for probs, rewards in zip(alike, prompts, strict=True)]
    return BestOfN(
        arms=arms,
        reward=shares @ np.array([[best_of_n_reward(rewards, n) for n in sizes] for rewards in prompts]),
        kl_bound=np.array([best_of_n_kl(n) for n in sizes]),
        kl_ties=shares @ np.array(ties),
        optimum_reward=shares @ np.array([each.rewards[:far] for each in tilted]),
        optimum_kl=shares @ np.array([each.kl[:far] for each in tilted]),
    )


def point(run: Run, prompt_ids: Sequence[str]) -> Point | str:
    """Where the run stands, or why that cannot be said."""
    settings = run.settings
    if run.before is None or run.evaluated_at == 0:
        return "it lacks an evaluation before or after training"
    if (kl := sequence_kl(run.history)) is None:
        return "no KL to a reference was measured; a divergence would"
    if settings["reference"] != "initial":
        return f"reference={settings['reference']} is not the model that was evaluated before training"
    if settings["replay"] != "none":
        return f"replay={settings['replay']}: its KL is also over tokens of older policies"
    if float(settings["rollout.temperature"]) != float(settings["evaluation.temperature"]):
        return "rollout.temperature and evaluation.temperature differ, and with them the policies that were measured"
    plain = {"top_p": 1.0, "top_k": 0.0, "min_p": 0.0}
    for key, value in ((f"{group}.{name}", value) for group in ("rollout", "evaluation") for name, value in plain.items()):
        if float(settings[key]) != value:
            return f"{key}={settings[key]}: samples are not of the distribution whose KL was measured"
    return Point(kl=kl, reward=float(run.last.select(prompt_ids).rewards.mean()))
