import pytest
import torch

from rlkit.core.reduce import Aggregation, Denominators, LossTerm, reduce
from rlkit.errors import RlkitError

NAN, INF = float("nan"), float("inf")
everywhere = pytest.mark.parametrize("aggregation", list(Aggregation), ids=lambda aggregation: aggregation.name)


def test_yaml_names_an_aggregation_by_its_value():
    assert [a.name for a in Aggregation] == ["token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "const_norm"]
    assert all(a.name == a.value for a in Aggregation)


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [
        # Row sums 4.1, 2.4, 2.4, 2.0 over 4, 2, 3, 1 tokens.
        (Aggregation.token_mean, 1.09),  # 10.9 / 10
        (Aggregation.seq_mean_token_mean, 1.25625),  # (1.025 + 1.2 + 0.8 + 2.0) / 4
        (Aggregation.seq_mean_token_sum, 2.725),  # 10.9 / 4
        (Aggregation.const_norm, 0.68125),  # 10.9 / (4 * 4)
    ],
)
def test_each_aggregation_has_the_denominator_of_its_name(f1, aggregation, expected):
    denominators = Denominators.count(f1.response_mask, max_response_tokens=4)
    value = reduce(f1.entropy, f1.response_mask, aggregation=aggregation, denominators=denominators)
    assert value.shape == ()
    assert value.item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("aggregation", "weights"),
    [  # lengths 2 and 1, a budget of 5
        (Aggregation.token_mean, [[1 / 3, 1 / 3], [1 / 3, 0.0]]),
        (Aggregation.seq_mean_token_mean, [[1 / 4, 1 / 4], [1 / 2, 0.0]]),
        (Aggregation.seq_mean_token_sum, [[1 / 2, 1 / 2], [1 / 2, 0.0]]),
        (Aggregation.const_norm, [[1 / 10, 1 / 10], [1 / 10, 0.0]]),
    ],
)
def test_the_gradient_is_each_tokens_share_and_exactly_zero_on_masked_cells(aggregation, weights):
    x = torch.tensor([[1.0, 2.0], [3.0, NAN]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True], [True, False]])
    value = reduce(x, mask, aggregation=aggregation, denominators=Denominators.count(mask, max_response_tokens=5))
    (gradient,) = torch.autograd.grad(value, x)
    torch.testing.assert_close(gradient, torch.tensor(weights, dtype=torch.float64), rtol=0, atol=1e-15)


@everywhere
def test_garbage_in_masked_cells_changes_neither_value_nor_gradient(ragged, aggregation):
    denominators = Denominators.count(ragged.response_mask, max_response_tokens=9)
    results = []
    for garbage in (0.0, NAN, INF, -INF):
        x = ragged.entropy.masked_fill(~ragged.response_mask, garbage).requires_grad_()
        value = reduce(x, ragged.response_mask, aggregation=aggregation, denominators=denominators)
        results.append((value, torch.autograd.grad(value, x)[0]))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0], rtol=0, atol=0)


@everywhere
@pytest.mark.parametrize("sizes", [[1, 1, 1, 1, 1, 1], [2, 3, 1], [5, 1], [6]], ids=str)
def test_shares_of_the_microbatches_sum_to_the_whole(ragged, aggregation, sizes):
    denominators = Denominators.count(ragged.response_mask, max_response_tokens=9)
    whole = reduce(ragged.entropy, ragged.response_mask, aggregation=aggregation, denominators=denominators)
    parts = list(zip(ragged.entropy.split(sizes), ragged.response_mask.split(sizes), strict=True))
    counted = [Denominators.count(mask, max_response_tokens=9) for _, mask in parts]
    total = counted[0]
    for more in counted[1:]:
        total = total + more
    assert total == denominators
    shares = torch.stack([reduce(x, mask, aggregation=aggregation, denominators=total) for x, mask in parts])
    torch.testing.assert_close(shares.sum(), whole, rtol=0, atol=1e-12)


def test_the_mean_of_microbatch_means_is_not_what_comes_out():
    # Two microbatches of 3 tokens (all 1) and 1 token (5): the step's token mean is 8/4, the mean of means (1 + 5)/2.
    x, mask = torch.tensor([[1.0, 1.0, 1.0], [5.0, 0.0, 0.0]]), torch.tensor([[True] * 3, [True, False, False]])
    denominators = Denominators.count(mask, max_response_tokens=3)
    shares = [
        reduce(x[i : i + 1], mask[i : i + 1], aggregation=Aggregation.token_mean, denominators=denominators).item() for i in (0, 1)
    ]
    assert sum(shares) == 2.0


