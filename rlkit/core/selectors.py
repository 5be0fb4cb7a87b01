"""Which tokens train, and which tokens' loss is changed: masks over a batch of rollouts, and selectors behind the objective."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from rlkit.core.objectives import Surrogate
from rlkit.core.ratios import masked_log_ratio
from rlkit.errors import ConfigError

MIN_STD = 1e-12  # below it the tokens of a batch are taken for equal: none stands out


class Scope(Enum):
    """Which tokens compete with each other wherever a method ranks them."""

    mini = "mini"  # those of one optimiser step: all of its microbatches on all ranks
    micro = "micro"  # those of one microbatch on one rank, as in the published codes; its size then changes the result


class Sides(Enum):
    """Which tokens an entropy filter may drop. Both kinds are those whose update lowers the entropy most."""

    negative_low = "negative_low"  # of negative advantage, far less likely than its distribution expects
    positive_high = "positive_high"  # of positive advantage, far more likely than that
    both = "both"


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of x [B, T] over mask [B, T] bool, a scalar; 0 where nothing is in the mask. Summed in float64."""
    return (x.masked_fill(~mask, 0.0).sum(dtype=torch.float64) / mask.sum().clamp(min=1)).to(x.dtype)


def row_quantile(x: Tensor, mask: Tensor, q: float) -> Tensor:
    """The q-quantile of each row of x [B, T] over mask [B, T] bool, interpolated linearly; [B], NaN for a row without a token."""
    ranked = x.masked_fill(~mask, torch.inf).sort(-1).values
    counts = mask.sum(-1)
    position = q * (counts - 1).clamp(min=0).double()
    below = position.floor()
    low, high = (ranked.gather(-1, index.long().unsqueeze(-1)).squeeze(-1) for index in (below, position.ceil()))
    return torch.lerp(low, high, (position - below).to(x.dtype)).masked_fill(counts == 0, torch.nan)


def covariance(logprobs: Tensor, advantages: Tensor, response_mask: Tensor) -> Tensor:
    """(A - mean A) * (logprobs - mean logprobs) of each token, [B, T], no gradient, 0 off the mask; means over the whole mask.

    Its mean is the covariance that a step's entropy falls with, to first order and up to a factor (arXiv:2505.22617).
    """
    advantages, logprobs = (x.detach().masked_fill(~response_mask, 0.0) for x in (advantages, logprobs))
    product = (advantages - masked_mean(advantages, response_mask)) * (logprobs - masked_mean(logprobs, response_mask))
    return product.masked_fill(~response_mask, 0.0)


def covariance_metrics(*, logprobs: Tensor, advantages: Tensor, response_mask: Tensor) -> dict[str, float]:
    """The mean of the tokens' covariances and of the largest 0.02 % and 0.2 % of them, at least one token each.

    All [B, T], of a whole step or batch of rollouts. Says how fast and by how few tokens' doing the entropy falls.
    """
    values = covariance(logprobs, advantages, response_mask)[response_mask].double()
    if not len(values):
        return {}
    ranked = values.sort(descending=True).values

    def top(fraction: float) -> float:
        return float(ranked[: max(int(fraction * len(ranked)), 1)].mean())

    return {
        "entropy/cov_mean": float(values.mean()),
        "entropy/cov_top0.02pct_mean": top(0.0002),
        "entropy/cov_top0.2pct_mean": top(0.002),
    }


def entropy_score(logprobs: Tensor, entropy: Tensor) -> Tensor:
    """S = p (log p + H) of the sampled token: minus the derivative of the entropy H in that token's logit.

    A gradient step alpha on log p changes the entropy by -alpha (S - E[S]) to first order, where E[S] = sum_v p_v S_v is
    `expected_score` of token_statistics: S above E[S] is a token likelier than its distribution expects.
    """
    return logprobs.exp() * (logprobs + entropy)


# --- Filters: once, over a whole batch of rollouts ------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class TokenFilter(ABC):
    """Base of the token filters."""

    @property
    def needs(self) -> frozenset[str]:
        """`old_entropy` and `old_expected_score`: of the policy before the update, exact, [B, T], without gradient."""
        return frozenset()

    @abstractmethod
    def __call__(
        self,
        *,
        old_logprobs: Tensor,
        rollout_logprobs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        entropy: Tensor | None = None,
        expected_score: Tensor | None = None,
    ) -> Tensor:
        """The part of response_mask that trains, [B, T] bool. All inputs [B, T], of the whole batch of rollouts.

        A dropped token leaves every denominator; advantages are not computed again. entropy and expected_score are the old
        policy's.
        """


