"""Prompts -> scored rollouts: seeds, generation, rewards. Training and evaluation sample through the same door."""

from __future__ import annotations

import hashlib
import time
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rlkit.controller.dispatch import Ticket
from rlkit.controller.fleet import Engines, Generation
from rlkit.core.curriculum import CurriculumState
from rlkit.data.rewards.parts import with_all_parts
from rlkit.data.rewards.pool import RewardItem
from rlkit.data.rewards.weighted import Rewards
from rlkit.types import Completion, Prompt, RewardResult, Rollout, SampleRequest, SamplingSpec, single_turn_rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def sample_seed(*parts: str | int) -> int:
    """63 bits from what identifies a sample (run seed, step, prompt, index): no sample's luck depends on timing or place."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampled:
    """A batch of scored rollouts, and what it took."""

    rollouts: list[Rollout]
    generate_s: float
    reward_s: float
    num_prompts: int  # places of the order that it took
    num_tokens: int  # that the policy wrote for it, also in what is not there any more
    environment_s: float = 0.0  # that the environment took between the turns
    tempered: Sequence[Rollout] = ()  # further samples of some of its prompts, at another temperature
    counts: Mapping[str, int] = field(default_factory=dict)  # of the prompts that did not come this far, by why
    curriculum: CurriculumState = field(default_factory=CurriculumState)  # with what it says of its prompts

    @classmethod
    def again(cls, rollouts: list[Rollout]) -> Sampled:
        """Rollouts that an earlier process paid for."""
        groups = {rollout.group_id for rollout in rollouts}
        return cls(rollouts=rollouts, generate_s=0.0, reward_s=0.0, num_prompts=len(groups), num_tokens=tokens_of(rollouts))


def tokens_of(rollouts: Sequence[Rollout]) -> int:
    """That the policy wrote."""
    return sum(rollout.num_sampled for rollout in rollouts)


@dataclass(kw_only=True, slots=True)
class Sampler:
    """Draws `group_size` responses per prompt and has them scored."""

    engines: Engines
    rewards: Rewards
    tokenizer: PreTrainedTokenizerBase
    seed: int

    def submit(self, label: str, prompts: Sequence[Prompt], group_size: int, sampling: SamplingSpec) -> Submitted:
        """Start generation. `label` names the batch ("step-12") and is part of every sample's id and seed."""
        started = time.monotonic()
        owners = [prompt for prompt in prompts for _ in range(group_size)]
        requests = [
            SampleRequest(
                sample_id=f"{label}/{place}/{prompt.id}/{index}",
                prompt_ids=prompt.prompt_ids,
                seed=sample_seed(self.seed, label, place, prompt.id, index),
            )
            for place, prompt in enumerate(prompts)
            for index in range(group_size)
        ]
        return SubmittedResponses(owners=owners, generation=self.engines.generate(requests, sampling), started=started)

    def collect(self, submitted: Submitted) -> Sampled:
        """Wait for the responses and score them. Raises RewardError when too many rewards fail."""
        assert isinstance(submitted, SubmittedResponses)  # of `submit`
        completions = submitted.generation.result()
        generated = time.monotonic()
        # Special tokens end a response; they are no part of the answer that a reward function reads.
        texts = self.tokenizer.batch_decode([c.response_ids.tolist() for c in completions], skip_special_tokens=True)
        groups = [completion.sample_id.rsplit("/", 1)[0] for completion in completions]
        results = self._judged(
            [
                RewardItem(
                    sample_id=completion.sample_id,
                    group_id=group,
                    prompt=prompt.text,
                    completion=text,
                    columns=prompt.columns,
                    completion_ids=completion.response_ids,
                    messages=prompt.messages,
                    source=prompt.source,
                )
                for prompt, completion, group, text in zip(submitted.owners, completions, groups, texts, strict=True)
            ]
        )
        rollouts = [
            single_turn_rollout(
                prompt, completion, result, group_id=group, text=text, earned=self._earned(completion, result.earned)
            )
            for prompt, completion, result, group, text in zip(submitted.owners, completions, results, groups, texts, strict=True)
        ]
        return Sampled(
            rollouts=rollouts,
            generate_s=generated - submitted.started,
            reward_s=time.monotonic() - generated,
            num_prompts=len(set(groups)),
            num_tokens=tokens_of(rollouts),
        )

    def _judged(self, items: Sequence[RewardItem]) -> list[RewardResult]:
        """In the order of the items."""
        return with_all_parts(self.rewards.score(items), [item.source for item in items])

    def _earned(self, completion: Completion, parts: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
        """Parts of a reward by the token that completes the text each was given for."""
        ids = completion.response_ids.tolist()

        def num_characters(token: int) -> int:
            return len(self.tokenizer.decode(ids[: token + 1], skip_special_tokens=True))

        # A text that its tokens do not spell to the end, such as one cut off within a character, ends with the last of them.
        places = [min(bisect_left(range(len(ids)), end, key=num_characters), len(ids) - 1) for end, _ in parts]
        return [(place, part) for place, (_, part) in zip(places, parts, strict=True)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Submitted:
    """What a sampler has under way."""

    started: float


@dataclass(frozen=True, kw_only=True, slots=True)
class SubmittedResponses(Submitted):
    """Responses under way, and whose they are."""

    owners: list[Prompt]
    generation: Generation | Ticket
