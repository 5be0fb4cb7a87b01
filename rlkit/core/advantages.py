"""Rewards -> advantages."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from rlkit.errors import ConfigError


@dataclass(kw_only=True, slots=True)
class Estimate:
    """What an estimator hands on; no gradient, zero off the response mask."""

    advantages: Tensor  # [B, T]
    returns: Tensor | None = None  # [B, T], the critic's targets, never whitened; None where no critic is trained


@dataclass(kw_only=True, slots=True)
class Advantage(ABC):
    """Base of the advantage estimators."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def __call__(
        self, *, token_rewards: Tensor, response_mask: Tensor, group_ids: Tensor, values: Tensor | None = None
    ) -> Estimate:
        """token_rewards, response_mask (bool), values: [B, T]; group_ids: [B] int64, equal for responses to one prompt.

        Takes a whole batch of rollouts: statistics of a part of it would depend on how it was cut. One whose `needs` name
        reward_components is given them by that keyword as well.
        """


@dataclass(kw_only=True, slots=True)
class GroupBaseline(Advantage):
    """Base of the estimators that compare a row's reward with its group's, and give all tokens of a row the same advantage.

    R is the sum of a row's token_rewards. A group of one and a group of equal rewards rank nothing: their advantages are 0.
    """

    def __call__(
        self, *, token_rewards: Tensor, response_mask: Tensor, group_ids: Tensor, values: Tensor | None = None
    ) -> Estimate:
        """Shapes as in the base class; values are not used."""
        advantages = self.of_rows(Groups.of_outcomes(token_rewards, response_mask, group_ids))
        return Estimate(advantages=_on_every_token(advantages, response_mask))

    @abstractmethod
    def of_rows(self, groups: "Groups") -> Tensor:
        """The rows' advantages, [B]."""


@dataclass(kw_only=True, slots=True)
class GroupNormalized(GroupBaseline):
    """Reward minus its group's mean, divided by the group's standard deviation (GRPO).

        A = (R - mean) / (std + std_eps)

    std has Bessel's correction, as in every public implementation; the paper does not say. Source: arXiv:2402.03300 sec. 4.1.2.
    """

    std_eps: float = 1e-6  # added to the standard deviation

    def __post_init__(self):
        if not self.std_eps > 0:
            raise ConfigError(
                f"advantage.std_eps={self.std_eps}: write a value above 0, or equal rewards divide by zero; 1e-6 is usual."
            )

    def of_rows(self, groups: "Groups") -> Tensor:
        """[B]."""
        std = (groups.sum(groups.deviation.square()) / (groups.size - 1).clamp(min=1)).sqrt()
        return groups.deviation / (std + self.std_eps)


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardComponent:
    """A named part of the reward, as its function gave it, and what multiplies it in the sum."""

    rewards: Tensor  # [B], NaN in the rows that have no such part
    weight: float = 1.0


@dataclass(kw_only=True, slots=True)
class ComponentNormalized(GroupNormalized):
    """Each part of the reward normalised within its group, and their weighted sum over the batch (GDPO).

        A_k = (r_k - mean_k) / (std_k + std_eps)      over the group's rows that have part k; 0 in the others
        S   = sum_k weight_k * A_k
        A   = (S - mean) / (std + std_eps)            over the batch's rows that have any part; 0 in the others

    GRPO sums first, so that rewards of (1, 0) and (0, 1) are one and the same, and a part of a wide range drowns the others. A part
    that is constant in a group adds exactly 0 to it. Rows count once, however long; both std have Bessel's correction. What
    token_rewards hold beside the parts is not seen. Source: arXiv:2601.05242; weights as in TRL (`normalize_then_sum`).
    """

    needs: ClassVar[frozenset[str]] = frozenset({"reward_components"})

    def __call__(
        self,
        *,
        token_rewards: Tensor,
        response_mask: Tensor,
        group_ids: Tensor,
        values: Tensor | None = None,
        reward_components: Mapping[str, RewardComponent] | None = None,
    ) -> Estimate:
        """Shapes as in the base class; values are not used, and token_rewards only for their type."""
        assert reward_components is not None, "ComponentNormalized needs reward_components"
        # In float64: where parts cancel, what is left of rounding would be blown up by the batch's deviation.
        total = torch.zeros(len(response_mask), dtype=torch.float64, device=response_mask.device)
        has_part = torch.zeros_like(total, dtype=torch.bool)
        for component in reward_components.values():
            rewards = component.rewards.detach().to(total)
            member = response_mask.any(-1) & ~rewards.isnan()
            total += component.weight * self.of_rows(Groups.of(rewards, group_ids, member))
            has_part |= member
        deviation = (total - _mean(total[has_part])).masked_fill(~has_part, 0.0)
        std = (deviation.square().sum() / (has_part.sum() - 1).clamp(min=1)).sqrt()
        advantages = (deviation / (std + self.std_eps)).to(token_rewards.dtype)
        return Estimate(advantages=_on_every_token(advantages, response_mask))


