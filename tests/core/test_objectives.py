import pytest
import torch

from rlkit.core.objectives import ClippedSurrogate
from rlkit.core.reduce import Aggregation, Denominators, reduce
from rlkit.errors import ConfigError

NAN, INF = float("nan"), float("inf")


def run(objective, batch, *, aggregation=Aggregation.token_mean, max_response_tokens=4, denominators=None, **override):
    """The whole batch's loss, its gradient in the log-probabilities, and the objective's own answer."""
    fields = {
        "logprobs": batch.logprobs,
        "old_logprobs": batch.old_logprobs,
        "advantages": batch.advantages,
        "response_mask": batch.response_mask,
    } | override
    fields["logprobs"] = fields["logprobs"].detach().requires_grad_()
    surrogate = objective(**fields)
    mask = fields["response_mask"]
    denominators = denominators or Denominators.count(mask, max_response_tokens=max_response_tokens)
    loss = reduce(surrogate.loss, mask, aggregation=aggregation, denominators=denominators)
    (gradient,) = torch.autograd.grad(loss, fields["logprobs"])
    return loss.item(), gradient, surrogate


@pytest.mark.parametrize(
    ("objective", "aggregation", "expected"),
    [
        # Ratios [[1, 1.284025, .670320, 1.020201], [1.648721, .904837], [.740818, 1.105171, 1], [1.221403]];
        # advantages 1, -1, .5, -.5
        (ClippedSurrogate(), Aggregation.token_mean, -0.214926),
        (ClippedSurrogate(clip_high=0.28), Aggregation.token_mean, -0.222926),  # token (0, 1) held at 1.28, not 1.2
        (ClippedSurrogate(dual_clip=1.5), Aggregation.token_mean, -0.229798),  # token (1, 0) held at 1.5, not 1.648721
        (ClippedSurrogate(dual_clip=INF), Aggregation.token_mean, -0.214926),
        (ClippedSurrogate(clip_low=0.999999, clip_high=1e9), Aggregation.token_mean, -0.223328),  # no clip at all
        (ClippedSurrogate(), Aggregation.seq_mean_token_mean, 0.110130),
        (ClippedSurrogate(), Aggregation.seq_mean_token_sum, -0.537314),
        (ClippedSurrogate(), Aggregation.const_norm, -0.134328),
    ],
)
def test_the_loss_of_ten_tokens_worked_out_by_hand(f1, objective, aggregation, expected):
    assert run(objective, f1, aggregation=aggregation)[0] == pytest.approx(expected, abs=1e-6)


def test_one_token_in_ten_is_clipped_and_it_alone_has_no_gradient(f1):
    _, gradient, surrogate = run(ClippedSurrogate(), f1)
    assert surrogate.clipped.dtype == torch.bool
    assert (surrogate.clipped & f1.response_mask).nonzero().tolist() == [[0, 1]]
    assert gradient[0, 1] == 0
    assert gradient[0, 0].item() == pytest.approx(-0.1)  # -A ratio / 10
    assert gradient[1, 0].item() == pytest.approx(0.1648721)  # past the bound, but pushed back: not clipped
    assert gradient[0, 2].item() == pytest.approx(-0.0670320)  # the same on the low side
    assert gradient[~f1.response_mask].eq(0).all()


@pytest.mark.parametrize("log_ratio", [-0.5, -0.1, 0.0, 0.1, 0.5])
@pytest.mark.parametrize("advantage", [-1.5, 1.5])
def test_a_token_is_clipped_exactly_when_it_is_past_the_bound_its_advantage_pushes_it_to(log_ratio, advantage):
    logprobs = torch.tensor([[-1.0 + log_ratio]], dtype=torch.float64, requires_grad=True)
    old_logprobs, mask = torch.tensor([[-1.0]], dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool)
    advantages = torch.full((1, 1), advantage, dtype=torch.float64)
    surrogate = ClippedSurrogate(clip_low=0.2, clip_high=0.28)(
        logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages, response_mask=mask
    )
    ratio = torch.tensor(log_ratio, dtype=torch.float64).exp().item()
    past = ratio > 1.28 if advantage > 0 else ratio < 0.8
    bound = 1.28 if advantage > 0 else 0.8
    assert surrogate.clipped.item() == past
    assert surrogate.loss.item() == pytest.approx(-advantage * (bound if past else ratio))
    (gradient,) = torch.autograd.grad(surrogate.loss.sum(), logprobs)
    assert gradient.item() == pytest.approx(0.0 if past else -advantage * ratio)


