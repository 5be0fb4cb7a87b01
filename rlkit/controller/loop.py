"""The training loop."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from rlkit.config import RunConfig
from rlkit.controller.checkpoint import save_checkpoint
from rlkit.controller.cluster import Cluster
from rlkit.controller.evaluate import Evaluation, evaluate, gain
from rlkit.controller.fleet import Engines, Learners, ReferenceScorer
from rlkit.controller.sampling import Sampled, Sampler
from rlkit.controller.tracking import Tracker
from rlkit.core.control import ControlState
from rlkit.core.divergences import FDivergence
from rlkit.core.entropy import EntropyBonus
from rlkit.data.collate import collate, group_index, minibatches, response_mask, token_rewards
from rlkit.data.models.loading import context_length, load_tokenizer, resolve, stop_token_ids
from rlkit.data.order import PromptOrder
from rlkit.data.prompts import PromptSet, load_prompts
from rlkit.data.rewards.pool import RewardPool
from rlkit.errors import ConfigError
from rlkit.metrics import Metric, merge, values
from rlkit.settings import HeldOut
from rlkit.types import FinishReason, RewardStatus, Rollout, SamplingSpec, TrainBatch
from rlkit.workers.weight_sync import TOLERANCES, SyncReport, sync_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """What a finished run leaves behind."""

    run_dir: Path
    checkpoint: Path
    before: Evaluation | None
    after: Evaluation | None


def train(config: RunConfig, cluster: Cluster) -> RunSummary:
    """Train the policy as the settings say. Whatever cannot work is found before the first worker starts."""
    run_dir = Path(config.run_dir or f"runs/{config.experiment_name}-{datetime.now():%Y%m%d-%H%M%S}")
    folder = resolve(config.model.path)
    tokenizer = load_tokenizer(folder, trust_remote_code=config.model.trust_remote_code)
    check_context(config, folder)
    stops = stop_token_ids(folder, tokenizer)
    with RewardPool(config.reward, base_dir=Path.cwd()) as rewards:
        prompts = load_prompts(
            config.data, tokenizer, max_prompt_tokens=config.max_prompt_tokens, reward_columns=rewards.signature.columns
        )
        with Tracker(run_dir, config) as tracker:
            engines, learner = Engines(config, cluster), Learners(config, cluster)
            run = Run(
                config=config,
                run_dir=run_dir,
                prompts=prompts,
                order=PromptOrder(len(prompts.train), config.seed),
                sampling=config.sampling(stops),
                tracker=tracker,
                engines=engines,
                learner=learner,
                reference=start_reference(config, cluster, learner),
                sampler=Sampler(engines=engines, rewards=rewards, tokenizer=tokenizer, seed=config.seed),
                coefficients=Coefficients.start(config),
            )
            return run.train()


def check_context(config: RunConfig, folder: str) -> None:
    """Raises ConfigError when prompt and response together do not fit the model's context."""
    limit = context_length(folder, trust_remote_code=config.model.trust_remote_code)
    if limit is not None and config.max_model_tokens > limit:
        raise ConfigError(
            f"max_response_tokens={config.max_response_tokens}: with max_prompt_tokens={config.max_prompt_tokens} that is "
            f"{config.max_model_tokens} tokens, and {config.model.path} has positions for {limit}. "
            f"Write at most {limit} for both together."
        )


def start_reference(config: RunConfig, cluster: Cluster, learner: Learners) -> ReferenceScorer | None:
    """A scorer, if a chosen strategy needs one."""
    if "ref_logprobs" not in config.needs:
        return None
    reference = ReferenceScorer(config, cluster)
    if "ref_hidden" in config.needs:
        learner.set_reference_head(reference.head())
    return reference


@dataclass(frozen=True, kw_only=True, slots=True)
class Coefficients:
    """The loss terms' multipliers, moved by the controller once per optimiser step; None where the term is off."""

    divergence: ControlState | None
    entropy: ControlState | None

    @classmethod
    def start(cls, config: RunConfig) -> Coefficients:
        divergence, entropy = config.divergence, config.entropy
        return cls(
            divergence=config.control.initial(divergence.coef) if isinstance(divergence, FDivergence) else None,
            entropy=config.control.initial(entropy.coef) if isinstance(entropy, EntropyBonus) else None,
        )

    def update(self, config: RunConfig, metrics: dict[str, Metric], num_sequences: int) -> Coefficients:
        def moved(state: ControlState | None, measured: str) -> ControlState | None:
            return state and config.control.update(state, metrics[measured].value, num_sequences)

        return Coefficients(divergence=moved(self.divergence, "kl/ref_token_mean"), entropy=moved(self.entropy, "entropy/mean"))


