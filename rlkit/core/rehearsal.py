"""Terms on the base model's own right answers, which keep the policy from forgetting them."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import ClassVar

from torch import Tensor

from rlkit.core.divergences import Alpha, FDivergence, ForwardKL, JensenShannon
from rlkit.core.reduce import Aggregation, LossTerm
from rlkit.errors import ConfigError


class Mode(Enum):
    """The divergence of the policy from the base model that is estimated on the base model's samples."""

    forward_kl = "forward_kl"
    jensen_shannon = "jensen_shannon"  # in the scale of GANs: twice the Jensen-Shannon divergence
    alpha = "alpha"


@cache  # a divergence looks at its own generator when it is made, and every microbatch asks
def _divergence_of(mode: Mode, alpha: float) -> FDivergence:
    match mode:
        case Mode.forward_kl:
            return ForwardKL()
        case Mode.jensen_shannon:
            return JensenShannon(scale=2)
        case Mode.alpha:
            return Alpha(a=alpha)


@dataclass(kw_only=True, slots=True)
class Rehearsal(ABC):
    """Base of the rehearsals."""

    needs: ClassVar[frozenset[str]] = frozenset()  # no reference model: what it said of its samples is stored with them

    @abstractmethod
    def term(self, *, logprobs: Tensor, stored_logprobs: Tensor, mask: Tensor) -> LossTerm:
        """The loss term on stored answers. All [B, T]; logprobs alone receive a gradient."""


@dataclass(kw_only=True, slots=True)
class NoRehearsal(Rehearsal):
    """Nothing is rehearsed."""

    def term(self, *, logprobs: Tensor, stored_logprobs: Tensor, mask: Tensor) -> LossTerm:
        """Never asked: no batch carries stored answers."""
        raise AssertionError("a batch with stored answers, and rehearsal=none")


@dataclass(kw_only=True, slots=True)
class BaseAnswers(Rehearsal):
    """DPH-RL: prompts that the base model always solves are rehearsed, the others explored.

        loss = f(u) with u = exp(logprobs - stored_logprobs), on the base model's right answers; f of the mode

    Under the base model's samples f(u) is unbiased in value and gradient, and both are 0 for a policy that has not moved. Before
    the first step the base model answers every prompt samples_per_prompt times; one that it always gets right leaves the
    training set, and one further answer to it is kept if that is right as well. No reference model is held in memory.
    Source: arXiv:2509.07430; code: seamoke/DPH-RL. There the k3 form is the forward one, as here; the definition form of its
    Jensen-Shannon, whose second half has a biased gradient, is not offered.
    """

    coef: float = 0.01  # multiplies the loss
    mode: Mode = Mode.forward_kl
    alpha: float = 0.2  # of mode alpha
    num_prompts: int = 0  # of the training set that are asked, the first ones; 0: all
    samples_per_prompt: int = 4  # that must all be right for a prompt to be rehearsed
    right_from: float = 0.5  # a reward at least as high counts as right
    rows_per_step: int = 32  # stored answers that join each batch

    def __post_init__(self):
        if not self.coef > 0:
            raise ConfigError(f"rehearsal.coef={self.coef}: write a number above 0, or rehearsal=none to train without this term.")
        if not 0 < self.alpha < 1:
            raise ConfigError(f"rehearsal.alpha={self.alpha}: write a number in (0, 1); 0.2 is usual.")
        if self.alpha != 0.2 and self.mode is not Mode.alpha:
            raise ConfigError(f"rehearsal.alpha={self.alpha}: rehearsal.mode={self.mode.name} never reads it. Write mode=alpha.")
        if self.samples_per_prompt < 1 or self.rows_per_step < 1 or self.num_prompts < 0:
            raise ConfigError(
                f"rehearsal.samples_per_prompt={self.samples_per_prompt}, rows_per_step={self.rows_per_step}, "
                f"num_prompts={self.num_prompts}: write 1 or more; num_prompts=0 asks all."
            )

    @property
    def divergence(self) -> FDivergence:
        """Whose generator is the loss."""
        return _divergence_of(self.mode, self.alpha)

    def term(self, *, logprobs: Tensor, stored_logprobs: Tensor, mask: Tensor) -> LossTerm:
        log_ratio = (logprobs - stored_logprobs).masked_fill(~mask, 0.0)
        loss = self.divergence.generator(log_ratio)
        return LossTerm(name="rehearsal", loss=loss, mask=mask, coef=self.coef, aggregation=Aggregation.token_mean)
