from typing import Any

import pytest
import torch

from rlkit.core.objectives import CISPO, GMPO, GSPO, ClippedSurrogate, ScoreFunction, UnclippedSurrogate
from rlkit.core.reduce import Aggregation, Denominators, reduce
from rlkit.errors import ConfigError

NAN, INF = float("nan"), float("inf")
OBJECTIVES = {
    "reinforce": ScoreFunction(),
    "unclipped": UnclippedSurrogate(),
    "clipped": ClippedSurrogate(),
    "dual clip": ClippedSurrogate(dual_clip=1.5),
    "gspo": GSPO(clip_low=0.05, clip_high=0.05),
    "gmpo": GMPO(clip_low=0.2, clip_high=0.2),
    "cispo": CISPO(clip_low=0.2, clip_high=0.28),
}
every_objective = pytest.mark.parametrize("objective", list(OBJECTIVES.values()), ids=list(OBJECTIVES))
sequence_level = pytest.mark.parametrize("objective", [GSPO(clip_low=0.2, clip_high=0.2), GMPO(clip_low=0.2, clip_high=0.2)])


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
        (UnclippedSurrogate(), Aggregation.token_mean, -0.223328),
        (ScoreFunction(), Aggregation.token_mean, 0.198),
        (ScoreFunction(), Aggregation.seq_mean_token_mean, -0.055417),
        # Geometric means of the rows' ratios: .968022, 1.221403, .935507, 1.221403
        (GSPO(clip_low=0.2, clip_high=0.2), Aggregation.seq_mean_token_mean, 0.099082),
        (GMPO(), Aggregation.seq_mean_token_mean, 0.099082),  # nothing past exp(+-.4): the same ratios
        (GMPO(clip_low=0.1, clip_high=0.1), Aggregation.seq_mean_token_mean, 0.107989),  # the first is .932394: (0, 1) held
        (CISPO(clip_low=0.2, clip_high=0.28), Aggregation.token_mean, 0.119976),
        (CISPO(clip_high=0.28), Aggregation.token_mean, 0.085893),  # no lower bound: (0, 2) and (2, 0) weigh less
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


@pytest.mark.parametrize(
    "objective", [UnclippedSurrogate(), ClippedSurrogate(clip_low=0.9, clip_high=10.0), CISPO(clip_high=INF)], ids=str
)
def test_without_a_binding_clip_the_expected_gradient_is_the_policy_gradient_under_samples_from_the_old_policy(objective):
    # E_old[ratio * A * grad log p] = grad sum_v p_v A_v, by enumeration of four tokens.
    logits = torch.tensor([0.2, -0.4, 1.0, 0.1], dtype=torch.float64, requires_grad=True)
    old_logprobs = (logits.detach() + torch.tensor([0.1, -0.2, 0.05, 0.3], dtype=torch.float64)).log_softmax(-1)
    advantages = torch.tensor([1.0, -2.0, 0.5, 0.3], dtype=torch.float64)
    logprobs = logits.log_softmax(-1)
    surrogate = objective(
        logprobs=logprobs[None],
        old_logprobs=old_logprobs[None],
        advantages=advantages[None],
        response_mask=torch.ones(1, 4, dtype=torch.bool),
    )
    sampled = (old_logprobs.exp() * surrogate.loss[0]).sum()
    exact = -(logprobs.exp() * advantages).sum()
    torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (sampled, exact)))


@every_objective
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


