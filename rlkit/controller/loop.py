"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from rlkit.config import RunConfig, choice_of
from rlkit.controller.checkpoint import (
    Checkpoint,
    checkpoint_folder,
    newest_valid,
    prune,
    read_ahead,
    restore_buffer,
    save_checkpoint,
)
from rlkit.controller.clock import Clock
from rlkit.controller.cluster import Cluster
from rlkit.controller.episodes import make_sampler, open_environment, read_prompts
from rlkit.controller.evaluate import Evaluation, evaluate, gain
from rlkit.controller.feed import Feed
from rlkit.controller.filtering import fewest_scored, rollout_metrics, trainable
from rlkit.controller.fleet import Engines, Learners, ReferenceScorer, weight_transport
from rlkit.controller.lookahead import Lookahead
from rlkit.controller.preemption import Preemption, StopRequested
from rlkit.controller.preparation import (
    balance,
    blended,
    choose,
    correct,
    divergence_part,
    episode_parts,
    filtered,
    joined,
    narrow,
    part_weights,
    shaped_rewards,
    sharpened,
    weigh,
    with_advantages,
    with_effective_sample_size,
)
from rlkit.controller.progress import Progress
from rlkit.controller.rehearsal import Answers, sample_answers
from rlkit.controller.replaying import Replayed, open_buffer, replayed, store
from rlkit.controller.rewards import open_rewards
from rlkit.controller.reweighting import check_objectives, objective_metrics, rewards_by_objective
from rlkit.controller.sampling import Sampled, Sampler
from rlkit.controller.tracking import Tracker
from rlkit.controller.turns import ByTurns, SideBySide
from rlkit.core.aepo import Aepo
from rlkit.core.apo import first_advantages
from rlkit.core.divergences import FDivergence, Penalty
from rlkit.core.loss import Knobs
from rlkit.core.recap import SUPERVISED
from rlkit.core.rehearsal import BaseAnswers
from rlkit.core.selectors import covariance_metrics
from rlkit.data.buffer import ReplayBuffer
from rlkit.data.collate import collate, minibatches, truncated, with_reference
from rlkit.data.models.loading import context_length, load_tokenizer, resolve, slow_arithmetic, stop_token_ids
from rlkit.data.models.lora import adapted_shapes
from rlkit.data.models.reference import check_reference
from rlkit.data.order import order_of
from rlkit.data.prompts import PromptSet
from rlkit.data.rewards.weighted import check_sources
from rlkit.errors import ConfigError, Preempted, ResourceError, RlkitError, WorkerError
from rlkit.metrics import Metric, merge, values
from rlkit.settings import ExistingRay, HeldOut, LoraLearner, Placement
from rlkit.types import Rollout, SamplingSpec, TrainBatch
from rlkit.workers.weight_sync import TOLERANCES, SyncReport, Transport, sync_weights

MAX_FAILED_SAVES = 2  # in a row
PROBE_TOKENS = 32  # of a sync check's sequence
DIVERGENCE_PROBE_TOKENS = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSummary:
    """What a finished run leaves behind."""

    run_dir: Path
    checkpoint: Path
    before: Evaluation | None
    after: Evaluation | None


