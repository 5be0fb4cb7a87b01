from typing import Any

import pytest
import torch

from rlkit.core.objectives import ClippedSurrogate
from rlkit.core.reduce import Aggregation, Denominators, reduce
from rlkit.core.selectors import Scope
from rlkit.core.weights import HighEntropy, NoTokenWeight, Omega, Shape, Steer
from rlkit.errors import ConfigError

NAN, INF = float("nan"), float("inf")
DAPO = ClippedSurrogate(clip_high=0.28, dual_clip=10.0)


def weigh(weight, batch, *, rows: Any = slice(None), old=False, **override: Any):
    names = ("logprobs", "old_logprobs", "advantages", "response_mask", "entropy")
    fields = {name: getattr(batch, name).detach() for name in names} | override
    if old:
        fields["logprobs"] = fields["old_logprobs"]
    return weight(**{name: x[rows] for name, x in fields.items()})


def weighted_loss(weights, batch, *, objective=DAPO, rows: Any = slice(None), denominators=None):
    """The token mean of the weighted loss and its gradient in the log-probabilities."""
    fields = {name: getattr(batch, name)[rows] for name in ("logprobs", "old_logprobs", "advantages", "response_mask")}
    fields["logprobs"] = fields["logprobs"].detach().requires_grad_()
    mask = fields["response_mask"]
    loss = reduce(
        objective(**fields).loss * weights,
        mask,
        aggregation=Aggregation.token_mean,
        denominators=denominators or Denominators.count(mask, max_response_tokens=9),
    )
    (gradient,) = torch.autograd.grad(loss, fields["logprobs"])
    return loss.item(), gradient


