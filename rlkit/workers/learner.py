"""The learner: forward, loss, backward, optimiser step. One object is one of N FSDP2 ranks; nothing here knows of Ray."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
import torch.distributed as dist
import xxhash
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint

from rlkit.config import RunConfig
from rlkit.core.copo import Blend
from rlkit.core.divergences import Divergence, FDivergence, Penalty
from rlkit.core.logprobs import chunk_size
from rlkit.core.loss import Knobs
from rlkit.core.ratios import MAX_LOG_RATIO, Weights
from rlkit.core.reduce import Denominators, reduce
from rlkit.core.values import Backbone, Critic, ExplainedVariance, TrainedCritic
from rlkit.data.layout import EMPTY_LAYOUT, Layout, LayoutKind, arrange, whole_sequences
from rlkit.data.models import lora
from rlkit.data.models.critic import CriticModel, ValueHeads
from rlkit.data.models.loading import copy_tokenizer_files, load_model, resolve
from rlkit.data.models.policy import Policy, PolicyOutput, ReferenceStates
from rlkit.errors import DataError, NumericalError, ResourceError
from rlkit.metrics import Last, Max, Mean, Metric, Min, Sum, merge
from rlkit.settings import AdamW, Dtype, LoraLearner, Optimizer, Schedule, VllmEngine, WeightTransport
from rlkit.settings import Learner as LearnerSettings
from rlkit.types import StepStats, TrainBatch
from rlkit.workers.handle import Handle, Rank
from rlkit.workers.native_transfer import check_device
from rlkit.workers.weight_sync import Manifest, WeightPart, digests, layer_groups, pack

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlkit.workers.rollout.vllm_transfer import Sender


class Learner:
    """One rank. Every method is collective: all ranks are called together, with their own rows where rows are passed."""

    def __init__(self, rank: Rank, *, num_threads: int | None = None):
        if num_threads:
            torch.set_num_threads(num_threads)
        self.rank = rank
        if not dist.is_initialized():
            backend = "nccl" if torch.cuda.is_available() else "gloo"
            # torch documents these three; its stubs do not export them.
            store: dist.Store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            if rank.count > 1:
                host, _, port = rank.address.rpartition(":")
                store = dist.TCPStore(host, int(port), is_master=False)  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=store, rank=rank.index, world_size=rank.count, timeout=timedelta(minutes=10))
        self._sender: Sender | None = None
        self.device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")

    def begin(self, config: RunConfig) -> None:
        """Load the initial policy and forget everything about an earlier run. Raises ResourceError without a GPU that it needs."""
        rollout = config.rollout
        if isinstance(rollout, VllmEngine) and rollout.weight_transport is not WeightTransport.host:
            check_device(rollout.weight_transport.name, f"learner rank {self.rank.index}", is_gpu=self.device.type == "cuda")
        self.config = config
        self.model_folder = resolve(config.model.path)
        self.strategy = config.strategy
        self.critic: CriticModel | None = None
        self._base_digest = ""
        self.policy = self._load_policy()
        self.optimizer = make_optimizer(config.optimizer, self.policy_parameters, self.critic_parameters, config.critic)
        self.reference_head: Tensor | None = None
        self.reference_version = 0  # of the head
        self.num_updates = 0  # optimiser steps attempted: drives the learning-rate schedule
        self.skipped_in_a_row = 0
        self._export_digests: dict[str, str] = {}
        self._close_transfer()

    def _load_policy(self) -> Policy:
        """The policy with float32 master weights, and the critic, on the policy's layers or on a copy of them."""
        critic = self.config.critic
        model = self._load_model(self.config.learner)
        heads = None
        if isinstance(critic, TrainedCritic):
            heads = ValueHeads(model.config.hidden_size, critic.num_heads, seed=self.config.seed)
            if critic.backbone is Backbone.own:
                self.critic, heads = CriticModel(self._load_model(None), heads).to(self.device), None
                self._shard(self.critic, self.critic.decoder.layers)
        shared = isinstance(critic, TrainedCritic) and critic.backbone is Backbone.shared
        policy = Policy(model, value_heads=heads, values_train_layers=shared).to(self.device)
        self._shard(policy, model.get_decoder().layers)
        return policy

    def _load_model(self, settings: LearnerSettings | None) -> PreTrainedModel:
        """With adapters where the learner's settings ask for them; None trains all of it."""
        # What is trained is float32, the masters; what is frozen needs no more bits than the forward pass sees.
        is_frozen = isinstance(settings, LoraLearner)
        dtype = self._dtype if is_frozen else torch.float32
        model = load_model(self.model_folder, dtype=dtype, trust_remote_code=self.config.model.trust_remote_code)
        if is_frozen:
            lora.add_adapters(model, settings, self.config.seed)
            self._base_digest = lora.base_digest(self.model_folder) if self.rank.is_first else ""
        else:
            model.requires_grad_(True)
        if self.config.learner.activation_checkpointing:
            # Around forward and not as a wrapping module, which would rename every parameter.
            for layer in cast(nn.ModuleList, model.get_decoder().layers):
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
        return model

    def _shard(self, module: nn.Module, layers: object) -> None:
        """FSDP2, by layer where there are several ranks."""
        # bfloat16 is FSDP's mixed precision, as the engine runs it: parameters are cast once a forward, masters stay float32.
        bf16 = self.config.model.dtype is Dtype.bfloat16
        # One rank holds everything anyway: without the gathers and DTensors it is up to a tenth faster in float32, and where
        # `_run` does the cast by up to a third in bfloat16. Not with checkpointed activations: the layers run again in the backward
        # pass, where only FSDP still has the rounded parameters in them.
        if self.rank.count == 1 and not (bf16 and self.config.learner.activation_checkpointing):
            return
        precision = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if bf16 else MixedPrecisionPolicy()
        mesh = dist.device_mesh.init_device_mesh(self.device.type, (self.rank.count,))
        if self.rank.count > 1:
            for layer in cast(nn.ModuleList, layers):
                fully_shard(layer, mesh=mesh, mp_policy=precision)
        fully_shard(module, mesh=mesh, mp_policy=precision, reshard_after_forward=False)
        # Losses are shares of a global mean, so ranks are summed; FSDP would average. The plain sum, because gloo has no other.
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.set_force_sum_reduction_for_comms(True)
                part.set_gradient_divide_factor(1.0)

    def _run(self, module: nn.Module, *args: object, **kwargs: object) -> Any:
        """The module's forward with its parameters rounded to the engine's precision; gradients reach the float32 masters."""
        if self._dtype is torch.float32 or isinstance(module, FSDPModule):
            return module(*args, **kwargs)
        rounded = {name: parameter.to(self._dtype) for name, parameter in module.named_parameters()}
        return torch.func.functional_call(module, rounded, args, kwargs)

    @property
    def policy_parameters(self) -> list[nn.Parameter]:
        """What the objective trains."""
        return [parameter for parameter in self.policy.model.parameters() if parameter.requires_grad]

    @property
    def critic_parameters(self) -> list[nn.Parameter]:
        """What the value loss alone trains."""
        module = self.critic if self.critic is not None else self.policy.value_heads
        return [] if module is None else list(module.parameters())

    @property
    def _dtype(self) -> torch.dtype:
        """Of the engine, and of the forward pass."""
        return getattr(torch, self.config.model.dtype.value)

    # --- learning -----------------------------------------------------------------------------------------------------

    def update(
        self,
        batch: TrainBatch,
        *,
        denominators: Mapping[str, Denominators],
        knobs: Knobs,
    ) -> StepStats:
        """One optimiser step on this rank's rows. `denominators` count the whole step over all ranks, for every term its own.

        Raises NumericalError after `learner.max_skipped_steps` non-finite steps in a row.
        """
        optimizer_settings = self.config.optimizer
        total_updates = self.config.num_steps * self.config.optimizer_steps_per_step
        rate = learning_rate(optimizer_settings, self.num_updates, total_updates)
        self.optimizer.param_groups[0]["lr"] = rate  # the critic's is constant
        self.optimizer.zero_grad(set_to_none=True)
        self._num_microbatches = 0  # of this step, so far
        parts = [self._backward(part, layout, denominators, knobs) for _, part, layout in self._microbatches(batch)]
        if self.num_updates < getattr(self.config.critic, "warmup_steps", 0):
            for parameter in self.policy_parameters:
                parameter.grad = None  # the critic learns alone: an optimiser passes over what has no gradient
        grad_norm = clip_gradients(self.policy_parameters, optimizer_settings.max_grad_norm)
        critic_norm = clip_gradients(self.critic_parameters, optimizer_settings.max_grad_norm)
        metrics = merge(parts)
        finite = math.isfinite(grad_norm) and math.isfinite(critic_norm)
        self.num_updates += 1
        is_empty = not any(count.num_tokens for count in denominators.values())
        if finite:
            if not is_empty:  # else momentum and weight decay would move the weights for no reason
                self.optimizer.step()
            self.skipped_in_a_row = 0
        else:
            self.skipped_in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        metrics["policy/grad_norm"] = Mean(grad_norm if finite else 0.0, 1.0 if finite else 0.0)
        if self.critic_parameters:
            metrics["critic/grad_norm"] = Mean(critic_norm if finite else 0.0, 1.0 if finite else 0.0)
        metrics["policy/skipped_steps"] = Sum(0.0 if finite else 1.0)
        if is_empty:
            metrics["policy/empty_steps"] = Sum(1.0)
        metrics["policy/learning_rate"] = Last(rate)
        if self.skipped_in_a_row >= self.config.learner.max_skipped_steps:
            raise NumericalError(
                f"The loss or its gradient was not finite in {self.skipped_in_a_row} optimiser steps in a row (last gradient norm "
                f"{grad_norm}). Lower optimizer.learning_rate, or look at the dumped batches for the sample that causes it."
            )
        return StepStats(metrics=metrics, skipped=not finite)

    def _microbatches(self, batch: TrainBatch) -> Iterator[tuple[list[int], TrainBatch, Layout]]:
        """This rank's samples in parts: their rows of the batch, themselves, and how they are laid out.

        Ranks with fewer parts go on with empty ones, because every forward is collective.
        """
        settings = self.config.learner
        kind = settings.layout if self.policy.takes_masks else LayoutKind.padded
        parts = list(arrange(batch.sequences, token_budget=settings.tokens_per_microbatch, kind=kind, cost=self.policy.cost))
        if self.rank.count > 1:  # agreed on before the first forward, so that no rank's collectives meet another's
            most = torch.tensor(len(parts), device=self.device)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            parts += [([], EMPTY_LAYOUT)] * (int(most) - len(parts))
        for samples, layout in parts:
            yield samples, batch.select(samples), layout

    def _backward(
        self,
        batch: TrainBatch,
        layout: Layout,
        denominators: Mapping[str, Denominators],
        knobs: Knobs,
    ) -> dict[str, Metric]:
        statistics = self._forward(batch, layout, gradient=True)
        mask = batch.response_mask
        logprobs = scatter(statistics.logprobs, batch)
        old_logprobs = logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs
        entropy, exact, nucleus_entropy = (
            None if found is None else scatter(found, batch)
            for found in (statistics.entropy, statistics.divergence, statistics.nucleus_entropy)
        )
        values = self._values(batch, layout, statistics)
        step = self.strategy.terms(
            logprobs=logprobs,
            old_logprobs=old_logprobs,
            rollout_logprobs=batch.rollout_logprobs,
            advantages=batch.advantages,
            response_mask=mask,
            knobs=knobs,
            behaviour_logprobs=batch.rollout_logprobs if self.config.trains_on_stale else None,
            ref_logprobs=batch.ref_logprobs,
            entropy=entropy,
            nucleus_entropy=nucleus_entropy,
            old_entropy=batch.old_entropy,
            old_expected_score=batch.old_expected_score,
            turns=batch.turns,
            exact_divergence=exact,
            rewards=batch.rewards,
            values=values,
            old_values=batch.old_values,
            returns=batch.returns,
            weights=correction_of(batch),
            chosen=batch.chosen,
            blend=blend_of(batch),
            divergence_weight=batch.divergence_weight,
            tempered_mask=batch.tempered_mask,
            rehearsal_mask=batch.rehearsal_mask,
            stored_logprobs=batch.stored_logprobs,
            generator=torch.Generator().manual_seed(self._microbatch_seed()),
        )
        loss = logprobs.new_zeros(())
        shares: dict[str, Metric] = {}
        for term in step.terms:
            part = reduce(
                term.loss,
                term.mask,
                aggregation=term.aggregation,
                denominators=denominators[term.name],
                share=batch.episode_share,
            )
            loss = loss + term.coef * part
            shares[f"{term.name}/loss"] = Sum(float(part.detach()))
        if not batch.num_rows:
            # Keeps the graph, so that this rank takes part in the reduction.
            loss = loss + statistics.logprobs.sum() + (0.0 if values is None else values.sum())
        loss.backward()
        with torch.no_grad():
            return (
                shares
                | value_metrics(self.config.critic, batch, values)
                | token_metrics(
                    batch,
                    logprobs=logprobs.detach(),
                    old_logprobs=old_logprobs,
                    clipped=step.surrogate.clipped,
                    entropy=None if entropy is None else entropy.detach(),
                    exact_divergence=None if exact is None else exact.detach(),
                    divergence=self.config.divergence,
                )
            )

    def _microbatch_seed(self) -> int:
        """Of what is drawn in one microbatch: a function of its place in the run, so that a resumed run draws the same."""
        self._num_microbatches += 1
        place = (self.config.seed, self.num_updates, self.rank.index, self._num_microbatches)
        return int.from_bytes(xxhash.xxh3_64_digest(repr(place).encode()), "big") >> 1

    def measure(self, batch: TrainBatch, heat: float = 1.0) -> dict[str, Tensor]:
        """What the strategies need of the present policy about this rank's rows, at `heat` times the sampling temperature:
        fields of TrainBatch [B, T], 0 on padding, among them always old_logprobs."""

        def of(part: TrainBatch, layout: Layout) -> dict[str, Tensor]:
            found = self._forward(part, layout, gradient=False, heat=heat)
            tensors = {
                "old_logprobs": found.logprobs,
                "old_entropy": found.entropy,
                "old_expected_score": found.expected_score,
                "old_nucleus_entropy": found.nucleus_entropy,
            }
            return {name: scatter(tensor, part) for name, tensor in tensors.items() if tensor is not None}

        return self._per_token(batch, of)

    def probe(self, batch: TrainBatch) -> dict[str, Tensor]:
        """Whatever estimator trains: the divergence over the whole vocabulary at this rank's tokens, `exact`, and `logprobs`;
        [B, T], 0 on padding."""

        def of(part: TrainBatch, layout: Layout) -> dict[str, Tensor]:
            found = self._forward(part, layout, gradient=False, compares=True)
            assert found.divergence is not None
            return {"exact": scatter(found.divergence, part), "logprobs": scatter(found.logprobs, part)}

        return self._per_token(batch, of)

    def values(self, batch: TrainBatch) -> dict[str, Tensor]:
        """The critic's values of the states before this rank's tokens, as a field of TrainBatch [B, T], 0 on padding."""

        def of(part: TrainBatch, layout: Layout) -> dict[str, Tensor]:
            statistics = None if self.critic is not None else self._forward(part, layout, gradient=False)
            found = self._values(part, layout, statistics)
            assert found is not None  # nobody asks without a critic
            return {"old_values": found}

        return self._per_token(batch, of)

    def _per_token(self, batch: TrainBatch, of: Callable[[TrainBatch, Layout], dict[str, Tensor]]) -> dict[str, Tensor]:
        """Tensors [B, T] from what `of` says of every microbatch, without a gradient."""
        out: dict[str, Tensor] = {}
        with self._inference():
            for rows, part, layout in self._microbatches(batch):
                for name, values in of(part, layout).items():
                    whole = out.setdefault(name, torch.zeros(batch.response_mask.shape))
                    whole[rows, : values.shape[1]] = values
        return out

    def _values(self, batch: TrainBatch, layout: Layout, statistics: PolicyOutput | None) -> Tensor | None:
        """[B, T]; `statistics` holds them where the critic is on the policy's layers."""
        settings = self.config.critic
        if not isinstance(settings, TrainedCritic):
            return None
        if self.critic is not None:
            heads = self._run(self.critic, layout.to(self.device))
        else:
            assert statistics is not None
            assert statistics.value_heads is not None
            heads = statistics.value_heads
        return scatter(settings.value(heads), batch)

    def set_reference_head(self, head: np.ndarray, version: int = 0) -> None:
        """The reference's output head [V, H], for exact divergences from its hidden states of the same version."""
        self.reference_head = torch.from_numpy(head.copy()).to(self.device)
        self.reference_version = version

    def reset_optimizer(self) -> None:
        """Forget its moments and step counts, as before the first step."""
        self.optimizer.state.clear()

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Forwards without a backward. FSDP leaves the root's gathered (and, in bfloat16, rounded) parameters in place after
        them, and whoever reads parameters next must see the sharded float32 masters."""
        with torch.no_grad():
            yield
        for module in (self.policy, self.critic):
            if isinstance(module, FSDPModule):
                module.reshard()

    def _forward(
        self, batch: TrainBatch, layout: Layout, *, gradient: bool, heat: float = 1.0, compares: bool = False
    ) -> PolicyOutput:
        """Statistics of the batch's response tokens; entropy is always measured when learning. compares: with the reference's
        hidden states also without a gradient."""
        config = self.config
        needs = config.needs
        has_nucleus = ("nucleus_entropy" if gradient else "old_nucleus_entropy") in needs
        divergence = reference = None
        if (gradient or compares) and batch.ref_hidden is not None:
            if self.reference_head is None or not isinstance(config.divergence, Penalty):
                raise DataError("A batch carries the reference's hidden states, but the learner has no reference head.")
            if batch.ref_version is not None:
                batch.check_reference(self.reference_version)
            divergence = config.divergence
            width = torch.arange(batch.response_mask.shape[1])
            present = width < batch.response_lengths.unsqueeze(1)
            reference = ReferenceStates(hidden=batch.ref_hidden[present].to(self.device), head=self.reference_head)
        return self._run(
            self.policy,
            layout.to(self.device),
            temperature=config.rollout.temperature * heat,
            chunk_tokens=self._chunk_tokens(1 + (divergence is not None)),
            with_entropy=gradient or "old_entropy" in needs,
            entropy_gradient="entropy" in needs,
            with_expected_score=not gradient and "old_expected_score" in needs,
            nucleus=config.entropy.nucleus if has_nucleus else None,
            divergence=divergence,
            reference=reference,
        )

    def _chunk_tokens(self, buffers: int) -> int:
        return chunk_size(self.policy.vocab_size * buffers, memory_bytes=self.config.learner.head_memory_mib << 20)

    # --- memory, where engines use the same device by turns --------------------------------------------------------------

    def offload(self) -> None:
        """Weights and optimiser state to host memory; a no-op where they are there anyway."""
        self._move(torch.device("cpu"))

    def onload(self) -> None:
        """Undo `offload`."""
        self._move(self.device)

    def _move(self, device: torch.device) -> None:
        if self.device.type == "cpu":
            return
        move(self.policy, self.optimizer, device)
        if self.critic is not None:
            self.critic.to(device)
        if self.reference_head is not None:
            self.reference_head = self.reference_head.to(device)
        torch.cuda.empty_cache()  # else torch keeps the memory, and the engine cannot have it

    # --- weights out --------------------------------------------------------------------------------------------------

    def num_parts(self) -> int:
        return len(self._groups())

    def _groups(self) -> list[list[str]]:
        """Checkpoint names by layer; a tied head is its embedding and appears once, as in `named_parameters`."""
        itemsize = self._dtype.itemsize
        weights = lora.checkpoint_weights(self.policy.model)
        return layer_groups({name: weight.numel() * itemsize for name, (weight, _) in weights.items()})

    def export_part(self, index: int, version: int) -> WeightPart | None:
        """Part `index` of the weights, in the engine's dtype, on rank 0; the others take part and return None.

        Only this part is whole at a time: a full copy of a large model exists on no rank.
        """
        names = self._groups()[index]
        weights = lora.checkpoint_weights(self.policy.model)
        # A copy in any case: memory shared with a parameter would change at the next optimiser step.
        tensors = {name: merged(*weights[name]).to(self._dtype, copy=True) for name in names}
        if not self.rank.is_first:
            return None
        if index == 0:
            self._export_digests = {}
        packed = {name: pack(tensor) for name, tensor in tensors.items()}
        self._export_digests |= digests(packed)
        return WeightPart(version=version, tensors=packed)

    def manifest(self, version: int) -> Manifest:
        """Digests of what `export_part` sent since part 0."""
        return Manifest(version=version, digests=dict(self._export_digests))

    def open_transfer(self, kind: str, engines: Sequence[Handle], ranks: Sequence[int]) -> None:
        """Meet the engines, of which each receives with so many `ranks`, for `send_weights`.

        All ranks take part in gathering; rank 0 sends and drives the engines, within `rollout.deadline_s`.
        """
        from rlkit.workers.rollout.vllm_transfer import PolicySource, Sender

        self._close_transfer()
        source = PolicySource(
            self._groups(), lambda: dict(self.policy.model.named_parameters()), getattr(torch, self.config.model.dtype.value)
        )
        deadline_s = self.config.rollout.deadline_s
        self._sender = Sender(kind, source, self.rank, self.device, engines=engines, ranks=ranks, deadline_s=deadline_s)

    def send_weights(self, version: int) -> None:
        """The weights from this learner's GPUs to the engines', which serve them as `version` afterwards."""
        assert self._sender is not None, "open_transfer comes first"
        self._sender.send(version)

    def _close_transfer(self) -> None:
        if self._sender is not None:
            self._sender.close()
        self._sender = None

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """Log-probs [len - 1] of each sequence's tokens given their prefixes, at temperature 1."""
        with self._inference():
            layout = whole_sequences(sequences).to(self.device)
            statistics = self._run(self.policy, layout, temperature=1.0, chunk_tokens=self._chunk_tokens(1))
        lengths = [len(sequence) - 1 for sequence in sequences]
        return [scores.numpy() for scores in statistics.logprobs.float().cpu().split(lengths)]

    def layer_outputs(self, sequence: tuple[int, ...]) -> dict[str, np.ndarray]:
        """See `Policy.layer_outputs`."""
        outputs: dict[str, np.ndarray] = {}
        with self.policy.capturing(outputs):
            self.score([sequence])
        return outputs

    # --- checkpoints ----------------------------------------------------------------------------------------------------

    def sees(self, path: str) -> bool:
        """Whether this file is there for this process, which may run on another node than the controller that wrote it."""
        return Path(path).is_file()

    def save(self, folder: str) -> None:
        """Write the policy in Hugging Face format, tokenizer included, and under `state/` what `restore` needs of this rank.

        Adapters are merged there, and stand by themselves under `adapter/`. The folder must exist. Raises ResourceError when the
        disk refuses.
        """
        weights, adapters, dtype = {}, {}, self._dtype
        for name, weight in lora.checkpoint_weights(self.policy.model).items():
            whole = merged(*weight)
            if self.rank.is_first:
                weights[name] = whole.to(dtype).cpu()
        if isinstance(self.config.learner, LoraLearner):
            trained = ((name, parameter) for name, parameter in self.policy.model.named_parameters() if parameter.requires_grad)
            adapters = {name: full_tensor(parameter).cpu() for name, parameter in trained}
        try:
            (Path(folder) / "state").mkdir(exist_ok=True)
            if self.rank.is_first:
                self.policy.model.config.dtype = dtype
                self.policy.model.save_pretrained(folder, state_dict=weights)
                copy_tokenizer_files(self.model_folder, Path(folder))
                if adapters:
                    lora.save_adapter(Path(folder) / lora.FOLDER, self.policy.model, adapters, self.model_folder)
                counters = {"num_updates": self.num_updates, "skipped_in_a_row": self.skipped_in_a_row, "base": self._base_digest}
                (Path(folder) / "state" / "learner.json").write_text(json.dumps(counters), encoding="utf-8")
            shards = {name: local_tensor(tensor).contiguous() for name, tensor in self._state_tensors().items()}
            save_file(shards, shard_file(folder, self.rank.index, self.rank.count))
        except (OSError, SafetensorError) as error:
            raise ResourceError(f"learner rank {self.rank.index}: {error}") from error

    def restore(self, folder: str) -> None:
        """Go on from what `save` wrote, with any number of ranks: weights, optimiser state and counters as they were, bit for bit.

        What is frozen is not in the checkpoint, and comes from the run's model. Raises DataError when the checkpoint is of
        another model or optimiser, or the frozen model is not the one that was trained on.
        """
        counters = json.loads((Path(folder) / "state" / "learner.json").read_text(encoding="utf-8"))
        self.num_updates, self.skipped_in_a_row = counters["num_updates"], counters["skipped_in_a_row"]
        if self.rank.is_first and counters.get("base", "") != self._base_digest:
            raise DataError(
                f"{folder}: its adapters were trained on other weights than model.path={self.config.model.path} holds now. "
                "Put those back, or start a new run from the checkpoint, whose own weights have the adapters in them."
            )
        parameters = self._trained()
        with ExitStack() as stack, torch.no_grad():
            shards = [stack.enter_context(safe_open(file, "pt")) for file in shard_files(folder)]
            if missing := sorted(parameters.keys() - {key.partition(".")[2] for key in shards[0].keys()}):  # noqa: SIM118
                raise DataError(
                    f"{folder}: lacks {missing[0]}, which this run trains. Resume with the run's own model and learner."
                )
            for key in shards[0].keys():  # noqa: SIM118  safe_open has no iterator
                kind, _, name = key.partition(".")
                if name not in parameters:
                    raise DataError(
                        f"{folder}: holds {name}, which this run does not train. Resume with the run's own model and learner."
                    )
                parameter = parameters[name]
                parts = [shard.get_tensor(key) for shard in shards]
                if kind == "step":  # the optimiser's own counter: a number, the same on every rank
                    self.optimizer.state[parameter][kind] = parts[0]
                    continue
                value = sharded_like(parameter, torch.cat(parts))
                if kind == "parameter":
                    parameter.copy_(value)
                else:
                    self.optimizer.state[parameter][kind] = value

    def _named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Of the policy under their checkpoint names, and of the critic."""
        yield from self.policy.model.named_parameters()
        for module in (self.policy.value_heads, self.critic):
            if module is not None:
                yield from ((f"critic.{name}", parameter) for name, parameter in module.named_parameters())

    def _state_tensors(self) -> dict[str, Tensor]:
        """Name -> tensor of all that learning changes: `parameter.<name>`, and `<state>.<name>` for the optimiser's state."""
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._trained().items():
            tensors[f"parameter.{name}"] = parameter.detach()
            tensors |= {f"{kind}.{name}": value for kind, value in self.optimizer.state.get(parameter, {}).items()}
        return tensors

    def _trained(self) -> dict[str, Tensor]:
        """What the optimiser moves, by name: of the policy as its model has them, and of the critic."""
        return {name: parameter for name, parameter in self._named_parameters() if parameter.requires_grad}