@pytest.mark.parametrize(
    ("objective", "aggregation"),
    [
        *((ClippedSurrogate(), aggregation) for aggregation in Aggregation),
        *((objective, Aggregation.seq_mean_token_mean) for objective in OBJECTIVES.values()),
    ],
    ids=lambda x: x.name if isinstance(x, Aggregation) else type(x).__name__,
)
@pytest.mark.parametrize("sizes", [[1] * 6, [2, 3, 1], [5, 1]], ids=str)
def test_how_the_step_is_split_into_microbatches_does_not_matter(ragged, objective, aggregation, sizes):
    whole, gradient, _ = run(objective, ragged, aggregation=aggregation, max_response_tokens=9)
    denominators = Denominators.count(ragged.response_mask, max_response_tokens=9)
    names = ("logprobs", "old_logprobs", "advantages", "response_mask")
    parts = zip(*(getattr(ragged, name).split(sizes) for name in names), strict=True)
    results = [
        run(objective, ragged, aggregation=aggregation, denominators=denominators, **dict(zip(names, part, strict=True)))
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


def away_from_kinks(ragged, kinks):
    """log-ratios at least a hundredth away from the logarithm of each of these ratios."""
    log_ratio = ragged.logprobs.detach() - ragged.old_logprobs
    for kink in kinks:
        near = (log_ratio - torch.tensor(kink).log()).abs() < 1e-2
        log_ratio = log_ratio.masked_fill(near, 0.0)
    return log_ratio


@pytest.mark.parametrize(
    ("objective", "kinks"),
    [
        (ScoreFunction(), []),
        (UnclippedSurrogate(), []),
        (ClippedSurrogate(), [0.8, 1.2]),
        (ClippedSurrogate(clip_high=0.28, dual_clip=1.4), [0.8, 1.28, 1.4]),
    ],
    ids=["reinforce", "unclipped", "clip", "dual clip"],
)
def test_gradients_agree_with_finite_differences(ragged, objective, kinks):
    mask = ragged.response_mask
    logprobs = (ragged.old_logprobs + away_from_kinks(ragged, kinks))[mask].requires_grad_()

    def loss(values):
        full = torch.full(mask.shape, NAN, dtype=torch.float64).masked_scatter(mask, values)
        return objective(logprobs=full, old_logprobs=ragged.old_logprobs, advantages=ragged.advantages, response_mask=mask).loss[
            mask
        ]

    assert torch.autograd.gradcheck(loss, (logprobs,))


@sequence_level
def test_gradients_of_a_whole_row_agree_with_finite_differences(ragged, objective):
    # Cell by cell they cannot: a cell's value is its row's, its gradient its own token's.
    mask = ragged.response_mask
    denominators = Denominators.count(mask, max_response_tokens=9)
    kinks = [0.8, 1.2, torch.tensor(0.2).exp().item(), torch.tensor(-0.2).exp().item()]
    logprobs = (ragged.old_logprobs + away_from_kinks(ragged, kinks))[mask].requires_grad_()
    advantages = ragged.rewards[:, None].expand(mask.shape)

    def loss(values):
        full = torch.full(mask.shape, NAN, dtype=torch.float64).masked_scatter(mask, values)
        surrogate = objective(logprobs=full, old_logprobs=ragged.old_logprobs, advantages=advantages, response_mask=mask)
        return reduce(surrogate.loss, mask, aggregation=Aggregation.seq_mean_token_mean, denominators=denominators)

    assert torch.autograd.gradcheck(loss, (logprobs,))


def test_cispos_gradient_is_that_of_a_surrogate_which_goes_on_as_a_line_in_log_space_past_the_bound(ragged):
    # d(ratio)/d(logprobs) = ratio, and d(cap * log_ratio)/d(logprobs) = cap: the value of CISPO itself has no such gradient.
    mask, cap = ragged.response_mask, 1.28
    logprobs = (ragged.old_logprobs + away_from_kinks(ragged, [cap]))[mask].requires_grad_()
    old_logprobs, advantages = ragged.old_logprobs[mask], ragged.advantages[mask]

    def potential(values):
        log_ratio = values - old_logprobs
        line = cap * (1 + log_ratio - torch.tensor(cap).double().log())
        return -advantages * torch.where(log_ratio.exp() < cap, log_ratio.exp(), line)

    assert torch.autograd.gradcheck(potential, (logprobs,))
    full = torch.full(mask.shape, NAN, dtype=torch.float64).masked_scatter(mask, logprobs)
    fields = {"old_logprobs": ragged.old_logprobs, "advantages": ragged.advantages, "response_mask": mask}
    surrogate = CISPO(clip_high=cap - 1)(logprobs=full, **fields)
    assert surrogate.clipped.any()
    mine, theirs = (torch.autograd.grad(x.sum(), logprobs)[0] for x in (surrogate.loss[mask], potential(logprobs)))
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("log_ratio", [-100.0, 100.0])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@every_objective
def test_absurd_ratios_leave_loss_and_gradient_finite(dtype, log_ratio, advantage, objective):
    logprobs = torch.tensor([[log_ratio - 100.0]], dtype=dtype, requires_grad=True)
    surrogate = objective(
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


@every_objective
def test_only_the_current_policy_gets_a_gradient(f1, objective):
    inputs = {
        "logprobs": f1.logprobs,
        "old_logprobs": f1.old_logprobs.clone().requires_grad_(),
        "advantages": f1.advantages.clone().requires_grad_(),
    }
    loss = objective(**inputs, response_mask=f1.response_mask).loss[f1.response_mask].sum()
    to_policy, to_old, to_advantages = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    assert to_policy.ne(0).any()
    assert all(gradient is None or gradient.eq(0).all() for gradient in (to_old, to_advantages))


@every_objective
def test_on_policy_every_objective_has_the_policy_gradient(ragged, objective):
    # At a ratio of 1, with one advantage per row, under the mean over rows of row means: -A / (num_tokens * num_rows).
    mask, on_policy = ragged.response_mask, ragged.old_logprobs
    advantages = ragged.rewards[:, None].expand(mask.shape)
    _, gradient, _ = run(objective, ragged, aggregation=Aggregation.seq_mean_token_mean, logprobs=on_policy, advantages=advantages)
    expected = (-advantages / mask.sum(-1, keepdim=True) / mask.any(-1).sum()).masked_fill(~mask, 0.0)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-15)


@every_objective
def test_a_step_without_a_token_has_a_loss_of_zero_and_a_graph(f1, objective):
    nothing = torch.zeros_like(f1.response_mask)
    loss, gradient, surrogate = run(objective, f1, aggregation=Aggregation.seq_mean_token_mean, response_mask=nothing)
    assert loss == 0
    assert gradient.eq(0).all()
    assert not surrogate.clipped.any()


@every_objective
def test_more_padding_and_another_order_of_rows_change_nothing(ragged, objective):
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    names = ("logprobs", "old_logprobs", "advantages")
    garbage = torch.full((6, 3), NAN, dtype=torch.float64)
    wider: dict[str, Any] = {name: torch.cat([getattr(ragged, name).detach(), garbage], -1)[order] for name in names}
    wider["response_mask"] = torch.cat([ragged.response_mask, torch.zeros(6, 3, dtype=torch.bool)], -1)[order]
    loss, gradient, surrogate = run(objective, ragged, aggregation=Aggregation.seq_mean_token_mean)
    got_loss, got_gradient, got = run(objective, ragged, aggregation=Aggregation.seq_mean_token_mean, **wider)
    assert got_loss == pytest.approx(loss, abs=1e-14)
    torch.testing.assert_close(got_gradient[:, :9], gradient[order], rtol=0, atol=1e-14)
    torch.testing.assert_close(got.loss[:, :9], surrogate.loss[order], rtol=0, atol=1e-14)


@every_objective
def test_a_clipped_token_has_no_gradient_exactly_where_the_objective_says_that_it_clips(ragged, objective):
    _, gradient, surrogate = run(objective, ragged)
    assert not (surrogate.clipped & ~ragged.response_mask).any()
    of_clipped = gradient[surrogate.clipped]
    if objective.clips:
        assert of_clipped.eq(0).all()
    else:
        assert of_clipped.ne(0).all()
    if not isinstance(objective, ScoreFunction | UnclippedSurrogate):
        assert len(of_clipped) > 0


@every_objective
def test_the_tokens_of_a_row_share_a_ratio_exactly_where_the_objective_says_so(f1, objective):
    _, gradient, _ = run(objective, f1, advantages=torch.ones_like(f1.advantages))
    free = gradient[0][gradient[0] != 0]  # of the first row: four tokens, no two of the same ratio
    assert len(free) >= 2
    shared = bool((free - free[0]).abs().max() < 1e-15)
    assert shared == (objective.is_sequence_level or isinstance(objective, ScoreFunction))  # whose ratio is always 1


def test_gspo_holds_a_whole_row_and_a_free_row_has_one_gradient(f1):
    gspo, seq_mean = GSPO(clip_low=0.2, clip_high=0.2), Aggregation.seq_mean_token_mean
    _, gradient, surrogate = run(gspo, f1, aggregation=seq_mean)
    assert not surrogate.clipped.any()
    torch.testing.assert_close(gradient[0], torch.full((4,), -0.968022 / (4 * 4), dtype=torch.float64), rtol=0, atol=1e-7)
    assert gradient[1, 0].item() == pytest.approx(1.221403 / (2 * 4), abs=1e-7)

    loss, gradient, surrogate = run(gspo, f1, aggregation=seq_mean, advantages=-f1.advantages)
    assert loss == pytest.approx(-0.091056, abs=1e-6)
    assert surrogate.clipped.tolist() == [[False] * 4, [True, True, False, False], [False] * 4, [True, False, False, False]]
    assert gradient[surrogate.clipped].eq(0).all()

    loss, gradient, surrogate = run(GSPO(), f1, aggregation=seq_mean, advantages=-f1.advantages)
    assert loss == pytest.approx(-0.0002625, abs=1e-8)
    assert torch.equal(surrogate.clipped, f1.response_mask)  # every row is past bounds this narrow
    assert gradient.eq(0).all()


def test_gspo_of_responses_of_one_token_is_the_clipped_surrogate(ragged):
    mask = ragged.response_mask & (torch.arange(9) == 0)
    fields = {"aggregation": Aggregation.seq_mean_token_mean, "response_mask": mask}
    loss, gradient, _ = run(GSPO(clip_low=0.1, clip_high=0.1), ragged, **fields)
    expected_loss, expected, _ = run(ClippedSurrogate(clip_low=0.1, clip_high=0.1), ragged, **fields)
    assert loss == pytest.approx(expected_loss, abs=1e-15)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-15)


