"""The base model's own answers: sampled once before the first step, stored with the run, drawn from in every step."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from rlkit.controller.fleet import Learners
from rlkit.controller.sampling import Sampler
from rlkit.controller.tracking.files import read_rollouts, write_rollouts
from rlkit.core.rehearsal import BaseAnswers
from rlkit.data.collate import collate, joined_rows, pad_rows
from rlkit.errors import DataError
from rlkit.types import Prompt, Rollout, SamplingSpec, TrainBatch

PROMPTS_AT_ONCE = 256  # sampled in one call


@dataclass(frozen=True, kw_only=True, slots=True)
class Answers:
    """What is rehearsed, and which prompts are left to explore."""

    rollouts: list[Rollout]
    logprobs: list[np.ndarray]  # per rollout [T] float32: of the base model, as the learner computes them
    mastered: frozenset[str]  # ids of the prompts that the base model always solved

    def explored(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Those that are trained on."""
        return [prompt for prompt in prompts if prompt.id not in self.mastered]

    def join(self, batch: TrainBatch, *, count: int, seed: int) -> TrainBatch:
        """The batch with `count` answers behind its rows, drawn by the seed; they are on no mask but rehearsal_mask."""
        drawn = np.random.Generator(np.random.Philox(key=seed)).permutation(len(self.rollouts))[:count].tolist()
        rows = collate([self.rollouts[index] for index in drawn])
        stored = pad_rows([self.logprobs[index] for index in drawn], rows.rollout_logprobs.dtype, width=rows.response_mask.shape[1])
        rows = replace(rows, rehearsal_mask=rows.response_mask, response_mask=rows.response_mask & False, stored_logprobs=stored)
        if batch.ref_version is not None:  # no term compares these rows with the reference, whichever it is
            rows = replace(rows, ref_version=batch.ref_version[:1].repeat(len(drawn)))
        return joined_rows(batch, rows)

    def save(self, folder: Path) -> None:
        """Into a folder of the run."""
        folder.mkdir(parents=True, exist_ok=True)
        write_rollouts(folder / "answers.parquet", self.rollouts, [float("nan")] * len(self.rollouts))
        save_file({str(index): logprobs for index, logprobs in enumerate(self.logprobs)}, folder / "logprobs.safetensors")
        (folder / "mastered.json").write_text(
            json.dumps(sorted(self.mastered)) + "\n", encoding="utf-8"
        )  # last: it says all is there

    @classmethod
    def load(cls, folder: Path) -> Answers:
        """What `save` wrote. Raises DataError where it is not there."""
        if not (folder / "mastered.json").is_file():
            raise DataError(
                f"{folder}: the base model's answers that this run rehearses are gone. Restore them, or start a new run."
            )
        logprobs = load_file(folder / "logprobs.safetensors")
        return cls(
            rollouts=read_rollouts(folder / "answers.parquet"),
            logprobs=[logprobs[str(index)] for index in range(len(logprobs))],
            mastered=frozenset(json.loads((folder / "mastered.json").read_text(encoding="utf-8"))),
        )


def sample_answers(
    settings: BaseAnswers, prompts: Sequence[Prompt], sampler: Sampler, sampling: SamplingSpec, learner: Learners
) -> Answers:
    """Ask the model as it is now, which must be the base model. Raises DataError where nothing is mastered, or all of it."""
    total, prompts = len(prompts), prompts[: settings.num_prompts or None]
    mastered: list[Prompt] = []
    rollouts: list[Rollout] = []
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        some = list(prompts[start : start + PROMPTS_AT_ONCE])
        size = settings.samples_per_prompt
        found = sampler.collect(sampler.submit("rehearsal", some, size, sampling)).rollouts
        solved = [
            prompt
            for place, prompt in enumerate(some)
            if all(is_right(r, settings) for r in found[place * size : (place + 1) * size])
        ]
        mastered += solved
        if solved:
            further = sampler.collect(sampler.submit("rehearsal-answer", solved, 1, sampling)).rollouts
            rollouts += [rollout for rollout in further if is_right(rollout, settings)]
    if not rollouts or len(mastered) == total:
        raise DataError(
            f"rehearsal=base_answers: of {len(prompts)} prompts that were asked the base model always solves {len(mastered)} in "
            f"{settings.samples_per_prompt} samples, which leaves nothing to {'rehearse' if not rollouts else 'explore'}. Change "
            "rehearsal.samples_per_prompt or the prompts, or write rehearsal=none."
        )
    measured = learner.measure(collate(rollouts))["old_logprobs"].numpy()
    logprobs = [measured[row, : len(rollout.response_ids)].copy() for row, rollout in enumerate(rollouts)]
    return Answers(rollouts=rollouts, logprobs=logprobs, mastered=frozenset(prompt.id for prompt in mastered))


def is_right(rollout: Rollout, settings: BaseAnswers) -> bool:
    """Scored, and scored high."""
    return rollout.reward is not None and rollout.reward >= settings.right_from
