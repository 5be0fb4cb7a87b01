"""The controller's view of many workers of one kind as one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlkit.config import RunConfig
from rlkit.controller.cluster import START_DEADLINE_S, Cluster
from rlkit.controller.dispatch import Dispatcher, Ticket
from rlkit.controller.placement import engine_seat, rank_seat, scorer_seat
from rlkit.controller.turns import Turns
from rlkit.core.loss import Knobs
from rlkit.core.reduce import Denominators
from rlkit.core.references import GeometricMixture, ModelReference, MovingReference, Refresh, Soup
from rlkit.data.collate import split_ranks
from rlkit.data.models.loading import resolve
from rlkit.data.models.reference import other_models
from rlkit.errors import ConfigError, ResourceError
from rlkit.metrics import Mean, Metric, merge
from rlkit.settings import AsyncVllmEngine, Placement, TransformersEngine, VllmEngine, WeightTransport
from rlkit.types import Completion, Rollout, SampleRequest, SamplingSpec, StepStats, TrainBatch
from rlkit.workers.handle import Handle, Pending, Rank, wait
from rlkit.workers.native_transfer import GRACE_S, NativeTransport
from rlkit.workers.rollout.engine import EngineSpec
from rlkit.workers.scorer import Move, ScorerSpec, Scores
from rlkit.workers.weight_sync import HostTransport, Manifest, Transport

ENGINE_CLASSES = {
    "vllm": "rlkit.workers.rollout.vllm_engine:VllmRolloutEngine",
    "vllm_async": "rlkit.workers.rollout.vllm_async:AsyncVllmRolloutEngine",
    "transformers": "rlkit.workers.rollout.transformers:TransformersRolloutEngine",
}


class Engines:
    """All rollout engines of a run.

    With `max_staleness=0` which engine samples what is a function of the request's place alone, so that timing changes nothing.
    Above that, samples go one by one to whichever engine has room.
    """

    def __init__(self, config: RunConfig, cluster: Cluster, turns: Turns, *, purpose: str = "training"):
        """Engines of one purpose are shared by the runs that need equal ones; a training engine holds some run's weights, so
        one that serves a model as it is on disk must be another."""
        spec = engine_spec(config)
        count = config.rollout.num_engines
        self._deadline_s = config.rollout.deadline_s
        self._receiving: list[Pending] = []  # parts of the next version on their way
        self._sync_deadline_s = START_DEADLINE_S  # of the first sync, which waits for the engines to start
        self.handles = [
            cluster.worker(
                ("engine", purpose, spec, index, count),
                f"rollout engine {index}",
                ENGINE_CLASSES[spec.kind],
                spec,
                seat=engine_seat(config, index, purpose=purpose),
            )
            for index in range(count)
        ]
        self._turns = turns
        turns.add_engines(self.handles)
        self._dispatcher = None
        if config.max_staleness and purpose == "training":
            self._dispatcher = Dispatcher(self.handles, max_in_flight=config.rollout.max_num_seqs, deadline_s=self._deadline_s)

    def generate(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> Generation | Ticket:
        """Start these samples."""
        self._turns.sample()
        if self._dispatcher is not None:
            return self._dispatcher.submit(requests, sampling)
        bounds = [round(i * len(requests) / len(self.handles)) for i in range(len(self.handles) + 1)]
        parts = [requests[low:high] for low, high in itertools.pairwise(bounds)]
        return Generation(
            [handle.call("generate", part, sampling) for handle, part in zip(self.handles, parts, strict=True) if part],
            self._deadline_s,
        )

    @property
    def takes_singly(self) -> bool:
        """Whether each sample goes to whichever engine has room, and comes back as soon as it is done."""
        return self._dispatcher is not None

    def paused(self) -> AbstractContextManager[None]:
        """Within, no engine samples: it might hold weights that are not proved yet."""
        return nullcontext() if self._dispatcher is None else self._dispatcher.paused()

    def close(self) -> None:
        """Drop what is under way. The engines themselves stay, for the next run."""
        if self._dispatcher is not None:
            self._dispatcher.close()

    # What a weight sync asks of them (`weight_sync.EngineSide`).

    def receive(self, part: Pending) -> None:
        self._receiving += [handle.call("receive", part) for handle in self.handles]

    def commit(self, manifest: Manifest) -> None:
        receiving, self._receiving = self._receiving, []
        wait(receiving, self._sync_deadline_s)
        wait([handle.call("commit", manifest) for handle in self.handles], self._sync_deadline_s)
        self._sync_deadline_s = self._deadline_s

    def score_each(self, sequences: Sequence[tuple[int, ...]]) -> list[list[np.ndarray]]:
        self._turns.sample()
        return wait([handle.call("score", sequences) for handle in self.handles], self._deadline_s)

    def layer_outputs(self, engine: int, sequence: tuple[int, ...]) -> dict[str, np.ndarray]:
        self._turns.sample()
        return self.handles[engine].call("layer_outputs", sequence).result(self._deadline_s)

    # What a native transfer asks of them (`native_transfer.ReceivingEngines`).

    def transfer_ranks(self) -> list[int]:
        return wait([handle.call("transfer_ranks") for handle in self.handles], START_DEADLINE_S)

    def discard(self) -> None:
        """Whoever needs engines next starts new ones."""
        for handle in self.handles:
            handle.kill()


class Generation:
    """Responses under way."""

    def __init__(self, parts: Sequence[Pending], deadline_s: float):
        self._parts = parts
        self._deadline_s = deadline_s

    def result(self) -> list[Completion]:
        """In the order of the requests."""
        return [completion for part in wait(self._parts, self._deadline_s) for completion in part]


class Learners:
    """The learner's ranks as one learner."""

    def __init__(self, config: RunConfig, cluster: Cluster, turns: Turns):
        count = config.learner.num_ranks
        self._max_response_tokens = config.max_response_tokens
        self._strategy = config.strategy
        self._deadline_s = config.learner.deadline_s
        self._transfer_deadline_s = config.rollout.deadline_s + 2 * GRACE_S
        keys = [("learner", index, count) for index in range(count)]
        address = cluster.meeting_point(keys) if count > 1 else ""
        self._handles = [
            cluster.worker(
                keys[index],
                f"learner rank {index}",
                "rlkit.workers.learner:Learner",
                Rank(index=index, count=count, address=address),
                seat=rank_seat(config, index),
            )
            for index in range(count)
        ]
        self._exporting: list[Pending] = []  # the other ranks' share of a gather under way
        wait([handle.call("begin", config) for handle in self._handles], START_DEADLINE_S)
        self._turns = turns
        turns.add_learner(self._handles)

    def update(self, batch: TrainBatch, knobs: Knobs) -> StepStats:
        """One optimiser step; its denominators are counted here, before the rows are dealt out."""
        self._turns.learn()
        masks = self._strategy.masks(
            response_mask=batch.response_mask,
            keep=batch.policy_mask,
            rewards=batch.rewards,
            tempered_mask=batch.tempered_mask,
            rehearsal_mask=batch.rehearsal_mask,
        )
        denominators = {
            name: Denominators.count(mask, max_response_tokens=self._max_response_tokens, share=batch.episode_share)
            for name, mask in masks.items()
        }
        stats: list[StepStats] = wait(
            [
                handle.call("update", part, denominators=denominators, knobs=knobs)
                for handle, part in zip(self._handles, split_ranks(batch, len(self._handles)), strict=True)
            ],
            self._deadline_s,
        )
        shared = {
            "policy/grad_norm",
            "critic/grad_norm",
            "policy/skipped_steps",
            "policy/empty_steps",
        }  # the same on every rank: counted once
        parts = [{k: v for k, v in s.metrics.items() if i == 0 or k not in shared} for i, s in enumerate(stats)]
        metrics = merge(parts)
        # A loss is the sum of its microbatches' shares, and from here on a mean: over optimiser steps it must not grow.
        losses: dict[str, Metric] = {name: Mean(m.value, 1.0) for name, m in metrics.items() if name.endswith("/loss")}
        return StepStats(metrics=metrics | losses, skipped=stats[0].skipped)

    def measure(self, batch: TrainBatch, heat: float = 1.0) -> dict[str, Tensor]:
        """What the strategies need of the present policy at `heat` times the sampling temperature: fields of TrainBatch [B, T],
        among them always old_logprobs."""
        return self._per_token("measure", batch, heat)

    def probe(self, batch: TrainBatch) -> dict[str, Tensor]:
        """The exact divergence at the batch's tokens, and the policy's log-probs of them, [B, T] each."""
        return self._per_token("probe", batch)

    def values(self, batch: TrainBatch) -> dict[str, Tensor]:
        """The critic's, as a field of TrainBatch [B, T]."""
        return self._per_token("values", batch)

    def _per_token(self, method: str, batch: TrainBatch, *args: float) -> dict[str, Tensor]:
        self._turns.learn()
        out: dict[str, Tensor] = {}
        position = {sample_id: row for row, sample_id in enumerate(batch.sample_ids)}
        parts = split_ranks(batch, len(self._handles))
        pending = [handle.call(method, part, *args) for handle, part in zip(self._handles, parts, strict=True)]
        for part, found in zip(parts, wait(pending, self._deadline_s), strict=True):
            rows = torch.tensor([position[sample_id] for sample_id in part.sample_ids], dtype=torch.int64)
            for name, values in found.items():
                out.setdefault(name, torch.zeros(batch.response_mask.shape))[rows, : values.shape[1]] = values
        return out

    def set_reference_head(self, head: Pending, version: int) -> None:
        self._all("set_reference_head", head, version)

    def reset_optimizer(self) -> None:
        self._all("reset_optimizer")

    def check_shared(self, file: Path) -> None:
        """Raises ResourceError where a rank does not find a file of the run folder, in which every rank saves its part."""
        found = self._all("sees", str(file.resolve()))
        if blind := [handle.name for handle, sees in zip(self._handles, found, strict=True) if not sees]:
            raise ResourceError(
                f"run_dir={file.parent}: {' and '.join(blind)} cannot see it from where it runs, and could save no checkpoint. "
                "Put the run folder on a file system that all nodes share, such as run_dir=/shared/runs/first."
            )

    def save(self, folder: str) -> None:
        """Weights, and every rank's own state, into an existing folder."""
        self._all("save", folder)

    def restore(self, folder: str) -> None:
        """What `save` wrote, with as many ranks as there are now."""
        self._all("restore", folder)

    # What a weight sync asks of it (`weight_sync.LearnerSide`); all ranks take part, rank 0 answers.

    def num_parts(self) -> int:
        return self._handles[0].call("num_parts").result(self._deadline_s)

    def export_part(self, index: int, version: int) -> Pending:
        self._turns.sync()
        return self._export(index, version)

    def export_to_reference(self, index: int, version: int) -> Pending:
        """As `export_part`, without room for the weights of engines."""
        self._turns.learn()
        return self._export(index, version)

    def _export(self, index: int, version: int) -> Pending:
        first, *others = [handle.call("export_part", index, version) for handle in self._handles]
        # Kept until the manifest waits for them: Ray may drop a call whose result nobody holds, and the gather would then
        # wait for that rank for ever.
        self._exporting += others
        return first

    def manifest(self, version: int) -> Manifest:
        exporting, self._exporting = self._exporting, []
        wait(exporting, self._deadline_s)
        return self._handles[0].call("manifest", version).result(self._deadline_s)

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        return self._all("score", sequences)[0]

    def layer_outputs(self, sequence: tuple[int, ...]) -> dict[str, np.ndarray]:
        return self._all("layer_outputs", sequence)[0]

    # What a native transfer asks of it (`native_transfer.SendingLearner`).

    def open_transfer(self, kind: str, engines: Sequence[Handle], ranks: Sequence[int]) -> None:
        self._turns.sync()
        # With the time that a first call may take: the learner has to import vLLM.
        pending = [handle.call("open_transfer", kind, engines, ranks) for handle in self._handles]
        wait(pending, START_DEADLINE_S + self._transfer_deadline_s)

    def send_weights(self, version: int) -> None:
        self._turns.sync()
        wait([handle.call("send_weights", version) for handle in self._handles], self._transfer_deadline_s)

    def discard(self) -> None:
        """Whoever needs a learner next starts a new one."""
        for handle in self._handles:
            handle.kill()

    def _all(self, method: str, *args) -> list:
        self._turns.learn()
        return wait([handle.call(method, *args) for handle in self._handles], self._deadline_s)


