from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """A small batch in float64; every masked cell of every tensor is NaN, so that a leak cannot hide."""

    response_mask: Tensor
    logprobs: Tensor  # a leaf that requires grad
    old_logprobs: Tensor
    rollout_logprobs: Tensor
    ref_logprobs: Tensor
    advantages: Tensor
    entropy: Tensor
    rewards: Tensor  # [B]


def _pad(rows: list[list[float]], width: int) -> Tensor:
    return torch.tensor([row + [NAN] * (width - len(row)) for row in rows], dtype=torch.float64)


@pytest.fixture
def f1() -> Rollouts:
    """Four responses of 4, 2, 3 and 1 tokens: ten tokens, every number of which can be checked by hand."""
    old_logprobs = _pad([[-0.10, -0.50, -2.00, -0.05], [-1.20, -0.30], [-0.70, -0.90, -0.20], [-1.60]], 4)
    log_ratio = _pad([[0.00, 0.25, -0.40, 0.02], [0.50, -0.10], [-0.30, 0.10, 0.00], [0.20]], 4)
    mismatch = _pad([[0.00, 0.20, -0.90, 0.00], [0.70, -0.05], [0.00, 1.80, -0.20], [-2.00]], 4)
    to_ref = _pad([[0.05, -0.10, 0.30, 0.00], [0.20, 0.10], [-0.20, 0.00, 0.10], [0.40]], 4)
    return Rollouts(
        response_mask=~old_logprobs.isnan(),
        logprobs=(old_logprobs + log_ratio).requires_grad_(),
        old_logprobs=old_logprobs,
        rollout_logprobs=old_logprobs - mismatch,
        ref_logprobs=old_logprobs - to_ref,
        advantages=_pad([[1.0] * 4, [-1.0] * 2, [0.5] * 3, [-0.5]], 4),
        entropy=_pad([[0.30, 1.20, 2.50, 0.10], [1.80, 0.60], [0.90, 1.10, 0.40], [2.00]], 4),
        rewards=torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64),
    )


@pytest.fixture(params=range(3))
def ragged(request) -> Rollouts:
    """Six random responses: ragged, one with a gap in its middle (a tool's output), one without a single policy token."""
    generator = torch.Generator().manual_seed(request.param)
    shape, lengths = (6, 9), torch.tensor([9, 4, 1, 7, 0, 5])
    response_mask = torch.arange(9) < lengths[:, None]
    response_mask[3, 2:4] = False

    def draw(scale: float) -> Tensor:
        return scale * torch.randn(shape, generator=generator, dtype=torch.float64)

    def mask(x: Tensor) -> Tensor:
        return x.masked_fill(~response_mask, NAN)

    old_logprobs = -draw(1.0).abs()
    return Rollouts(
        response_mask=response_mask,
        logprobs=mask(old_logprobs + draw(0.3)).requires_grad_(),
        old_logprobs=mask(old_logprobs),
        rollout_logprobs=mask(old_logprobs + draw(0.5)),
        ref_logprobs=mask(old_logprobs + draw(0.4)),
        advantages=mask(draw(1.0)),
        entropy=mask(draw(1.0).abs()),
        rewards=draw(1.0)[:, 0],
    )