def product_of_ratios(row, advantage, bound):
    """GMPO's definition, as a product over tokens: sign(A) decides which of ratio and clipped ratio counts."""
    product = torch.ones((), dtype=torch.float64)
    for log_ratio in row:
        pair = torch.stack([log_ratio, log_ratio.clamp(-bound, bound)])
        product = product * (pair.min() if advantage > 0 else pair.max()).exp()
    return product ** (1 / len(row))


@sequence_level
def test_the_published_row_loss_has_the_same_value_and_gradient(ragged, objective):
    mask, advantages = ragged.response_mask, ragged.rewards
    logprobs = ragged.logprobs.detach().requires_grad_()
    rows = []
    for row in mask.any(-1).nonzero().flatten():
        log_ratio, advantage = (logprobs - ragged.old_logprobs)[row][mask[row]], advantages[row]
        if isinstance(objective, GMPO):
            rows.append(-advantage * product_of_ratios(log_ratio, advantage, 0.2))
        else:
            s = log_ratio.mean().exp()
            rows.append(-torch.minimum(s * advantage, s.clamp(0.8, 1.2) * advantage))
    published = torch.stack(rows).mean()
    (expected,) = torch.autograd.grad(published, logprobs)
    loss, gradient, _ = run(
        objective, ragged, aggregation=Aggregation.seq_mean_token_mean, advantages=advantages[:, None].expand(mask.shape)
    )
    assert loss == pytest.approx(published.item(), abs=1e-14)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-14)


