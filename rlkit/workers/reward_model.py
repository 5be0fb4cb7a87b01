"""A reward model in a worker of its own: scores texts in its own tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlkit.data.models.reward_model import RewardModel, ScoredText
from rlkit.settings import ModelKind


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardModelSpec:
    """What it is built from; equal specs can share one."""

    model_path: str  # a folder that `find_reward_model` returned
    kind: ModelKind
    dtype: str
    trust_remote_code: bool
    tokens_per_microbatch: int
    max_rows: int


class RewardModelWorker:
    """Holds one reward model."""

    def __init__(self, spec: RewardModelSpec):
        self._spec = spec
        self._model = RewardModel.load(
            spec.model_path, spec.kind, dtype=getattr(torch, spec.dtype), trust_remote_code=spec.trust_remote_code
        )

    def score(self, texts: Sequence[ScoredText]) -> list[np.ndarray]:
        """For each text its scores, float32: one of an outcome model, one for each step of a process model."""
        return self._model.score(texts, tokens_per_microbatch=self._spec.tokens_per_microbatch, max_rows=self._spec.max_rows)