@dataclass(kw_only=True, slots=True)
class GroupCentered(GroupBaseline):
    """Reward minus its group's mean (Dr. GRPO).

    A = R - mean. Not dividing by the standard deviation keeps nearly solved and nearly hopeless prompts from weighing more.
    Source: arXiv:2503.20783.
    """

    def of_rows(self, groups: "Groups") -> Tensor:
        """[B]."""
        return groups.deviation


@dataclass(kw_only=True, slots=True)
class LeaveOneOut(GroupBaseline):
    """Reward minus the mean reward of the other responses in its group (RLOO).

    A = G / (G - 1) * (R - mean). The baseline does not depend on the response it is subtracted from, hence no bias.
    Source: arXiv:2402.14740.
    """

    def of_rows(self, groups: "Groups") -> Tensor:
        """[B]."""
        return groups.size / (groups.size - 1).clamp(min=1) * groups.deviation


class AlphaMode(Enum):
    """What GPG takes for the share of responses that carry a signal; see `GroupPolicyGradient`."""

    official = "official"
    verl = "verl"


@dataclass(kw_only=True, slots=True)
class GroupPolicyGradient(GroupBaseline):
    """Reward minus its group's mean, scaled up for the groups whose rewards are all equal (GPG).

        A = alpha * (R - mean)
        official  alpha = 1 / (share of the responses in groups whose rewards differ + 1e-5)
        verl      alpha = number of responses / number of rewards that are not 0

    A group of equal rewards adds nothing to the gradient, yet counts in the loss's denominators; alpha makes up for it.
    Source: arXiv:2504.02546 and its code (AMAP-ML/GPG), which divides the loss instead; `verl` as in volcengine/verl.
    """

    alpha_mode: AlphaMode = AlphaMode.official

    def of_rows(self, groups: "Groups") -> Tensor:
        """[B]."""
        num_rows = groups.member.sum().to(groups.deviation.dtype)
        match self.alpha_mode:
            case AlphaMode.official:
                alpha = 1 / (groups.differ.sum() / num_rows.clamp(min=1) + 1e-5)
            case AlphaMode.verl:
                alpha = num_rows / groups.rewards.ne(0).sum().clamp(min=1)
        return alpha * groups.deviation


class Baseline(Enum):
    """What REINFORCE subtracts from the return; see `Reinforce`."""

    none = "none"
    batch = "batch"


@dataclass(kw_only=True, slots=True)
class Reinforce(Advantage):
    """Return from each token on, minus the batch's mean reward (REINFORCE).

        A_t = G_t - b,  G_t = r_t + gamma * G_{t+1},  b = 0 or the batch's mean R

    R is the sum of a row's token_rewards. With gamma=1 and the aggregation seq_mean_token_sum the gradient estimates that of
    E[R], without a bias for b = 0; the batch's mean contains the row's own reward, which shrinks the expected gradient by
    (B - 1) / B. Source: Williams (1992); the mean as baseline is this project's choice.
    """

    baseline: Baseline = Baseline.batch  # none or batch
    gamma: float = 1.0  # discount per token of the policy

    def __post_init__(self):
        _check_gamma(self.gamma)

    def __call__(
        self, *, token_rewards: Tensor, response_mask: Tensor, group_ids: Tensor, values: Tensor | None = None
    ) -> Estimate:
        """Shapes as in the base class; values and group_ids are not used."""
        advantages = _lambda_returns(token_rewards, response_mask, gamma=self.gamma)
        if self.baseline is Baseline.batch:
            rewards, member = _outcomes(token_rewards, response_mask)
            advantages = advantages - _mean(rewards[member])
        return Estimate(advantages=advantages.masked_fill(~response_mask, 0.0))


