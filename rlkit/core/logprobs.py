"""Hidden states -> log-probabilities, entropy and exact divergences, in chunks: a whole [tokens, V] never exists."""

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

BYTES_PER_LOGIT = 12  # three float32 at the peak of the backward pass: log-probabilities, their gradient, the logits' gradient


class ExactDivergence(Protocol):
    """What `token_statistics` asks of a divergence."""

    def between(self, logprobs: Tensor, ref_logprobs: Tensor, embeddings: Tensor) -> Tensor:
        """[c, V] log-probabilities of policy and reference -> divergence [c], in nats. embeddings: [V, H], the head."""
        ...


class Crossing(Enum):
    """Whether the token whose probability carries the sum over top_p belongs to the nucleus."""

    included = "included"  # the smallest set that holds top_p, as SIREN's paper has it
    excluded = "excluded"  # as SIREN's code has it; where the likeliest token alone holds top_p, the nucleus is empty


@dataclass(frozen=True, kw_only=True, slots=True)
class Nucleus:
    """The likeliest tokens of a distribution, and the entropy of the distribution restricted to them."""

    top_p: float  # how much probability they hold together
    top_k: int  # at most so many
    crossing: Crossing = Crossing.included

    def entropy(self, logprobs: Tensor) -> Tensor:
        """[c, V] log-probabilities -> [c], 0 for an empty nucleus.

            p^ = p / sum of p over the nucleus;  entropy = -sum p^ log p^ over the nucleus

        Gradient: of this value with the nucleus held fixed. Source: arXiv:2509.25133, and its code (Linn3a/siren).
        """
        ranked = logprobs.topk(min(self.top_k, logprobs.shape[-1]), dim=-1).values
        with torch.no_grad():
            probs = ranked.exp()
            held = probs.cumsum(-1)
            keep = (held if self.crossing is Crossing.excluded else held - probs) < self.top_p
            keep[:, :1] = True  # one token alone has the value and the gradient that an empty nucleus must have: zero
        restricted = ranked.masked_fill(~keep, -torch.inf).log_softmax(-1)
        return -(restricted.exp() * restricted.masked_fill(~keep, 0.0)).sum(-1)


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenStatistics:
    """Per-token results over n positions, float32 (float64 for float64 inputs), in nats; None where not asked for."""

    logprobs: Tensor  # [n], of the target tokens
    entropy: Tensor | None  # [n], of the next-token distribution
    divergence: Tensor | None  # [n], policy from reference
    expected_score: Tensor | None = None  # [n], sum_v p_v S_v with S_v = p_v (log p_v + entropy); no gradient
    nucleus_entropy: Tensor | None = None  # [n], of the next-token distribution restricted to its likeliest tokens


