"""Terms that imitate the policy's own good responses, beside the objective."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from rlkit.core.reduce import Aggregation, LossTerm
from rlkit.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class Imitation(ABC):
    """Base of the imitation terms."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def mask(self, *, rewards: Tensor, response_mask: Tensor) -> Tensor | None:
        """The tokens to imitate, [B, T] bool, from rewards [B]; None for no term. The term's denominators are counted on it."""

    @abstractmethod
    def term(self, *, logprobs: Tensor, rewards: Tensor, response_mask: Tensor) -> LossTerm | None:
        """The loss term on that mask; None adds none. logprobs: [B, T], and they alone receive a gradient."""


@dataclass(kw_only=True, slots=True)
class NoImitation(Imitation):
    """No imitation term."""

    def mask(self, *, rewards: Tensor, response_mask: Tensor) -> None:
        """Nothing is imitated."""

    def term(self, *, logprobs: Tensor, rewards: Tensor, response_mask: Tensor) -> None:
        """Adds no term."""


@dataclass(kw_only=True, slots=True)
class PositiveExamples(Imitation):
    """Raises the likelihood of the responses that were rewarded (VAPO).

    The loss is -logprobs on the tokens of rows with a reward above a bound, 0 by default, averaged over those tokens whatever the
    objective's aggregation; 0 where there are none. Gradient: that of supervised fine-tuning on these rows; no ratio, no clip,
    no baseline. Source: arXiv:2504.05118; NVIDIA-NeMo/RL.
    """

    coef: float = 0.1  # multiplies the loss
    above: float = 0.0  # responses with a higher reward are imitated

    def __post_init__(self):
        if not self.coef >= 0:
            raise ConfigError(f"imitation.coef={self.coef}: write 0 or more, or imitation=none to train without this term.")

    def mask(self, *, rewards: Tensor, response_mask: Tensor) -> Tensor:
        """[B, T]: the response tokens of rows with a reward above the bound."""
        return response_mask & (rewards > self.above).unsqueeze(-1)

    def term(self, *, logprobs: Tensor, rewards: Tensor, response_mask: Tensor) -> LossTerm:
        """-logprobs on the mask."""
        mask = self.mask(rewards=rewards, response_mask=response_mask)
        loss = -logprobs.masked_fill(~mask, 0.0)
        return LossTerm(name="imitation", loss=loss, mask=mask, coef=self.coef, aggregation=Aggregation.token_mean)
