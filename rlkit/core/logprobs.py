"""Hidden states -> log-probabilities, entropy and exact divergences, in chunks: a whole [tokens, V] never exists."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

BYTES_PER_LOGIT = 12  # three float32 at the peak of the backward pass: log-probabilities, their gradient, the logits' gradient


class ExactDivergence(Protocol):
    """What `token_statistics` asks of a divergence."""

    def exact(self, logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        """[c, V] log-probabilities of policy and reference -> divergence [c], in nats."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenStatistics:
    """Per-token results over n positions, float32 (float64 for float64 inputs), in nats."""

    logprobs: Tensor  # [n], of the target tokens
    entropy: Tensor | None  # [n], of the next-token distribution
    divergence: Tensor | None  # [n], policy from reference


def chunk_size(vocab_size: int, *, memory_bytes: int) -> int:
    """How many tokens a chunk may hold so that its [chunk, V] buffers fit into memory_bytes; at least 1.

    Counts `BYTES_PER_LOGIT` for each token and vocabulary entry, the measured peak of log-probabilities alone. With entropy or
    with the exact reverse KL the peak is 20 bytes, with both 24: hand in 12/20 or half of the memory there is.
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
        divergence: evaluated between this distribution and the reference's, at the same temperature.
        ref_hidden, ref_head, ref_head_bias: [n, H'], [V, H'], [V] of the reference; only with a divergence.

    Gradient: exact for all three results with respect to hidden, head and head_bias; none reaches the reference. With more
    than one chunk the backward pass recomputes each chunk's logits instead of storing them: one more product with the head.
    """
    if divergence is not None:
        assert ref_hidden is not None, "an exact divergence needs ref_hidden"
        assert ref_head is not None, "an exact divergence needs ref_head"

    def of_chunk(rows: slice) -> tuple[Tensor, Tensor | None, Tensor | None]:
        logprobs = _vocabulary_logprobs(hidden[rows], head, head_bias, temperature)
        chosen = logprobs.gather(-1, targets[rows].unsqueeze(-1)).squeeze(-1)
        # Not logsumexp(z) - sum p z: for peaked logits that subtracts two large, nearly equal numbers.
        entropy = None
        if with_entropy:
            source = logprobs if entropy_gradient else logprobs.detach()
            entropy = -(source.exp() * source).sum(-1)
        if divergence is None or ref_hidden is None or ref_head is None:
            return chosen, entropy, None
        with torch.no_grad():
            ref_logprobs = _vocabulary_logprobs(ref_hidden[rows], ref_head, ref_head_bias, temperature)
        return chosen, entropy, divergence.exact(logprobs, ref_logprobs)

    n = len(hidden)
    if n <= chunk_tokens:
        results = [of_chunk(slice(0, n))]
    else:
        results = [
            checkpoint(of_chunk, slice(start, start + chunk_tokens), use_reentrant=False, preserve_rng_state=False)
            for start in range(0, n, chunk_tokens)
        ]
    logprobs, entropy, exact_values = zip(*results, strict=True)
    return TokenStatistics(
        logprobs=torch.cat(logprobs),
        entropy=torch.cat(entropy) if with_entropy else None,
        divergence=torch.cat(exact_values) if divergence is not None else None,
    )


def _vocabulary_logprobs(hidden: Tensor, head: Tensor, bias: Tensor | None, temperature: float) -> Tensor:
    """[c, V]. The softmax of bfloat16 logits is off by more than a policy update moves it, hence at least float32."""
    logits = F.linear(hidden, head, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits.div_(temperature).log_softmax(-1)  # in place: one [c, V] buffer less