def clip_gradients(parameters: Sequence[nn.Parameter], max_norm: float) -> float:
    """Their norm before; 0 where nothing has a gradient."""
    with_gradient = [parameter for parameter in parameters if parameter.grad is not None]
    if not with_gradient:
        return 0.0
    norm = torch.nn.utils.clip_grad_norm_(with_gradient, max_norm)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def move(policy: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    """Weights and the optimiser's state; its step counts stay where it keeps them."""
    policy.to(device)
    for state in optimizer.state.values():
        state |= {name: value.to(device) for name, value in state.items() if name != "step"}


def shard_file(folder: str, index: int, count: int) -> Path:
    return Path(folder) / "state" / f"learner-{index}-of-{count}.safetensors"


def shard_files(folder: str) -> list[Path]:
    """Of every rank that saved, in order."""
    found = list((Path(folder) / "state").glob("learner-*-of-*.safetensors"))
    return sorted(found, key=lambda file: int(file.name.split("-")[1]))


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(parameter: Tensor, whole: Tensor) -> Tensor:
    """`whole` [the parameter's global shape] laid out as the parameter is: this rank's rows of it."""
    if not isinstance(parameter, DTensor):
        return whole.to(parameter.device)
    return distribute_tensor(whole.to(parameter.device), parameter.device_mesh, parameter.placements)


def full_tensor(parameter: Tensor) -> Tensor:
    """The whole parameter, detached; collective when it is sharded."""
    detached = parameter.detach()
    return detached.full_tensor() if isinstance(detached, DTensor) else detached


def merged(parameter: Tensor, adapter: lora.Adapter | None) -> Tensor:
    """The whole checkpoint tensor, adapter included; collective when it is sharded."""
    whole = full_tensor(parameter)
    if adapter is None:
        return whole
    return lora.merge(whole, down=full_tensor(adapter.down), up=full_tensor(adapter.up), scaling=adapter.scaling)


def scatter(values: Tensor, batch: TrainBatch) -> Tensor:
    """[n] values of the response tokens, row by row -> [B, T], 0 on padding; differentiable."""
    width = torch.arange(batch.response_mask.shape[1])
    present = width < batch.response_lengths.unsqueeze(1)
    return values.new_zeros(present.shape).masked_scatter(present.to(values.device), values).cpu()


def correction_of(batch: TrainBatch) -> Weights | None:
    """What a correction said of these tokens when it was asked about the whole step."""
    if batch.policy_weight is None or batch.policy_mask is None:
        return None
    return Weights(weight=batch.policy_weight, keep=batch.policy_mask)


def blend_of(batch: TrainBatch) -> Blend | None:
    """The second advantage of these rows, if there is one."""
    if batch.prompt_advantages is None or batch.local_weight is None:
        return None
    return Blend(advantages=batch.prompt_advantages, weight=batch.local_weight)


def make_optimizer(
    settings: Optimizer, policy: list[nn.Parameter], critic: list[nn.Parameter], critic_settings: Critic
) -> torch.optim.Optimizer:
    """The policy's parameters are its first group, and a critic's its second, with a learning rate of their own."""
    groups: list[dict] = [{"params": policy, "lr": settings.learning_rate}]
    if isinstance(critic_settings, TrainedCritic):
        groups.append({"params": critic, "lr": critic_settings.learning_rate})
    if isinstance(settings, AdamW):
        return torch.optim.AdamW(
            groups, betas=(settings.beta1, settings.beta2), eps=settings.eps, weight_decay=settings.weight_decay, fused=True
        )
    return torch.optim.SGD(groups)


def learning_rate(settings: Optimizer, update: int, total_updates: int) -> float:
    """Of optimiser step `update` (from 0): linear warm-up, then the schedule down to `final_fraction`."""
    if update < settings.warmup_steps:
        return settings.learning_rate * (update + 1) / settings.warmup_steps
    span = max(total_updates - settings.warmup_steps - 1, 1)
    progress = min((update - settings.warmup_steps) / span, 1.0)
    match settings.schedule:
        case Schedule.constant:
            fraction = 1.0
        case Schedule.linear:
            fraction = 1 - (1 - settings.final_fraction) * progress
        case Schedule.cosine:
            fraction = settings.final_fraction + (1 - settings.final_fraction) * (1 + math.cos(math.pi * progress)) / 2
    return settings.learning_rate * fraction


def token_metrics(
    batch: TrainBatch,
    *,
    logprobs: Tensor,
    old_logprobs: Tensor,
    clipped: Tensor,
    entropy: Tensor | None,
    exact_divergence: Tensor | None,
    divergence: Divergence,
) -> dict[str, Metric]:
    """What one microbatch's tokens say. All tensors [B, T], without gradient."""
    mask = batch.response_mask
    count = float(mask.sum())
    if not count:
        return {}

    def mean(x: Tensor) -> Mean:
        return Mean(float(x[mask].double().sum()), count)

    log_ratio = logprobs - old_logprobs
    ratio = log_ratio.exp()
    gap = logprobs - batch.rollout_logprobs
    metrics: dict[str, Metric] = {
        "policy/clip_fraction": mean(clipped.float()),
        "policy/approx_kl_k3": mean(ratio - 1 - log_ratio),
        "policy/ratio_max": Max(float(ratio[mask].max())),
        "policy/ratio_min": Min(float(ratio[mask].min())),
        # Of the engine from the learner. With several optimiser steps per batch the later ones include the policy's movement.
        "mismatch/mean": mean(gap.abs()),
        "mismatch/max": Max(float(gap[mask].abs().max())),
        "mismatch/k3": mean(gap.exp() - 1 - gap),
        "mismatch/exp_mean": mean(gap.abs().exp()),
    }
    if entropy is not None:
        metrics["entropy/mean"] = mean(entropy)
    if batch.ref_logprobs is not None:
        log_ref_ratio = logprobs - batch.ref_logprobs
        metrics["kl/ref_token_mean"] = mean(log_ref_ratio)
        metrics["kl/ref_k3"] = mean((-log_ref_ratio).exp() - 1 + log_ref_ratio)
        rows = mask.any(-1)
        sequences = float(rows.sum() if batch.episode_share is None else batch.episode_share[rows].double().sum())
        metrics["kl/ref_sequence"] = Mean(float(log_ref_ratio.masked_fill(~mask, 0.0).double().sum()), sequences)
        metrics["divergence/clamp_fraction"] = mean((log_ref_ratio.abs() > MAX_LOG_RATIO).float())
        if isinstance(divergence, FDivergence):
            metrics["divergence/value"] = mean(divergence.value(log_ref_ratio))
    if exact_divergence is not None:
        metrics["divergence/exact"] = mean(exact_divergence)
    return metrics


def value_metrics(critic: Critic, batch: TrainBatch, values: Tensor | None) -> dict[str, Metric]:
    """How well the critic foresees returns; values [B, T]."""
    if not isinstance(critic, TrainedCritic) or values is None or batch.returns is None or batch.old_values is None:
        return {}
    mask, count = batch.response_mask, float(batch.response_mask.sum())
    given = {"values": values.detach(), "returns": batch.returns, "response_mask": mask}
    clipped = critic.vf_clipped(old_values=batch.old_values, **given)
    return {
        "critic/explained_variance": ExplainedVariance.of(**given),
        "critic/vf_clipfrac": Mean(float(clipped.sum()), count),
        "critic/value_mean": Mean(float(values.detach()[mask].sum()), count),
        "critic/return_mean": Mean(float(batch.returns[mask].sum()), count),
    }