@dataclass(kw_only=True, slots=True)
class Whitened(Advantage):
    """Base of the estimators that bring a batch's advantages to mean 0 and variance 1, counted over its tokens."""

    ddof: int = 1  # 1: the variance has Bessel's correction, as in verl; 0: it has none, as in OpenRLHF and NeMo RL

    def __post_init__(self):
        if self.ddof not in (0, 1):
            raise ConfigError(f"advantage.ddof={self.ddof}: write 1 for a variance with Bessel's correction, or 0 for one without.")


@dataclass(kw_only=True, slots=True)
class ReinforcePlusPlus(Whitened):
    """Return from each token on, whitened over the batch's tokens (REINFORCE++).

    G_t = r_t + gamma * G_{t+1}, then whitened. A penalty for leaving the reference belongs into the rewards here.
    Source: arXiv:2501.03262. In verl the return starts anew at a gap in the mask (a tool's output); here it goes on.
    """

    gamma: float = 1.0  # discount per token of the policy

    def __post_init__(self):
        Whitened.__post_init__(self)
        _check_gamma(self.gamma)

    def __call__(
        self, *, token_rewards: Tensor, response_mask: Tensor, group_ids: Tensor, values: Tensor | None = None
    ) -> Estimate:
        """Shapes as in the base class; values and group_ids are not used."""
        returns = _lambda_returns(token_rewards, response_mask, gamma=self.gamma)
        return Estimate(advantages=_whiten(returns, response_mask, ddof=self.ddof))


@dataclass(kw_only=True, slots=True)
class ReinforcePlusPlusBaseline(Whitened):
    """Reward minus its group's mean, whitened over the batch's tokens (REINFORCE++ with baseline).

    R - mean on all tokens of a row, with R the sum of its token_rewards, then whitened: one deviation for all prompts, where
    GRPO has one per prompt. Source: arXiv:2501.03262.
    """

    def __call__(
        self, *, token_rewards: Tensor, response_mask: Tensor, group_ids: Tensor, values: Tensor | None = None
    ) -> Estimate:
        """Shapes as in the base class; values are not used."""
        deviation = Groups.of_outcomes(token_rewards, response_mask, group_ids).deviation
        return Estimate(advantages=_whiten(_on_every_token(deviation, response_mask), response_mask, ddof=self.ddof))


@dataclass(kw_only=True, slots=True)
class CriticBased(Whitened):
    """Base of the generalised advantage estimators.

        delta_t = r_t + gamma * V_{t+1} - V_t
        A_t     = delta_t + gamma * lam * A_{t+1},  whitened last
        returns = A + V, with the critic's own lam and not whitened

    t + 1 is the policy's next token: a gap in the mask (a tool's output) is stepped over, without a discount. Behind the last
    token V is 0, also where the response was cut off. Source: arXiv:1506.02438 eq. 16.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"values"})
    gamma: float = 1.0  # discount per token of the policy
    whiten: bool = True  # advantages to mean 0 and variance 1 over the batch's tokens

    def __post_init__(self):
        Whitened.__post_init__(self)
        _check_gamma(self.gamma)

    @abstractmethod
    def lams(self, response_mask: Tensor) -> tuple[Tensor | float, float]:
        """The lam of the advantages, for all rows or one for each [B], and that of the critic's targets."""

    def __call__(
        self, *, token_rewards: Tensor, response_mask: Tensor, group_ids: Tensor, values: Tensor | None = None
    ) -> Estimate:
        """Shapes as in the base class; values[:, t] is of the state before token t. group_ids are not used."""
        assert values is not None, f"{type(self).__name__} needs values"
        for_actor, for_critic = (
            _lambda_returns(token_rewards, response_mask, values=values, gamma=self.gamma, lam=lam)
            for lam in self.lams(response_mask)
        )
        advantages = (for_actor - values.detach()).masked_fill(~response_mask, 0.0)
        if self.whiten:
            advantages = _whiten(advantages, response_mask, ddof=self.ddof)
        return Estimate(advantages=advantages, returns=for_critic)


