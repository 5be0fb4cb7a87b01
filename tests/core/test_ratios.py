import pytest
import torch

from rlkit.core.ratios import NoCorrection, ratio


def test_a_ratio_is_the_exponential_of_its_log_within_twenty_nats():
    log_ratio = torch.tensor([-0.5, 0.0, 0.25, 19.5, -19.5], dtype=torch.float64)
    torch.testing.assert_close(ratio(log_ratio), log_ratio.exp(), rtol=0, atol=0)
    far = torch.tensor([21.0, 1e6, -21.0, -1e6], dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(ratio(far), torch.tensor([20.0, 20.0, -20.0, -20.0], dtype=torch.float64).exp())
    (gradient,) = torch.autograd.grad(ratio(far).sum(), far)
    assert gradient.eq(0).all()


def test_a_ratio_is_its_own_derivative():
    log_ratio = torch.tensor([-3.0, -0.1, 0.0, 0.7, 5.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ratio, (log_ratio,))


def test_no_correction_needs_nothing_and_weighs_nothing(f1):
    assert NoCorrection().needs == frozenset()
    weights = NoCorrection()(old_logprobs=f1.old_logprobs, rollout_logprobs=f1.rollout_logprobs, response_mask=f1.response_mask)
    if weights is not None:  # either says "no weights" or hands out ones
        assert weights.weight[f1.response_mask].eq(1).all()
        assert torch.equal(weights.keep, f1.response_mask)
    assert pytest.approx(1.0) == ratio(torch.zeros(())).item()
