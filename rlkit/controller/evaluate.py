"""Held-out evaluation: mean reward, unbiased pass@k with bootstrap intervals, distinct right answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlkit.config import RunConfig
from rlkit.controller.cluster import Cluster
from rlkit.controller.episodes import make_sampler, open_environment, read_prompts
from rlkit.controller.fleet import Engines
from rlkit.controller.rewards import open_rewards
from rlkit.controller.sampling import Sampler
from rlkit.controller.turns import SideBySide
from rlkit.core.evaluation import bootstrap_interval, pass_at_k
from rlkit.data.models.loading import load_tokenizer, resolve, stop_token_ids
from rlkit.errors import ConfigError, DataError
from rlkit.settings import HeldOut
from rlkit.types import Prompt, Rollout, SamplingSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """One evaluation. Every sample's reward is kept, so that evaluations on the same prompts can be compared in pairs."""

    prompt_ids: tuple[str, ...]
    row_digests: tuple[str, ...]  # [P] of their rows: two data sets can have the same ids
    sample_rewards: tuple[tuple[float, ...], ...]  # [P], of each prompt's scored samples
    num_correct: np.ndarray  # [P] of them
    distinct: np.ndarray  # [P] different right answers
    num_failed: int  # samples without a reward
    ks: tuple[int, ...]  # of the pass@k in `metrics`

    @property
    def rows(self) -> list[tuple[str, str]]:
        """[P] id and digest: what makes a prompt the same one in another run."""
        return list(zip(self.prompt_ids, self.row_digests, strict=True))

    @property
    def num_samples(self) -> np.ndarray:
        """[P] with a reward."""
        return np.array([len(each) for each in self.sample_rewards])

    @property
    def rewards(self) -> np.ndarray:
        """[P] mean over the prompt's samples."""
        return np.array([np.mean(each) for each in self.sample_rewards])

    def pass_at(self, k: int) -> np.ndarray:
        """[P] unbiased. Raises DataError where a prompt has fewer than k samples."""
        counts = list(zip(self.num_samples.tolist(), self.num_correct.tolist(), strict=True))
        known = {(n, c): pass_at_k(n, c, k) for n, c in set(counts)}
        return np.array([known[each] for each in counts])

    def select(self, prompt_ids: Sequence[str]) -> Evaluation:
        """The same with these prompts alone, in this order."""
        place = {prompt_id: i for i, prompt_id in enumerate(self.prompt_ids)}
        rows = [place[prompt_id] for prompt_id in prompt_ids]
        return replace(
            self,
            prompt_ids=tuple(prompt_ids),
            row_digests=tuple(self.row_digests[row] for row in rows),
            sample_rewards=tuple(self.sample_rewards[row] for row in rows),
            num_correct=self.num_correct[rows],
            distinct=self.distinct[rows],
        )

    def metrics(self) -> dict[str, float]:
        """Figures with the ends of their 95 % intervals, which resample prompts."""
        figures = {"reward": self.rewards, "distinct": self.distinct}
        figures |= {f"pass@{k}": self.pass_at(k) for k in self.ks}
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
            "row_digests": list(self.row_digests),
            "sample_rewards": [list(each) for each in self.sample_rewards],
            "num_correct": self.num_correct.tolist(),
            "distinct": self.distinct.tolist(),
            "num_failed": self.num_failed,
            "ks": list(self.ks),
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Evaluation:
        return cls(
            prompt_ids=tuple(stored["prompt_ids"]),
            row_digests=tuple(stored["row_digests"]),
            sample_rewards=tuple(tuple(each) for each in stored["sample_rewards"]),
            num_correct=np.array(stored["num_correct"]),
            distinct=np.array(stored["distinct"]),
            num_failed=stored["num_failed"],
            ks=tuple(stored["ks"]),
        )


def gain(before: Evaluation, after: Evaluation, k: int = 1) -> tuple[float, float, float]:
    """Mean rise of pass@k and its 95 % interval, paired by prompt: the same prompts were asked both times."""
    if before.prompt_ids != after.prompt_ids:
        raise DataError("The two evaluations asked different prompts, so they cannot be paired.")
    difference = after.pass_at(k) - before.pass_at(k)
    low, high = bootstrap_interval(difference)
    return float(difference.mean()), low, high


def evaluate_checkpoint(config: RunConfig, cluster: Cluster) -> Evaluation:
    """Evaluate `model.path` as it is on disk. Raises ConfigError without an evaluation."""
    settings = config.evaluation
    if not isinstance(settings, HeldOut):
        raise ConfigError("evaluation=none: there is nothing to evaluate. Write evaluation=held_out.")
    folder = resolve(config.model.path)
    tokenizer = load_tokenizer(folder, trust_remote_code=config.model.trust_remote_code)
    base_dir = Path.cwd()
    with open_rewards(config, cluster, base_dir=base_dir) as rewards, open_environment(config, base_dir=base_dir) as environment:
        prompts = read_prompts(config, tokenizer, rewards, environment)
        rewards.start(prompts.everything)
        engines = Engines(config, cluster, SideBySide(), purpose="evaluation")
        sampler = make_sampler(config, engines, rewards, tokenizer, environment)
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
    groups = [rollouts[start : start + size] for start in range(0, len(rollouts), size)]
    return summarize(groups, settings, {prompt.id: prompt.row_digest for prompt in chosen})


def summarize(groups: Sequence[Sequence[Rollout]], settings: HeldOut, row_digests: Mapping[str, str]) -> Evaluation:
    """Figures per prompt. Samples without a reward are left out; a prompt with fewer than max(ks) of them left is as well."""
    scored = [[rollout for rollout in group if rollout.reward is not None] for group in groups]
    kept = [group for group in scored if len(group) >= max(settings.ks)]
    if not kept:
        raise DataError("No held-out prompt has enough scored samples for evaluation.ks; look at the reward function's failures.")
    right = [[r for r in group if r.reward is not None and r.reward >= settings.right_from] for group in kept]
    return Evaluation(
        prompt_ids=tuple(group[0].prompt_id for group in kept),
        row_digests=tuple(row_digests[group[0].prompt_id] for group in kept),
        sample_rewards=tuple(tuple(float(r.reward) for r in group if r.reward is not None) for group in kept),
        num_correct=np.array([len(good) for good in right]),
        distinct=np.array([len({r.text.strip() for r in good}) for good in right], dtype=float),
        num_failed=sum(map(len, groups)) - sum(map(len, scored)),
        ks=tuple(settings.ks),
    )