class ReferenceScorer:
    """The reference, frozen or following the policy. What it says is of one version of its weights at any time."""

    def __init__(self, config: RunConfig, cluster: Cluster):
        reference = config.reference
        self._rule = reference if isinstance(reference, MovingReference) else None
        self._temperature = config.rollout.temperature
        self._with_hidden = "ref_hidden" in config.needs
        self._needs_head = self._with_hidden or config.probes_divergence
        self._deadline_s = config.learner.deadline_s
        self.version = 0  # how many times it has moved
        self._moved_at = 0  # step of the last time
        spec = scorer_spec(config)
        self._handle: Handle = cluster.worker(
            ("scorer", spec), "reference scorer", "rlkit.workers.scorer:Scorer", spec, seat=scorer_seat(config)
        )
        self._beginning: Pending | None = self._handle.call("begin", self._rule)

    def score(self, rollouts: Sequence[Rollout], *, with_hidden: bool | None = None) -> Scores:
        """with_hidden: None for what the strategies need."""
        with_hidden = self._with_hidden if with_hidden is None else with_hidden
        scores: Scores = self._call("score", rollouts, temperature=self._temperature, with_hidden=with_hidden)
        assert scores.ref_version == self.version
        return scores

    def send_head(self, learner: Learners) -> None:
        """What the learner needs of this version for exact divergences; nothing where there are none."""
        if self._needs_head:
            self._wait_for_start()
            learner.set_reference_head(self._handle.call("head"), self.version)

    def follow(self, learner: Learners, step: int) -> dict[str, float]:
        """After `step`, move as the rule says; weights go from the learner to the scorer some layers at a time, as to an engine.

        Before the engines are brought up to date, while shared devices still are the learner's.
        """
        if self._rule is None:
            return {}
        metrics = {}
        if self._rule.due(step):
            self._wait_for_start()
            receiving = [
                self._handle.call("receive", learner.export_to_reference(index, step)) for index in range(learner.num_parts())
            ]
            wait(receiving, self._deadline_s)
            move: Move = self._call("commit", learner.manifest(step))
            self.version, self._moved_at = move.ref_version, step
            self.send_head(learner)
            if isinstance(self._rule, Refresh) and self._rule.reset_optimizer:
                learner.reset_optimizer()
            metrics["reference/distance"] = move.distance
        return metrics | {"reference/version": float(self.version), "reference/age": float(step - self._moved_at)}

    def save(self, folder: str) -> None:
        """Into a checkpoint; a frozen one leaves nothing there."""
        if self._rule is not None:
            self._call("save", folder)

    def restore(self, folder: str) -> None:
        """What `save` wrote."""
        if self._rule is not None:
            self.version, self._moved_at = self._call("restore", folder)

    def _call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        self._wait_for_start()
        return self._handle.call(method, *args, **kwargs).result(self._deadline_s)

    def _wait_for_start(self) -> None:
        """It starts beside the engines; whoever needs it first waits."""
        beginning, self._beginning = self._beginning, None
        if beginning is not None:
            beginning.result(START_DEADLINE_S)