def train(config: RunConfig, cluster: Cluster, *, resume: bool = False) -> RunSummary:
    """Train the policy as the settings say. Whatever cannot work is found before the first worker starts.

    `resume`: go on with the run in `run_dir` from its newest whole checkpoint. SIGTERM or Ctrl-C saves a checkpoint and raises
    Preempted; every other failure that a run can be resumed after says so.
    """
    run_dir = Path(config.run_dir or f"runs/{config.experiment_name}-{datetime.now():%Y%m%d-%H%M%S}")
    folder = resolve(config.model.path)
    tokenizer = load_tokenizer(folder, trust_remote_code=config.model.trust_remote_code)
    check_context(config, folder)
    check_reference(config)
    if isinstance(config.learner, LoraLearner):
        adapted_shapes(folder, config.learner)  # refuses what the model has not
    stops = stop_token_ids(folder, tokenizer)
    with ExitStack() as stack:
        rewards = stack.enter_context(open_rewards(config, cluster, base_dir=Path.cwd()))
        environment = stack.enter_context(open_environment(config, base_dir=Path.cwd()))
        prompts = read_prompts(config, tokenizer, rewards, environment)
        check_sources(config.reward, prompts.everything)
        check_objectives(config, prompts.everything)
        fingerprint = prompts.fingerprint()
        found, passed_over = newest_valid(run_dir) if resume else (None, [])
        progress = Progress.start(config)
        if found is not None:
            progress = Progress.from_json(found.progress, config, fingerprint)
        resume_after = (progress.step if found else -1) if resume else None
        tracker = stack.enter_context(Tracker(run_dir, config, resume_after=resume_after))
        if (slow := slow_arithmetic(config.model.dtype)) and not isinstance(config.cluster, ExistingRay):
            tracker.message(slow)
        if biased := descends_something_else(config):
            tracker.message(biased)
        for reason in passed_over:
            tracker.message(f"Passed over: {reason}")
        if resume:
            tracker.message(f"Going on after step {progress.step}." if found else "Nothing was saved yet: starting with step 1.")
        preemption = stack.enter_context(Preemption())
        cluster.begin_run()
        turns = ByTurns() if config.placement is Placement.colocated else SideBySide()
        rewards.start(prompts.everything)
        engines, learner = Engines(config, cluster, turns), Learners(config, cluster, turns)
        stack.callback(engines.close)
        learner.check_shared(run_dir / "config.yaml")
        if found is not None:
            learner.restore(str(found.folder.resolve()))
        buffer = open_buffer(config)
        if found is not None and buffer is not None:
            restore_buffer(found.folder, buffer)
        sampler = make_sampler(config, engines, rewards, tokenizer, environment)
        sampling = config.sampling(stops)
        answers = base_answers(config, run_dir, prompts, sampler, sampling, learner, is_new=found is None)
        explored = prompts if answers is None else replace(prompts, train=answers.explored(prompts.train))

        def drawn_before(step: int) -> int:  # the steps between now and then draw one batch each
            return run.progress.prompts_drawn + (step - run.progress.step - 1) * config.prompts_per_step

        feed = Feed(
            config=config,
            prompts=explored,
            order=order_of(explored.train, config.data, config.seed),
            sampler=sampler,
            sampling=sampling,
            drawn_before=drawn_before,
            heat=lambda: config.tempering.temperature(run.progress.tempering),
            known=lambda: run.progress.curriculum,
        )
        ahead = Lookahead(
            feed.submit,
            feed.collect,
            num_steps=config.num_steps,
            max_staleness=config.max_staleness,
            ready=read_ahead(found.folder) if found else {},
        )
        stack.callback(ahead.close)
        run = Run(
            config=config,
            run_dir=run_dir,
            prompts=prompts,
            fingerprint=fingerprint,
            sampling=sampling,
            tracker=tracker,
            engines=engines,
            learner=learner,
            transport=weight_transport(config, learner, engines),
            reference=start_reference(config, cluster, learner, found),
            sampler=sampler,
            answers=answers,
            ahead=ahead,
            preemption=preemption,
            progress=progress,
            buffer=buffer,
        )
        tracker.workers(cluster.places())
        how = f"Go on with: rlkit train resume={run_dir}"
        try:
            return run.train()
        except StopRequested:
            run.finish(stopped=f"stopped by {preemption.requested}")
            raise Preempted(
                f"Stopped by {preemption.requested} after step {run.progress.step} of {config.num_steps}, and saved. {how}"
            ) from None
        except RlkitError as error:
            if isinstance(error, ConfigError):
                raise  # the same settings would end there again
            raise type(error)(f"{error} {how}") from error


def descends_something_else(config: RunConfig) -> str:
    """What to tell whoever reads the divergence's name; empty where it is true."""
    divergence = config.divergence
    if not isinstance(divergence, Penalty) or divergence.verdict.is_right:
        return ""
    leave = " (divergence.allow_biased=true)" if divergence.allow_biased else ""
    return f"divergence.estimator={divergence.estimator.name}: descends {divergence.verdict.of}, not {divergence.name}{leave}."


