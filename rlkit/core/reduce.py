"""The one place where a [B, T] tensor becomes a scalar."""

from dataclasses import dataclass
from enum import Enum
from typing import Self

from torch import Tensor


class Aggregation(Enum):
    """How per-token losses become one number; see `reduce`."""

    token_mean = "token_mean"
    seq_mean_token_mean = "seq_mean_token_mean"
    seq_mean_token_sum = "seq_mean_token_sum"
    const_norm = "const_norm"


@dataclass(frozen=True, kw_only=True, slots=True)
class Denominators:
    """Counts over one whole optimiser step: all of its microbatches on all ranks.

    Add the counts of the microbatches, then of the ranks, before the first backward pass. Local counts in their place are the
    field's classic silent bug: the gradient then depends on how the step was split.
    """

    num_tokens: int
    num_sequences: float  # rows with at least one token in the mask, each by its share of a sequence
    max_response_tokens: int  # the run's generation budget, never the width of a padded tensor

    @classmethod
    def count(cls, mask: Tensor, *, max_response_tokens: int, share: Tensor | None = None) -> Self:
        """Counts of one microbatch's mask, [B, T] bool. share: [B], see `reduce`."""
        rows = mask.any(-1)
        return cls(
            num_tokens=int(mask.sum()),
            num_sequences=float(rows.sum() if share is None else share[rows].double().sum()),
            max_response_tokens=max_response_tokens,
        )

    def __add__(self, other: Self) -> Self:
        """Counts of two disjoint parts of a step. Raises ValueError when their token budgets differ."""
        if self.max_response_tokens != other.max_response_tokens:
            raise ValueError(
                f"Denominators.max_response_tokens is {self.max_response_tokens} in one part of the step and "
                f"{other.max_response_tokens} in another: pass the run's setting to both."
            )
        return type(self)(
            num_tokens=self.num_tokens + other.num_tokens,
            num_sequences=self.num_sequences + other.num_sequences,
            max_response_tokens=self.max_response_tokens,
        )


def reduce(x: Tensor, mask: Tensor, *, aggregation: Aggregation, denominators: Denominators, share: Tensor | None = None) -> Tensor:
    """This microbatch's share of the aggregate of x [B, T] over mask [B, T] bool; a scalar.

        token_mean           sum of x / num_tokens
        seq_mean_token_mean  sum over rows of (the row's mean of x) / num_sequences                   arXiv:2402.03300 eq. 3
        seq_mean_token_sum   sum of x / num_sequences
        const_norm           sum of x / (num_sequences * max_response_tokens)                         arXiv:2503.20783

    share: [B], what part of its sequence a row is, by tokens; None: all of it. An episode that had to be cut into several rows
    counts as one sequence then, and the mean over its tokens is what it would be in one row.
    Shares are summed, not averaged, over microbatches and ranks: the total is the same for every split of the step into rows.
    Masked cells may hold anything, NaN included, and receive a gradient of exactly zero. A step with nothing in its mask
    yields 0 that is still attached to the graph, so that a rank without work can take part in the backward pass.
    """
    kept = x.masked_fill(~mask, 0.0)
    num_tokens, num_sequences = max(denominators.num_tokens, 1), denominators.num_sequences or 1.0
    match aggregation:
        case Aggregation.token_mean:
            return kept.sum() / num_tokens
        case Aggregation.seq_mean_token_mean:
            by_row = kept.sum(-1) / mask.sum(-1).clamp(min=1)
            return (by_row if share is None else by_row * share).sum() / num_sequences
        case Aggregation.seq_mean_token_sum:
            return kept.sum() / num_sequences
        case Aggregation.const_norm:
            return kept.sum() / (num_sequences * denominators.max_response_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTerm:
    """One summand of the training loss: coef * reduce(loss, mask, ...), with denominators counted on this term's own mask."""

    name: str
    loss: Tensor  # [B, T]
    mask: Tensor  # [B, T] bool
    coef: float
    aggregation: Aggregation