@dataclass(kw_only=True, slots=True)
class GAE(CriticBased):
    """Generalised advantage estimation with a critic's values (PPO).

    lam=1 is the return minus the value; a smaller lam trusts the critic more, for less variance. Source: arXiv:1506.02438.
    """

    lam: float = 1.0  # 1: no bias from the critic; 0: its one-step error alone

    def __post_init__(self):
        CriticBased.__post_init__(self)
        _check_lam("lam", self.lam)

    def lams(self, response_mask: Tensor) -> tuple[float, float]:
        """The same for both."""
        return self.lam, self.lam


@dataclass(kw_only=True, slots=True)
class DecoupledGAE(CriticBased):
    """GAE with one lam for the policy and another for the critic's targets (VC-PPO).

    With lam_critic=1 a reward at the end of a long response reaches its first tokens' targets undiminished, while
    lam_actor < 1 still calms the advantages. The method also trains the critic before the policy: critic.warmup_steps.
    Source: arXiv:2503.01491.
    """

    lam_actor: float = 0.95  # of the advantages
    lam_critic: float = 1.0  # of the critic's targets; 1: the returns themselves

    def __post_init__(self):
        CriticBased.__post_init__(self)
        _check_lam("lam_actor", self.lam_actor)
        _check_lam("lam_critic", self.lam_critic)

    def lams(self, response_mask: Tensor) -> tuple[float, float]:
        """As set."""
        return self.lam_actor, self.lam_critic


@dataclass(kw_only=True, slots=True)
class LengthAdaptiveGAE(CriticBased):
    """GAE whose lam for the policy grows with the response's length (VAPO).

        lam_actor = max(1 - 1 / (alpha * length), 0)

    so that the weights lam^k of the one-step errors sum to about alpha * length, whatever the length; 0 for a response of
    1 / alpha tokens or fewer, a bound from NeMo RL's code. Source: arXiv:2504.05118.
    """

    alpha: float = 0.05  # share of a response that an advantage looks ahead over
    lam_critic: float = 1.0  # of the critic's targets; 1: the returns themselves

    def __post_init__(self):
        CriticBased.__post_init__(self)
        if not self.alpha > 0:
            raise ConfigError(f"advantage.alpha={self.alpha}: write a value above 0; 0.05 is usual.")
        _check_lam("lam_critic", self.lam_critic)

    def lams(self, response_mask: Tensor) -> tuple[Tensor, float]:
        """[B] float64, and as set."""
        return 1 - 1 / (self.alpha * response_mask.sum(-1).double()).clamp(min=1), self.lam_critic


def _check_gamma(gamma: float) -> None:
    if not 0 < gamma <= 1:
        raise ConfigError(f"advantage.gamma={gamma}: write a value in (0, 1]; 1, no discount, is usual.")


