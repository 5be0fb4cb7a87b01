"""Generation with transformers behind the engine interface: where vLLM cannot be installed, and for fast tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import numpy as np
import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import DynamicCache, LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.cache_utils import DynamicLayer

from rlkit.data.layout import whole_sequences
from rlkit.data.models.loading import load_model
from rlkit.data.models.policy import Policy
from rlkit.types import Completion, FinishReason, SampleRequest, SamplingSpec
from rlkit.workers.rollout.engine import EngineSpec, expected_tensors
from rlkit.workers.weight_sync import Manifest, PackedTensor, WeightPart, check_complete, digests, unpack


class SeededSampling:
    """Samples row by row from each row's own generator: a sample depends on its seed alone, not on what it is batched with.

    The largest of (log-prob + Gumbel noise) is an exact sample of the distribution.
    """

    def __init__(self, seeds: Sequence[int], sampling: SamplingSpec):
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature = sampling.temperature
        self._warpers = LogitsProcessorList()
        if sampling.top_k > 0:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p > 0:
            self._warpers.append(MinPLogitsWarper(sampling.min_p))

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """[R, V], one for each of `rows` -> tokens and their log-probs, [R] each."""
        # None of the warpers looks at the tokens before.
        kept = self._warpers(cast(LongTensor, None), cast(FloatTensor, logits.float() / self._temperature))
        logprobs = kept.log_softmax(-1)
        uniform = torch.stack([torch.rand(logprobs.shape[1], generator=self._generators[row]) for row in rows])
        choice = (logprobs - torch.log(-torch.log(uniform.clamp(min=1e-20)))).argmax(-1)
        return choice, logprobs.gather(1, choice.unsqueeze(1)).squeeze(1)


class GrowingLayer(DynamicLayer):
    """Keys and values with room for the tokens to come, where `DynamicLayer` copies all of them at every token."""

    _room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before = self.get_seq_length()
        after = before + key_states.shape[-2]
        if self._room is None or self._room[0].shape[-2] < after:
            self._room = _widened(self.keys, key_states, 2 * after), _widened(self.values, value_states, 2 * after)
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, before:after] = new
        self.keys, self.values = (room[:, :, :after] for room in self._room)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        length = self.get_seq_length()
        if self._room is not None:
            self._room = self._room[0][indices], self._room[1][indices]
            self.keys, self.values = (room[:, :, :length] for room in self._room)


def _widened(held: Tensor | None, like: Tensor, width: int) -> Tensor:
    """A buffer [R, heads, width, D] that begins with what is held."""
    rows, heads, _, size = like.shape
    room = like.new_empty(rows, heads, width, size)
    if held is not None and held.numel():
        room[:, :, : held.shape[-2]] = held
    return room


class TransformersRolloutEngine:
    """Implements `Engine`."""

    def __init__(self, spec: EngineSpec):
        self.version = -1
        self._batch_size = spec.max_num_seqs
        self._expected_names = frozenset(expected_tensors(spec.model_path))
        self._staged: dict[str, PackedTensor] = {}
        self._model = load_model(
            spec.model_path, dtype=getattr(torch, spec.dtype), trust_remote_code=spec.trust_remote_code
        ).requires_grad_(False)
        self._policy = Policy(self._model)

    def generate(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> list[Completion]:
        completions = []
        for start in range(0, len(requests), self._batch_size):
            completions += self._generate_batch(requests[start : start + self._batch_size], sampling)
        return completions

    def advance(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> list[Completion]:
        """Whole: nothing is ever under way between two calls."""
        return self.generate(requests, sampling)

    def abort(self) -> None:
        """See `advance`."""

    @torch.no_grad()
    def _generate_batch(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> list[Completion]:
        """Token by token, all requests together; one that has ended leaves the batch."""
        width = max(len(request.prompt_ids) for request in requests)
        input_ids = torch.zeros(len(requests), width, dtype=torch.int64)
        mask = torch.ones(len(requests), width + sampling.max_tokens, dtype=torch.int64)
        for row, request in enumerate(requests):  # left-padded: generation continues at the right end
            input_ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            mask[row, : width - len(request.prompt_ids)] = 0
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = bool((mask == 0).any())
        cache = DynamicCache(config=self._model.config)
        cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
        sampler, stops = (
            SeededSampling([request.seed for request in requests], sampling),
            torch.tensor(sampling.stop_token_ids, dtype=torch.int64),
        )
        limits = torch.tensor([sampling.max_tokens if request.max_tokens is None else request.max_tokens for request in requests])
        chosen = torch.zeros(len(requests), sampling.max_tokens, dtype=torch.int64)
        logprobs, lengths = torch.zeros(chosen.shape), torch.zeros(len(requests), dtype=torch.int64)
        rows, start = torch.arange(len(requests)), 0
        for place in range(sampling.max_tokens):
            end = width + place
            logits = self._model(
                input_ids=input_ids,
                attention_mask=mask[rows, :end] if padded else None,
                position_ids=positions[rows, start:end],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits[:, -1]
            tokens, logprobs[rows, place] = sampler(logits, rows.tolist())
            chosen[rows, place], lengths[rows], start = tokens, place + 1, end
            going = ~torch.isin(tokens, stops) & (place + 1 < limits[rows])
            if not going.all():
                rows, tokens = rows[going], tokens[going]
                if not len(rows):
                    break
                cache.batch_select_indices(going.nonzero().squeeze(-1))
            input_ids = tokens.unsqueeze(1)
        return [
            Completion(
                sample_id=request.sample_id,
                response_ids=chosen[row, :length].numpy(),
                rollout_logprobs=logprobs[row, :length].numpy(),
                policy_version=np.full(length, self.version, dtype=np.int64),
                finish_reason=FinishReason.stop if int(chosen[row, length - 1]) in sampling.stop_token_ids else FinishReason.length,
            )
            for row, (request, length) in enumerate(zip(requests, lengths.tolist(), strict=True))
        ]

    @torch.no_grad()
    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        lengths = [len(sequence) - 1 for sequence in sequences]
        statistics = self._policy(whole_sequences(sequences), temperature=1.0, chunk_tokens=max(sum(lengths), 1))
        return [scores.numpy() for scores in statistics.logprobs.split(lengths)]

    def receive(self, part: WeightPart) -> None:
        self._staged.update(part.tensors)

    @torch.no_grad()
    def commit(self, manifest: Manifest) -> None:
        staged, self._staged = self._staged, {}
        check_complete(manifest, digests(staged), self._expected_names)
        parameters = dict(self._model.named_parameters())
        for name, packed in staged.items():
            parameters[name].copy_(unpack(packed))
        self.version = manifest.version

    def layer_outputs(self, sequence: tuple[int, ...]) -> dict[str, np.ndarray]:
        outputs: dict[str, np.ndarray] = {}
        with self._policy.capturing(outputs):
            self.score([sequence])
        return outputs

    def sleep(self) -> None:
        """Nothing to give back on the CPU."""

    def wake(self, what: Literal["weights", "kv_cache"]) -> None:
        """See `sleep`."""
