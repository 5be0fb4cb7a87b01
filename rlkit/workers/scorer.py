"""A frozen model that scores given tokens: the reference, later a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlkit.core.logprobs import chunk_size
from rlkit.data.collate import sequences_of
from rlkit.data.layout import LayoutKind, arrange
from rlkit.data.models.loading import load_model
from rlkit.data.models.policy import Policy
from rlkit.types import Rollout


@dataclass(frozen=True, kw_only=True, slots=True)
class ScorerSpec:
    """What a scorer is built from; equal specs can share one."""

    model_path: str  # a folder in Hugging Face format
    dtype: str
    trust_remote_code: bool
    tokens_per_microbatch: int
    head_memory_mib: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Per rollout, in order; what was not asked for is None."""

    logprobs: list[np.ndarray]  # each [T] float32, at the learner's temperature
    hidden: list[np.ndarray] | None  # each [T, H] float32, for exact divergences together with `head`
    ref_version: int


class Scorer:
    """Holds one frozen model."""

    def __init__(self, spec: ScorerSpec, *, num_threads: int | None = None):
        if num_threads:
            torch.set_num_threads(num_threads)
        self.spec = spec
        dtype = getattr(torch, spec.dtype)
        self.policy = Policy(load_model(spec.model_path, dtype=dtype, trust_remote_code=spec.trust_remote_code))
        self.policy.requires_grad_(False)
        self.ref_version = 0

    @torch.no_grad()
    def score(self, rollouts: Sequence[Rollout], *, temperature: float, with_hidden: bool) -> Scores:
        """Log-probs of the rollouts' own tokens, and on request the hidden states that the head turns into whole distributions."""
        kind = LayoutKind.auto if self.policy.takes_masks else LayoutKind.padded
        budget, sequences = self.spec.tokens_per_microbatch, sequences_of(rollouts)
        chunk_tokens = chunk_size(self.policy.vocab_size, memory_bytes=self.spec.head_memory_mib << 20)
        logprobs: dict[int, np.ndarray] = {}
        hidden: dict[int, np.ndarray] = {}
        for samples, layout in arrange(sequences, token_budget=budget, kind=kind, cost=self.policy.cost):
            sizes = sequences.response_lengths[samples].tolist()
            statistics = self.policy(layout, temperature=temperature, chunk_tokens=chunk_tokens)
            for sample, values in zip(samples, statistics.logprobs.split(sizes), strict=True):
                logprobs[sample] = values.numpy()
            if with_hidden:
                for sample, values in zip(samples, self.policy.hidden_states(layout).split(sizes), strict=True):
                    hidden[sample] = values.float().numpy()
        return Scores(
            logprobs=[logprobs[row] for row in range(len(rollouts))],
            hidden=[hidden[row] for row in range(len(rollouts))] if with_hidden else None,
            ref_version=self.ref_version,
        )

    def head(self) -> np.ndarray:
        """[V, H] float32: the output head that belongs to the hidden states."""
        return self.policy.head.weight.detach().float().numpy()
