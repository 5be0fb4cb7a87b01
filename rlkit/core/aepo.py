"""Samples at another temperature that hold the entropy at a level of choice."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from rlkit.core.ratios import masked_log_ratio, ratio
from rlkit.core.reduce import Aggregation, LossTerm
from rlkit.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class TemperingState:
    """What the next batch of rollouts goes by, as plain numbers: JSON keeps every bit of them in a checkpoint."""

    entropy: float = 0.0  # mean entropy of the policy in the newest batch, nats; 0 before the first


@dataclass(frozen=True, kw_only=True, slots=True)
class Joined:
    """Which rows are trained on: indices [n] int64, in this order, the tempered ones first."""

    tempered: Tensor  # into the tempered samples
    main: Tensor  # into the batch's own


@dataclass(kw_only=True, slots=True)
class Tempering(ABC):
    """Base of what is done with samples at another temperature."""

    @property
    def needs(self) -> frozenset[str]:
        """`tempered_rollouts`: further samples; `tempered_old_logprobs`: the old policy's log-probabilities of the batch's own
        tokens with logits divided by `temperature` as well."""
        return frozenset()

    def initial(self) -> TemperingState:
        """The state before the first batch of rollouts."""
        return TemperingState()

    def update(self, state: TemperingState, measured: float) -> TemperingState:
        """The state for the next batch, after one whose mean entropy, over all of its tokens and ranks, was `measured`.

        A measurement that is not finite leaves the state as it was.
        """
        return TemperingState(entropy=measured) if math.isfinite(measured) else state

    @abstractmethod
    def temperature(self, state: TemperingState) -> float:
        """What the sampler's temperature is multiplied by for the tempered samples of the next batch."""

    def num_prompts(self, prompts_per_step: int) -> int:
        """How many of a batch's prompts are sampled once more."""
        return 0


@dataclass(kw_only=True, slots=True)
class NoTempering(Tempering):
    """Every sample is drawn at the sampler's temperature."""

    def temperature(self, state: TemperingState) -> float:
        """1."""
        return 1.0


class TemperedUse(Enum):
    """What becomes of the tempered samples; see `Aepo`."""

    additive = "additive"
    replace = "replace"
    dcpo = "dcpo"


@dataclass(kw_only=True, slots=True)
class Aepo(Tempering):
    """Holds the entropy at a target by also learning from samples at a higher or lower temperature (AEPO).

        temperature = high_temperature while entropy <= target, else low_temperature; entropy is the newest batch's

        additive  loss + coef * mean over the tokens of good tempered samples of -logprobs        `join`, `term`
        replace   good tempered samples, with advantage 1, take the place of the batch's first    `join`
        dcpo      no further samples: a temperature ratio is blended into the advantages          `blend`

    A tempered sample is good if its advantage within its own group is above min_advantage. Gradient of `additive`: that of
    REINFORCE on the good samples at the temperature of the policy itself; imitating hotter samples raises the entropy, colder
    ones lower it. Source: the README and code of 597358816/AEPO, whose procedure is `replace`; its README has the coefficient,
    which `replace` leaves implicit in the share of replaced rows; `additive` without a clip is rlkit's own reading of it.
    """

    use: TemperedUse = TemperedUse.additive
    target: float = 0.5  # nats per token
    high_temperature: float = 1.2  # of the samples that raise the entropy, times the sampler's
    low_temperature: float = 0.8  # of those that lower it
    prompt_fraction: float = 0.25  # of a batch's prompts, the first ones, that are sampled once more
    min_advantage: float = 0.05  # a sample of a larger one is good; for dcpo, of a larger reward
    max_samples: int = 60  # replace: so many good samples at most, half of them while the entropy is above the target
    coef: float = 0.05  # additive: multiplies the further term

    def __post_init__(self):
        for name in ("target", "coef", "max_samples"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"tempering.{name}={getattr(self, name)}: write 0 or more.")
        if not 1 <= self.high_temperature < math.inf:
            raise ConfigError(f"tempering.high_temperature={self.high_temperature}: write 1 or more; 1.2 is usual.")
        if not 0 < self.low_temperature <= 1:
            raise ConfigError(f"tempering.low_temperature={self.low_temperature}: write a value in (0, 1]; 0.8 is usual.")
        if not 0 < self.prompt_fraction <= 1:
            raise ConfigError(f"tempering.prompt_fraction={self.prompt_fraction}: write a value in (0, 1]; 0.25 is usual.")

    @property
    def needs(self) -> frozenset[str]:
        return {
            TemperedUse.additive: frozenset({"tempered_rollouts"}),
            # Their log-probabilities at the sampler's own temperature are what the ratio is to.
            TemperedUse.replace: frozenset({"tempered_rollouts", "old_pass"}),
            TemperedUse.dcpo: frozenset({"tempered_old_logprobs", "old_pass"}),
        }[self.use]

    def temperature(self, state: TemperingState) -> float:
        """High at the target and below it, low above."""
        return self.high_temperature if state.entropy <= self.target else self.low_temperature

    def num_prompts(self, prompts_per_step: int) -> int:
        """The first ones of the batch."""
        return 0 if self.use is TemperedUse.dcpo else int(self.prompt_fraction * prompts_per_step)

    def join(self, tempered_advantages: Tensor, *, num_main: int, state: TemperingState) -> Joined:
        """Which rows are trained on, from the advantages [E] of the tempered samples, each among its own group.

        Where no tempered sample is good, the batch's own rows are all there is.
        """
        good = (tempered_advantages.detach() > self.min_advantage).nonzero().squeeze(-1)
        if self.use is TemperedUse.additive:
            return Joined(tempered=good, main=torch.arange(num_main))
        count = min(self.max_samples, len(good), num_main)
        if state.entropy > self.target:
            count //= 2
        return Joined(tempered=good[:count], main=torch.arange(count, num_main))

    def term(self, *, logprobs: Tensor, mask: Tensor) -> LossTerm:
        """The additive form's term; logprobs [B, T], mask [B, T] bool: the response tokens of rows that joined.

        These rows belong to this term alone: no other term's mask has them. Denominators count this mask over the step.
        """
        loss = -logprobs.masked_fill(~mask, 0.0)
        return LossTerm(name="aepo", loss=loss, mask=mask, coef=self.coef, aggregation=Aggregation.token_mean)

    def blend(
        self,
        advantages: Tensor,
        *,
        old_logprobs: Tensor,
        tempered_old_logprobs: Tensor,
        rewards: Tensor,
        response_mask: Tensor,
        state: TemperingState,
    ) -> Tensor:
        """DCPO's advantages, [B, T], 0 off the mask, from those of the batch of rollouts [B, T] and its rewards [B].

            A <- (1 - a) A + a * good * exp(tempered_old_logprobs - old_logprobs),  good = reward > min_advantage
            a = a0 / (1 + a0),  a0 = min(|target - entropy|, 0.1) / mean(good)

        a is 0 where no response is good. Rows without a response token do not count.
        """
        advantages = advantages.detach().masked_fill(~response_mask, 0.0)
        good = (rewards.detach() > self.min_advantage) & response_mask.any(-1)
        if not good.any():
            return advantages
        pull = min(abs(self.target - state.entropy), 0.1) * float(response_mask.any(-1).sum() / good.sum())
        share = pull / (1 + pull)
        hotter = ratio(masked_log_ratio(tempered_old_logprobs.detach(), old_logprobs.detach(), response_mask))
        blended = (1 - share) * advantages + share * hotter * good.unsqueeze(-1)
        return blended.masked_fill(~response_mask, 0.0)