def expected_score(batch):
    return 0.2 * torch.rand(batch.response_mask.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def rows_of(values, mask):
    return [[round(x, 6) for x in row[keep].tolist()] for row, keep in zip(values, mask, strict=True)]


def test_no_weight_is_no_tensor(f1):
    assert weigh(NoTokenWeight(), f1) is None
    assert NoTokenWeight().needs == frozenset()
    assert not NoTokenWeight().whole_batch


def test_linear_steer_of_ten_tokens_worked_out_by_hand(f1):
    # omega = [[.019033, .269824, .060951, .002111], [.912990, .059661], [.023414, .091288, .018127], [.276063]]
    weights = weigh(Steer(scope=Scope.micro), f1)
    assert rows_of(weights, f1.response_mask) == [
        [1.192569, 1.082437, 1.174161, 1.2],
        [0.8, 1.174727],
        [1.190645, 1.160839, 1.192967],
        [1.079698],
    ]
    assert weighted_loss(weights, f1)[0] == pytest.approx(-0.322708, abs=1e-6)


def test_exponential_steer_of_ten_tokens_worked_out_by_hand(f1):
    weights = weigh(Steer(shape=Shape.exponential, scope=Scope.micro), f1)  # kappa = -log(.8) / .912990 = .244410
    assert rows_of(weights[:2], f1.response_mask[:2]) == [[0.995359, 0.936180, 0.985213, 0.999484], [0.8, 0.985524]]
    assert weighted_loss(weights, f1)[0] == pytest.approx(-0.249866, abs=1e-6)


def test_the_exponentials_slope_is_held_where_nothing_changes_the_entropy(f1):
    advantages = f1.advantages * 1e-3  # the largest omega is .000913, below .02
    weights = weigh(Steer(shape=Shape.exponential, scope=Scope.micro), f1, advantages=advantages)
    assert weights[1, 0].item() == pytest.approx(0.8 ** (0.000912990 / 0.02), abs=1e-6)


@pytest.mark.parametrize("shape", list(Shape), ids=lambda shape: shape.name)
def test_equal_weights_of_one_are_the_plain_objective(ragged, shape):
    weights = weigh(Steer(shape=shape, min_weight=1.0, max_weight=1.0), ragged, old=True)
    (loss, gradient), (plain, expected) = weighted_loss(weights, ragged), weighted_loss(1.0, ragged)
    assert loss == plain
    assert torch.equal(gradient, expected)


def test_where_no_token_changes_the_entropy_all_weigh_the_same(f1):
    zero = torch.zeros_like(f1.advantages)
    for shape, expected in ((Shape.linear, 1.05), (Shape.exponential, 1.0)):
        weights = weigh(Steer(shape=shape, max_weight=1.3), f1, old=True, advantages=zero)
        torch.testing.assert_close(weights[f1.response_mask], torch.full((10,), expected, dtype=torch.float64))


def test_l5_is_the_entropy_change_that_a_step_really_makes():
    # One context, every token sampled once: the weight's omega against the entropy after a small step on each token's loss.
    logits = torch.tensor([1.0, 0.2, -0.5, 0.7], dtype=torch.float64)
    old_logits = logits + torch.tensor([0.1, -0.2, 0.05, 0.1], dtype=torch.float64)
    logprobs, old_logprobs = logits.log_softmax(-1), old_logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum()
    advantages = torch.tensor([1.0, -0.5, 0.7, 2.0], dtype=torch.float64)
    step, changes = 1e-5, []
    for token in range(4):
        leaf = logits.clone().requires_grad_()
        loss = -advantages[token] * (leaf.log_softmax(-1)[token] - old_logprobs[token]).exp()
        moved = logits - step * torch.autograd.grad(loss, leaf)[0]
        changes.append((torch.distributions.Categorical(logits=moved).entropy() - entropy).abs().item() / step)
    weights = Steer(shape=Shape.exponential, omega=Omega.l5, scope=Scope.micro, min_weight=0.5)(
        logprobs=logprobs[None],
        old_logprobs=old_logprobs[None],
        advantages=advantages[None],
        response_mask=torch.ones(1, 4, dtype=torch.bool),
        entropy=entropy.expand(1, 4),
        expected_score=(logprobs.exp().square() * (logprobs + entropy)).sum().expand(1, 4),
    )
    omega = -weights[0].log() / (torch.tensor(2.0).log() / max(changes))
    torch.testing.assert_close(omega, torch.tensor(changes, dtype=torch.float64), rtol=1e-3, atol=1e-6)


def test_high_entropy_tokens_are_those_above_the_quantile(f1):
    weights = weigh(HighEntropy(), f1)  # the .8-quantile of the ten entropies is 1.84
    assert weights.nonzero().tolist() == [[0, 2], [3, 0]]
    assert weights.sum() == 2
    # They keep their loss, and all ten still count: -(.670320 * 1) - .5 * -1.221403, over ten.
    loss, _ = weighted_loss(weights, f1, objective=ClippedSurrogate(clip_high=0.28))
    assert loss == pytest.approx((-0.670320 + 0.610701) / 10, abs=1e-6)


def test_high_entropy_with_a_fraction_of_one_is_the_plain_objective(ragged):
    weights = weigh(HighEntropy(fraction=1.0), ragged)
    assert torch.equal(weights.bool(), ragged.response_mask)
    (loss, gradient), (plain, expected) = weighted_loss(weights, ragged), weighted_loss(1.0, ragged)
    assert loss == plain
    assert torch.equal(gradient, expected)


def test_the_fraction_is_the_share_of_tokens_that_train():
    entropy = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).double().view(20, 50)
    mask = torch.ones(20, 50, dtype=torch.bool)
    zeros = torch.zeros_like(entropy)
    for fraction in (0.05, 0.2, 0.5):
        weights = HighEntropy(fraction=fraction)(
            logprobs=zeros, old_logprobs=zeros, advantages=zeros, response_mask=mask, entropy=entropy
        )
        assert torch.equal(weights.bool(), entropy >= 1000 * (1 - fraction))


