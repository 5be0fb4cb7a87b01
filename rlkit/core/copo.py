"""A second advantage that compares prompts, for those whose responses teach nothing when compared with each other (COPO)."""

import math
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

from rlkit.core.objectives import Surrogate
from rlkit.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Blend:
    """A second advantage, and how much the first one counts beside it; no gradient."""

    advantages: Tensor  # [B, T], 0 off the response mask
    weight: Tensor  # [B], of the first advantage's loss, in [0, 1]

    def __call__(self, local: Surrogate, of_prompts: Surrogate) -> Surrogate:
        """weight * local + (1 - weight) * of_prompts, of the objective's answers to the first and to the second advantage.

        A weight of 1 or 0 hands on the one answer, bit for bit. A token counts as clipped if it is in every answer that counts.
        """
        weight = self.weight.unsqueeze(-1)
        loss = weight * local.loss + (1 - weight) * of_prompts.loss
        return Surrogate(loss, (local.clipped | (weight == 0)) & (of_prompts.clipped | (weight == 1)))


@dataclass(kw_only=True, slots=True)
class PromptAdvantage(ABC):
    """Base of the second advantages."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def answers(self, texts: Sequence[str]) -> list[str | None]:
        """What each response answers, for `answer_entropy`; None for one that gives no answer."""

    @abstractmethod
    def __call__(
        self, *, advantages: Tensor, rewards: Tensor, entropy: Tensor, response_mask: Tensor, group_ids: Tensor
    ) -> Blend | None:
        """The second advantage and its blend with the first; None for no second one.

        advantages, response_mask (bool): [B, T]; rewards: [B]; entropy: [B], of the prompt's answers, from `answer_entropy`;
        group_ids: [B] int64, equal for responses to one prompt. Takes a whole batch of rollouts, as advantages do.
        """


@dataclass(kw_only=True, slots=True)
class NoPromptAdvantage(PromptAdvantage):
    """Responses are compared with those to the same prompt alone."""

    def answers(self, texts: Sequence[str]) -> list[str | None]:
        """Nobody asks."""
        return [None] * len(texts)

    def __call__(self, *, advantages: Tensor, rewards: Tensor, entropy: Tensor, response_mask: Tensor, group_ids: Tensor) -> None:
        """No second advantage."""


class BlendMode(Enum):
    """What the first advantage's loss weighs; see `COPO`."""

    only_soft = "only_soft"
    soft_with_zero = "soft_with_zero"
    soft_with_forced = "soft_with_forced"
    only_forced = "only_forced"
    only_zero = "only_zero"
    only_global = "only_global"
    no_global = "no_global"


