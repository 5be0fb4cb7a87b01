"""What crosses a module: frozen dataclasses that check themselves once, where they are built.

Ragged, per-sample data (a prompt, a rollout) is numpy, which Ray moves without a copy; padded batches are torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from enum import Enum, IntEnum
from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlkit.errors import DataError
from rlkit.metrics import Metric


class FinishReason(Enum):
    """Why a response ended."""

    stop = "stop"  # the model emitted an end-of-sequence token
    length = "length"  # the token limit cut it off


class RewardStatus(Enum):
    """What became of one sample's reward. Samples without one are not trained on."""

    ok = "ok"
    wrong = "wrong"  # judged, and not the answer; only functions that say so (`rlkit.data.rewards.wrong`) tell it from ok
    unparsable = "unparsable"  # there is no answer in it to judge
    skipped = "skipped"  # the function returned None: it has no opinion on this sample
    timeout = "timeout"  # it did not answer within its wall-clock limit, and was killed
    error = "error"  # it raised, or returned something that is not a finite number


class Origin(IntEnum):
    """Who wrote a response token. Only the policy's own are trained on."""

    policy = 0
    environment = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One row of a data set, ready for the engine. `columns` is the whole row, for the reward function, by column name."""

    id: str
    text: str  # as the tokenizer saw it, chat template applied
    prompt_ids: tuple[int, ...]
    source: str
    columns: dict[str, Any]
    messages: tuple[dict[str, str], ...] | None = None  # as the chat template saw them; None: plain text

    @property
    def row_digest(self) -> str:
        """Of the whole row: two data sets can number their rows alike."""
        return sha256(json.dumps(self.columns, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingSpec:
    """How tokens are drawn. The engine and the learner read the same object, so their log-probs mean the same thing."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: off
    min_p: float = 0.0
    max_tokens: int
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRequest:
    """One response to sample. The seed is a function of run, step, prompt and sample: timing cannot change it."""

    sample_id: str
    prompt_ids: tuple[int, ...]
    seed: int
    max_tokens: int | None = None  # of this response, where that is less than the sampling's


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What an engine returns for one `SampleRequest`. Token ids are the truth; text is decoded from them later."""

    sample_id: str
    response_ids: np.ndarray  # [T] int64, the stop token included when one was sampled
    rollout_logprobs: np.ndarray  # [T] float32, nats, after temperature
    policy_version: np.ndarray  # [T] int64
    finish_reason: FinishReason

    def __post_init__(self):
        lengths = {len(self.response_ids), len(self.rollout_logprobs), len(self.policy_version)}
        if len(lengths) != 1:
            raise DataError(f"Completion {self.sample_id}: ids, log-probs and versions have lengths {sorted(lengths)}.")
        if not np.isfinite(self.rollout_logprobs).all():
            raise DataError(f"Completion {self.sample_id}: the engine reported a log-prob that is not finite.")


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardResult:
    """One sample's reward, matched to it by id. `reward` is None where there is none to train on: skipped, and timeout and error
    unless `reward.failed_value` stands in for them."""

    sample_id: str
    status: RewardStatus
    reward: float | None = None
    components: dict[str, float] = field(default_factory=dict)
    message: str = ""  # the first line of what went wrong, or empty
    statuses: dict[str, RewardStatus] = field(default_factory=dict)  # of its functions, by name, where there are several
    # Parts of such a function's own value, as function/part. For statistics: components alone share out the reward.
    subparts: dict[str, float] = field(default_factory=dict)
    # Parts of the reward that are earned before the response ends: (so many characters of it, part). The rest is earned at its end.
    earned: tuple[tuple[int, float], ...] = ()


MAX_MESSAGE = 200  # characters that a rollout keeps of its reward's message


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One sampled and scored response, as it is trained on, stored and replayed."""

    sample_id: str
    group_id: str  # the prompt and the step it was drawn in: the group whose mean is its baseline
    prompt_id: str
    source: str
    prompt_ids: tuple[int, ...]
    response_ids: np.ndarray  # [T] int64
    rollout_logprobs: np.ndarray  # [T] float32
    policy_version: np.ndarray  # [T] int64
    turn_index: np.ndarray  # [T] int64
    origin: np.ndarray  # [T] int64, values of `Origin`
    token_rewards: np.ndarray  # [T] float32; an outcome reward sits on the last token
    text: str  # the answer, as a reward function judges it
    finish_reason: FinishReason
    reward: float | None
    reward_components: dict[str, float]
    status: RewardStatus
    reward_message: str = ""  # what went wrong, or why it is wrong: the beginning of the result's message
    reward_statuses: dict[str, RewardStatus] = field(default_factory=dict)  # of each function, where there are several
    reward_subparts: dict[str, float] = field(default_factory=dict)  # parts of components, without weights: for statistics
    ref_version: int | None = None  # of the reference whose log-probs are attached, if any are
    transcript: tuple[dict[str, Any], ...] | None = None  # who said what, where there are turns: role, content, a turn's reward
    num_uses: int = 0  # optimiser steps that have trained on it
    parts: tuple[Rollout, ...] = ()  # earlier turns of the same episode, where the policy did not read them as it wrote them

    @property
    def num_sampled(self) -> int:
        """Tokens that the policy wrote, in all of the episode."""
        return int((self.origin == Origin.policy).sum()) + sum(part.num_sampled for part in self.parts)