@everywhere
def test_more_padding_and_empty_rows_change_nothing(ragged, aggregation):
    def whole(x, mask):
        denominators = Denominators.count(mask, max_response_tokens=9)
        return denominators, reduce(x, mask, aggregation=aggregation, denominators=denominators)

    wider = torch.full((8, 12), NAN, dtype=torch.float64)
    wider[1:7, :9] = ragged.entropy
    mask = torch.zeros(8, 12, dtype=torch.bool)
    mask[1:7, :9] = ragged.response_mask
    (before, small), (after, large) = whole(ragged.entropy, ragged.response_mask), whole(wider, mask)
    assert before == after
    torch.testing.assert_close(large, small, rtol=0, atol=1e-14)


def test_counts_tokens_and_only_the_rows_that_have_any(ragged):
    counted = Denominators.count(ragged.response_mask, max_response_tokens=33)
    # lengths 9, 4, 1, 7 less a gap of 2, 0, 5
    assert (counted.num_tokens, counted.num_sequences, counted.max_response_tokens) == (24, 5, 33)


def test_counts_of_unlike_budgets_do_not_add():
    mask = torch.ones(1, 2, dtype=torch.bool)
    with pytest.raises((RlkitError, ValueError, AssertionError)):
        _ = Denominators.count(mask, max_response_tokens=2) + Denominators.count(mask, max_response_tokens=3)


@everywhere
def test_a_step_without_tokens_is_zero_and_can_still_be_differentiated(aggregation):
    x, mask = torch.full((2, 3), NAN, requires_grad=True), torch.zeros(2, 3, dtype=torch.bool)
    value = reduce(x, mask, aggregation=aggregation, denominators=Denominators.count(mask, max_response_tokens=3))
    assert value.item() == 0.0
    value.backward()
    torch.testing.assert_close(x.grad, torch.zeros(2, 3))


@everywhere
def test_an_empty_microbatch_of_a_full_step_is_zero_with_zero_gradient(aggregation):
    x, mask = torch.full((1, 3), NAN, requires_grad=True), torch.zeros(1, 3, dtype=torch.bool)
    step = Denominators(num_tokens=7, num_sequences=2, max_response_tokens=4)
    value = reduce(x, mask, aggregation=aggregation, denominators=step)
    value.backward()
    assert value.item() == 0.0
    torch.testing.assert_close(x.grad, torch.zeros(1, 3))


def test_const_norm_halves_when_the_budget_doubles_and_does_not_look_at_the_width(f1):
    def value(budget):
        denominators = Denominators.count(f1.response_mask, max_response_tokens=budget)
        return reduce(f1.entropy, f1.response_mask, aggregation=Aggregation.const_norm, denominators=denominators).item()

    assert value(8) == pytest.approx(value(4) / 2)
    assert value(4) == pytest.approx(0.68125)


def test_a_loss_term_cannot_be_changed_once_built(f1):
    term = LossTerm(name="policy", loss=f1.entropy, mask=f1.response_mask, coef=1.0, aggregation=Aggregation.token_mean)
    with pytest.raises(AttributeError):
        term.coef = 2.0  # type: ignore[misc]


@everywhere
def test_an_episode_in_several_rows_counts_as_it_would_in_one(aggregation):
    """Two responses, of 5 and 2 tokens; then the first one's tokens are dealt to rows of 2 and 3, in microbatches of their own."""
    values = torch.arange(1.0, 8.0, dtype=torch.float64).square()
    one_row = torch.zeros(2, 5, dtype=torch.float64)
    one_row[0], one_row[1, :2] = values[:5], values[5:]
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    want = reduce(one_row, mask, aggregation=aggregation, denominators=Denominators.count(mask, max_response_tokens=9))
    rows = torch.tensor([[1.0, 4.0, 0.0], [9.0, 16.0, 25.0], [36.0, 49.0, 0.0]], dtype=torch.float64)
    mask, share = rows > 0, torch.tensor([2 / 5, 3 / 5, 1.0])
    counts = [Denominators.count(mask[part], max_response_tokens=9, share=share[part]) for part in (slice(0, 1), slice(1, 3))]
    denominators = counts[0] + counts[1]
    parts = [
        reduce(rows[part], mask[part], aggregation=aggregation, denominators=denominators, share=share[part])
        for part in (slice(0, 1), slice(1, 3))
    ]
    torch.testing.assert_close(sum(parts), want, rtol=1e-6, atol=0)