@dataclass(kw_only=True, slots=True)
class COPO(PromptAdvantage):
    """Adds an advantage of the prompt over the batch's other prompts, the more the responses' answers agree (COPO).

        r        = the prompt's mean reward;  with discounted, times 1 - h * (1 - 1 / G) / log2(G) for G responses
        A_prompt = (r - mean of r over prompts) / (std of r over prompts + 1e-6), on every token of every response
        s        = sigmoid(sharpness * (h - midpoint)),  h the entropy of the answers in bits
        loss     = s * loss(A) + (1 - s) * loss(A_prompt)

    where answers disagree, responses are compared with each other; where they agree, right or wrong, prompts are. std has
    Bessel's correction; where all r are equal, and for one prompt, A_prompt is 0. By the mode, s is

        only_soft         s                        only_global  0
        soft_with_zero    s where R != 0, else 0   only_zero    1 where R != 0, else 0
        soft_with_forced  s where A != 0, else 0   only_forced  1 where A != 0, else 0
                                                   no_global    1

    for each response, A != 0 if it is on any token. A_prompt pushes a good prompt's wrong responses up with the right ones.
    Source: COPO's code (hijih/copo-code), run with GRPO's A, a dual clip of 3 and seq_mean_token_mean. Which mode and which r
    are the paper's is not known; only_soft and the plain mean are rlkit's choice.
    """

    answer_pattern: str = ""  # regular expression; its last match, or that match's first group, is the answer; '': the whole text
    sharpness: float = 5.0  # of the step from prompts to responses
    midpoint: float = 1.0  # bits of entropy at which both count the same
    mode: BlendMode = BlendMode.only_soft
    discounted: bool = False  # whether a prompt's reward is less where its answers disagree

    def __post_init__(self):
        for key in ("sharpness", "midpoint"):
            if not math.isfinite(value := getattr(self, key)):
                raise ConfigError(f"prompt_advantage.{key}={value}: write a finite number; sharpness=5 and midpoint=1 are usual.")
        try:
            re.compile(self.answer_pattern)
        except re.error as error:
            raise ConfigError(
                f"prompt_advantage.answer_pattern={self.answer_pattern}: is no regular expression ({error}). Write one such as "
                r"'####\s*(\S+)', or '' for the whole response."
            ) from error

    def answers(self, texts: Sequence[str]) -> list[str | None]:
        """By the pattern, without the spaces around it."""
        if not self.answer_pattern:
            return [text.strip() for text in texts]
        pattern = re.compile(self.answer_pattern)
        found = [list(pattern.finditer(text)) for text in texts]
        return [(matches[-1].group(min(pattern.groups, 1)) or "").strip() if matches else None for matches in found]

    def __call__(self, *, advantages: Tensor, rewards: Tensor, entropy: Tensor, response_mask: Tensor, group_ids: Tensor) -> Blend:
        """As in the base class."""
        rewards = rewards.detach()
        entropy = entropy.to(rewards.dtype)
        of_rows = self.of_prompts(rewards, entropy, group_ids)
        differ = advantages.detach().masked_fill(~response_mask, 0.0).ne(0).any(-1)
        return Blend(
            advantages=of_rows.unsqueeze(-1).expand(response_mask.shape).masked_fill(~response_mask, 0.0),
            weight=self.weight(entropy, rewards.ne(0), differ),
        )

    def of_prompts(self, rewards: Tensor, entropy: Tensor, group_ids: Tensor) -> Tensor:
        """A_prompt on each of the prompt's rows; all [B]."""
        index = group_ids.unique(return_inverse=True)[1]
        size = index.bincount().to(rewards.dtype)
        reward = torch.zeros_like(size).index_add(0, index, rewards) / size
        if self.discounted:
            share = torch.where(size > 1, (1 - 1 / size) / size.log2().clamp(min=1), 0.0)
            reward = reward * (1 - share * torch.zeros_like(size).index_copy(0, index, entropy))
        above = reward - reward.min()  # the mean of equal floats need not equal them
        deviation = above - above.mean()
        std = (deviation.square().sum() / max(len(size) - 1, 1)).sqrt()
        return (deviation / (std + 1e-6))[index]

    def weight(self, entropy: Tensor, rewarded: Tensor, differ: Tensor) -> Tensor:
        """Of each response's first advantage; all [B]. rewarded, differ (bool): R != 0, A != 0."""
        soft = torch.sigmoid(self.sharpness * (entropy - self.midpoint))
        match self.mode:
            case BlendMode.only_soft:
                return soft
            case BlendMode.soft_with_zero:
                return soft.masked_fill(~rewarded, 0.0)
            case BlendMode.soft_with_forced:
                return soft.masked_fill(~differ, 0.0)
            case BlendMode.only_forced:
                return differ.to(soft.dtype)
            case BlendMode.only_zero:
                return rewarded.to(soft.dtype)
            case BlendMode.only_global:
                return torch.zeros_like(soft)
            case BlendMode.no_global:
                return torch.ones_like(soft)


def answer_entropy(answers: Sequence[str | None], group_ids: Tensor) -> Tensor:
    """Entropy of each prompt's answers in bits, on each of its rows; [B] float64, from 0 to log2(group size).

    Answers are compared as strings: normalise them before. None, for a response without one, is an answer like any other.
    """
    groups: dict[int, list[str | None]] = {}
    ids = group_ids.tolist()
    for group, answer in zip(ids, answers, strict=True):
        groups.setdefault(group, []).append(answer)
    entropies = {group: _entropy(list(Counter(given).values())) for group, given in groups.items()}
    return torch.tensor([entropies[group] for group in ids], dtype=torch.float64, device=group_ids.device)


def _entropy(counts: list[int]) -> float:
    total = sum(counts)
    return math.fsum(count / total * math.log2(total / count) for count in counts)