def single_turn_rollout(
    prompt: Prompt,
    completion: Completion,
    result: RewardResult,
    *,
    group_id: str,
    text: str,
    earned: Iterable[tuple[int, float]] = (),
) -> Rollout:
    """A rollout whose response is one uninterrupted turn of the policy.

    `earned`: parts of its reward that belong to single tokens, (token, part). What is left, an outcome's whole reward, sits on
    the last token, so that the token rewards always sum to the reward.
    """
    length = len(completion.response_ids)
    token_rewards = np.zeros(length, dtype=np.float64)
    if result.reward is not None and length:
        for token, part in earned:
            token_rewards[token] += part
        token_rewards[-1] += result.reward - token_rewards.sum()
    return Rollout(
        sample_id=completion.sample_id,
        group_id=group_id,
        prompt_id=prompt.id,
        source=prompt.source,
        prompt_ids=prompt.prompt_ids,
        response_ids=completion.response_ids,
        rollout_logprobs=completion.rollout_logprobs,
        policy_version=completion.policy_version,
        turn_index=np.zeros(length, dtype=np.int64),
        origin=np.full(length, Origin.policy, dtype=np.int64),
        token_rewards=token_rewards.astype(np.float32),
        text=text,
        finish_reason=completion.finish_reason,
        reward=result.reward,
        reward_components=result.components,
        **judgement(result),
    )


