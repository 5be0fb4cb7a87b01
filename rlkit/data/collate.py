"""Rollouts -> TrainBatch, and TrainBatch -> microbatches under a token budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from rlkit.types import FinishReason, Origin, Rollout, Sequences, TrainBatch


def pad_rows(rows: Sequence[np.ndarray | Sequence[int]], dtype: torch.dtype, *, width: int | None = None) -> Tensor:
    """[B, width], right-padded with 0, which is finite and a valid token id."""
    width = max((len(row) for row in rows), default=0) if width is None else width
    out = torch.zeros(len(rows), width, dtype=dtype)
    for index, row in enumerate(rows):
        out[index, : len(row)] = torch.tensor(np.array(row), dtype=dtype)  # a copy: what Ray hands over is read-only
    return out


def response_mask(rollouts: Sequence[Rollout]) -> Tensor:
    """[B, T] bool: tokens that the policy sampled. From lengths and origins, never from token values."""
    return pad_rows([rollout.origin == Origin.policy for rollout in rollouts], torch.bool)


def token_rewards(rollouts: Sequence[Rollout]) -> Tensor:
    """[B, T] float32."""
    return pad_rows([rollout.token_rewards for rollout in rollouts], torch.float32)


def truncated(rollouts: Sequence[Rollout]) -> Tensor:
    """[B] bool: responses that the token limit ended."""
    return torch.tensor([rollout.finish_reason is FinishReason.length for rollout in rollouts], dtype=torch.bool)


def group_index(rollouts: Sequence[Rollout]) -> Tensor:
    """[B] int64: rows with equal numbers are responses to one prompt."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(rollout.group_id, len(numbers)) for rollout in rollouts], dtype=torch.int64)


def sequences_of(rollouts: Sequence[Rollout]) -> Sequences:
    """Prompts and responses, padded."""
    return Sequences(
        input_ids=pad_rows([[*rollout.prompt_ids, *rollout.response_ids.tolist()] for rollout in rollouts], torch.int64),
        prompt_lengths=torch.tensor([len(rollout.prompt_ids) for rollout in rollouts], dtype=torch.int64),
        response_lengths=torch.tensor([len(rollout.response_ids) for rollout in rollouts], dtype=torch.int64),
    )


def collate(
    rollouts: Sequence[Rollout],
    advantages: Tensor | None = None,
    *,
    ref_logprobs: Sequence[np.ndarray] | None = None,
    ref_hidden: Sequence[np.ndarray] | None = None,
    ref_version: int | None = None,
) -> TrainBatch:
    """One padded batch, with advantages of 0 until they are known; `ref_logprobs` [T] and `ref_hidden` [T, H] come per rollout,
    as scorers return them, of one version of the reference."""
    mask, sequences = response_mask(rollouts), sequences_of(rollouts)
    width = mask.shape[1]
    hidden = None
    if ref_hidden is not None:
        hidden = np.zeros((len(rollouts), width, ref_hidden[0].shape[1]), dtype=np.float32)
        for index, row in enumerate(ref_hidden):
            hidden[index, : len(row)] = row
    return TrainBatch(
        sample_ids=tuple(rollout.sample_id for rollout in rollouts),
        input_ids=sequences.input_ids,
        prompt_lengths=sequences.prompt_lengths,
        response_lengths=sequences.response_lengths,
        response_mask=mask,
        advantages=torch.zeros(mask.shape) if advantages is None else advantages,
        rewards=torch.tensor([float("nan") if rollout.reward is None else rollout.reward for rollout in rollouts]),
        turns=pad_rows([rollout.turn_index for rollout in rollouts], torch.int64, width=width),
        rollout_logprobs=pad_rows([rollout.rollout_logprobs for rollout in rollouts], torch.float32, width=width),
        ref_logprobs=None if ref_logprobs is None else pad_rows(ref_logprobs, torch.float32, width=width),
        ref_hidden=None if hidden is None else torch.from_numpy(hidden),
        ref_version=None if ref_version is None else torch.full((len(rollouts),), ref_version),
    )


def joined_rows(first: TrainBatch, second: TrainBatch) -> TrainBatch:
    """The rows of both, padded to the wider one; a field that one of them lacks is 0 in its rows."""
    width = max(first.response_mask.shape[1], second.response_mask.shape[1])

    def both(name: str) -> Tensor | None:
        parts = [getattr(first, name), getattr(second, name)]
        given = next((part for part in parts if part is not None), None)
        if given is None:
            return None
        whole = given.new_zeros(first.num_rows + second.num_rows, *([width] if given.ndim > 1 else []), *given.shape[2:])
        for start, part in zip((0, first.num_rows), parts, strict=True):
            if part is not None:
                rows = slice(start, start + len(part))
                whole[(rows, slice(0, part.shape[1])) if part.ndim > 1 else rows] = part
        return whole

    total = max(first.input_ids.shape[1], second.input_ids.shape[1])
    tensors = [field.name for field in fields(TrainBatch) if field.name not in ("sample_ids", "input_ids")]
    return TrainBatch(
        sample_ids=first.sample_ids + second.sample_ids,
        input_ids=torch.cat([functional.pad(part.input_ids, (0, total - part.input_ids.shape[1])) for part in (first, second)]),
        **{name: both(name) for name in tensors},  # pyright: ignore[reportArgumentType]
    )


def with_reference(rollouts: Sequence[Rollout], batch: TrainBatch) -> list[Rollout]:
    """Rollouts, those among them that are rows of `batch` with the version of the reference that they were compared with."""
    if batch.ref_version is None:
        return list(rollouts)
    versions = dict(zip(batch.sample_ids, batch.ref_version.tolist(), strict=True))
    return [replace(rollout, ref_version=versions.get(rollout.sample_id)) for rollout in rollouts]


def minibatches(batch: TrainBatch, count: int, *, seed: int) -> list[TrainBatch]:
    """`count` disjoint parts of nearly equal size, in an order drawn from `seed`. Whole groups are not kept together: the
    advantages are already computed."""
    if count == 1:
        return [batch]
    order = np.random.Generator(np.random.Philox(key=seed)).permutation(batch.num_rows)
    return [batch.select(part.tolist()) for part in np.array_split(order, count)]


def split_ranks(batch: TrainBatch, num_ranks: int) -> list[TrainBatch]:
    """One part per rank, rows dealt out by length so that ranks finish together."""
    if num_ranks == 1:
        return [batch]
    order = batch.lengths.argsort(descending=True, stable=True).tolist()
    return [batch.select(order[rank::num_ranks]) for rank in range(num_ranks)]