def chunk_size(vocab_size: int, *, memory_bytes: int) -> int:
    """How many tokens a chunk may hold so that its [chunk, V] buffers fit into memory_bytes; at least 1.

    Counts `BYTES_PER_LOGIT` for each token and vocabulary entry, the measured peak of log-probabilities alone. With entropy or
    with the exact reverse KL the peak is 20 bytes, with both 24: hand in 12/20 or half of the memory there is. A nucleus whose
    top_k is at most a sixteenth of the vocabulary makes it 16 (22 with entropy), one of the whole vocabulary 44; the expected
    score adds nothing.
    """
    return max(memory_bytes // (vocab_size * BYTES_PER_LOGIT), 1)


def token_statistics(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    *,
    temperature: float,
    chunk_tokens: int,
    with_entropy: bool = False,
    entropy_gradient: bool = True,
    with_expected_score: bool = False,
    nucleus: Nucleus | None = None,
    divergence: ExactDivergence | None = None,
    ref_hidden: Tensor | None = None,
    ref_head: Tensor | None = None,
    head_bias: Tensor | None = None,
    ref_head_bias: Tensor | None = None,
) -> TokenStatistics:
    """Statistics of the next-token distributions softmax(hidden @ head.T / temperature).

    Args:
        hidden: [n, H], the last hidden state at each position; n may be 0.
        head: [V, H], with head_bias [V] where the model has one.
        targets: [n] int64, the token that followed each position.
        temperature: the sampler's, so that these are log-probabilities of the distribution the tokens came from.
        chunk_tokens: positions handled at once; changes memory, not results. See `chunk_size`.
        entropy_gradient: False for an entropy that is only measured, which then keeps no [c, V] tensor for the backward pass.
        with_expected_score: what a sampled token's S = p (log p + entropy) is on average, which no gradient reaches.
        nucleus: the tokens that the nucleus entropy looks at; None for no nucleus entropy.
        divergence: evaluated between this distribution and the reference's, at the same temperature.
        ref_hidden, ref_head, ref_head_bias: [n, H'], [V, H'], [V] of the reference; only with a divergence.

    Gradient: exact for all results but the expected score, with respect to hidden, head and head_bias; none reaches the
    reference. With more than one chunk the backward pass recomputes each chunk's logits instead of storing them: one more
    product with the head.
    """
    if divergence is not None:
        assert ref_hidden is not None, "an exact divergence needs ref_hidden"
        assert ref_head is not None, "an exact divergence needs ref_head"

    def of_chunk(rows: slice) -> TokenStatistics:
        logprobs = _vocabulary_logprobs(hidden[rows], head, head_bias, temperature)
        # Before the entropy: the backward pass goes the other way, and this one's [c, V] gradient is then the last to exist.
        chosen = logprobs.gather(-1, targets[rows].unsqueeze(-1)).sum(-1)  # of one; a view would lose FSDP's backward hook
        nucleus_entropy = None if nucleus is None else nucleus.entropy(logprobs)
        entropy = expected_score = divergences = None
        if with_entropy:
            entropy = _entropy(logprobs if entropy_gradient else logprobs.detach())
        if with_expected_score:
            expected_score = _expected_score(logprobs.detach(), None if entropy is None else entropy.detach())
        if divergence is not None and ref_hidden is not None and ref_head is not None:
            with torch.no_grad():
                ref_logprobs = _vocabulary_logprobs(ref_hidden[rows], ref_head, ref_head_bias, temperature)
            divergences = divergence.between(logprobs, ref_logprobs, head.detach())
        return TokenStatistics(
            logprobs=chosen,
            entropy=entropy,
            divergence=divergences,
            expected_score=expected_score,
            nucleus_entropy=nucleus_entropy,
        )

    n = len(hidden)
    if n <= chunk_tokens:
        return of_chunk(slice(0, n))
    parts = [
        checkpoint(of_chunk, slice(start, start + chunk_tokens), use_reentrant=False, preserve_rng_state=False)
        for start in range(0, n, chunk_tokens)
    ]

    def joined(name: str) -> Tensor | None:
        values = [getattr(part, name) for part in parts]
        return None if values[0] is None else torch.cat(values)

    further = ("entropy", "divergence", "expected_score", "nucleus_entropy")
    return TokenStatistics(logprobs=torch.cat([part.logprobs for part in parts]), **{name: joined(name) for name in further})


def _entropy(logprobs: Tensor) -> Tensor:
    """[c]. Not logsumexp(z) - sum p z: for peaked logits that subtracts two large, nearly equal numbers."""
    return -(logprobs.exp() * logprobs).sum(-1)


def _expected_score(logprobs: Tensor, entropy: Tensor | None) -> Tensor:
    """[c]: sum_v p_v^2 (log p_v + entropy)."""
    entropy = _entropy(logprobs) if entropy is None else entropy
    squares = (2 * logprobs).exp_()
    total = squares.sum(-1)
    return entropy * total + squares.mul_(logprobs).sum(-1)


def _vocabulary_logprobs(hidden: Tensor, head: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """[c, V]. The softmax of bfloat16 logits is off by more than a policy update moves it, hence at least float32."""
    logits = F.linear(hidden, head, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.div_(temperature).log_softmax(-1)  # in place: one [c, V] buffer less