@sequence_level
def test_the_cell_of_a_token_carries_that_tokens_gradient_alone(f1, objective):
    # So that a weight on a token, or the loss of one, acts on the token and not on its row.
    surrogate = objective(
        logprobs=f1.logprobs, old_logprobs=f1.old_logprobs, advantages=f1.advantages, response_mask=f1.response_mask
    )
    (gradient,) = torch.autograd.grad(surrogate.loss[0, 3], f1.logprobs)
    assert gradient.ne(0).nonzero().tolist() == [[0, 3]]


def test_gmpo_leaves_a_clipped_token_in_its_rows_mean(f1):
    _, gradient, surrogate = run(GMPO(clip_low=0.15, clip_high=0.15), f1, aggregation=Aggregation.seq_mean_token_mean)
    assert surrogate.clipped.nonzero().tolist() == [[0, 1]]  # exp(.25) is pushed up; the others past a bound are pushed back
    row_ratio = torch.tensor((0.00 + 0.15 - 0.40 + 0.02) / 4).exp().item()  # four tokens, though one is held at 0.15
    assert gradient[0].tolist() == pytest.approx([-row_ratio / 16, 0.0, -row_ratio / 16, -row_ratio / 16], abs=1e-7)


def test_gmpo_gives_a_row_its_mean_advantage(f1):
    uneven = f1.advantages.clone()
    uneven[0] = torch.tensor([2.0, 0.0, 1.5, 0.5])  # mean 1, as before
    loss, gradient, _ = run(GMPO(), f1, aggregation=Aggregation.seq_mean_token_mean, advantages=uneven)
    expected_loss, expected, _ = run(GMPO(), f1, aggregation=Aggregation.seq_mean_token_mean)
    assert loss == pytest.approx(expected_loss, abs=1e-15)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-15)


def test_gmpo_has_a_bound_for_each_sign_of_the_advantage_and_clips_nothing_without_one(f1):
    gmpo = GMPO(clip_low=0.05, clip_high=0.3)
    _, gradient, surrogate = run(gmpo, f1, aggregation=Aggregation.seq_mean_token_mean)
    # Bad rows are held below -0.05 alone, good ones above 0.3 alone: not (1, 0) at 0.5, not (0, 2) at -0.4.
    assert surrogate.clipped.nonzero().tolist() == [[1, 1]]
    assert gradient[1, 0].item() == pytest.approx(torch.tensor((0.50 - 0.05) / 2).exp().item() / 8, abs=1e-7)
    assert run(gmpo, f1, advantages=-f1.advantages)[2].clipped.nonzero().tolist() == [[0, 2], [1, 0], [2, 0]]
    assert not run(gmpo, f1, advantages=0 * f1.advantages)[2].clipped.any()


