import pytest
import torch

from rlkit.core.reduce import Aggregation, Denominators, reduce
from rlkit.core.values import Backbone, DoubleSoftMin, ExplainedVariance, NoCritic, ValueModel, soft_min
from rlkit.errors import ConfigError

NAN, INF = float("nan"), float("inf")
CRITICS = [ValueModel(value_clip=0.2), ValueModel(value_clip=None), DoubleSoftMin(), DoubleSoftMin(value_clip=None)]
each = pytest.mark.parametrize("critic", CRITICS, ids=str)


def rows(lists):
    return torch.tensor([row + [NAN] * (4 - len(row)) for row in lists], dtype=torch.float64)


@pytest.fixture
def fit(f1):
    """Old values, moved values and returns of ten tokens, NaN in masked cells."""
    old_values = rows([[0.1, 0.2, 0.4, 0.5], [0.3, 0.1], [0.2, 0.2, 0.6], [0.7]])
    step = rows([[0.3, -0.1, 0.05, 0.0], [0.1, -0.3], [0.0, 0.25, -0.1], [-0.4]])
    returns = f1.rewards[:, None].expand(4, 4).masked_fill(~f1.response_mask, NAN)
    return {"values": old_values + step, "old_values": old_values, "returns": returns, "response_mask": f1.response_mask}


def random_fit(batch):
    """The same from the ragged fixture."""
    return {
        "values": batch.logprobs.detach(),
        "old_values": batch.old_logprobs,
        "returns": batch.advantages - 1,
        "response_mask": batch.response_mask,
    }


def mean_loss(critic, fields):
    """Over the tokens of all rows, and its gradient in the values."""
    fields = fields | {"values": fields["values"].detach().requires_grad_()}
    mask = fields["response_mask"]
    denominators = Denominators.count(mask, max_response_tokens=9)
    loss = reduce(critic.loss(**fields), mask, aggregation=Aggregation.token_mean, denominators=denominators)
    return loss.item(), torch.autograd.grad(loss, fields["values"])[0]


def test_the_squared_error_of_ten_tokens_worked_out_by_hand(fit):
    # Values [[.4, .1, .45, .5], [.4, -.2], [.2, .45, .5], [.3]], returns 1, 0, 1, 1. Held to 0.2: .3, -.1, .4 and .5 in the
    # cells (0, 0), (1, 1), (2, 1) and (3, 0), of which the first and third are then further from their return.
    assert mean_loss(ValueModel(value_clip=0.2), fit)[0] == pytest.approx(0.189625, abs=1e-12)
    assert mean_loss(ValueModel(value_clip=None), fit)[0] == pytest.approx(0.180250, abs=1e-12)
    assert mean_loss(ValueModel(value_clip=0.5), fit)[0] == pytest.approx(0.180250, abs=1e-12)


def test_a_value_past_the_bound_gets_no_gradient_towards_its_return_but_one_away_from_it(fit):
    critic = ValueModel(value_clip=0.2)
    _, gradient = mean_loss(critic, fit)
    clipped = critic.vf_clipped(**fit)
    assert clipped.dtype == torch.bool
    assert clipped.nonzero().tolist() == [[0, 0], [2, 1]]
    expected = ((fit["values"] - fit["returns"]) / 10).masked_fill(~fit["response_mask"] | clipped, 0.0)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-15)
    assert gradient[1, 1].item() == pytest.approx(-0.02)  # past the bound, on the wrong side of its return: pulled back


def test_within_the_bound_nothing_is_held(ragged):
    fields = random_fit(ragged)
    wide = max((fields["values"] - fields["old_values"])[ragged.response_mask].abs().max().item(), 1e-3) * 1.01
    for kind in (ValueModel, DoubleSoftMin):
        bounded, free = kind(value_clip=wide), kind(value_clip=None)
        assert torch.equal(bounded.loss(**fields), free.loss(**fields))
        assert not bounded.vf_clipped(**fields).any()
        assert not free.vf_clipped(**fields).any()


@pytest.mark.parametrize(
    ("value", "old_value", "expected"),
    [
        (0.3, 0.2, 0.045),  # 0.3^2 / 2, twice
        (1.0, 0.9, 0.375),  # 0.5 * (1 - 0.25), twice: linear beyond 0.5
        (1.0, 0.5, 0.3),  # 0.5 * (1 - 0.25) and, held at 0.7, 0.5 * (0.7 - 0.25)
        (-0.4, 0.1, 0.0425),  # 0.4^2 / 2 and, held at -0.1, 0.1^2 / 2
    ],
)
def test_safes_value_loss_worked_out_by_hand(value, old_value, expected):
    one = {"response_mask": torch.ones(1, 1, dtype=torch.bool), "returns": torch.zeros(1, 1, dtype=torch.float64)}
    values, old_values = (torch.full((1, 1), x, dtype=torch.float64) for x in (value, old_value))
    loss = DoubleSoftMin().loss(values=values, old_values=old_values, **one)
    assert loss.item() == pytest.approx(expected, abs=1e-12)
    is_held = DoubleSoftMin().vf_clipped(values=values, old_values=old_values, **one)
    assert is_held.item() == (abs(value - old_value) > 0.2)