def test_the_dual_clip_bounds_only_what_a_bad_token_can_cost(f1):
    _, single, plain = run(ClippedSurrogate(), f1)
    _, double, bounded = run(ClippedSurrogate(dual_clip=1.5), f1)
    changed = (plain.loss != bounded.loss) & f1.response_mask
    assert changed.nonzero().tolist() == [[1, 0]]  # the only token with a negative advantage and a ratio above 1.5
    assert bounded.loss[1, 0].item() == pytest.approx(1.5)  # -A * dual_clip
    assert double[1, 0] == 0
    single[1, 0] = 0
    torch.testing.assert_close(double, single, rtol=0, atol=0)


def test_on_policy_the_gradient_is_the_plain_policy_gradient(ragged):
    # At a ratio of 1: d loss / d logprobs = -A / N, whatever the clip.
    _, gradient, surrogate = run(ClippedSurrogate(dual_clip=3.0), ragged, logprobs=ragged.old_logprobs)
    expected = -ragged.advantages.masked_fill(~ragged.response_mask, 0) / ragged.response_mask.sum()
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-15)
    assert not (surrogate.clipped & ragged.response_mask).any()


def test_without_a_binding_clip_the_expected_gradient_is_the_policy_gradient_under_samples_from_the_old_policy():
    # E_old[ratio * A * grad log p] = grad sum_v p_v A_v, by enumeration of four tokens.
    logits = torch.tensor([0.2, -0.4, 1.0, 0.1], dtype=torch.float64, requires_grad=True)
    old_logprobs = (logits.detach() + torch.tensor([0.1, -0.2, 0.05, 0.3], dtype=torch.float64)).log_softmax(-1)
    advantages = torch.tensor([1.0, -2.0, 0.5, 0.3], dtype=torch.float64)
    logprobs = logits.log_softmax(-1)
    surrogate = ClippedSurrogate(clip_low=0.9, clip_high=10.0)(
        logprobs=logprobs[None],
        old_logprobs=old_logprobs[None],
        advantages=advantages[None],
        response_mask=torch.ones(1, 4, dtype=torch.bool),
    )
    sampled = (old_logprobs.exp() * surrogate.loss[0]).sum()
    exact = -(logprobs.exp() * advantages).sum()
    torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (sampled, exact)))


@pytest.mark.parametrize("objective", [ClippedSurrogate(), ClippedSurrogate(dual_clip=1.5)], ids=["clip", "dual clip"])
def test_garbage_in_masked_cells_changes_neither_loss_nor_gradient(ragged, objective):
    names = ("logprobs", "old_logprobs", "advantages")
    clean = {name: getattr(ragged, name).masked_fill(~ragged.response_mask, 0.0) for name in names}
    loss, gradient, surrogate = run(objective, ragged, **clean)
    for garbage in (NAN, INF, -INF):
        for poisoned in (*names, None):  # one at a time, then all: inf - inf is NaN, inf - 0 is not
            dirty = {
                name: x.masked_fill(~ragged.response_mask, garbage if poisoned in (name, None) else 0.0)
                for name, x in clean.items()
            }
            got_loss, got_gradient, got = run(objective, ragged, **dirty)
            assert got_loss == loss
            torch.testing.assert_close(got_gradient, gradient, rtol=0, atol=0)
            assert torch.equal(got.clipped & ragged.response_mask, surrogate.clipped & ragged.response_mask)
            assert got.loss[~ragged.response_mask].eq(0).all()  # a selector may sum before anything is reduced
    assert gradient[~ragged.response_mask].eq(0).all()


@pytest.mark.parametrize("aggregation", list(Aggregation), ids=lambda aggregation: aggregation.name)
@pytest.mark.parametrize("sizes", [[1] * 6, [2, 3, 1], [5, 1]], ids=str)
def test_how_the_step_is_split_into_microbatches_does_not_matter(ragged, aggregation, sizes):
    whole, gradient, _ = run(ClippedSurrogate(), ragged, aggregation=aggregation, max_response_tokens=9)
    denominators = Denominators.count(ragged.response_mask, max_response_tokens=9)
    names = ("logprobs", "old_logprobs", "advantages", "response_mask")
    parts = zip(*(getattr(ragged, name).split(sizes) for name in names), strict=True)
    results = [
        run(ClippedSurrogate(), ragged, aggregation=aggregation, denominators=denominators, **dict(zip(names, part, strict=True)))
        for part in parts
    ]
    assert sum(loss for loss, _, _ in results) == pytest.approx(whole, abs=1e-10)
    torch.testing.assert_close(torch.cat([g for _, g, _ in results]), gradient, rtol=0, atol=1e-10)