@dataclass(kw_only=True, slots=True)
class NoTokenFilter(TokenFilter):
    """Every sampled token trains."""

    def __call__(
        self,
        *,
        old_logprobs: Tensor,
        rollout_logprobs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        entropy: Tensor | None = None,
        expected_score: Tensor | None = None,
    ) -> Tensor:
        """The response mask itself."""
        return response_mask


class LogprobSource(Enum):
    """Whose log-probabilities of the sampled tokens a filter scores."""

    old = "old"
    rollout = "rollout"  # as the engine reported them: what the published code of Clip_B reads


@dataclass(kw_only=True, slots=True)
class EntropyFilter(TokenFilter):
    """Base of the filters by the entropy score S = p (log p + H)."""

    mu: float  # how many standard deviations a token may stand out; .inf drops none
    sides: Sides = Sides.negative_low  # the others are rlkit's own
    logprobs: LogprobSource = LogprobSource.old

    def __post_init__(self):
        if not self.mu >= 0:
            raise ConfigError(f"token_filter.mu={self.mu}: write 0 or more; .inf drops no token.")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"old_entropy"})

    def _score(self, old_logprobs: Tensor, rollout_logprobs: Tensor, entropy: Tensor | None, mask: Tensor) -> Tensor:
        assert entropy is not None, "an entropy filter needs the old policy's entropy"
        logprobs = old_logprobs if self.logprobs is LogprobSource.old else rollout_logprobs
        return entropy_score(*(x.detach().masked_fill(~mask, 0.0) for x in (logprobs, entropy)))

    def _outstanding(self, surplus: Tensor, std: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        """[B, T] bool: tokens on a side that may be dropped whose surplus, S less what is expected, is beyond mu * std."""
        advantages = advantages.detach().masked_fill(~mask, 0.0)
        low = (advantages < 0) & (surplus < -self.mu * std)
        high = (advantages > 0) & (surplus > self.mu * std)
        match self.sides:
            case Sides.negative_low:
                beyond = low
            case Sides.positive_high:
                beyond = high
            case Sides.both:
                beyond = low | high
        return beyond & mask & (std > MIN_STD)


@dataclass(kw_only=True, slots=True)
class ClipB(EntropyFilter):
    """Drops bad tokens whose entropy score is far below the batch's mean (Clip_B).

        S = exp(old_logprobs) * (entropy + old_logprobs)
        drop where A < 0 and S - mean(S) < -mu * std(S)

    Mean and population standard deviation over all response tokens. Punishing such a token, one far less likely than its
    distribution expects, lowers the entropy most. Source: arXiv:2602.03392; code: hiyuchang/Trinity-RFT, which scores the
    engine's log-probabilities (`logprobs=rollout`).
    """

    mu: float = 2.5  # how many standard deviations a token may stand out; .inf drops none

    def __call__(
        self,
        *,
        old_logprobs: Tensor,
        rollout_logprobs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        entropy: Tensor | None = None,
        expected_score: Tensor | None = None,
    ) -> Tensor:
        """Shapes as in the base class; expected_score is not used."""
        score = self._score(old_logprobs, rollout_logprobs, entropy, response_mask)
        surplus = score - masked_mean(score, response_mask)
        return response_mask & ~self._outstanding(surplus, _std(score, response_mask), advantages, response_mask)


@dataclass(kw_only=True, slots=True)
class ClipV(EntropyFilter):
    """Drops bad tokens whose entropy score is far below what their own distribution expects (Clip_V).

        X = expected_score - S,  S = exp(old_logprobs) * (entropy + old_logprobs)
        drop where A < 0 and X > mu * std(X), but at most max(int(max_fraction * N), 1) tokens: those of the largest X

    std is the population standard deviation over all N response tokens, and the bound is not shifted by the mean of X. To first
    order a token's update changes the entropy by alpha * X, alpha having the sign of A: large X and A < 0 lower it most.
    Source: arXiv:2602.03392; code: hiyuchang/Trinity-RFT, where a token of advantage 0 can be dropped as well.
    """

    mu: float = 8.5  # how many standard deviations a token may stand out; .inf drops none
    max_fraction: float = 1e-4  # of the batch's tokens that are dropped at most, though always one

    def __post_init__(self):
        EntropyFilter.__post_init__(self)
        if not 0 < self.max_fraction <= 1:
            raise ConfigError(f"token_filter.max_fraction={self.max_fraction}: write a value in (0, 1]; 1e-4 is usual.")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"old_entropy", "old_expected_score"})

    def __call__(
        self,
        *,
        old_logprobs: Tensor,
        rollout_logprobs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        entropy: Tensor | None = None,
        expected_score: Tensor | None = None,
    ) -> Tensor:
        """Shapes as in the base class."""
        assert expected_score is not None, "token_filter=clip_v needs the old policy's expected_score"
        score = self._score(old_logprobs, rollout_logprobs, entropy, response_mask)
        surplus = score - expected_score.detach().masked_fill(~response_mask, 0.0)
        dropped = self._outstanding(surplus, _std(surplus, response_mask), advantages, response_mask)
        allowed = max(int(self.max_fraction * int(response_mask.sum())), 1)
        return response_mask & ~_largest(surplus.abs(), dropped, allowed)


