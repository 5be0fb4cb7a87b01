"""What is done to a batch of rollouts around its advantages: rewards that mind the length, prompts that are not learnt from."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rlkit.core.advantages import Groups
from rlkit.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class Shaping(ABC):
    """Base of what is added to rewards before advantages."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def __call__(self, *, lengths: Tensor, max_response_tokens: int) -> Tensor | None:
        """What each response's reward gains, [B], from its length in tokens [B]; None leaves rewards as they are."""


@dataclass(kw_only=True, slots=True)
class NoShaping(Shaping):
    """Rewards stay as the reward function gave them."""

    def __call__(self, *, lengths: Tensor, max_response_tokens: int) -> None:
        """Nothing is added."""


@dataclass(kw_only=True, slots=True)
class OverlongPenalty(Shaping):
    """A penalty that grows over the last tokens of the budget (DAPO's soft overlong punishment).

        buffer  = buffer_fraction * max_response_tokens
        penalty = -factor * clip((length - (max_response_tokens - buffer)) / buffer, 0, 1)

    Source: arXiv:2503.14476 sec. 3.4.
    """

    buffer_fraction: float = 0.2  # of the budget, its end over which the penalty grows; 4,096 of 20,480 tokens in the paper
    factor: float = 1.0  # the penalty of a response that fills the budget

    def __post_init__(self):
        if not 0 < self.buffer_fraction <= 1:
            raise ConfigError(f"shaping.buffer_fraction={self.buffer_fraction}: write a number in (0, 1]; 0.2 is usual.")
        if not self.factor >= 0:
            raise ConfigError(f"shaping.factor={self.factor}: write 0 or more; 1 is usual where rewards are 0 and 1.")

    def __call__(self, *, lengths: Tensor, max_response_tokens: int) -> Tensor:
        """[B], 0 or below."""
        buffer = self.buffer_fraction * max_response_tokens
        return -self.factor * ((lengths - max_response_tokens) / buffer + 1).clamp(0.0, 1.0)


@dataclass(kw_only=True, slots=True)
class PromptFilter(ABC):
    """Base of the rules for which prompts' responses are learnt from."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def keep(self, *, scores: Tensor, group_ids: Tensor) -> Tensor:
        """[B] bool, the same for all responses to one prompt. scores: [B], before any shaping; group_ids: [B] int64."""


@dataclass(kw_only=True, slots=True)
class NoPromptFilter(PromptFilter):
    """Every prompt is learnt from."""

    def keep(self, *, scores: Tensor, group_ids: Tensor) -> Tensor:
        """True throughout."""
        return torch.ones_like(group_ids, dtype=torch.bool)


@dataclass(kw_only=True, slots=True)
class DynamicSampling(PromptFilter):
    """Prompts whose responses all scored alike are replaced by further ones (DAPO).

    A prompt stays if the scores of its responses differ at all, or if it has one response. Scores are compared, their standard
    deviation is not: that of equal decimals need not be 0. Source: arXiv:2503.14476 sec. 3.2.
    """

    max_batches: int = 10  # batches of rollouts that may be drawn to fill one step; 0: as many as it takes

    def __post_init__(self):
        if self.max_batches < 0:
            raise ConfigError(f"prompt_filter.max_batches={self.max_batches}: write a number of batches, or 0 for no limit.")

    def keep(self, *, scores: Tensor, group_ids: Tensor) -> Tensor:
        """[B] bool."""
        groups = Groups.of(scores, group_ids, torch.ones_like(group_ids, dtype=torch.bool))
        return groups.differ | (groups.size == 1)


def without_truncated(response_mask: Tensor, truncated: Tensor) -> Tensor:
    """response_mask [B, T] without the rows that ran into the token limit, truncated [B] bool (DAPO's overlong filtering).

    For losses and their denominators. Advantages are computed on the mask before: a truncated row counts in its group's mean.
    Source: arXiv:2503.14476 sec. 3.4.
    """
    return response_mask & ~truncated.unsqueeze(-1)
