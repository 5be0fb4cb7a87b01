"""Held-out evaluation: mean reward, unbiased pass@k with bootstrap intervals, distinct right answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlkit.config import RunConfig
from rlkit.controller.cluster import Cluster
from rlkit.controller.fleet import Engines
from rlkit.controller.sampling import Sampler
from rlkit.controller.turns import SideBySide
from rlkit.core.evaluation import bootstrap_interval, pass_at_k
from rlkit.data.models.loading import load_tokenizer, resolve, stop_token_ids
from rlkit.data.prompts import load_prompts
from rlkit.data.rewards.pool import RewardPool
from rlkit.errors import ConfigError, DataError
from rlkit.settings import HeldOut
from rlkit.types import Prompt, RewardStatus, Rollout, SamplingSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """One evaluation. Per-prompt figures are kept, so that two evaluations on the same prompts can be compared in pairs."""

    prompt_ids: tuple[str, ...]
    rewards: np.ndarray  # [P] mean over the prompt's samples
    pass_at: dict[int, np.ndarray]  # k -> [P]
    distinct: np.ndarray  # [P] different right answers
    num_failed: int  # samples without a reward

    def metrics(self) -> dict[str, float]:
        """Figures with the ends of their 95 % intervals, which resample prompts."""
        figures = {"reward": self.rewards, "distinct": self.distinct}
        figures |= {f"pass@{k}": values for k, values in self.pass_at.items()}
        out: dict[str, float] = {}
        for name, values in figures.items():
            low, high = bootstrap_interval(values)
            out |= {
                f"evaluation/{name}": float(values.mean()),
                f"evaluation/{name}_low": low,
                f"evaluation/{name}_high": high,
            }
        return out | {"evaluation/num_prompts": float(len(self.prompt_ids)), "evaluation/failed_samples": float(self.num_failed)}

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reads them back to the last bit."""
        return {
            "prompt_ids": list(self.prompt_ids),
            "rewards": self.rewards.tolist(),
            "pass_at": {str(k): values.tolist() for k, values in self.pass_at.items()},
            "distinct": self.distinct.tolist(),
            "num_failed": self.num_failed,
        }

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Evaluation:
        return cls(
            prompt_ids=tuple(stored["prompt_ids"]),
            rewards=np.array(stored["rewards"]),
            pass_at={int(k): np.array(values) for k, values in stored["pass_at"].items()},
            distinct=np.array(stored["distinct"]),
            num_failed=stored["num_failed"],
        )


def gain(before: Evaluation, after: Evaluation, k: int = 1) -> tuple[float, float, float]:
    """Mean rise of pass@k and its 95 % interval, paired by prompt: the same prompts were asked both times."""
    if before.prompt_ids != after.prompt_ids:
        raise DataError("The two evaluations asked different prompts, so they cannot be paired.")
    difference = after.pass_at[k] - before.pass_at[k]
    low, high = bootstrap_interval(difference)
    return float(difference.mean()), low, high


def evaluate_checkpoint(config: RunConfig, cluster: Cluster) -> Evaluation:
    """Evaluate `model.path` as it is on disk. Raises ConfigError without an evaluation."""
    settings = config.evaluation
    if not isinstance(settings, HeldOut):
        raise ConfigError("evaluation=none: there is nothing to evaluate. Write evaluation=held_out.")
    folder = resolve(config.model.path)
    tokenizer = load_tokenizer(folder, trust_remote_code=config.model.trust_remote_code)
    with RewardPool(config.reward, base_dir=Path.cwd()) as rewards:
        prompts = load_prompts(
            config.data, tokenizer, max_prompt_tokens=config.max_prompt_tokens, reward_columns=rewards.signature.columns
        )
        sampler = Sampler(
            engines=Engines(config, cluster, SideBySide(), purpose="evaluation"),
            rewards=rewards,
            tokenizer=tokenizer,
            seed=config.seed,
        )
        return evaluate(
            sampler,
            prompts.held_out,
            settings,
            max_tokens=config.max_response_tokens,
            stop_token_ids=stop_token_ids(folder, tokenizer),
        )


def evaluate(
    sampler: Sampler, prompts: Sequence[Prompt], settings: HeldOut, *, max_tokens: int, stop_token_ids: tuple[int, ...]
) -> Evaluation:
    """Sample the first `num_prompts` held-out prompts. The same seeds every time: evaluations differ by the policy alone."""
    chosen = prompts[: settings.num_prompts]
    if not chosen:
        raise DataError("There are no held-out prompts: raise data.held_out_fraction, or write evaluation=none.")
    sampling = SamplingSpec(
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        max_tokens=max_tokens,
        stop_token_ids=stop_token_ids,
    )
    submitted = sampler.submit("evaluation", chosen, settings.samples_per_prompt, sampling)
    rollouts = sampler.collect(submitted).rollouts
    size = settings.samples_per_prompt
    return summarize([rollouts[start : start + size] for start in range(0, len(rollouts), size)], settings)


def summarize(groups: Sequence[Sequence[Rollout]], settings: HeldOut) -> Evaluation:
    """Figures per prompt. Samples without a reward are left out; a prompt with fewer than max(ks) of them left is as well."""
    scored = [[rollout for rollout in group if rollout.status is RewardStatus.ok] for group in groups]
    kept = [group for group in scored if len(group) >= max(settings.ks)]
    if not kept:
        raise DataError("No held-out prompt has enough scored samples for evaluation.ks; look at the reward function's failures.")
    rewards = [[float(r.reward) for r in group if r.reward is not None] for group in kept]  # of an ok sample it never is None
    right = [[r for r in group if r.reward is not None and r.reward >= settings.right_from] for group in kept]
    return Evaluation(
        prompt_ids=tuple(group[0].prompt_id for group in kept),
        rewards=np.array([np.mean(group) for group in rewards]),
        pass_at={
            k: np.array([pass_at_k(len(group), len(good), k) for group, good in zip(kept, right, strict=True)]) for k in settings.ks
        },
        distinct=np.array([len({r.text.strip() for r in good}) for good in right], dtype=float),
        num_failed=sum(map(len, groups)) - sum(map(len, scored)),
    )