def test_the_mean_of_microbatch_means_would_be_wrong(f1):
    # Rows {0, 1} hold six tokens, rows {2, 3} four: the step's mean is -0.214926, the mean of the two means -0.212950.
    halves = [
        run(
            ClippedSurrogate(),
            f1,
            denominators=Denominators.count(f1.response_mask, max_response_tokens=4),
            **{name: getattr(f1, name)[rows] for name in ("logprobs", "old_logprobs", "advantages", "response_mask")},
        )[0]
        for rows in (slice(0, 2), slice(2, 4))
    ]
    assert sum(halves) == pytest.approx(-0.214926, abs=1e-6)


@pytest.mark.parametrize(
    "objective", [ClippedSurrogate(), ClippedSurrogate(clip_high=0.28, dual_clip=1.4)], ids=["clip", "dual clip"]
)
def test_gradients_agree_with_finite_differences(ragged, objective):
    mask = ragged.response_mask
    log_ratio = ragged.logprobs.detach() - ragged.old_logprobs
    # Stay clear of the kinks at log(1 - clip), log(1 + clip) and log(dual_clip).
    for kink in (0.8, 1.2, 1.28, 1.4):
        near = (log_ratio - torch.tensor(kink).log()).abs() < 1e-2
        log_ratio = log_ratio.masked_fill(near, 0.0)
    logprobs = (ragged.old_logprobs + log_ratio)[mask].requires_grad_()

    def loss(values):
        full = torch.full(mask.shape, NAN, dtype=torch.float64).masked_scatter(mask, values)
        return objective(logprobs=full, old_logprobs=ragged.old_logprobs, advantages=ragged.advantages, response_mask=mask).loss[
            mask
        ]

    assert torch.autograd.gradcheck(loss, (logprobs,))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_ratio", [-100.0, 100.0])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_absurd_ratios_leave_loss_and_gradient_finite(dtype, log_ratio, advantage, dual_clip):
    logprobs = torch.tensor([[log_ratio - 100.0]], dtype=dtype, requires_grad=True)
    surrogate = ClippedSurrogate(dual_clip=dual_clip)(
        logprobs=logprobs,
        old_logprobs=torch.tensor([[-100.0]], dtype=dtype),
        advantages=torch.full((1, 1), advantage, dtype=dtype),
        response_mask=torch.ones(1, 1, dtype=torch.bool),
    )
    (gradient,) = torch.autograd.grad(surrogate.loss.sum(), logprobs)
    assert surrogate.loss.isfinite().all()
    assert gradient.isfinite().all()


def test_the_ratio_itself_is_held_at_exp_20():
    logprobs = torch.tensor([[30.0]], dtype=torch.float64)
    surrogate = ClippedSurrogate()(
        logprobs=logprobs,
        old_logprobs=torch.zeros(1, 1, dtype=torch.float64),
        advantages=-torch.ones(1, 1, dtype=torch.float64),
        response_mask=torch.ones(1, 1, dtype=torch.bool),
    )
    assert surrogate.loss.item() == pytest.approx(485165195.4097903)  # exp(20), not exp(30)


def test_only_the_current_policy_gets_a_gradient(f1):
    inputs = {
        "logprobs": f1.logprobs,
        "old_logprobs": f1.old_logprobs.clone().requires_grad_(),
        "advantages": f1.advantages.clone().requires_grad_(),
    }
    loss = ClippedSurrogate()(**inputs, response_mask=f1.response_mask).loss[f1.response_mask].sum()
    to_policy, to_old, to_advantages = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    assert to_policy.ne(0).any()
    assert all(gradient is None or gradient.eq(0).all() for gradient in (to_old, to_advantages))


def test_it_asks_for_the_old_policys_logprobs():
    assert "old_logprobs" in ClippedSurrogate().needs


@pytest.mark.parametrize(
    "settings", [{"clip_low": -0.1}, {"clip_low": 1.5}, {"clip_high": -0.1}, {"dual_clip": 1.0}, {"dual_clip": 0.5}], ids=str
)
def test_an_impossible_bound_is_refused_by_name(settings):
    with pytest.raises(ConfigError, match=rf"objective\.{next(iter(settings))}"):
        ClippedSurrogate(**settings)
