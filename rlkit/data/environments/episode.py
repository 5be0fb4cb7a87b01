"""One episode: who said what, token for token, and the rollout that becomes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from rlkit.data.environments.calls import EpisodeWorker, Failure
from rlkit.data.environments.history import Continuation
from rlkit.errors import DataError
from rlkit.types import Completion, FinishReason, Origin, Prompt, RewardResult, Rollout, judgement

ENVIRONMENT = "environment"  # the part of a reward that an environment gives
POLICY = "assistant"  # the policy's role in a transcript, as in chat templates


@dataclass(kw_only=True, slots=True)
class Piece:
    """A prompt and what follows it, as the policy read and wrote it; the lists are of the response's tokens."""

    prompt_ids: tuple[int, ...]
    num_told: int = 0  # tokens of its prompt that are the answer for which the piece before it ended
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # 0 where the policy did not sample
    versions: list[int] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)
    turns: list[int] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)

    @property
    def own_ids(self) -> list[int]:
        """What the policy sampled."""
        return [token for token, origin in zip(self.ids, self.origins, strict=True) if origin == Origin.policy]

    def sampled(self, completion: Completion, *, turn: int) -> None:
        self.ids += completion.response_ids.tolist()
        self.logprobs += completion.rollout_logprobs.tolist()
        self.versions += completion.policy_version.tolist()
        self._label(len(completion.response_ids), Origin.policy, turn)

    def told(self, ids: Sequence[int], *, turn: int) -> None:
        self.ids += ids
        self.logprobs += [0.0] * len(ids)
        self.versions += [self.versions[-1]] * len(ids)
        self._label(len(ids), Origin.environment, turn)

    def _label(self, count: int, origin: Origin, turn: int) -> None:
        self.origins += [int(origin)] * count
        self.turns += [turn] * count
        self.rewards += [0.0] * count


@dataclass(kw_only=True, slots=True)
class Episode:
    """One sample under way. Its tokens are kept as they were sampled, and never made from text again."""

    sample_id: str
    group_id: str
    prompt: Prompt  # with what the environment says at the start
    rendered: str  # by the chat template, up to the turn that is next
    pieces: list[Piece]  # one, and a further one wherever the template rewrote earlier turns
    world: int  # the seed of its environment
    worker: EpisodeWorker | None = None  # while it goes on
    failure: Failure | None = None
    finish_reason: FinishReason | None = None  # None: it goes on
    num_turns: int = 0
    transcript: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        return self.failure is not None or self.finish_reason is not None

    @property
    def now(self) -> Piece:
        """Where the next turn goes."""
        return self.pieces[-1]

    @property
    def num_tokens(self) -> int:
        """Of all turns and answers; a history that was written anew is counted once."""
        return sum(piece.num_told + len(piece.ids) for piece in self.pieces)

    @property
    def num_read(self) -> int:
        """Tokens before the next turn."""
        return len(self.now.prompt_ids) + len(self.now.ids)

    @property
    def answer(self) -> str:
        """What a reward function judges: the policy's last words."""
        said = (each["content"] for each in reversed(self.transcript) if each["role"] == POLICY)
        return next((content for content in said if content.strip()), "")

    @property
    def messages(self) -> list[dict[str, Any]] | None:
        """The whole conversation for a chat template; None for plain text."""
        if self.prompt.messages is None:
            return None
        return [*self.prompt.messages, *({"role": each["role"], "content": each["content"]} for each in self.transcript)]

    def hear(self, completion: Completion, text: str) -> None:
        """The policy has had its turn."""
        self.now.sampled(completion, turn=self.num_turns)
        self.transcript.append({"role": POLICY, "content": text})
        self.num_turns += 1

    def tell(self, behind: Continuation, text: str, *, role: str, is_cut: bool) -> None:
        """The environment's answer, which belongs to the turn that it follows."""
        if behind.forks:
            self.pieces.append(Piece(prompt_ids=tuple(behind.ids), num_told=behind.num_told))
        else:
            self.now.told(behind.ids, turn=self.num_turns - 1)
        self.rendered = behind.rendered
        self.transcript.append({"role": role, "content": text} | ({"cut": True} if is_cut else {}))

    def earn(self, reward: float) -> None:
        """For the turn that has just ended, on its last token."""
        self.now.rewards[-1] += reward
        self.transcript[-1]["reward"] = self.transcript[-1].get("reward", 0.0) + reward

    def rollout(self, result: RewardResult, *, has_outcome: bool, earns: bool) -> Rollout:
        """As it is trained on: the environment's rewards where they were given, the outcome on the last token, and there too what
        earlier pieces earned, because the last one stands for all. has_outcome: something judges the answer; earns: the environment
        rewards turns. Where both do, the reward has named parts."""
        earned, components, reward = sum(sum(piece.rewards) for piece in self.pieces), result.components, None
        if result.reward is not None:
            reward = result.reward + earned
            if earns:
                if ENVIRONMENT in components:
                    raise DataError(
                        f"The reward of sample {self.sample_id} has a part called {ENVIRONMENT}, which is the name of what the "
                        "environment gives. Give it another name."
                    )
                outcome = {"outcome": result.reward} if has_outcome else {}
                components = (components or outcome) | {ENVIRONMENT: earned}
        *earlier, last = self.pieces
        parts = [
            self._piece(piece, f"{self.sample_id}/part-{number}", replace(result, reward=reward), components)
            for number, piece in enumerate(earlier)
        ]
        token_rewards = np.array(last.rewards, dtype=np.float32)
        if result.reward is not None and len(token_rewards):
            token_rewards[-1] += result.reward + sum(sum(piece.rewards) for piece in earlier)
        whole = self._piece(last, self.sample_id, replace(result, reward=reward), components)
        return replace(whole, token_rewards=token_rewards, parts=tuple(parts), transcript=tuple(self.transcript))

    def _piece(self, piece: Piece, sample_id: str, result: RewardResult, components: dict[str, float]) -> Rollout:
        return Rollout(
            sample_id=sample_id,
            group_id=self.group_id,
            prompt_id=self.prompt.id,
            source=self.prompt.source,
            prompt_ids=piece.prompt_ids,
            response_ids=np.array(piece.ids, dtype=np.int64),
            rollout_logprobs=np.array(piece.logprobs, dtype=np.float32),
            policy_version=np.array(piece.versions, dtype=np.int64),
            turn_index=np.array(piece.turns, dtype=np.int64),
            origin=np.array(piece.origins, dtype=np.int64),
            token_rewards=np.zeros(len(piece.ids), dtype=np.float32),
            text=self.answer,
            finish_reason=self.finish_reason or FinishReason.stop,
            reward=result.reward,
            reward_components=components,
            **judgement(result),
        )
