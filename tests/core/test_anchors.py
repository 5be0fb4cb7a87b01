"""The anchor to the old policy, by enumeration of a small vocabulary."""

from __future__ import annotations

import pytest
import torch

from rlkit.core.anchors import NoAnchor, OldPolicyAnchor
from rlkit.errors import ConfigError

MASK = torch.ones(1, 5, dtype=torch.bool)


def policies() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits with a gradient; the old policy's and a reference's log-probabilities."""
    torch.manual_seed(0)
    logits, old, ref = torch.randn(3, 5, dtype=torch.float64)
    return logits.requires_grad_(), old.log_softmax(-1), ref.log_softmax(-1)


def kl(logprobs: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return (logprobs.exp() * (logprobs - other)).sum()


def test_value_and_gradient_are_those_of_the_kl_under_the_old_policys_samples():
    logits, old, _ = policies()
    logprobs = logits.log_softmax(-1)
    loss = OldPolicyAnchor().loss(logprobs=logprobs.unsqueeze(0), old_logprobs=old.unsqueeze(0), response_mask=MASK)
    expected = (old.exp() * loss[0]).sum()  # each token as often as the old policy samples it
    torch.testing.assert_close(expected, kl(logprobs, old))
    mine, theirs = (torch.autograd.grad(term, logits, retain_graph=True)[0] for term in (expected, kl(logprobs, old)))
    torch.testing.assert_close(mine, theirs)


def test_a_policy_that_has_not_moved_is_not_pulled():
    logits, *_ = policies()
    logprobs = logits.log_softmax(-1).unsqueeze(0)
    loss = OldPolicyAnchor().loss(logprobs=logprobs, old_logprobs=logprobs.detach(), response_mask=MASK)
    assert torch.equal(loss, torch.zeros_like(loss))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))


def test_two_anchors_pull_as_one_between_them():
    logits, old, ref = policies()
    logprobs = logits.log_softmax(-1)
    near, far = 0.3, 0.1
    share = near / (near + far)
    between = (share * old + (1 - share) * ref).log_softmax(-1)
    both, one = near * kl(logprobs, old) + far * kl(logprobs, ref), (near + far) * kl(logprobs, between)
    mine, theirs = (torch.autograd.grad(term, logits, retain_graph=True)[0] for term in (both, one))
    torch.testing.assert_close(mine, theirs)


def test_padding_and_the_choice_of_none_add_nothing():
    logits, old, _ = policies()
    mask = MASK.clone()
    mask[0, 3:] = False
    garbage = old.clone()
    garbage[3:] = torch.nan
    loss = OldPolicyAnchor().loss(
        logprobs=logits.log_softmax(-1).unsqueeze(0), old_logprobs=garbage.unsqueeze(0), response_mask=mask
    )
    assert torch.equal(loss[0, 3:], torch.zeros(2, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.isfinite().all()
    assert NoAnchor().loss(logprobs=loss, old_logprobs=loss, response_mask=mask) is None
    with pytest.raises(ConfigError, match=r"anchor\.coef=0\.0: write a number above 0, or anchor=none"):
        OldPolicyAnchor(coef=0.0)
