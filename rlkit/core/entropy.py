"""Entropy terms beside the objective."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor

from rlkit.core.logprobs import Crossing, Nucleus
from rlkit.core.reduce import Aggregation, Denominators, reduce
from rlkit.core.selectors import Scope, row_quantile
from rlkit.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class EntropyState:
    """All that an entropy term remembers between batches of rollouts, as plain numbers: JSON keeps every bit of them.

    A term with a memory of its own extends this class.
    """


@dataclass(kw_only=True, slots=True)
class EntropyTerm(ABC):
    """Base of the entropy terms; each has a setting `coef`, which multiplies its loss."""

    needs: ClassVar[frozenset[str]] = frozenset()

    @property
    def nucleus(self) -> Nucleus | None:
        """What token_statistics must be asked for where `needs` names nucleus_entropy."""
        return None

    @property
    def aggregation(self) -> Aggregation | None:
        """How this term's loss becomes one number, over response_mask; None: as the run's other losses do."""
        return None

    def initial(self) -> EntropyState:
        """The state before the first batch of rollouts."""
        return EntropyState()

    def update(
        self,
        state: EntropyState,
        *,
        response_mask: Tensor,
        entropy: Tensor | None = None,
        nucleus_entropy: Tensor | None = None,
        turns: Tensor | None = None,
    ) -> EntropyState:
        """The state that a batch of rollouts is trained with, once for each batch, before its first optimiser step.

        All [B, T], of the whole batch: the old policy's entropies where `needs` names old_entropy or old_nucleus_entropy, and
        the turn that each token belongs to, counted from 0, where it names turns.
        """
        return state

    def measure(self, *, nucleus_entropy: Tensor | None, response_mask: Tensor) -> float | None:
        """The number about the whole optimiser step that `loss` is given as `measured`; None where it needs none.

        Both [B, T], all rows of the step over all ranks, under the weights that the step begins with.
        """
        return None

    @abstractmethod
    def loss(
        self,
        *,
        entropy: Tensor | None,
        nucleus_entropy: Tensor | None = None,
        response_mask: Tensor | None = None,
        turns: Tensor | None = None,
        state: EntropyState | None = None,
        measured: float | None = None,
    ) -> Tensor | None:
        """A microbatch's per-token loss [B, T], without its coefficient; None adds no term.

        Args:
            entropy, nucleus_entropy: [B, T], of the present policy, in nats; the loss's gradient flows through them.
            turns: [B, T] int64, as in `update`.
            state: what `update` returned for this batch of rollouts.
            measured: what `measure` said of this optimiser step.
        """

    def metrics(self, state: EntropyState) -> dict[str, float]:
        """What the state says, for logging."""
        return {}


def _check_coef(coef: float) -> None:
    if not coef >= 0:
        raise ConfigError(f"entropy.coef={coef}: write 0 or more, or entropy=none to train without an entropy term.")


@dataclass(kw_only=True, slots=True)
class NoEntropy(EntropyTerm):
    """No entropy term."""

    def loss(
        self,
        *,
        entropy: Tensor | None,
        nucleus_entropy: Tensor | None = None,
        response_mask: Tensor | None = None,
        turns: Tensor | None = None,
        state: EntropyState | None = None,
        measured: float | None = None,
    ) -> None:
        """Adds no term."""


@dataclass(kw_only=True, slots=True)
class EntropyBonus(EntropyTerm):
    """Rewards the entropy of every next-token distribution.

    The loss is -entropy, and its gradient flows through all logits of the vocabulary, not through the sampled token alone:
    the sampled entropy -logprobs has an expected gradient of zero. Source: Williams and Peng (1991); arXiv:1602.01783.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"entropy"})
    coef: float = 0.01  # multiplies the loss; where a controller is chosen, its start

    def __post_init__(self):
        _check_coef(self.coef)

    def loss(
        self,
        *,
        entropy: Tensor | None,
        nucleus_entropy: Tensor | None = None,
        response_mask: Tensor | None = None,
        turns: Tensor | None = None,
        state: EntropyState | None = None,
        measured: float | None = None,
    ) -> Tensor:
        """-entropy, [B, T]."""
        assert entropy is not None, "the entropy bonus needs entropy from token_statistics"
        return -entropy


# --- SIREN ------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class SirenState(EntropyState):
    """The level that SIREN holds the entropy at; None before the first batch of rollouts."""

    anchor: float | None = None