def check_context(config: RunConfig, folder: str) -> None:
    """Raises ConfigError when prompt and response together do not fit the model's context."""
    limit = context_length(folder, trust_remote_code=config.model.trust_remote_code)
    if limit is not None and config.max_model_tokens > limit:
        raise ConfigError(
            f"max_response_tokens={config.max_response_tokens}: with max_prompt_tokens={config.max_prompt_tokens} that is "
            f"{config.max_model_tokens} tokens, and {config.model.path} has positions for {limit}. "
            f"Write at most {limit} for both together."
        )


def base_answers(
    config: RunConfig,
    run_dir: Path,
    prompts: PromptSet,
    sampler: Sampler,
    sampling: SamplingSpec,
    learner: Learners,
    *,
    is_new: bool,
) -> Answers | None:
    """What the run rehearses: sampled by the initial model, or for a run that goes on as it was stored. None: nothing."""
    if not isinstance(config.rehearsal, BaseAnswers):
        return None
    folder = run_dir / "rehearsal"
    if not is_new:
        return Answers.load(folder)
    answers = sample_answers(config.rehearsal, prompts.train, sampler, sampling, learner)
    answers.save(folder)
    return answers


def start_reference(config: RunConfig, cluster: Cluster, learner: Learners, found: Checkpoint | None) -> ReferenceScorer | None:
    """A scorer, if a chosen strategy needs one, as it was at the checkpoint."""
    if "ref_logprobs" not in config.needs:
        return None
    reference = ReferenceScorer(config, cluster)
    if found is not None:
        reference.restore(str(found.folder.resolve()))
    reference.send_head(learner)
    return reference


