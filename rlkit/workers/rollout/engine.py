"""The one interface of every rollout engine, and what engines share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from rlkit.data.models.loading import checkpoint_shapes
from rlkit.errors import ResourceError
from rlkit.types import Completion, SampleRequest, SamplingSpec
from rlkit.workers.weight_sync import Manifest, WeightPart


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSpec:
    """What an engine is built from. Equal specs can share one engine, whatever weights it holds at the moment."""

    kind: str  # of ENGINE_CLASSES in controller/fleet.py
    model_path: str  # a folder in Hugging Face format
    dtype: str
    trust_remote_code: bool
    max_model_tokens: int
    max_num_seqs: int
    kv_cache_mib: int = 0
    enforce_eager: bool = True
    shares_device: bool = False  # with a learner, by turns: it must be able to sleep
    device_share: float = 1.0  # of each device, where there are any
    tensor_parallel_size: int = 1
    weight_transport: str = "host"  # or one of vLLM's back ends


class Engine(Protocol):
    """Token ids in, token ids out."""

    version: int  # policy version of the weights it serves; -1 before the first sync

    def generate(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> list[Completion]:
        """One response per request, in order. All are submitted before the first token is sampled."""
        ...

    def advance(self, requests: Sequence[SampleRequest], sampling: SamplingSpec) -> list[Completion]:
        """Take these samples in beside those under way, work for a moment, and return what is finished, which may be nothing.

        A weight sync between two calls is seen by the samples under way: their later tokens carry the new version.
        """
        ...

    def abort(self) -> None:
        """Forget the samples under way."""
        ...

    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
        """Log-probs [len - 1] float32 of each sequence's tokens given their prefixes, at temperature 1."""
        ...

    def receive(self, part: WeightPart) -> None:
        """Stage one part of the next version. The engine goes on serving the old one."""
        ...

    def commit(self, manifest: Manifest) -> None:
        """Check that the staged parts are complete, load them and drop every cache made by older weights."""
        ...

    def layer_outputs(self, sequence: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Output [len, H] of the embedding and of every decoder layer, to find where a failed sync went wrong."""
        ...

    def sleep(self) -> None:
        """Give the accelerator's memory back, weights to host memory, caches to nowhere; a no-op where there is none."""
        ...

    def wake(self, what: Literal["weights", "kv_cache"]) -> None:
        """Take the memory again: for the weights, which may be updated from then on, or for the cache, to generate."""
        ...


def expected_tensors(model_path: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes that a complete sync must bring, read from the model's own checkpoint.

    Taken from the files and not from the learner, so that a learner that forgets a tensor cannot vouch for itself. A tied
    output head is the embedding, and is expected once.
    """
    shapes = checkpoint_shapes(model_path)
    if not shapes:
        raise ResourceError(f"model.path={model_path}: no *.safetensors file there. Save the model with safetensors.")
    config = json.loads((Path(model_path) / "config.json").read_text())
    if config.get("tie_word_embeddings", False):
        shapes.pop("lm_head.weight", None)
    return shapes