def test_cispo_cuts_a_weight_and_keeps_the_gradient(f1):
    _, gradient, surrogate = run(CISPO(clip_low=0.2, clip_high=0.28), f1)
    # Weights past .8 and 1.28 on either side, whatever the advantage.
    assert surrogate.clipped.nonzero().tolist() == [[0, 1], [0, 2], [1, 0], [2, 0]]
    assert gradient[0, 1].item() == pytest.approx(-0.128)  # -1.28 * A / 10, where the clipped surrogate has none
    assert gradient[0, 2].item() == pytest.approx(-0.08)


@pytest.mark.parametrize(
    ("objective", "expected"),
    [(ClippedSurrogate(), -0.029168), (CISPO(clip_high=1.0), 0.056905)],  # REINFORCE with weights of at most 2
    ids=["clipped", "reinforce"],
)
def test_with_the_engines_logprobs_as_the_old_ones_the_two_policy_losses_need_no_objective_of_their_own(f1, objective, expected):
    assert run(objective, f1, old_logprobs=f1.rollout_logprobs)[0] == pytest.approx(expected, abs=1e-6)


def test_on_policy_samples_the_score_functions_expected_gradient_is_the_policy_gradient():
    logits = torch.tensor([0.2, -0.4, 1.0, 0.1], dtype=torch.float64, requires_grad=True)
    logprobs, advantages = logits.log_softmax(-1), torch.tensor([1.0, -2.0, 0.5, 0.3], dtype=torch.float64)
    surrogate = ScoreFunction()(
        logprobs=logprobs[None],
        old_logprobs=logprobs[None],
        advantages=advantages[None],
        response_mask=torch.ones(1, 4, dtype=torch.bool),
    )
    sampled = (logprobs.exp().detach() * surrogate.loss[0]).sum()
    exact = -(logprobs.exp() * advantages).sum()
    torch.testing.assert_close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (sampled, exact)))


@pytest.mark.parametrize("kind", [GSPO, GMPO])
def test_an_infinite_log_ratio_leaves_the_rest_of_its_row_finite(kind):
    logprobs = torch.tensor([[-INF, -1.0]], dtype=torch.float64, requires_grad=True)
    surrogate = kind()(
        logprobs=logprobs,
        old_logprobs=torch.full((1, 2), -1.0, dtype=torch.float64),
        advantages=torch.ones(1, 2, dtype=torch.float64),
        response_mask=torch.ones(1, 2, dtype=torch.bool),
    )
    (gradient,) = torch.autograd.grad(surrogate.loss.sum(), logprobs)
    assert surrogate.loss.tolist() == [pytest.approx([-torch.tensor(-10.0).exp().item()] * 2)]  # the mean of -20 and 0
    assert gradient[0, 0] == 0
    assert gradient[0, 1].item() == pytest.approx(-torch.tensor(-10.0).exp().item())


@every_objective
def test_only_the_score_function_does_without_the_old_policys_logprobs(ragged, objective):
    loss = run(objective, ragged)[0]
    other = run(objective, ragged, old_logprobs=ragged.old_logprobs + 0.1)[0]
    assert ("old_logprobs" in objective.needs) == (loss != other)


@every_objective
def test_a_shared_ratio_asks_for_the_mean_over_rows_of_row_means(objective):
    assert objective.aggregations == ({"seq_mean_token_mean"} if objective.is_sequence_level else None)
    assert (objective.aggregations or set()) <= {aggregation.name for aggregation in Aggregation}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (ClippedSurrogate, {"clip_low": -0.1}),
        (ClippedSurrogate, {"clip_low": 1.5}),
        (ClippedSurrogate, {"clip_high": -0.1}),
        (ClippedSurrogate, {"dual_clip": 1.0}),
        (ClippedSurrogate, {"dual_clip": 0.5}),
        (GSPO, {"clip_low": 0.0}),
        (GSPO, {"clip_high": NAN}),
        (GMPO, {"clip_low": 0.0}),
        (GMPO, {"clip_high": -0.4}),
        (CISPO, {"clip_low": 1.2}),
        (CISPO, {"clip_high": 0.0}),
    ],
    ids=str,
)
def test_an_impossible_bound_is_refused_by_name(kind, settings):
    ((name, value),) = settings.items()
    with pytest.raises(ConfigError, match=rf"objective\.{name}={value}: .*write a value"):
        kind(**settings)
