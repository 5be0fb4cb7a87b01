"""transformers' own generation behind the engine interface: where vLLM cannot be installed, and for fast tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import numpy as np
import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import LogitsProcessor, LogitsProcessorList, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from rlkit.data.layout import whole_sequences
from rlkit.data.models.loading import load_model
from rlkit.data.models.policy import Policy
from rlkit.types import Completion, FinishReason, SampleRequest, SamplingSpec
from rlkit.workers.rollout.engine import EngineSpec, expected_tensors
from rlkit.workers.weight_sync import Manifest, PackedTensor, WeightPart, check_complete, digests, unpack


class SeededSampling(LogitsProcessor):
    """Samples row by row from each row's own generator, inside greedy generation.

    The largest of (log-prob + Gumbel noise) is an exact sample of the distribution. `generate` draws from the global generator
    for the whole batch, so there a sample would depend on what it is batched with; here it depends on its seed alone.
    """

    def __init__(self, seeds: Sequence[int], sampling: SamplingSpec, prompt_width: int):
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self._temperature = sampling.temperature
        self._warpers = LogitsProcessorList()
        if sampling.top_k > 0:
            self._warpers.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            self._warpers.append(TopPLogitsWarper(sampling.top_p))
        if sampling.min_p > 0:
            self._warpers.append(MinPLogitsWarper(sampling.min_p))
        self._prompt_width = prompt_width
        self.chosen: list[Tensor] = []  # per position, [B]: the token that greedy generation will pick
        self.logprobs: list[Tensor] = []  # per position, [B]: its log-prob

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        logits = self._warpers(cast(LongTensor, input_ids), cast(FloatTensor, scores.float() / self._temperature))
        logprobs = logits.log_softmax(-1)
        uniform = torch.stack([torch.rand(logprobs.shape[1], generator=generator) for generator in self._generators])
        noisy = logprobs - torch.log(-torch.log(uniform.clamp(min=1e-20)))
        choice = noisy.argmax(-1)
        self.chosen.append(choice)
        self.logprobs.append(logprobs.gather(1, choice.unsqueeze(1)).squeeze(1))
        return noisy


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
        """Whole: `generate` cannot be left and entered again, so nothing is ever under way between two calls."""
        return self.generate(requests, sampling)

    def abort(self) -> None:
        """See `advance`."""

    @torch.no_grad()
    def _generate_batch(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> list[Completion]:
        width = max(len(request.prompt_ids) for request in requests)
        input_ids = torch.zeros(len(requests), width, dtype=torch.int64)
        attention_mask = torch.zeros_like(input_ids)
        for row, request in enumerate(requests):  # left-padded: generation continues at the right end
            input_ids[row, width - len(request.prompt_ids) :] = torch.tensor(request.prompt_ids)
            attention_mask[row, width - len(request.prompt_ids) :] = 1
        sampler = SeededSampling([request.seed for request in requests], sampling, width)
        self._model.generate(  # pyright: ignore[reportCallIssue]
            input_ids=input_ids,
            attention_mask=attention_mask,
            do_sample=False,
            max_new_tokens=sampling.max_tokens,
            eos_token_id=list(sampling.stop_token_ids),
            pad_token_id=0,
            logits_processor=LogitsProcessorList([sampler]),
        )
        chosen, logprobs = torch.stack(sampler.chosen, 1), torch.stack(sampler.logprobs, 1)
        return [self._completion(request, chosen[row], logprobs[row], sampling) for row, request in enumerate(requests)]

    def _completion(self, request: SampleRequest, chosen: Tensor, logprobs: Tensor, sampling: SamplingSpec) -> Completion:
        stops = torch.isin(chosen, torch.tensor(sampling.stop_token_ids)).nonzero()
        stopped = len(stops) > 0
        length = int(stops[0]) + 1 if stopped else len(chosen)
        return Completion(
            sample_id=request.sample_id,
            response_ids=chosen[:length].numpy(),
            rollout_logprobs=logprobs[:length].numpy(),
            policy_version=np.full(length, self.version, dtype=np.int64),
            finish_reason=FinishReason.stop if stopped else FinishReason.length,
        )

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