def scorer_spec(config: RunConfig) -> ScorerSpec:
    """What the reference is built from."""
    reference = config.reference
    folders = [folder for _, folder in other_models(reference)]
    policy = resolve(config.model.path)
    spec = ScorerSpec(
        model_path=policy,
        dtype=config.model.dtype.value,
        trust_remote_code=config.model.trust_remote_code,
        tokens_per_microbatch=config.learner.tokens_per_microbatch,
        head_memory_mib=config.learner.head_memory_mib,
    )
    match reference:
        case ModelReference():
            return replace(spec, model_path=folders[0])
        case Soup():
            return replace(spec, model_path=folders[0], soup=tuple(zip(folders, reference.shares, strict=True)))
        case GeometricMixture():
            return replace(spec, second_path=folders[0], second_share=reference.share)
        case _:
            return spec


def weight_transport(config: RunConfig, learner: Learners, engines: Engines) -> Transport:
    """The one that `rollout.weight_transport` names."""
    rollout = config.rollout
    if not isinstance(rollout, VllmEngine) or rollout.weight_transport is WeightTransport.host:
        return HostTransport(learner, engines)
    return NativeTransport(learner, engines, kind=rollout.weight_transport.value)


def engine_spec(config: RunConfig) -> EngineSpec:
    rollout = config.rollout
    common = {
        "model_path": resolve(config.model.path),
        "dtype": config.model.dtype.value,
        "trust_remote_code": config.model.trust_remote_code,
        "max_model_tokens": config.max_model_tokens,
    }
    if isinstance(rollout, VllmEngine):
        return EngineSpec(
            kind="vllm_async" if isinstance(rollout, AsyncVllmEngine) else "vllm",
            max_num_seqs=rollout.max_num_seqs,
            kv_cache_mib=rollout.kv_cache_mib,
            enforce_eager=rollout.enforce_eager,
            shares_device=config.placement is Placement.colocated,
            device_share=engine_seat(config, 0).device_share,
            tensor_parallel_size=rollout.tensor_parallel_size,
            weight_transport=rollout.weight_transport.value,
            **common,
        )
    if isinstance(rollout, TransformersEngine):
        return EngineSpec(kind="transformers", max_num_seqs=rollout.max_num_seqs, **common)
    raise ConfigError(f"rollout={type(rollout).__name__}: no engine is known for these settings. Choose vllm or transformers.")