@dataclass(kw_only=True, slots=True)
class Siren(EntropyTerm):
    """Holds the entropy of likely tokens, at each response's most undecided places, at its first level (SIREN).

        peak  = nucleus_entropy > its quantile over the row's response tokens, strictly
        H~    = mean over rows of (the row's mean of nucleus_entropy over its peaks, 0 without any)
        loss  = (H~ - anchor)^2, where anchor is H~ of the first batch of rollouts under the initial policy

    Gradient: 2 (H~ - anchor) grad H~, peaks and nuclei held fixed. In scope mini H~ is the whole optimiser step's, measured
    beforehand without a gradient as `measured`, and a microbatch adds its share of the square's tangent there,
    (measured - anchor)^2 + 2 (measured - anchor) (H~ - measured): exact in value and gradient at the step's first weights, and
    the same for every split into microbatches. In scope micro each microbatch has a square of its own, as in the published
    code, whose nucleus also leaves out the token that crosses top_p (`crossing=excluded`). Each row weighs the same whatever
    the run's aggregation. Source: arXiv:2509.25133; code: Linn3a/siren.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"nucleus_entropy", "old_nucleus_entropy"})
    coef: float = 0.005  # multiplies the loss; where a controller is chosen, its start
    top_p: float = 0.8  # probability that a nucleus holds
    top_k: int = 10_000  # tokens that a nucleus holds at most
    quantile: float = 0.8  # of a row's nucleus entropies; those above it are peaks
    crossing: Crossing = Crossing.included  # the published code's is excluded
    scope: Scope = Scope.mini  # the published code's is micro

    def __post_init__(self):
        _check_coef(self.coef)
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"entropy.top_p={self.top_p}: write a value in (0, 1]; 0.8 is usual.")
        if not self.top_k >= 1:
            raise ConfigError(f"entropy.top_k={self.top_k}: write 1 or more; 10000 is usual.")
        if not 0 <= self.quantile < 1:
            raise ConfigError(f"entropy.quantile={self.quantile}: write a value in [0, 1); 0.8 is usual.")

    @property
    def nucleus(self) -> Nucleus:
        return Nucleus(top_p=self.top_p, top_k=self.top_k, crossing=self.crossing)

    @property
    def aggregation(self) -> Aggregation:
        return Aggregation.seq_mean_token_mean

    def initial(self) -> SirenState:
        """No anchor yet."""
        return SirenState()

    def update(
        self,
        state: EntropyState,
        *,
        response_mask: Tensor,
        entropy: Tensor | None = None,
        nucleus_entropy: Tensor | None = None,
        turns: Tensor | None = None,
    ) -> SirenState:
        """The first batch with a token and finite entropies sets the anchor; nothing moves it again."""
        assert isinstance(state, SirenState)
        assert nucleus_entropy is not None, "entropy=siren needs the old policy's nucleus_entropy"
        values = nucleus_entropy[response_mask]
        if state.anchor is not None or not len(values) or not values.isfinite().all():
            return state
        return SirenState(anchor=self._level(nucleus_entropy, response_mask))

    def measure(self, *, nucleus_entropy: Tensor | None, response_mask: Tensor) -> float | None:
        """H~ of the whole optimiser step in scope mini."""
        if self.scope is Scope.micro:
            return None
        assert nucleus_entropy is not None, "entropy.scope=mini needs the nucleus_entropy of the whole optimiser step"
        return self._level(nucleus_entropy, response_mask)

    def loss(
        self,
        *,
        entropy: Tensor | None,
        nucleus_entropy: Tensor | None = None,
        response_mask: Tensor | None = None,
        turns: Tensor | None = None,
        state: EntropyState | None = None,
        measured: float | None = None,
    ) -> Tensor:
        """[B, T], to be aggregated by rows over response_mask."""
        assert isinstance(state, SirenState), "entropy=siren needs its state"
        assert state.anchor is not None, "entropy=siren has no anchor: update its state with a batch of rollouts first"
        assert nucleus_entropy is not None, "entropy=siren needs nucleus_entropy from token_statistics"
        assert response_mask is not None
        if self.scope is Scope.micro:
            return (self._mean(nucleus_entropy, response_mask) - state.anchor).square().expand(response_mask.shape)
        assert measured is not None, "entropy.scope=mini needs what `measure` says of the whole optimiser step"
        gap = measured - state.anchor
        return gap**2 + 2 * gap * (self._by_token(nucleus_entropy, response_mask) - measured)

    def metrics(self, state: EntropyState) -> dict[str, float]:
        """The anchor."""
        assert isinstance(state, SirenState)
        return {} if state.anchor is None else {"siren/H_anchor": state.anchor}

    def peaks(self, nucleus_entropy: Tensor, response_mask: Tensor) -> Tensor:
        """[B, T] bool: the response tokens above their row's quantile."""
        values = nucleus_entropy.detach()
        return response_mask & (values > row_quantile(values, response_mask, self.quantile).unsqueeze(-1))

    def _by_token(self, nucleus_entropy: Tensor, response_mask: Tensor) -> Tensor:
        """[B, T] whose mean over a row's response tokens is the row's mean over its peaks."""
        peaks = self.peaks(nucleus_entropy, response_mask)
        scale = response_mask.sum(-1, keepdim=True) / peaks.sum(-1, keepdim=True).clamp(min=1)
        return nucleus_entropy.masked_fill(~peaks, 0.0) * scale

    def _mean(self, nucleus_entropy: Tensor, response_mask: Tensor) -> Tensor:
        """H~ of these rows, a scalar."""
        return reduce(
            self._by_token(nucleus_entropy, response_mask),
            response_mask,
            aggregation=self.aggregation,
            denominators=Denominators.count(response_mask, max_response_tokens=1),
        )

    def _level(self, nucleus_entropy: Tensor, response_mask: Tensor) -> float:
        return float(self._mean(nucleus_entropy.detach(), response_mask))


