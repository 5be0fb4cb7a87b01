import pytest
import torch

from rlkit.core.imitation import NoImitation, PositiveExamples
from rlkit.core.reduce import Aggregation, Denominators, reduce
from rlkit.errors import ConfigError

NAN, INF = float("nan"), float("inf")


def run(term_of, *, logprobs, rewards, response_mask, denominators=None):
    """The term's share of the training loss, and its gradient in the log-probabilities."""
    logprobs = logprobs.detach().requires_grad_()
    term = term_of.term(logprobs=logprobs, rewards=rewards, response_mask=response_mask)
    denominators = denominators or Denominators.count(term.mask, max_response_tokens=9)
    loss = term.coef * reduce(term.loss, term.mask, aggregation=term.aggregation, denominators=denominators)
    return loss.item(), torch.autograd.grad(loss, logprobs)[0]


def test_the_likelihood_of_rewarded_responses_is_averaged_over_their_tokens(f1):
    # Rows 0, 2 and 3, eight tokens: (2.78 + 2.0 + 1.4) / 8 = 0.7725, whatever row 1 is like
    fields = {"logprobs": f1.logprobs, "rewards": f1.rewards, "response_mask": f1.response_mask}
    loss, gradient = run(PositiveExamples(), **fields)
    assert loss == pytest.approx(0.1 * 0.7725)
    is_positive = f1.response_mask & torch.tensor([[True], [False], [True], [True]])
    torch.testing.assert_close(gradient, -0.1 / 8 * is_positive.double(), rtol=0, atol=1e-15)
    assert PositiveExamples().term(**fields).aggregation is Aggregation.token_mean
    assert torch.equal(PositiveExamples().mask(rewards=f1.rewards, response_mask=f1.response_mask), is_positive)


@pytest.mark.parametrize("rewards", [[0.0] * 4, [-1.0, 0.0, -0.5, -2.0], [NAN] * 4], ids=str)
def test_without_a_rewarded_response_loss_and_gradient_are_exactly_zero(f1, rewards):
    loss, gradient = run(
        PositiveExamples(), logprobs=f1.logprobs, rewards=torch.tensor(rewards).double(), response_mask=f1.response_mask
    )
    assert loss == 0
    assert gradient.eq(0).all()


def test_responses_are_imitated_from_the_bound_on(f1):
    mask = PositiveExamples(above=0.5).mask(rewards=torch.tensor([1.0, 0.5, 0.6, 0.0]), response_mask=f1.response_mask)
    assert mask.any(-1).tolist() == [True, False, True, False]


def test_at_a_coefficient_of_0_it_is_exactly_zero(f1):
    loss, gradient = run(PositiveExamples(coef=0.0), logprobs=f1.logprobs, rewards=f1.rewards, response_mask=f1.response_mask)
    assert loss == 0
    assert gradient.eq(0).all()


def test_none_adds_no_term(f1):
    assert NoImitation().term(logprobs=f1.logprobs, rewards=f1.rewards, response_mask=f1.response_mask) is None
    assert NoImitation().mask(rewards=f1.rewards, response_mask=f1.response_mask) is None


def test_garbage_off_the_mask_changes_neither_loss_nor_gradient(ragged):
    fields = {"rewards": ragged.rewards, "response_mask": ragged.response_mask}
    off = ~PositiveExamples().mask(**fields)
    expected = run(PositiveExamples(), logprobs=ragged.logprobs.masked_fill(off, 0.0), **fields)
    assert expected[1][off].eq(0).all()
    for garbage in (NAN, INF, -INF):
        loss, gradient = run(PositiveExamples(), logprobs=ragged.logprobs.masked_fill(off, garbage), **fields)
        assert loss == expected[0]
        assert torch.equal(gradient, expected[1])


def test_how_the_step_is_split_into_microbatches_does_not_matter(ragged):
    fields = {"logprobs": ragged.logprobs, "rewards": ragged.rewards, "response_mask": ragged.response_mask}
    mask = PositiveExamples().mask(rewards=ragged.rewards, response_mask=ragged.response_mask)
    whole, gradient = run(PositiveExamples(), **fields)
    denominators = Denominators.count(mask, max_response_tokens=9)
    parts = [
        run(PositiveExamples(), denominators=denominators, **{name: x[rows] for name, x in fields.items()})
        for rows in (slice(0, 1), slice(1, 4), slice(4, 6))
    ]
    assert sum(loss for loss, _ in parts) == pytest.approx(whole, abs=1e-12)
    torch.testing.assert_close(torch.cat([g for _, g in parts]), gradient, rtol=0, atol=1e-15)


def test_gradients_agree_with_finite_differences(ragged):
    mask = PositiveExamples().mask(rewards=ragged.rewards, response_mask=ragged.response_mask)

    def loss(x):
        logprobs = torch.full(mask.shape, NAN, dtype=torch.float64).masked_scatter(ragged.response_mask, x)
        term = PositiveExamples().term(logprobs=logprobs, rewards=ragged.rewards, response_mask=ragged.response_mask)
        return term.loss[term.mask]

    assert mask.any()
    assert torch.autograd.gradcheck(loss, (ragged.logprobs[ragged.response_mask].detach().requires_grad_(),))


def test_a_negative_coefficient_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"imitation\.coef=-0\.1: write"):
        PositiveExamples(coef=-0.1)
