"""A frozen model that scores given tokens: the reference, later a teacher."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlkit.core.logprobs import chunk_size
from rlkit.data.collate import pad_rows, plan_microbatches
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
        lengths = torch.tensor([len(r.prompt_ids) + len(r.response_ids) for r in rollouts], dtype=torch.int64)
        chunk_tokens = chunk_size(self.policy.vocab_size, memory_bytes=self.spec.head_memory_mib << 20)
        logprobs: dict[int, np.ndarray] = {}
        hidden: dict[int, np.ndarray] = {}
        for rows in plan_microbatches(lengths, token_budget=self.spec.tokens_per_microbatch):
            part = [rollouts[row] for row in rows]
            batch = {
                "input_ids": pad_rows([[*r.prompt_ids, *r.response_ids.tolist()] for r in part], torch.int64),
                "prompt_lengths": torch.tensor([len(r.prompt_ids) for r in part]),
                "response_lengths": torch.tensor([len(r.response_ids) for r in part]),
            }
            sizes = batch["response_lengths"].tolist()
            statistics = self.policy(**batch, temperature=temperature, chunk_tokens=chunk_tokens)
            for row, values in zip(rows, statistics.logprobs.split(sizes), strict=True):
                logprobs[row] = values.numpy()
            if with_hidden:
                for row, values in zip(rows, self.policy.hidden_states(**batch).split(sizes), strict=True):
                    hidden[row] = values.float().numpy()
        return Scores(
            logprobs=[logprobs[row] for row in range(len(rollouts))],
            hidden=[hidden[row] for row in range(len(rollouts))] if with_hidden else None,
            ref_version=self.ref_version,
        )

    def head(self) -> np.ndarray:
        """[V, H] float32: the output head that belongs to the hidden states."""
        return self.policy.head.weight.detach().float().numpy()