def _std(x: Tensor, mask: Tensor) -> Tensor:
    """The population standard deviation over the mask; 0 for a single token."""
    return masked_mean((x - masked_mean(x, mask)).square(), mask).sqrt()


def _largest(x: Tensor, candidates: Tensor, count: int) -> Tensor:
    """[B, T] bool: of the candidates [B, T], the `count` with the largest x; the first in the batch where some are equal."""
    where = candidates.flatten().nonzero().squeeze(-1)
    ranked = where[x.flatten()[where].argsort(descending=True, stable=True)]
    return _at(ranked[:count], candidates.shape)


def _at(indices: Tensor, shape: torch.Size) -> Tensor:
    """A bool tensor of this shape, True at these indices into its flattened form."""
    chosen = torch.zeros(shape.numel(), dtype=torch.bool, device=indices.device)
    chosen[indices] = True
    return chosen.view(shape)


# --- Selectors: behind the objective ----------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class Selector(ABC):
    """Base of the token selectors."""

    @property
    def needs(self) -> frozenset[str]:
        """What must be computed; `old_pass`: old_logprobs as numbers, before the optimiser step's first forward pass."""
        return frozenset()

    @property
    def whole_batch(self) -> bool:
        """True: `choose` is called once, before the first microbatch, on all rows of the optimiser step over all ranks, with
        old_logprobs for logprobs. False: `__call__` chooses among the microbatch's own tokens."""
        return False

    def __call__(
        self,
        surrogate: Surrogate,
        *,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        generator: torch.Generator | None = None,
        chosen: Tensor | None = None,
    ) -> Surrogate:
        """The surrogate with the loss of some tokens changed; all tensors [B, T]. `chosen`: these rows of the step's choice."""
        if chosen is None:
            assert not self.whole_batch, f"{type(self).__name__} chooses once per optimiser step: pass chosen"
            chosen = self.choose(
                logprobs=logprobs.detach(),
                advantages=advantages,
                response_mask=response_mask,
                clipped=surrogate.clipped,
                generator=generator,
            )
        return self.apply(
            surrogate, chosen, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, response_mask=response_mask
        )

    @abstractmethod
    def choose(
        self,
        *,
        logprobs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        generator: torch.Generator | None,
        clipped: Tensor | None = None,
    ) -> Tensor:
        """The tokens whose loss changes, [B, T] bool. All inputs [B, T], over the tokens that compete with each other.

        clipped: tokens that the objective's bound already holds, where that is known. Every random choice is drawn from
        `generator`, so that a resumed run draws the same; only a selector that makes none takes None.
        """

    @abstractmethod
    def apply(
        self,
        surrogate: Surrogate,
        chosen: Tensor,
        *,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
    ) -> Surrogate:
        """The surrogate with the loss of the chosen tokens changed; all tensors [B, T], of a microbatch."""


@dataclass(kw_only=True, slots=True)
class NoSelector(Selector):
    """Every token keeps its loss."""

    def choose(
        self,
        *,
        logprobs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        generator: torch.Generator | None,
        clipped: Tensor | None = None,
    ) -> Tensor:
        """None of them."""
        return torch.zeros_like(response_mask)

    def apply(
        self,
        surrogate: Surrogate,
        chosen: Tensor,
        *,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
    ) -> Surrogate:
        """The surrogate itself."""
        return surrogate


@dataclass(kw_only=True, slots=True)
class CovarianceSelector(Selector):
    """Base of the selectors by the covariance of log-probability and advantage."""

    token_fraction: float = 2e-4  # of the scope's tokens that are chosen, though always one
    scope: Scope = Scope.mini  # the published code's is micro

    def __post_init__(self):
        if not 0 < self.token_fraction <= 1:
            raise ConfigError(f"selector.token_fraction={self.token_fraction}: write a value in (0, 1]; 2e-4 is usual.")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"old_logprobs", "old_pass"} if self.whole_batch else {"old_logprobs"})

    @property
    def whole_batch(self) -> bool:
        return self.scope is Scope.mini

    def _count(self, response_mask: Tensor) -> int:
        return max(int(self.token_fraction * int(response_mask.sum())), 1)