def judgement(result: RewardResult) -> dict[str, Any]:
    """What a rollout keeps of its reward beside the numbers."""
    message = result.message[:MAX_MESSAGE].encode("utf-8", "replace").decode()  # half a surrogate cannot be stored
    return {
        "status": result.status,
        "reward_message": message,
        "reward_statuses": result.statuses,
        "reward_subparts": result.subparts,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class Sequences:
    """Prompt-and-response sequences, right-padded."""

    input_ids: Tensor  # [B, S] int64
    prompt_lengths: Tensor  # [B] int64, at least 1
    response_lengths: Tensor  # [B] int64

    def prompt(self, sample: int) -> list[int]:
        return self.input_ids[sample, : int(self.prompt_lengths[sample])].tolist()

    def response(self, sample: int) -> Tensor:
        start = int(self.prompt_lengths[sample])
        return self.input_ids[sample, start : start + int(self.response_lengths[sample])]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainBatch:
    """Responses of one optimiser step, or of one of its microbatches. Right-padded; padding is finite."""

    sample_ids: tuple[str, ...]
    input_ids: Tensor  # [B, S] int64, prompt then response
    prompt_lengths: Tensor  # [B] int64
    response_lengths: Tensor  # [B] int64
    response_mask: Tensor  # [B, T] bool
    advantages: Tensor  # [B, T] float32
    rollout_logprobs: Tensor  # [B, T] float32
    old_logprobs: Tensor | None = None  # [B, T] float32; None: one optimiser step per batch, so they are logprobs.detach()
    ref_logprobs: Tensor | None = None  # [B, T] float32
    ref_hidden: Tensor | None = None  # [B, T, H]: the reference's last hidden states, for exact divergences
    ref_version: Tensor | None = None  # [B] int64: of the reference that these two are of
    rewards: Tensor | None = None  # [B] float32, as the reward function gave them
    old_values: Tensor | None = None  # [B, T] float32: of the critic, that the advantages were computed from
    returns: Tensor | None = None  # [B, T] float32: the critic's targets
    policy_weight: Tensor | None = None  # [B, T] float32: multiplies the policy term; None: 1
    train_mask: Tensor | None = None  # [B, T] bool: what filters left of response_mask, see `preparation.narrow`; None: all
    old_entropy: Tensor | None = None  # [B, T] float32, exact, of the policy before the batch
    old_expected_score: Tensor | None = None  # [B, T] float32, of the same
    old_nucleus_entropy: Tensor | None = None  # [B, T] float32, of the same
    tempered_mask: Tensor | None = None  # [B, T] bool: tokens that the tempering's own term trains, of no other term's mask
    rehearsal_mask: Tensor | None = None  # [B, T] bool: tokens of stored answers, of no other term's mask
    stored_logprobs: Tensor | None = None  # [B, T] float32: of the base model, on those
    turns: Tensor | None = None  # [B, T] int64: the turn that a token belongs to, from 0
    prompt_advantages: Tensor | None = None  # [B, T] float32: a second advantage
    local_weight: Tensor | None = None  # [B] float32: of the first one's loss beside the second's
    divergence_weight: Tensor | None = None  # [B] float32: multiplies the response's divergence; None: 1
    chosen: Tensor | None = None  # [B, T] bool: the selector's tokens, where it chooses over the whole step
    objective_weight: Tensor | None = None  # [B] float32: multiplies the row's policy loss; None: 1
    policy_mask: Tensor | None = None  # [B, T] bool: tokens of the policy term and its denominators; None: response_mask
    episode_share: Tensor | None = None  # [B] float32: of its episode's tokens, where one is several rows; None: a row is all of it

    def __post_init__(self):
        want = tuple(self.response_mask.shape)
        for name, value in self._optional():
            given = tuple(value.shape[:2])
            if given != want[: len(given)]:
                raise DataError(f"TrainBatch.{name} is {list(value.shape)}, response_mask {list(want)}. Pad it in collate.py.")
        if len(self.sample_ids) != want[0]:
            raise DataError(f"TrainBatch has {len(self.sample_ids)} sample ids for {want[0]} rows.")

    def _optional(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors per row or per response token, but for the mask itself; those that are there."""
        for name in ("advantages", "rollout_logprobs", *(each.name for each in fields(self) if each.default is None)):
            if (value := getattr(self, name)) is not None:
                yield name, value

    @property
    def num_rows(self) -> int:
        return len(self.sample_ids)

    @property
    def lengths(self) -> Tensor:
        """[B] prompt and response together."""
        return self.prompt_lengths + self.response_lengths

    @property
    def sequences(self) -> Sequences:
        return Sequences(input_ids=self.input_ids, prompt_lengths=self.prompt_lengths, response_lengths=self.response_lengths)

    def check_reference(self, version: int) -> None:
        """Raises DataError where a row was compared with another version of the reference than `version`."""
        if self.ref_logprobs is None and self.ref_hidden is None:
            return
        if self.ref_version is None:
            raise DataError("TrainBatch.ref_logprobs do not say which reference they are of. Pass ref_version to collate.")
        if (others := self.ref_version[self.ref_version != version]).numel():
            raise DataError(
                f"TrainBatch.ref_logprobs: {len(others)} of {self.num_rows} rows are of version {int(others[0])} of the reference, "
                f"which is at version {version} now. Score them again: a batch is compared with one reference."
            )

    def select(self, rows: list[int]) -> TrainBatch:
        """These rows, in this order, trimmed to the longest of them."""
        index = torch.tensor(rows, dtype=torch.int64)
        width = int(self.response_lengths[index].max()) if rows else 0
        total = int(self.lengths[index].max()) if rows else 0
        return TrainBatch(
            sample_ids=tuple(self.sample_ids[row] for row in rows),
            input_ids=self.input_ids[index, :total],
            prompt_lengths=self.prompt_lengths[index],
            response_lengths=self.response_lengths[index],
            response_mask=self.response_mask[index, :width],
            **{name: value[index] if value.ndim == 1 else value[index, :width] for name, value in self._optional()},  # pyright: ignore[reportArgumentType]
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStats:
    """What one optimiser step measured. `skipped`: it was not finite, and the weights did not move."""

    metrics: dict[str, Metric]
    skipped: bool