# --- EPO --------------------------------------------------------------------------------------------------------------------


class Penalty(Enum):
    """What a token costs whose entropy is outside the band; see `Epo`."""

    hinge = "hinge"
    hinge_sq = "hinge_sq"
    literal = "literal"  # a constant, as in the published code and paper: no gradient


class Phase(Enum):
    """How the penalty's weight moves over training; see `Epo.phase_weight`."""

    official = "official"  # falls from 1 to 0.04, as in the published code
    increasing = "increasing"  # rises from 0.2 to 1, as the paper describes it in words
    constant = "constant"


@dataclass(frozen=True, kw_only=True, slots=True)
class EpoState(EntropyState):
    """What the entropy of each turn was so far."""

    sums: tuple[float, ...] = ()  # by turn: the sum over batches of rollouts of the mean entropy of the turn's tokens
    counts: tuple[int, ...] = ()  # by turn: in how many batches it occurred
    num_batches: int = 0  # of rollouts, the present one included
    last_turn: int = -1  # the largest turn of the present batch

    def __post_init__(self):
        for name in ("sums", "counts"):  # JSON has no tuples
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @property
    def means(self) -> list[float]:
        """By turn; NaN for one that never occurred."""
        return [total / count if count else math.nan for total, count in zip(self.sums, self.counts, strict=True)]