@dataclass(kw_only=True, slots=True)
class Run:
    """One run's workers and state."""

    config: RunConfig
    run_dir: Path
    prompts: PromptSet
    order: PromptOrder
    sampling: SamplingSpec
    tracker: Tracker
    engines: Engines
    learner: Learners
    reference: ReferenceScorer | None
    sampler: Sampler
    coefficients: Coefficients

    def train(self) -> RunSummary:
        config = self.config
        self.sync(version=0)
        before = self.evaluate(step=0)
        after, evaluated_at = before, 0
        checkpoint = None
        for step in range(1, config.num_steps + 1):
            clock = Clock()
            sampled = self.sample(step)
            clock.add("generate", sampled.generate_s)
            clock.add("reward", sampled.reward_s)
            rollouts, dropped = trainable(sampled.rollouts)
            metrics = rollout_metrics(sampled, rollouts, dropped)
            advantages: Tensor | None = None
            if rollouts:
                with clock.time("score"):
                    batch, advantages = self.prepare(rollouts)
                with clock.time("learn"):
                    metrics |= self.learn(step, batch)
                report = self.sync(version=step)
                clock.add("sync", report.sync_s)
                clock.add("sync_check", report.check_s)
                metrics |= {"sync/probe_max": report.max_abs, "sync/probe_exp_mean": report.mean_exp_abs}
            else:
                self.tracker.message(f"Step {step}: no group has two scored samples, so nothing was learnt from it.")
            self.report(step, metrics, clock, sampled, rollouts, advantages)
            if self.evaluation_is_due(step):
                after, evaluated_at = self.evaluate(step=step, before=before), step
            if config.checkpoint_every and step % config.checkpoint_every == 0:
                checkpoint = save_checkpoint(self.learner, self.run_dir, step)
        if evaluated_at != config.num_steps:
            after = self.evaluate(step=config.num_steps, before=before)
        if checkpoint is None or checkpoint.name != f"step_{config.num_steps:06d}":
            checkpoint = save_checkpoint(self.learner, self.run_dir, config.num_steps)
        self.tracker.finish(checkpoint=checkpoint, stopped=None)
        return RunSummary(run_dir=self.run_dir, checkpoint=checkpoint, before=before, after=after)

    def sample(self, step: int) -> Sampled:
        """The step's rollouts. Submitting and collecting are apart, so that a later step's can be under way meanwhile."""
        config = self.config
        cursor = (step - 1) * config.prompts_per_step
        prompts = [self.prompts.train[index] for index in self.order.take(cursor, config.prompts_per_step)]
        return self.sampler.collect(self.sampler.submit(f"step-{step}", prompts, config.group_size, self.sampling))

    def prepare(self, rollouts: Sequence[Rollout]) -> tuple[TrainBatch, Tensor]:
        """Advantages [B, T] over the whole batch of rollouts, and the reference's scores where a strategy needs them."""
        estimate = self.config.advantage(
            token_rewards=token_rewards(rollouts), response_mask=response_mask(rollouts), group_ids=group_index(rollouts)
        )
        scores = None if self.reference is None else self.reference.score(rollouts)
        batch = collate(
            rollouts,
            estimate.advantages,
            ref_logprobs=None if scores is None else scores.logprobs,
            ref_hidden=None if scores is None else scores.hidden,
        )
        return batch, estimate.advantages

    def learn(self, step: int, batch: TrainBatch) -> dict[str, float]:
        """Every optimiser step on one batch of rollouts."""
        config = self.config
        if config.optimizer_steps_per_step > 1:
            batch = batch.with_old_logprobs(self.learner.logprobs(batch))
        parts: list[dict[str, Metric]] = []
        for epoch in range(config.epochs_per_batch):
            order_seed = (config.seed << 32) + step * config.epochs_per_batch + epoch
            for number, part in enumerate(minibatches(batch, config.optimizer_steps_per_batch, seed=order_seed)):
                coefficients = self.coefficients
                stats = self.learner.update(
                    part,
                    divergence_coef=coefficients.divergence and coefficients.divergence.coef,
                    entropy_coef=coefficients.entropy and coefficients.entropy.coef,
                )
                parts.append(stats.metrics)
                if stats.skipped:
                    self.dump(f"step_{step:06d}-{epoch}-{number}", part)
                else:
                    self.coefficients = coefficients.update(config, stats.metrics, part.num_rows)
        return values(merge(parts))

    def dump(self, name: str, batch: TrainBatch) -> None:
        """Keep the batch of a non-finite step for whoever has to find the cause."""
        folder = self.run_dir / "skipped"
        folder.mkdir(exist_ok=True)
        tensors = {field: getattr(batch, field) for field in batch.__slots__ if isinstance(getattr(batch, field), Tensor)}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{name}.safetensors")
        self.tracker.message(f"{name}: loss or gradient not finite; the weights did not move. The batch is in {folder}.")

    def sync(self, *, version: int) -> SyncReport:
        """The learner's weights on every engine, proved, before anything else is sampled."""
        return sync_weights(
            self.learner,
            self.engines,
            version=version,
            probes=self.probes(),
            tolerance=TOLERANCES[self.config.model.dtype.value],
        )

    def probes(self) -> list[tuple[int, ...]]:
        """Token sequences that sync checks score: real prompts, and random tokens, which no cache and no habit predicts."""
        real = [prompt.prompt_ids for prompt in self.prompts.train[:8] if len(prompt.prompt_ids) > 1]
        vocabulary = sorted({token for prompt in self.prompts.train[:256] for token in prompt.prompt_ids})
        length = min(32, self.config.max_model_tokens - 1)
        draws = np.random.Generator(np.random.Philox(key=self.config.seed)).choice(vocabulary, (2, length))
        return [*real, *(tuple(int(token) for token in row) for row in draws)]

    def evaluation_is_due(self, step: int) -> bool:
        settings = self.config.evaluation
        return isinstance(settings, HeldOut) and settings.every > 0 and step % settings.every == 0

    def evaluate(self, *, step: int, before: Evaluation | None = None) -> Evaluation | None:
        settings = self.config.evaluation
        if not isinstance(settings, HeldOut):
            return None
        evaluation = evaluate(
            self.sampler,
            self.prompts.held_out,
            settings,
            max_tokens=self.config.max_response_tokens,
            stop_token_ids=self.sampling.stop_token_ids,
        )
        metrics = evaluation.metrics()
        if before is not None and before.prompt_ids == evaluation.prompt_ids and 1 in settings.ks:
            names = ("evaluation/pass@1_gain", "evaluation/pass@1_gain_low", "evaluation/pass@1_gain_high")
            metrics |= dict(zip(names, gain(before, evaluation), strict=True))
        self.tracker.evaluation(step, metrics)
        return evaluation

    def report(
        self,
        step: int,
        metrics: dict[str, float],
        clock: Clock,
        sampled: Sampled,
        rollouts: Sequence[Rollout],
        advantages: Tensor | None,
    ) -> None:
        """The step's line in every sink."""
        timings = clock.stop()
        generated = sum(len(rollout.response_ids) for rollout in sampled.rollouts)
        metrics["rate/generated_tokens_per_s"] = generated / timings["time/generate_s"]
        if "time/learn_s" in timings:
            learnt = sum(len(rollout.prompt_ids) + len(rollout.response_ids) for rollout in rollouts)
            metrics["rate/learned_tokens_per_s"] = learnt / timings["time/learn_s"]
        by_id: dict[str, float] = {}
        if advantages is not None:
            by_id = {rollout.sample_id: float(advantages[row, 0]) for row, rollout in enumerate(rollouts)}
        self.tracker.rollouts(step, sampled.rollouts, [by_id.get(r.sample_id, float("nan")) for r in sampled.rollouts])
        self.tracker.step(step, metrics, timings)