@dataclass(kw_only=True, slots=True)
class Run:
    """One run's workers and state. `step` counts the finished steps; everything at `step` follows from what is checkpointed."""

    config: RunConfig
    run_dir: Path
    prompts: PromptSet
    fingerprint: str
    sampling: SamplingSpec
    tracker: Tracker
    engines: Engines
    learner: Learners
    transport: Transport
    reference: ReferenceScorer | None
    sampler: Sampler
    answers: Answers | None  # that are rehearsed
    ahead: Lookahead
    preemption: Preemption
    progress: Progress
    buffer: ReplayBuffer | None = None  # what is kept of its rollouts; None: nothing is replayed
    failed_saves: int = 0  # in a row

    def train(self) -> RunSummary:
        self.sync()
        self.settle()
        while self.progress.step < self.config.num_steps:
            self.train_step()
            self.settle()
        return self.finish(stopped=None)

    def train_step(self) -> None:
        """One batch of rollouts: sampled, scored, learnt from; the new weights are on every engine at the end."""
        step = self.progress.step + 1
        clock = Clock()
        with self.preemption.interruptible(), clock.time("wait"):
            sampled = self.ahead.take(step)
        if not self.config.max_staleness:  # then the wait was for these two
            clock.split("wait", generate=sampled.generate_s, reward=sampled.reward_s, environment=sampled.environment_s)
        at_least = fewest_scored(self.config)
        rollouts, dropped = trainable(sampled.rollouts, at_least=at_least)
        tempered = trainable(sampled.tempered, at_least=at_least)[0] if sampled.tempered else []
        metrics = rollout_metrics(sampled, rollouts, dropped, part_weights(self.config)) | self.staleness(rollouts)
        advantages: dict[str, float] = {}
        chosen = self.replay(rollouts)
        num_learnt = 0
        if rollouts:
            with clock.time("score"):
                batch, prepared = self.prepare(chosen.fresh, tempered, chosen.stored)
            sampled = replace(sampled, rollouts=with_reference(sampled.rollouts, batch))
            metrics |= self.probe(step, chosen.fresh)
            advantages = dict(zip(batch.sample_ids, first_advantages(batch.advantages, batch.response_mask).tolist(), strict=True))
            batch = self.with_answers(step, batch)
            num_learnt = int(batch.lengths.sum())
            with clock.time("learn"):
                metrics |= (
                    prepared
                    | self.learn(step, batch, len(chosen.fresh) + len(tempered))
                    | self.progress.coefficients.metrics(self.config)
                )
            if metrics.get("policy/empty_steps") == self.config.optimizer_steps_per_step:
                self.tracker.message(f"Step {step}: filters left no token to train on, so the weights did not move.")
            metrics |= objective_metrics(self.progress.judged(self.config))
            if self.buffer is not None:
                metrics |= chosen.metrics(self.buffer, self.progress.step)
            self.remember(rollouts, chosen, batch, metrics)
        else:
            self.tracker.message(f"Step {step}: no group has enough scored samples, so nothing was learnt from it.")
        self.progress.step, self.progress.prompts_drawn = step, self.progress.prompts_drawn + sampled.num_prompts
        self.progress.curriculum = sampled.curriculum
        metrics |= {f"data/{name}": value for name, value in self.config.curriculum.metrics(sampled.curriculum).items()}
        with clock.time("sync"):
            metrics |= self.follow()
        report = self.sync()
        clock.add("sync", report.sync_s)
        clock.add("sync_check", report.check_s)
        metrics |= {"sync/probe_max": report.max_abs, "sync/probe_exp_mean": report.mean_exp_abs}
        self.report(step, metrics, clock, sampled, num_learnt, advantages)

    def settle(self) -> None:
        """What is due between two steps: evaluation, then a checkpoint. A request to stop is honoured here too."""
        if self.evaluation_is_due():
            with self.preemption.interruptible():
                self.evaluate()
        if self.checkpoint_is_due():
            self.save()
        self.preemption.check()

    def finish(self, *, stopped: str | None) -> RunSummary:
        """Plots, summary, and the last checkpoint if it is not there yet."""
        if self.progress.saved_at != self.progress.step:
            self.save()
        checkpoint = checkpoint_folder(self.run_dir, self.progress.step)
        self.tracker.finish(checkpoint=checkpoint, stopped=stopped)
        return RunSummary(run_dir=self.run_dir, checkpoint=checkpoint, before=self.progress.before, after=self.progress.after)

    def staleness(self, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """How many versions behind the sampled tokens are. Raises WorkerError above the bound, which would be our own mistake."""
        if not rollouts:
            return {}
        behind = self.progress.step - np.concatenate([rollout.policy_version for rollout in rollouts])
        bound = self.config.max_staleness
        if behind.max() > bound:
            raise WorkerError(f"A token of step {self.progress.step + 1} is {behind.max()} versions old; max_staleness={bound}.")
        return {"staleness/mean": float(behind.mean()), "staleness/max": float(behind.max())} if bound else {}

    def replay(self, rollouts: Sequence[Rollout]) -> Replayed:
        """The groups to train on: a step's fresh ones, and stored ones beside them or in their place."""
        if self.buffer is None or not rollouts:
            return Replayed(fresh=list(rollouts), stored=[])
        outcomes = shaped_rewards(self.config, rollouts, self.weights()).sum(-1)
        return replayed(self.buffer, rollouts, outcomes, step=self.progress.step + 1, version=self.progress.step)

    def weights(self) -> dict[str, float]:
        """Of the run's objectives in this step; one that is not there weighs 1."""
        return {name: judged.weight for name, judged in self.progress.judged(self.config).items()}

    def remember(self, rollouts: Sequence[Rollout], chosen: Replayed, batch: TrainBatch, metrics: dict[str, float]) -> None:
        """Of a batch that was trained on: its groups for replay, and how each objective went."""
        config = self.config
        if self.buffer is not None:
            store(self.buffer, chosen.fresh, batch)
        assert batch.rewards is not None  # collate put them there
        imitated = config.imitation.mask(rewards=batch.rewards, response_mask=batch.response_mask)
        losses = {}
        if imitated is not None and imitated.any():
            losses[SUPERVISED] = metrics["imitation/loss"]
        self.progress.objectives = config.objective_weights.update(
            self.progress.objectives, rewards=rewards_by_objective(config.objective_weights, rollouts), losses=losses
        )
        if len(judged := self.progress.judged(config)) == 1 and self.progress.step == 0:
            self.tracker.message(
                f"objective_weights={choice_of('objective_weights', config.objective_weights)}: {', '.join(judged)} is the only "
                "objective so far, and its weight is always 1. Others come with data.source_column, a reward of named parts beside "
                "objective_weights.apply_to=reward, or imitation=positive."
            )

    def prepare(
        self, rollouts: Sequence[Rollout], tempered: Sequence[Rollout] = (), stored: Sequence[Rollout] = ()
    ) -> tuple[TrainBatch, dict[str, float]]:
        """A batch of rollouts with all that is known before it is trained on: what reference, policy and critic say of it,
        advantages, and which tokens train. `tempered`: samples at another temperature, of which some join it. `stored`: rollouts
        of earlier steps, which no strategy takes for a measurement of the policy."""
        config, num_main = self.config, len(rollouts)
        rollouts = [*rollouts, *stored, *tempered]
        parts = episode_parts(config, rollouts)
        rollouts += [part for part, _ in parts]
        scores = None if self.reference is None else self.reference.score(rollouts)
        batch = collate(
            rollouts,
            ref_logprobs=None if scores is None else scores.logprobs,
            ref_hidden=None if scores is None else scores.hidden,
            ref_version=None if scores is None else scores.ref_version,
        )
        batch = sharpened(config, batch)
        if config.measures_policy:
            batch = replace(batch, **self.learner.measure(batch))
        divergence = divergence_part(config, batch, rollouts, self.progress.divergence_coef(config))
        if config.compares_with_sampler:
            batch = replace(batch, old_logprobs=batch.rollout_logprobs)
        if "values" in config.needs:
            batch = replace(batch, **self.learner.values(batch))
        owners = [owner for _, owner in parts]
        batch, metrics = with_advantages(config, batch, rollouts, self.weights(), divergence=divergence, owners=owners)
        batch, dropped = filtered(config, batch, truncated(rollouts))
        batch, taken = self.temper(batch, num_main)
        if num_main:
            self.progress = self.progress.having_seen(config, batch.select([*range(num_main)]) if stored else batch)
        return batch, metrics | dropped | taken | self.progress.metrics(config)

    def probe(self, step: int, rollouts: Sequence[Rollout]) -> dict[str, float]:
        """On the steps of evaluations: a few hundred tokens' exact divergence beside the estimate from the tokens alone."""
        settings, divergence = self.config.evaluation, self.config.divergence
        if not (self.config.probes_divergence and isinstance(settings, HeldOut) and isinstance(divergence, FDivergence)):
            return {}
        if step % settings.every or self.reference is None:
            return {}
        lengths = np.cumsum([len(rollout.response_ids) for rollout in rollouts])
        few = rollouts[: int(np.searchsorted(lengths, DIVERGENCE_PROBE_TOKENS)) + 1]
        scores = self.reference.score(few, with_hidden=True)
        batch = collate(few, ref_logprobs=scores.logprobs, ref_hidden=scores.hidden, ref_version=scores.ref_version)
        found = self.learner.probe(batch)
        assert batch.ref_logprobs is not None
        sampled = divergence.value(found["logprobs"] - batch.ref_logprobs)[batch.response_mask]
        exact = found["exact"][batch.response_mask]
        return {
            "divergence/probe_exact": float(exact.mean()),
            "divergence/probe_sampled": float(sampled.mean()),
            "divergence/probe_bias": float((sampled - exact).mean()),
            "divergence/probe_spread": float((sampled - exact).std()),
        }

    def with_answers(self, step: int, batch: TrainBatch) -> TrainBatch:
        """With the stored answers that are rehearsed in this step."""
        if self.answers is None or not isinstance(self.config.rehearsal, BaseAnswers):
            return batch
        return self.answers.join(batch, count=self.config.rehearsal.rows_per_step, seed=(self.config.seed << 32) + step)

    def temper(self, batch: TrainBatch, num_main: int) -> tuple[TrainBatch, dict[str, float]]:
        """What the choice of tempering does with the samples behind the first `num_main`, or with the advantages."""
        tempering, state = self.config.tempering, self.progress.tempering
        if not isinstance(tempering, Aepo):
            return batch, {}
        heat = tempering.temperature(state)
        if "tempered_old_logprobs" in tempering.needs:
            hotter = self.learner.measure(batch, heat)["old_logprobs"]
            batch, metrics = blended(tempering, batch, hotter, state), {}
        else:
            batch, metrics = joined(tempering, batch, num_main, state)
        return batch, metrics | {"aepo/temperature": heat, "aepo/entropy_prev": state.entropy}

    def learn(self, step: int, batch: TrainBatch, num_responses: int) -> dict[str, float]:
        """Every optimiser step on one batch of rollouts. `num_responses`: that were sampled for it; the batch may hold more rows,
        of earlier steps, of a file, and several of one episode."""
        config = self.config
        num_in_step = -(-num_responses // config.optimizer_steps_per_batch)
        if self.reference is not None:
            batch.check_reference(self.reference.version)
        parts: list[dict[str, Metric]] = []
        for epoch in range(config.epochs_per_batch):
            order_seed = (config.seed << 32) + step * config.epochs_per_batch + epoch
            for number, part in enumerate(minibatches(batch, config.optimizer_steps_per_batch, seed=order_seed)):
                part, corrected = correct(config.correction, part)
                part = balance(narrow(part))
                part, weighed = weigh(config.token_weight, part)
                part, selected = choose(config.selector, part, seed=order_seed + (number << 40))
                stats = self.learner.update(part, self.knobs(part, is_first=epoch == number == 0))
                parts.append(stats.metrics | corrected | weighed | selected)
                if stats.skipped:
                    self.dump(f"step_{step:06d}-{epoch}-{number}", part)
                else:
                    self.progress.coefficients = self.progress.coefficients.update(config, stats.metrics, num_in_step)
        sampled = batch.rollout_logprobs if batch.old_logprobs is None else batch.old_logprobs
        metrics = covariance_metrics(logprobs=sampled, advantages=batch.advantages, response_mask=batch.response_mask)
        measured = values(merge(parts))
        self.progress.tempering = config.tempering.update(self.progress.tempering, measured.get("entropy/mean", math.nan))
        return metrics | with_effective_sample_size(measured)

    def knobs(self, part: TrainBatch, *, is_first: bool) -> Knobs:
        """What is decided about an optimiser step outside its loss. `is_first`: on this batch, so that the policy is still the
        one that was measured before it."""
        progress, nucleus_entropy = self.progress, part.old_nucleus_entropy
        if nucleus_entropy is not None and not is_first:
            nucleus_entropy = self.learner.measure(part)["old_nucleus_entropy"]
        return Knobs(
            divergence_coef=progress.divergence_coef(self.config),
            entropy_coef=progress.coefficients.of("entropy", self.config),
            clip_high=progress.coefficients.of("threshold", self.config),
            entropy_state=progress.entropy,
            entropy_measured=self.config.entropy.measure(nucleus_entropy=nucleus_entropy, response_mask=part.response_mask),
            imitation_weight=self.weights().get(SUPERVISED, 1.0),
        )

    def dump(self, name: str, batch: TrainBatch) -> None:
        """Keep the batch of a non-finite step for whoever has to find the cause."""
        folder = self.run_dir / "skipped"
        folder.mkdir(exist_ok=True)
        tensors = {field: getattr(batch, field) for field in batch.__slots__ if isinstance(getattr(batch, field), Tensor)}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / f"{name}.safetensors")
        self.tracker.message(f"{name}: loss or gradient not finite; the weights did not move. The batch is in {folder}.")

    def follow(self) -> dict[str, float]:
        """A reference that moves, after the policy; the next batch is compared with the new version."""
        return {} if self.reference is None else self.reference.follow(self.learner, self.progress.step)

    def sync(self) -> SyncReport:
        """The learner's weights on every engine, proved, before anything else is sampled."""
        with self.engines.paused():
            return sync_weights(
                self.learner,
                self.engines,
                version=self.progress.step,
                probes=self.probes(),
                tolerance=TOLERANCES[self.config.model.dtype.value],
                transport=self.transport,
            )

    def probes(self) -> list[tuple[int, ...]]:
        """Token sequences that sync checks score: the beginnings of real prompts, and random tokens, which no cache and no habit
        predicts. Few and short: both sides score them in every step."""
        length = min(PROBE_TOKENS, self.config.max_model_tokens - 1)
        real = [prompt.prompt_ids[:length] for prompt in self.prompts.train[:64] if len(prompt.prompt_ids) > 1]
        vocabulary = sorted({token for prompt in self.prompts.train[:256] for token in prompt.prompt_ids})
        draws = np.random.Generator(np.random.Philox(key=self.config.seed)).choice(vocabulary, (2, length))
        return [*real[:2], *(tuple(int(token) for token in row) for row in draws)]

    def evaluation_is_due(self) -> bool:
        settings, progress = self.config.evaluation, self.progress
        if not isinstance(settings, HeldOut) or progress.evaluated_at == progress.step:
            return False
        ends = progress.step in (0, self.config.num_steps)
        return ends or (settings.every > 0 and progress.step % settings.every == 0)

    def evaluate(self) -> None:
        """Held-out prompts, and what was gained on them since before the first step."""
        settings, progress = self.config.evaluation, self.progress
        assert isinstance(settings, HeldOut)  # evaluation_is_due asked
        evaluation = evaluate(
            self.sampler,
            self.prompts.held_out,
            settings,
            max_tokens=self.config.max_response_tokens,
            stop_token_ids=self.sampling.stop_token_ids,
        )
        metrics = evaluation.metrics()
        before = progress.before
        if before is None:
            progress.before = evaluation
        elif before.prompt_ids == evaluation.prompt_ids and 1 in settings.ks:
            names = ("evaluation/pass@1_gain", "evaluation/pass@1_gain_low", "evaluation/pass@1_gain_high")
            metrics |= dict(zip(names, gain(before, evaluation), strict=True))
        progress.after, progress.evaluated_at = evaluation, progress.step
        self.tracker.store_evaluation(progress.step, evaluation.to_json())
        self.tracker.evaluation(progress.step, metrics)

    def checkpoint_is_due(self) -> bool:
        every, step = self.config.checkpoint_every, self.progress.step
        return self.progress.saved_at != step and every > 0 and step > 0 and step % every == 0

    def save(self) -> None:
        """A checkpoint of this step; then the ones that it makes superfluous go.

        A disk that refuses is reported and training goes on, but not for ever: raises ResourceError the second time in a row.
        """
        progress = self.progress
        last_saved, progress.saved_at = progress.saved_at, progress.step
        progress.note_best()
        try:
            save_checkpoint(
                self.learner,
                self.run_dir,
                progress.step,
                progress.to_json(self.fingerprint),
                self.ahead.ready(),
                self.buffer,
                self.reference,
            )
        except ResourceError as error:
            progress.saved_at = last_saved
            self.failed_saves += 1
            if self.failed_saves == MAX_FAILED_SAVES or progress.step == self.config.num_steps:
                raise
            self.tracker.message(f"{error} Training goes on; the checkpoint before it is whole.")
            return
        self.failed_saves = 0
        prune(self.run_dir, keep_last=self.config.keep_checkpoints, best=progress.best_step)

    def report(
        self,
        step: int,
        metrics: dict[str, float],
        clock: Clock,
        sampled: Sampled,
        num_learnt: int,
        advantages: dict[str, float],
    ) -> None:
        """The step's line in every sink. `num_learnt`: tokens of the batch that was learnt from, prompts among them."""
        timings = clock.stop()
        # Beside learning, generation has the whole step.
        metrics["rate/generated_tokens_per_s"] = sampled.num_tokens / timings.get("time/generate_s", timings["time/step_s"])
        if "time/learn_s" in timings:
            metrics["rate/learned_tokens_per_s"] = num_learnt / timings["time/learn_s"]
        self.tracker.rollouts(step, sampled.rollouts, [advantages.get(r.sample_id, math.nan) for r in sampled.rollouts])
        self.tracker.step(step, metrics, timings)
