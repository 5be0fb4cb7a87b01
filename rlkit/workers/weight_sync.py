"""Learner weights -> engines. A sync is not done until it has been checked.

Two checks run after every sync, and a third names the culprit when one of them fails:

(a) completeness and bytes: the names that arrived are the names the engine's own checkpoint has, and the digest of every
    tensor's bytes is the learner's. Catches lost, stale, torn and reordered transfers whatever the size of the update.
(b) behaviour: the engine's log-probs of probe sequences are the learner's. Catches what bytes cannot show: a tensor that
    arrived but did not reach the computation, such as a repacked copy of a tied output head.
(c) on failure, the outputs of every layer on a probe, compared in order: the first that differs is where to look.

How the weights travel is a `Transport`. (a) is as it says over host memory. The native transports (`native_transfer.py`) digest no
bytes: names, shapes and dtypes are checked before anything is sent, and (b) after.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import xxhash
from torch import Tensor

from rlkit.errors import SyncError


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedTensor:
    """A tensor as raw bytes: numpy crosses processes without a copy, and bfloat16 has no numpy type."""

    dtype: str  # of torch, such as "bfloat16"
    shape: tuple[int, ...]
    data: np.ndarray  # [bytes] uint8, possibly read-only


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightPart:
    """Some whole layers of one version. Parts bound the memory that a sync needs on both sides."""

    version: int
    tensors: dict[str, PackedTensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a complete version consists of: checkpoint name -> digest of its bytes, as the learner sent them."""

    version: int
    digests: dict[str, str]


def pack(tensor: Tensor) -> PackedTensor:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return PackedTensor(
        dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape), data=flat.view(torch.uint8).numpy()
    )


def unpack(packed: PackedTensor) -> Tensor:
    """A tensor over the same memory, which may be read-only: copy from it, never write to it."""
    data = packed.data if packed.data.flags.writeable else packed.data.copy()
    return torch.from_numpy(data).view(getattr(torch, packed.dtype)).view(packed.shape)


def digest(packed: PackedTensor) -> str:
    """Of bytes, type and shape. Against mistakes, not against people: a cryptographic hash would take half of a sync's time."""
    return f"{packed.dtype}{list(packed.shape)}:{xxhash.xxh3_128_hexdigest(packed.data.data)}"


def digests(tensors: Mapping[str, PackedTensor]) -> dict[str, str]:
    return {name: digest(packed) for name, packed in tensors.items()}


PART_BYTES = 64 << 20  # of small layers that travel together: each part is a message


def layer_groups(sizes: Mapping[str, int]) -> list[list[str]]:
    """Checkpoint name -> bytes; the names grouped by decoder layers, in the model's order. What is of no layer comes first.

    Engines rebuild a layer once all of it has arrived, so a layer's tensors travel together.
    """
    layers: dict[int, list[str]] = {}
    for name in sizes:
        match = re.search(r"\blayers\.(\d+)\.", name)
        layers.setdefault(int(match.group(1)) if match else -1, []).append(name)
    groups: list[list[str]] = []
    room = 0
    for _, names in sorted(layers.items()):
        size = sum(sizes[name] for name in names)
        if not groups or size > room:
            groups.append([])
            room = PART_BYTES
        groups[-1] += names
        room -= size
    return groups