def trainable(rollouts: Sequence[Rollout]) -> tuple[list[Rollout], Counter[str]]:
    """The rollouts to learn from: scored ones whose group has at least two. Also what was left out, by reason.

    A failed reward is not a zero: the sample leaves its group's mean, its std and every denominator.
    """
    dropped: Counter[str] = Counter()
    scored = [rollout for rollout in rollouts if rollout.status is RewardStatus.ok]
    for rollout in rollouts:
        if rollout.status is not RewardStatus.ok:
            dropped[rollout.status.value] += 1
    sizes = Counter(rollout.group_id for rollout in scored)
    kept = [rollout for rollout in scored if sizes[rollout.group_id] >= 2]
    dropped["group"] = len({rollout.group_id for rollout in rollouts}) - sum(size >= 2 for size in sizes.values())
    return kept, dropped


def rollout_metrics(sampled: Sampled, kept: Sequence[Rollout], dropped: Counter[str]) -> dict[str, float]:
    """What the rollouts say before anything is learnt from them."""
    rollouts = sampled.rollouts
    lengths = np.array([len(rollout.response_ids) for rollout in rollouts], dtype=float)
    metrics = {
        "reward/ok_fraction": sum(r.status is RewardStatus.ok for r in rollouts) / len(rollouts),
        "length/mean": float(lengths.mean()),
        "length/max": float(lengths.max()),
        "length/frac_truncated": sum(r.finish_reason is FinishReason.length for r in rollouts) / len(rollouts),
        "group/dropped": float(dropped["group"]),
    }
    metrics |= {f"reward/{s.value}": float(dropped[s.value]) for s in RewardStatus if dropped[s.value]}
    if kept:
        rewards = np.array([rollout.reward for rollout in kept], dtype=float)
        groups = group_index(kept).numpy()
        spread = [np.ptp(rewards[groups == group]) for group in np.unique(groups)]
        metrics |= {
            "reward/mean": float(rewards.mean()),
            "reward/std": float(rewards.std()),
            "group/frac_zero_std": float(np.mean(np.array(spread) == 0)),
        }
    return metrics


class Clock:
    """Where one step's time goes. What nobody claimed shows as the rest."""

    def __init__(self):
        self._start = time.monotonic()
        self._parts: Counter[str] = Counter()

    def add(self, name: str, seconds: float) -> None:
        self._parts[f"time/{name}_s"] += seconds  # pyright: ignore[reportArgumentType]

    def time(self, name: str) -> Stopwatch:
        return Stopwatch(self, name)

    def stop(self) -> dict[str, float]:
        return dict(self._parts) | {"time/step_s": time.monotonic() - self._start}


class Stopwatch:
    """Adds the time of a `with` block to a clock."""

    def __init__(self, clock: Clock, name: str):
        self._clock, self._name = clock, name

    def __enter__(self) -> None:
        self._start = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        self._clock.add(self._name, time.monotonic() - self._start)