WEIGHTS = {
    "linear": Steer(),
    "exponential": Steer(shape=Shape.exponential),
    "l5": Steer(omega=Omega.l5),
    "high_entropy": HighEntropy(fraction=0.3),
}


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 3, 1], [5, 1]], ids=str)
@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_the_whole_step_do_not_depend_on_how_it_is_split(ragged, name, sizes):
    assert WEIGHTS[name].whole_batch
    weights = weigh(WEIGHTS[name], ragged, old=True, expected_score=expected_score(ragged))
    loss, gradient = weighted_loss(weights, ragged)
    denominators = Denominators.count(ragged.response_mask, max_response_tokens=9)
    parts = [weighted_loss(weights[rows], ragged, rows=rows, denominators=denominators) for rows in torch.arange(6).split(sizes)]
    assert sum(part[0] for part in parts) == pytest.approx(loss, abs=1e-10)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_within_a_microbatch_do(f1, name):
    whole = weigh(WEIGHTS[name], f1, expected_score=expected_score(f1))
    by_row = torch.cat([weigh(WEIGHTS[name], f1, rows=[row], expected_score=expected_score(f1)) for row in range(4)])
    assert (whole - by_row).abs().max() > 1e-3


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_follow_their_rows_and_ignore_padding_and_garbage(ragged, name):
    given = {"expected_score": expected_score(ragged)}
    mask = ragged.response_mask
    weights = weigh(WEIGHTS[name], ragged, old=True, **given)
    assert weights[~mask].eq(0).all()
    assert weights[mask].unique().numel() > 1
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3))
    assert torch.equal(weigh(WEIGHTS[name], ragged, old=True, rows=order, **given), weights[order])
    clean = {name: getattr(ragged, name).detach() for name in ("old_logprobs", "advantages", "entropy")} | given
    for garbage in (0.0, NAN, INF, -INF):
        for poisoned in (*clean, None):
            dirty = {name: x.masked_fill(~mask, garbage if poisoned in (name, None) else 0.0) for name, x in clean.items()}
            assert torch.equal(weigh(WEIGHTS[name], ragged, old=True, **dirty), weights)
    wider = {name: torch.nn.functional.pad(x, (0, 2), value=NAN) for name, x in clean.items()}
    wider["response_mask"] = torch.nn.functional.pad(mask, (0, 2))
    assert torch.equal(weigh(WEIGHTS[name], ragged, old=True, **wider)[:, :9], weights)


@pytest.mark.parametrize("name", WEIGHTS)
def test_no_gradient_reaches_what_a_weight_is_made_of(f1, name):
    given = {name: getattr(f1, name).detach().clone().requires_grad_() for name in ("logprobs", "old_logprobs", "entropy")}
    weights = WEIGHTS[name](
        **given, advantages=f1.advantages, response_mask=f1.response_mask, expected_score=expected_score(f1).requires_grad_()
    )
    assert not weights.requires_grad
    # The weighted loss's gradient is that of the objective, times a constant: -w A ratio where no bound holds.
    _, gradient = weighted_loss(weights, f1, objective=ClippedSurrogate(clip_low=0.9, clip_high=9.0))
    ratio = (f1.logprobs - f1.old_logprobs).exp().detach()
    expected = (-weights * f1.advantages * ratio / 10).masked_fill(~f1.response_mask, 0.0)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_microbatch_without_tokens_has_weights_of_zero(name):
    empty = torch.zeros(2, 3)
    for shape in ((2, 3), (0, 0)):
        x = empty[: shape[0], : shape[1]]
        weights = WEIGHTS[name](logprobs=x, old_logprobs=x, advantages=x, response_mask=x.bool(), entropy=x, expected_score=x)
        assert torch.equal(weights, x)


@pytest.mark.parametrize("omega", list(Omega), ids=lambda omega: omega.name)
def test_absurd_logprobs_leave_weights_in_their_range(omega):
    given = {"logprobs": torch.tensor([[-200.0, -0.0, -1.0]]), "old_logprobs": torch.tensor([[-0.0, -200.0, -1.0]])}
    weights = Steer(omega=omega, scope=Scope.micro)(
        **given,
        advantages=torch.tensor([[1.0, -3.0, INF]]),
        response_mask=torch.ones(1, 3, dtype=torch.bool),
        entropy=torch.tensor([[0.0, 2.0, 1.0]]),
        expected_score=torch.tensor([[0.0, 0.1, 0.1]]),
    )
    assert ((weights >= 0.8) & (weights <= 1.2)).all()


def test_weights_say_what_they_need():
    assert Steer().needs == {"old_logprobs", "old_pass", "old_entropy"}
    assert Steer(scope=Scope.micro).needs == {"old_logprobs", "old_entropy"}
    assert Steer(omega=Omega.l5).needs == {"old_logprobs", "old_pass", "old_entropy", "old_expected_score"}
    assert HighEntropy().needs == {"old_entropy"}
    assert HighEntropy(scope=Scope.micro).needs == frozenset()
    assert not HighEntropy(scope=Scope.micro).whole_batch


@pytest.mark.parametrize(
    ("choice", "settings"),
    [
        (Steer, {"min_weight": 0.0}),
        (Steer, {"min_weight": 1.1}),
        (Steer, {"max_weight": 0.9}),
        (Steer, {"max_weight": INF}),
        (HighEntropy, {"fraction": 0.0}),
        (HighEntropy, {"fraction": 1.2}),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_by_name(choice, settings):
    ((name, value),) = settings.items()
    with pytest.raises(ConfigError, match=rf"token_weight\.{name}={value}: write"):
        choice(**settings)