def check_complete(
    manifest: Manifest, received: Mapping[str, str], expected_names: frozenset[str], *, receiver: str = "the engine"
) -> None:
    """Check (a). `received`: name -> digest of what arrived. Raises SyncError naming the first offender."""
    for title, names in ((receiver, frozenset(received)), ("the manifest", frozenset(manifest.digests))):
        if missing := sorted(expected_names - names):
            raise SyncError(
                f"Weight sync {manifest.version}: {title} got {len(names)} tensors and lacks {len(missing)} of the "
                f"{len(expected_names)} in the model's checkpoint, first {missing[0]}."
            )
        if extra := sorted(names - expected_names):
            raise SyncError(f"Weight sync {manifest.version}: {title} got {extra[0]}, which the model's checkpoint does not have.")
    for name, found in received.items():
        if found != manifest.digests[name]:
            raise SyncError(f"Weight sync {manifest.version}: the bytes of {name} are not those that the learner sent.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """How far engine and learner may be apart on a probe."""

    max_abs: float  # |difference| of one token's log-prob, see `gaps_between`
    mean_exp_abs: float  # mean of exp|difference|
    layer: float  # mean relative difference of a layer's output, when looking for the culprit


# float32 engines and learners agree to 3e-5, so 1e-4 is a real gate. In bfloat16 the two round differently, most on tokens that
# the model finds unlikely, as random ones and a chat template's are: over 25 syncs of SmolLM2-135M the probes were at 1.05 to
# 1.12, the tokens it sampled at 1.01 to 1.04 (`mismatch/exp_mean`). A stale output head of that model is 0.23 off in the mean,
# 1.26 or more. So this gate finds gross mistakes only; it is (a) that finds any, whatever the size of the update.
TOLERANCES = {
    "float32": Tolerance(max_abs=1e-4, mean_exp_abs=1.0001, layer=1e-4),
    "bfloat16": Tolerance(max_abs=float("inf"), mean_exp_abs=1.2, layer=0.05),
}


FULL_SCALE = 10.0  # nats


def gaps_between(engine: Sequence[np.ndarray], learner: Sequence[np.ndarray]) -> np.ndarray:
    """|engine - learner| of every token's log-prob, [n]; beyond FULL_SCALE nats relative to that.

    Rounding grows with the logits: late in training a random token is at -40, where both are right to 2e-4 only.
    """
    theirs, mine = np.concatenate(engine), np.concatenate(learner)
    return np.abs(theirs - mine) / np.maximum(np.abs(mine) / FULL_SCALE, 1.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncReport:
    """What a sync cost and how well it matched."""

    version: int
    sync_s: float
    check_s: float
    max_abs: float  # the largest gap over the probes, over all engines
    mean_exp_abs: float


class LearnerSide(Protocol):
    """What `sync_weights` asks of the learner; every call may raise WorkerError."""

    def num_parts(self) -> int: ...
    def export_part(self, index: int, version: int) -> Any: ...
    def manifest(self, version: int) -> Manifest: ...
    def score(self, sequences: Sequence[tuple[int, ...]]) -> list[np.ndarray]: ...
    def layer_outputs(self, sequence: tuple[int, ...]) -> dict[str, np.ndarray]: ...


class EngineSide(Protocol):
    """What it asks of all engines together."""

    def receive(self, part: Any) -> None: ...
    def commit(self, manifest: Manifest) -> None: ...
    def score_each(self, sequences: Sequence[tuple[int, ...]]) -> list[list[np.ndarray]]: ...
    def layer_outputs(self, engine: int, sequence: tuple[int, ...]) -> dict[str, np.ndarray]: ...


class Transport(Protocol):
    """How weights travel from the learner to the engines."""

    def send(self, version: int) -> None:
        """Afterwards every engine serves what it got as `version`. Check (a) is the engine's own: raises SyncError where it fails,
        and WorkerError where a component does."""
        ...


@dataclass(frozen=True, slots=True)
class HostTransport:
    """Implements `Transport` over host memory, some layers at a time. It works everywhere, and every byte is digested."""

    learner: LearnerSide
    engines: EngineSide

    def send(self, version: int) -> None:
        for index in range(self.learner.num_parts()):
            self.engines.receive(self.learner.export_part(index, version))
        self.engines.commit(self.learner.manifest(version))


def sync_weights(
    learner: LearnerSide,
    engines: EngineSide,
    *,
    version: int,
    probes: Sequence[tuple[int, ...]],
    tolerance: Tolerance,
    transport: Transport | None = None,
) -> SyncReport:
    """Bring every engine to the learner's weights, and prove it. Raises SyncError naming what differs.

    `transport`: over host memory when it is not given.
    """
    began = time.monotonic()
    expected = learner.score(probes)  # before the transfer: by turns on one device, it is the engine's turn after it
    start = time.monotonic()
    (transport or HostTransport(learner, engines)).send(version)
    sent = time.monotonic()
    max_abs, mean_exp_abs = check_behaviour(
        learner, engines, version=version, probes=probes, tolerance=tolerance, expected=expected
    )
    return SyncReport(
        version=version,
        sync_s=sent - start,
        check_s=start - began + time.monotonic() - sent,
        max_abs=max_abs,
        mean_exp_abs=mean_exp_abs,
    )


def check_behaviour(
    learner: LearnerSide,
    engines: EngineSide,
    *,
    version: int,
    probes: Sequence[tuple[int, ...]],
    tolerance: Tolerance,
    expected: Sequence[np.ndarray] | None = None,
) -> tuple[float, float]:
    """Checks (b) and (c). Returns the largest |engine - learner| log-prob over all engines, and the mean of its exp.

    `expected`: the learner's scores of the probes, where they are known already.
    """
    mine = learner.score(probes) if expected is None else expected
    gaps = []
    for number, scores in enumerate(engines.score_each(probes)):
        gap = gaps_between(scores, mine)
        max_abs, mean_exp_abs = float(gap.max()), float(np.exp(gap).mean())
        if not (max_abs <= tolerance.max_abs and mean_exp_abs <= tolerance.mean_exp_abs):
            place = first_difference(
                learner.layer_outputs(probes[0]), engines.layer_outputs(number, probes[0]), allowed=tolerance.layer
            )
            raise SyncError(
                f"Weight sync {version}: engine {number}'s log-probs differ from the learner's by {max_abs:.2g} at most "
                f"(allowed {tolerance.max_abs:.2g}), mean exp|difference| {mean_exp_abs:.4f} (allowed "
                f"{tolerance.mean_exp_abs:.4f}); first difference: {place}. The engine does not hold the learner's weights, "
                "and nothing was sampled from it."
            )
        gaps.append((max_abs, mean_exp_abs))
    return max(gap[0] for gap in gaps), max(gap[1] for gap in gaps)


def first_difference(learner: dict[str, np.ndarray], engine: dict[str, np.ndarray], *, allowed: float) -> str:
    """The first layer, in the order of computation, whose mean relative difference is above `allowed`; else the output head.

    The learner does not run the last token, which predicts nothing.
    """
    for name, mine in learner.items():
        relative = float(np.abs(engine[name][: len(mine)] - mine).mean() / (np.abs(mine).mean() + 1e-12))
        if not relative <= allowed:
            return f"{name} (mean relative difference {relative:.2g})"
    return "the final norm or lm_head (every layer before them agrees)"