@dataclass(kw_only=True, slots=True)
class Epo(EntropyTerm):
    """Rewards entropy, and penalises a token whose entropy leaves a band around what its turn's used to be (EPO).

        loss = -entropy + smoothing * phase_weight * P
        lo, hi = low * past, high * past,  past = the mean over all batches so far of the mean entropy of the token's turn
        hinge     P = alpha * (max(lo - entropy, 0) + max(entropy - hi, 0))
        hinge_sq  P = alpha * (max(lo - entropy, 0)^2 + max(entropy - hi, 0)^2)
        literal   P = alpha unless lo < entropy < hi

    Gradient: through entropy, in the bonus and in the hinges; lo and hi are numbers. The literal penalty, the published one,
    has none, which leaves a plain bonus; the hinges are rlkit's own. P is 0 in a batch without any turn from min_turn on.
    Source: arXiv:2509.22576; code: WujiangXu/EPO.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"entropy", "old_entropy", "turns"})
    coef: float = 0.001  # multiplies the loss; where a controller is chosen, its start
    smoothing: float = 1.0  # multiplies the penalty; 0 leaves a plain bonus
    penalty: Penalty = Penalty.hinge  # the published one is literal
    alpha: float = 0.1  # cost of being outside the band
    low: float = 0.8  # the band begins at this share of the past entropy
    high: float = 1.2  # and ends at this one
    phase: Phase = Phase.official
    phase_steps: int = 150  # batches of rollouts that the phase weight's schedule is made for
    min_turn: int = 0  # a batch is penalised only if a turn from this one on occurs in it; 25 as published

    def __post_init__(self):
        _check_coef(self.coef)
        for name in ("smoothing", "alpha", "low"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"entropy.{name}={getattr(self, name)}: write 0 or more.")
        if not self.high > self.low:
            raise ConfigError(f"entropy.high={self.high}: is not above entropy.low={self.low}; 0.8 and 1.2 are usual.")
        if not self.phase_steps >= 2:
            raise ConfigError(f"entropy.phase_steps={self.phase_steps}: write 2 or more; num_steps is usual.")
        if not self.min_turn >= 0:
            raise ConfigError(f"entropy.min_turn={self.min_turn}: write 0 or more; turns are counted from 0.")

    def initial(self) -> EpoState:
        """No past."""
        return EpoState()

    def update(
        self,
        state: EntropyState,
        *,
        response_mask: Tensor,
        entropy: Tensor | None = None,
        nucleus_entropy: Tensor | None = None,
        turns: Tensor | None = None,
    ) -> EpoState:
        """With this batch's mean entropy of every turn that occurs in it and whose mean is finite."""
        assert isinstance(state, EpoState)
        assert entropy is not None, "entropy=epo needs the old policy's entropy"
        assert turns is not None, "entropy=epo needs to know each token's turn"
        token_turns, values = turns[response_mask], entropy.detach()[response_mask].double()
        last_turn = int(token_turns.max()) if len(token_turns) else -1
        size = max(last_turn + 1, len(state.sums))
        num_tokens = torch.bincount(token_turns, minlength=size)
        means = (torch.bincount(token_turns, weights=values, minlength=size) / num_tokens).tolist()  # NaN for a turn without one
        padding = [0] * (size - len(state.sums))
        sums, counts = [*map(float, (*state.sums, *padding))], [*state.counts, *padding]
        for turn, mean in enumerate(means):
            if math.isfinite(mean):
                sums[turn], counts[turn] = sums[turn] + mean, counts[turn] + 1
        return EpoState(sums=tuple(sums), counts=tuple(counts), num_batches=state.num_batches + 1, last_turn=last_turn)

    def loss(
        self,
        *,
        entropy: Tensor | None,
        nucleus_entropy: Tensor | None = None,
        response_mask: Tensor | None = None,
        turns: Tensor | None = None,
        state: EntropyState | None = None,
        measured: float | None = None,
    ) -> Tensor:
        """[B, T]."""
        assert isinstance(state, EpoState), "entropy=epo needs its state"
        assert entropy is not None, "entropy=epo needs entropy from token_statistics"
        assert turns is not None, "entropy=epo needs to know each token's turn"
        assert response_mask is not None
        weight = self.smoothing * self.phase_weight(state.num_batches - 1)
        return -entropy.masked_fill(~response_mask, 0.0) + weight * self.penalties(entropy, turns, response_mask, state)

    def penalties(self, entropy: Tensor, turns: Tensor, response_mask: Tensor, state: EpoState) -> Tensor:
        """P of each token, [B, T]; 0 off the mask, and for a turn without a past."""
        if state.last_turn < self.min_turn or not state.sums:
            return torch.zeros_like(entropy)
        past = torch.tensor(state.means, dtype=entropy.dtype, device=entropy.device)
        turns = turns.masked_fill(~response_mask, 0)
        past = past[turns.clamp(max=len(past) - 1)]
        known = response_mask & (turns < len(state.sums)) & past.isfinite()
        low, high = ((share * past).masked_fill(~known, 0.0) for share in (self.low, self.high))
        entropy = entropy.masked_fill(~known, 0.0)
        match self.penalty:
            case Penalty.hinge:
                distance = (low - entropy).relu() + (entropy - high).relu()
            case Penalty.hinge_sq:
                distance = (low - entropy).relu().square() + (entropy - high).relu().square()
            case Penalty.literal:
                distance = (~((low < entropy) & (entropy < high))).to(entropy.dtype)
        return self.alpha * distance.masked_fill(~known, 0.0)

    def phase_weight(self, step: int) -> float:
        """The penalty's weight for batch `step` of the rollouts, counted from 0; E = phase_steps, h = E // 2.

        official    1 - 0.2 (1 - exp(-2 step / h)) up to h, then 0.8 exp(-3 (step - h) / (E - h))
        increasing  0.2 + 0.8 (1 - exp(-2 step / E)) / (1 - exp(-2)), 1 from E on
        """
        end = self.phase_steps
        half = end // 2
        match self.phase:
            case Phase.official if step <= half:
                return 1 - 0.2 * (1 - math.exp(-2 * step / half))
            case Phase.official:
                return 0.8 * math.exp(-3 * (step - half) / (end - half))
            case Phase.increasing:
                return 0.2 + 0.8 * (1 - math.exp(-2 * min(step / end, 1.0))) / (1 - math.exp(-2))
            case Phase.constant:
                return 1.0

    def metrics(self, state: EntropyState) -> dict[str, float]:
        """The phase weight, and the past entropy of each turn."""
        assert isinstance(state, EpoState)
        past = {f"epo/hist_entropy_turn_{turn}": mean for turn, mean in enumerate(state.means) if math.isfinite(mean)}
        return {"epo/phase_weight": self.phase_weight(max(state.num_batches - 1, 0))} | past