def _check_lam(key: str, lam: float) -> None:
    if not 0 <= lam <= 1:
        raise ConfigError(f"advantage.{key}={lam}: write a value in [0, 1]; 0.95 and 1 are usual.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Groups:
    """The rewards of a batch of responses, each beside those of its group; all [B].

    A row that is no member counts in no statistic, and its deviation is 0.
    """

    rewards: Tensor
    member: Tensor  # bool
    index: Tensor  # int64, the row's group
    size: Tensor  # number of the group's members
    deviation: Tensor  # reward minus the group's mean, exactly 0 where the group's rewards are equal
    differ: Tensor  # bool, members of a group whose rewards are not all equal

    @classmethod
    def of(cls, rewards: Tensor, group_ids: Tensor, member: Tensor) -> Self:
        """rewards, group_ids, member (bool): [B]."""
        index = group_ids.unique(return_inverse=True)[1]
        # The mean of equal floats need not equal them; measured from the group's lowest reward it does, and zero stays zero.
        lowest = torch.full_like(rewards, torch.inf)
        lowest = lowest.scatter_reduce(0, index, rewards.masked_fill(~member, torch.inf), "amin")[index]
        above = (rewards - lowest).masked_fill(~member, 0.0)
        size = _group_sum(member.to(rewards.dtype), index)
        mean = _group_sum(above, index) / size.clamp(min=1)
        return cls(
            rewards=rewards,
            member=member,
            index=index,
            size=size,
            deviation=(above - mean).masked_fill(~member, 0.0),
            differ=member & (_group_sum(above, index) > 0),
        )

    @classmethod
    def of_outcomes(cls, token_rewards: Tensor, response_mask: Tensor, group_ids: Tensor) -> Self:
        """A row's reward is the sum of its token_rewards; rows without a response token are no members."""
        rewards, member = _outcomes(token_rewards, response_mask)
        return cls.of(rewards, group_ids, member)

    def sum(self, x: Tensor) -> Tensor:
        """The sum of x [B] over each row's group, [B]."""
        return _group_sum(x, self.index)


def _group_sum(x: Tensor, index: Tensor) -> Tensor:
    """There are at most B groups, so [B] sums suffice."""
    return torch.zeros_like(x).index_add(0, index, x)[index]


def _outcomes(token_rewards: Tensor, response_mask: Tensor) -> tuple[Tensor, Tensor]:
    """[B] each: the sum of a row's token_rewards, and whether the row has a response token at all."""
    return token_rewards.detach().masked_fill(~response_mask, 0.0).sum(-1), response_mask.any(-1)


def _on_every_token(row_advantages: Tensor, response_mask: Tensor) -> Tensor:
    """[B] -> [B, T], zero off the mask."""
    return row_advantages.unsqueeze(-1).expand(response_mask.shape).masked_fill(~response_mask, 0.0)


def _lambda_returns(
    token_rewards: Tensor, response_mask: Tensor, *, values: Tensor | None = None, gamma: float, lam: Tensor | float = 1.0
) -> Tensor:
    """[B, T], zero off the mask: what GAE adds to V.

        L_t = r_t + gamma * ((1 - lam) * V_{t+1} + lam * L_{t+1})

    over the tokens in the mask, the cells between them skipped; lam is a number or [B]. With lam=1 this is the discounted sum
    of the rewards to come, free of V's rounding, which the recursion over A would add to every cell and take away again.
    """
    rewards = token_rewards.detach().masked_fill(~response_mask, 0.0)
    lam = torch.as_tensor(lam, dtype=rewards.dtype, device=rewards.device).expand(len(rewards)).unsqueeze(-1)
    if values is not None:
        rewards = rewards + (gamma * (1 - lam) * _next_in_mask(values, response_mask)).masked_fill(~response_mask, 0.0)
    decay = torch.where(response_mask, gamma * lam, 1.0).T.contiguous()  # a cell between two tokens hands on what comes later
    returns = rewards.T.contiguous()
    for t in range(len(returns) - 2, -1, -1):
        returns[t].addcmul_(decay[t], returns[t + 1])
    return returns.T.masked_fill(~response_mask, 0.0)


def _next_in_mask(x: Tensor, mask: Tensor) -> Tensor:
    """[B, T]: each cell's next value of x in the mask; 0 where none follows."""
    width = mask.shape[-1]
    position = torch.arange(width, device=mask.device).expand(mask.shape).masked_fill(~mask, width)
    following = F.pad(position.flip(-1).cummin(-1).values.flip(-1)[:, 1:], (0, 1), value=width)
    return F.pad(x.detach().masked_fill(~mask, 0.0), (0, 1)).gather(-1, following)


def _whiten(x: Tensor, response_mask: Tensor, *, ddof: int) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8) over the mask's cells, [B, T]; zero off the mask, and where all x are equal."""
    deviation = (x - _mean(x[response_mask])).masked_fill(~response_mask, 0.0)
    variance = deviation.square().sum() / (response_mask.sum() - ddof).clamp(min=1)
    return deviation * (variance + 1e-8).rsqrt()


def _mean(x: Tensor) -> Tensor:
    """The mean of x [n], exactly x where all are equal; 0 for none."""
    if not len(x):
        return x.new_zeros(())
    lowest = x.min()
    return lowest + (x - lowest).mean()