@dataclass(kw_only=True, slots=True)
class ClipCov(CovarianceSelector):
    """Takes the loss from a few random tokens with a large covariance of log-probability and advantage (Clip-Cov).

        cov     = (A - mean(A)) * (logprobs - mean(logprobs))
        chosen  = max(int(token_fraction * N), 1) random tokens with cov_low < cov < cov_high that the objective did not clip
        loss    = 0 on chosen tokens, which still count in the denominators

    Gradient: the objective's on all other tokens. Rewarding what is likely already is what makes the entropy collapse. In
    scope mini the means, N and the choice are the whole optimiser step's, with old_logprobs; as nothing is clipped before the
    forward pass, a chosen token that turns out to be keeps its loss (its gradient is zero either way). In scope micro they are
    the microbatch's, with its present logprobs and without clipped tokens, as published. The published runs set
    objective.clip_low=1 and objective.clip_high=1. Source: arXiv:2505.22617; code: PRIME-RL/Entropy-Mechanism-of-RL.
    """

    cov_low: float = 1.0  # tokens with a covariance above it may be chosen
    cov_high: float = 5.0  # and below it
    exclude_clipped: bool = True  # never choose a token that the objective clipped

    def __post_init__(self):
        CovarianceSelector.__post_init__(self)
        if not self.cov_high >= self.cov_low:
            raise ConfigError(
                f"selector.cov_high={self.cov_high}: is below selector.cov_low={self.cov_low}. Write at least that; 5 is usual."
            )

    def choose(
        self,
        *,
        logprobs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        generator: torch.Generator | None,
        clipped: Tensor | None = None,
    ) -> Tensor:
        """Shapes as in the base class."""
        assert generator is not None, "selector=clip_cov draws at random: pass a generator"
        cov = covariance(logprobs, advantages, response_mask)
        candidates = response_mask & (self.cov_low < cov) & (cov < self.cov_high)
        if self.exclude_clipped and clipped is not None:
            candidates = candidates & ~clipped
        where = candidates.flatten().nonzero().squeeze(-1)
        order = torch.randperm(len(where), generator=generator, device=generator.device).to(where.device)
        return _at(where[order[: self._count(response_mask)]], response_mask.shape)

    def apply(
        self,
        surrogate: Surrogate,
        chosen: Tensor,
        *,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
    ) -> Surrogate:
        """The loss is 0 on chosen tokens, as value and as gradient."""
        if self.exclude_clipped:
            chosen = chosen & ~surrogate.clipped
        return Surrogate(loss=surrogate.loss.masked_fill(chosen, 0.0), clipped=surrogate.clipped)


@dataclass(kw_only=True, slots=True)
class KLCov(CovarianceSelector):
    """Pulls the tokens with the largest covariance of log-probability and advantage back to the old policy (KL-Cov).

        cov     = (A - mean(A)) * (logprobs - mean(logprobs))
        chosen  = the max(int(token_fraction * N), 1) tokens of the largest cov
        loss   += coef * |logprobs - old_logprobs| on chosen tokens

    Gradient: the objective's, and coef * sign(logprobs - old_logprobs) on chosen tokens, 0 where the policies agree. The method
    has no clip, in the paper and in its code: its objective is `unclipped`. In scope mini the means, N and the choice are the
    whole optimiser step's, with old_logprobs; in scope micro the microbatch's, with its present logprobs, as published. The
    paper writes a KL, the code the absolute log-ratio. Published: 0.002 of the tokens for 7B, 0.0002 for 32B.
    Source: arXiv:2505.22617; code: PRIME-RL/Entropy-Mechanism-of-RL.
    """

    coef: float = 1.0  # of the pull

    def __post_init__(self):
        CovarianceSelector.__post_init__(self)
        if not self.coef >= 0:
            raise ConfigError(f"selector.coef={self.coef}: write 0 or more; 1 is usual.")

    def choose(
        self,
        *,
        logprobs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
        generator: torch.Generator | None,
        clipped: Tensor | None = None,
    ) -> Tensor:
        """Shapes as in the base class; nothing is drawn, and clipped is not used."""
        cov = covariance(logprobs, advantages, response_mask)
        return _largest(cov, response_mask, self._count(response_mask))

    def apply(
        self,
        surrogate: Surrogate,
        chosen: Tensor,
        *,
        logprobs: Tensor,
        old_logprobs: Tensor,
        advantages: Tensor,
        response_mask: Tensor,
    ) -> Surrogate:
        """The pull is added on chosen tokens."""
        pull = masked_log_ratio(logprobs, old_logprobs.detach(), response_mask & chosen).abs()
        return Surrogate(loss=surrogate.loss + self.coef * pull, clipped=surrogate.clipped)