def test_past_its_bound_safes_value_keeps_half_its_gradient():
    one = {"response_mask": torch.ones(1, 1, dtype=torch.bool), "returns": torch.zeros(1, 1, dtype=torch.float64)}
    for old_value, share in [(0.35, 1.0), (0.0, 0.5)]:
        values = torch.full((1, 1), 0.4, dtype=torch.float64, requires_grad=True)
        old_values = torch.full((1, 1), old_value, dtype=torch.float64)
        DoubleSoftMin().loss(values=values, old_values=old_values, **one).sum().backward()
        assert values.grad is not None
        assert values.grad.item() == pytest.approx(share * 0.4)


@each
def test_gradients_agree_with_finite_differences(ragged, critic):
    fields, mask = random_fit(ragged), ragged.response_mask
    values, old_values, returns = (fields[name][mask] for name in ("values", "old_values", "returns"))
    # Stay clear of the kinks: the bound, and where both squared errors are equal, returns in the middle.
    near = ((values - old_values).abs() - 0.2).abs() < 1e-2
    values = torch.where(near, old_values, values)
    held = torch.clamp(values, old_values - 0.2, old_values + 0.2)
    returns = torch.where(((values + held) / 2 - returns).abs() < 1e-2, returns + 0.1, returns)
    full = {"old_values": fields["old_values"], "response_mask": mask}
    full["returns"] = torch.full(mask.shape, NAN, dtype=torch.float64).masked_scatter(mask, returns)

    def loss(x):
        return critic.loss(values=torch.full(mask.shape, NAN, dtype=torch.float64).masked_scatter(mask, x), **full)[mask]

    assert torch.autograd.gradcheck(loss, (values.requires_grad_(),))


@each
def test_garbage_in_masked_cells_changes_neither_loss_nor_gradient(ragged, critic):
    fields, off = random_fit(ragged), ~ragged.response_mask
    names = ("values", "old_values", "returns")
    clean = fields | {name: fields[name].masked_fill(off, 0.0) for name in names}
    loss, gradient = mean_loss(critic, clean)
    assert gradient[off].eq(0).all()
    assert gradient[~off].ne(0).any()
    for garbage in (NAN, INF, -INF):
        for poisoned in (*names, None):  # one at a time, then all
            dirty = clean | {name: clean[name].masked_fill(off, garbage) for name in names if poisoned in (name, None)}
            got_loss, got_gradient = mean_loss(critic, dirty)
            assert got_loss == loss
            assert torch.equal(got_gradient, gradient)
            assert critic.loss(**dirty)[off].eq(0).all()
            assert torch.equal(critic.vf_clipped(**dirty), critic.vf_clipped(**clean))
            assert not critic.vf_clipped(**dirty)[off].any()


@each
def test_only_the_values_get_a_gradient(ragged, critic):
    fields = random_fit(ragged)
    leaves = [fields[name].clone().requires_grad_() for name in ("values", "old_values", "returns")]
    values, old_values, returns = leaves
    loss = critic.loss(values=values, old_values=old_values, returns=returns, response_mask=ragged.response_mask).sum()
    to_values, *others = torch.autograd.grad(loss, leaves, allow_unused=True)
    assert to_values.ne(0).any()
    assert all(gradient is None or gradient.eq(0).all() for gradient in others)


def test_without_a_critic_there_is_no_term_and_no_head(fit):
    assert NoCritic().loss(**fit) is None
    assert NoCritic().num_heads == 0
    assert NoCritic().needs == set()


def test_a_value_is_one_head_or_the_soft_minimum_of_two():
    heads = torch.randn(2, 3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for critic, expected in [
        (ValueModel(), heads[..., 0]),
        (DoubleSoftMin(softness=0.7), soft_min(heads[..., 0], heads[..., 1], 0.7)),
    ]:
        assert torch.equal(critic.value(heads[..., : critic.num_heads]), expected)
        assert critic.needs == {"values"}


@pytest.mark.parametrize(("softness", "expected"), [(0.3, 1.197428), (0.001, 1.000693), (100.0, 1.498750)])
def test_the_soft_minimum_of_1_and_2(softness, expected):
    one, two = torch.tensor(1.0, dtype=torch.float64), torch.tensor(2.0, dtype=torch.float64)
    assert soft_min(one, two, softness).item() == pytest.approx(expected, abs=1e-6)
    assert soft_min(two, one, softness).item() == soft_min(one, two, softness).item()


@pytest.mark.parametrize("softness", [1e-3, 0.3, 10.0])
def test_the_soft_minimum_lies_between_minimum_and_mean(softness):
    generator = torch.Generator().manual_seed(1)
    first, second = 50 * torch.randn(2, 200, dtype=torch.float64, generator=generator)
    got = soft_min(first, second, softness)
    assert (got >= torch.minimum(first, second) - 1e-12).all()
    assert (got <= (first + second) / 2 + 1e-12).all()
    torch.testing.assert_close(soft_min(first, first, softness), first)
    torch.testing.assert_close(soft_min(first + 3, second + 3, softness), got + 3)


def test_both_heads_are_trained_the_lower_one_more():
    first, second = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (0.2, 0.5))
    weights = torch.autograd.grad(soft_min(first, second, 0.3), (first, second))
    expected = torch.softmax(torch.tensor([-0.2 / 0.3, -0.5 / 0.3], dtype=torch.float64), 0)
    torch.testing.assert_close(torch.stack(weights), expected)
    assert torch.autograd.gradcheck(lambda a, b: soft_min(a, b, 0.3), (first, second))


def explained(fields, index=slice(None)):
    return ExplainedVariance.of(**{name: fields[name][index] for name in ("values", "returns", "response_mask")})


def test_explained_variance_is_one_minus_a_ratio_of_variances(ragged):
    fields, mask = random_fit(ragged), ragged.response_mask
    returns, values = fields["returns"][mask], fields["values"][mask]
    expected = 1 - ((returns - values).var() / returns.var()).item()
    assert explained(fields).value == pytest.approx(expected, abs=1e-12)
    assert explained(fields | {"values": fields["returns"]}).value == 1
    assert explained(fields | {"values": fields["returns"] + 5}).value == pytest.approx(1)  # a constant error is no variance
    assert explained(fields | {"values": torch.full_like(fields["returns"], 3.0)}).value == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 3, 1], [4, 1, 1]], ids=str)
def test_explained_variance_merges_over_any_split_of_the_rows(ragged, sizes):
    fields, start, parts = random_fit(ragged), 0, []
    for size in sizes:
        parts.append(explained(fields, slice(start, start + size)))
        start += size
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part)
    whole = explained(fields)
    assert merged.value == pytest.approx(whole.value, abs=1e-12)
    assert parts[-1].merge(parts[0]).value == pytest.approx(parts[0].merge(parts[-1]).value, nan_ok=True)
    assert merged.returns.count == whole.returns.count == ragged.response_mask.sum()


def test_explained_variance_survives_returns_far_from_zero():
    # A sum of squares in float32 would have lost the variance: 1e4^2 = 1e8, of which seven digits are kept.
    returns = 1e4 + torch.tensor([[0.0, 1.0, 0.0, 1.0]])
    mask = torch.ones(1, 4, dtype=torch.bool)
    parts = [explained({"values": torch.full_like(returns, 1e4), "returns": returns, "response_mask": mask}) for _ in range(2)]
    assert parts[0].merge(parts[1]).value == pytest.approx(0, abs=1e-9)


def test_explained_variance_of_equal_returns_or_of_none_is_not_a_number(fit):
    equal = fit | {"returns": torch.full_like(fit["returns"], 0.1)}
    nothing = fit | {"response_mask": torch.zeros_like(fit["response_mask"])}
    for part in (explained(equal), explained(equal).merge(explained(equal)), explained(nothing)):
        assert part.value != part.value
    assert explained(fit).merge(explained(nothing)) == explained(fit)


@pytest.mark.parametrize("critic", [ValueModel, DoubleSoftMin])
@pytest.mark.parametrize(
    "settings",
    [
        {"coef": 0.0},
        {"learning_rate": -1e-5},
        {"warmup_steps": -1},
        {"value_clip": 0.0},
        {"warmup_steps": 5, "backbone": Backbone.shared},
    ],
    ids=str,
)
def test_an_impossible_setting_is_refused_by_name(critic, settings):
    with pytest.raises(ConfigError, match=rf"critic\.{next(iter(settings))}=.*[Ww]rite"):
        critic(**settings)


@pytest.mark.parametrize("settings", [{"softness": 0.0}, {"huber_delta": -0.5}], ids=str)
def test_an_impossible_setting_of_safes_critic_is_refused_by_name(settings):
    with pytest.raises(ConfigError, match=rf"critic\.{next(iter(settings))}=.*: write"):
        DoubleSoftMin(**settings)


def test_a_critic_can_be_trained_before_the_policy_where_it_does_not_move_it():
    assert [ValueModel(warmup_steps=5, backbone=backbone).warmup_steps for backbone in (Backbone.own, Backbone.detached)] == [5, 5]
