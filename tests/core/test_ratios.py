import math

import pytest
import torch

from rlkit.core.objectives import ClippedSurrogate
from rlkit.core.ratios import (
    Action,
    CorrectionMetrics,
    DecoupledPPO,
    DivergenceRejection,
    IcePop,
    Level,
    MaskedIS,
    MismatchEstimator,
    NoCorrection,
    Rejection,
    SequenceMaskedTIS,
    Statistic,
    TruncatedIS,
    Weights,
    correction_metrics,
    effective_fraction,
    mismatch_log_ratio,
    ratio,
    ratio_at,
)
from rlkit.core.reduce import Aggregation, Denominators, reduce
from rlkit.errors import ConfigError

NAN, INF = float("nan"), float("inf")
CORRECTIONS = {
    "tis": TruncatedIS(),
    "tis of sequences": TruncatedIS(level=Level.sequence),
    "tis normalised": TruncatedIS(normalise=True),
    "tis of sequences normalised": TruncatedIS(level=Level.sequence, normalise=True),
    "masked_is": MaskedIS(),
    "icepop": IcePop(),
    "seq_mask_tis": SequenceMaskedTIS(),
    "rejection": Rejection(),
    "rejection of sequences": Rejection(level=Level.sequence),
    "divergence_rejection": DivergenceRejection(),
    "decoupled_ppo": DecoupledPPO(),
    "decoupled_ppo clamp": DecoupledPPO(action=Action.clamp, level=Level.mean),
}
every_correction = pytest.mark.parametrize("correction", list(CORRECTIONS.values()), ids=list(CORRECTIONS))


def weigh(correction, batch, **override):
    fields = {name: getattr(batch, name) for name in ("old_logprobs", "rollout_logprobs", "response_mask")} | override
    return correction(**fields)


def corrected_loss(correction, batch):
    """The clipped surrogate's token mean under a correction, as a step takes it: the denominators count what is kept."""
    surrogate = ClippedSurrogate()(
        logprobs=batch.logprobs, old_logprobs=batch.old_logprobs, advantages=batch.advantages, response_mask=batch.response_mask
    )
    weights = weigh(correction, batch)
    denominators = Denominators.count(weights.keep, max_response_tokens=4)
    loss = reduce(surrogate.loss * weights.weight, weights.keep, aggregation=Aggregation.token_mean, denominators=denominators)
    return loss.item()


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


@pytest.mark.parametrize(
    ("level", "expected"),
    [
        (Level.token, [[1, 1.221403, 0.406570, 1], [2.013753, 0.951229], [1, 6.049647, 0.818731], [0.135335]]),
        (Level.sequence, [[0.496585] * 4, [1.915541] * 2, [4.953032] * 3, [0.135335]]),
        (Level.mean, [[0.839457] * 4, [1.384031] * 2, [1.704605] * 3, [0.135335]]),
    ],
    ids=lambda x: x.name if isinstance(x, Level) else "",
)
def test_the_mismatch_ratios_of_ten_tokens_worked_out_by_hand(f1, level, expected):
    log_ratio = mismatch_log_ratio(f1.old_logprobs, f1.rollout_logprobs, f1.response_mask)
    assert log_ratio[~f1.response_mask].eq(0).all()
    rho = ratio_at(level, log_ratio, f1.response_mask)
    flat = torch.tensor([x for row in expected for x in row], dtype=torch.float64)
    torch.testing.assert_close(rho[f1.response_mask], flat, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        (TruncatedIS(), -0.140256),
        (TruncatedIS(level=Level.sequence), 0.019613),
        (TruncatedIS(floor=0.5, cap=5.0), -0.287757),
        # The weights' mean is (1 + 1.221403 + .406570 + 1 + 2 + .951229 + 1 + 2 + .818731 + .135335) / 10 = 1.053327
        (TruncatedIS(normalise=True), -0.140256 / 1.053327),
        # and (.496585 + 1.915541 + 2 + .135335) / 4 = 1.136865 over the four responses, whatever their lengths
        (TruncatedIS(level=Level.sequence, normalise=True), 0.019613 / 1.136865),
        (MaskedIS(), 0.304212),  # row 2, with a ratio of 4.95, is out
        (MaskedIS(level=Level.token, floor=0.5, cap=5.0), -0.008483),  # IcePop by another name
        (IcePop(), -0.008483),  # without (0, 2), (2, 1) and (3, 0)
        (SequenceMaskedTIS(floor=0.5, cap=2.0), -0.370031),  # row 3, with a mean of .135, is out
        (DecoupledPPO(), -0.027472),  # without (2, 1)
        (DecoupledPPO(cap=2.0), -0.359483),  # nor (1, 0)
        (DecoupledPPO(action=Action.clamp, cap=2.0), -0.140256),
        (Rejection(), -0.530962),  # the mean over six tokens
    ],
    ids=str,
)
def test_the_corrected_loss_of_ten_tokens_worked_out_by_hand(f1, correction, expected):
    assert corrected_loss(correction, f1) == pytest.approx(expected, abs=1e-6)


@every_correction
def test_where_engine_and_learner_agree_the_loss_is_bit_identical_to_the_uncorrected(ragged, correction):
    weights = weigh(correction, ragged, rollout_logprobs=ragged.old_logprobs)
    assert torch.equal(weights.keep, ragged.response_mask)
    assert weights.weight[ragged.response_mask].eq(1).all()


@every_correction
def test_only_rejections_drop_tokens_and_only_they_and_normalising_look_beyond_a_row(ragged, correction):
    weights = weigh(correction, ragged)
    assert not (weights.keep & ~ragged.response_mask).any()
    drops = not torch.equal(weights.keep, ragged.response_mask)
    assert drops == isinstance(correction, Rejection | DivergenceRejection)
    names = ("old_logprobs", "rollout_logprobs", "response_mask")
    parts = [correction(**{name: getattr(ragged, name)[rows] for name in names}) for rows in (slice(0, 2), slice(2, 6))]
    apart = torch.cat([part.weight for part in parts])
    same = torch.equal(apart, weights.weight)
    assert torch.equal(torch.cat([part.keep for part in parts]), weights.keep)
    assert correction.whole_batch == (drops or not same)


@every_correction
def test_weights_carry_no_gradient_and_ask_for_a_real_old_policy(f1, correction):
    old_logprobs, rollout_logprobs = (x.clone().requires_grad_() for x in (f1.old_logprobs, f1.rollout_logprobs))
    weights = weigh(correction, f1, old_logprobs=old_logprobs, rollout_logprobs=rollout_logprobs)
    assert not weights.weight.requires_grad
    assert "proximal_logprobs" in correction.needs


@every_correction
def test_garbage_in_masked_cells_changes_no_weight(ragged, correction):
    mask = ragged.response_mask
    clean = weigh(
        correction,
        ragged,
        **{name: getattr(ragged, name).masked_fill(~mask, 0.0) for name in ("old_logprobs", "rollout_logprobs")},
    )
    assert clean.weight[~mask].eq(0).all()
    for garbage in (NAN, INF, -INF):
        for name in ("old_logprobs", "rollout_logprobs"):
            dirty = weigh(correction, ragged, **{name: getattr(ragged, name).masked_fill(~mask, garbage)})
            assert torch.equal(dirty.weight, clean.weight)
            assert torch.equal(dirty.keep, clean.keep)


@every_correction
@pytest.mark.parametrize("report", [NAN, INF, -INF])
def test_a_token_without_a_finite_report_of_the_engine_counts_as_one_that_agrees(f1, correction, report):
    rollout_logprobs = f1.rollout_logprobs.clone()
    rollout_logprobs[0, 1] = report
    agreeing = f1.rollout_logprobs.clone()
    agreeing[0, 1] = f1.old_logprobs[0, 1]
    got, expected = (weigh(correction, f1, rollout_logprobs=x) for x in (rollout_logprobs, agreeing))
    assert torch.equal(got.weight, expected.weight)
    assert torch.equal(got.keep, expected.keep)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_correction
def test_absurd_mismatches_leave_the_weights_finite(correction, dtype):
    old_logprobs = torch.tensor([[-1.0, -200.0, -0.5], [-300.0, -300.0, -300.0]], dtype=dtype)
    mask = torch.ones(2, 3, dtype=torch.bool)
    for one, other in ((old_logprobs, torch.full_like(old_logprobs, -1.0)), (torch.full_like(old_logprobs, -1.0), old_logprobs)):
        fields = {"old_logprobs": one, "rollout_logprobs": other, "response_mask": mask}
        weights = correction(**fields)
        assert weights.weight.isfinite().all()
        assert all(math.isfinite(total) for total, _ in correction_metrics(weights, **fields).means.values())


@every_correction
def test_without_a_token_there_is_no_weight_and_no_metric(f1, correction):
    nothing = torch.zeros_like(f1.response_mask)
    weights = weigh(correction, f1, response_mask=nothing)
    assert weights.weight.eq(0).all()
    assert not weights.keep.any()
    measured = correction_metrics(
        weights, old_logprobs=f1.old_logprobs, rollout_logprobs=f1.rollout_logprobs, response_mask=nothing
    )
    assert measured == CorrectionMetrics(means={}, maxima={}, minima={})


def two_tokens():
    """Log-probabilities [4, 2] of both tokens of every sequence over two letters, under two policies with a memory."""
    generator = torch.Generator().manual_seed(0)
    sequences = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])

    def policy():
        first = torch.randn(2, generator=generator, dtype=torch.float64).log_softmax(-1)
        second = torch.randn(2, 2, generator=generator, dtype=torch.float64).log_softmax(-1)
        return torch.stack([first[sequences[:, 0]], second[sequences[:, 0], sequences[:, 1]]], -1)

    return policy(), policy(), torch.randn(4, generator=generator, dtype=torch.float64)


def test_an_unbounded_weight_of_the_sequence_is_unbiased_and_one_of_the_token_only_on_the_last_prefix():
    # E_rollout[w f] = E_old[f] for any f of the sequence, by enumeration.
    old_logprobs, rollout_logprobs, f = two_tokens()
    fields = {
        "old_logprobs": old_logprobs,
        "rollout_logprobs": rollout_logprobs,
        "response_mask": torch.ones(4, 2, dtype=torch.bool),
    }
    sampled, exact = rollout_logprobs.sum(-1).exp(), (old_logprobs.sum(-1).exp() * f).sum()
    of_sequence = TruncatedIS(level=Level.sequence, cap=INF)(**fields).weight
    for t in range(2):
        assert (sampled * of_sequence[:, t] * f).sum().item() == pytest.approx(exact.item())
    of_token = TruncatedIS(cap=INF)(**fields).weight
    assert abs((sampled * of_token[:, 0] * f).sum() - exact) > 1e-3
    # Given the first letter, the second token's own weight is enough.
    for first in (slice(0, 2), slice(2, 4)):
        given = (rollout_logprobs[first, 1].exp() * of_token[first, 1] * f[first]).sum()
        assert given.item() == pytest.approx((old_logprobs[first, 1].exp() * f[first]).sum().item())


@pytest.mark.parametrize("level", list(Level), ids=lambda level: level.name)
def test_a_normalised_weight_is_one_on_average_over_tokens_or_over_responses(ragged, level):
    weight, mask = weigh(TruncatedIS(level=level, normalise=True), ragged).weight, ragged.response_mask
    if level is Level.token:
        assert weight[mask].mean().item() == pytest.approx(1.0)
    else:
        rows = mask.any(-1)  # the third row has one token, the first nine: each counts once
        assert torch.stack([row[m][0] for row, m in zip(weight[rows], mask[rows], strict=True)]).mean().item() == pytest.approx(1.0)
    assert not torch.equal(weight, weigh(TruncatedIS(level=level), ragged).weight)


def kept(correction, batch):
    return [row[mask].int().tolist() for row, mask in zip(weigh(correction, batch).keep, batch.response_mask, strict=True)]


def test_rejected_tokens_worked_out_by_hand(f1):
    assert kept(Rejection(), f1) == [[1, 1, 0, 1], [0, 1], [1, 0, 1], [0]]
    # verl's token_k1 with bounds 0.5 and 5 on engine / learner is this one on learner / engine: it keeps (0, 2) and drops
    # (1, 0), where IcePop with 0.5 and 5 has it the other way round.
    assert kept(Rejection(floor=1 / 5, cap=1 / 0.5), f1) == [[1, 1, 1, 1], [0, 1], [1, 0, 1], [0]]
    icepop = weigh(IcePop(), f1).weight
    assert icepop[0, 2] == 0
    assert icepop[1, 0].item() == pytest.approx(2.013753)
    assert kept(Rejection(level=Level.sequence), f1) == [[0] * 4, [1] * 2, [0] * 3, [0]]  # .497, 1.916, 4.953, .135
    assert kept(Rejection(level=Level.mean), f1) == [[1] * 4, [1] * 2, [1] * 3, [0]]  # .839, 1.384, 1.705, .135


@pytest.mark.parametrize(
    ("estimator", "statistic", "cap", "expected"),
    [
        # k3 per token: [0, .0214, .3066, 0], [.3138, .0012], [0, 3.2496, .0187], [1.1353]
        ("k3", "token", 0.31, [[1, 1, 1, 1], [0, 1], [1, 0, 1], [0]]),
        ("k3", "mean", 0.10, [[1] * 4, [0] * 2, [0] * 3, [0]]),  # .0820, .1575, 1.0895, 1.1353
        ("k3", "sum", 0.32, [[0] * 4, [1] * 2, [0] * 3, [0]]),  # .3280, .3150, 3.2684, 1.1353
        ("k3", "max", 0.31, [[1] * 4, [0] * 2, [0] * 3, [0]]),  # .3066, .3138, 3.2496, 1.1353
        # k2 per token: [0, .02, .405, 0], [.245, .00125], [0, 1.62, .02], [2]
        ("k2", "token", 0.30, [[1, 1, 0, 1], [1, 1], [1, 0, 1], [0]]),
        ("k2", "mean", 0.11, [[1] * 4, [0] * 2, [0] * 3, [0]]),  # .1063, .1231, .5467, 2
        ("k2", "sum", 0.30, [[0] * 4, [1] * 2, [0] * 3, [0]]),  # .425, .2463, 1.64, 2
        ("k2", "max", 1.70, [[1] * 4, [1] * 2, [1] * 3, [0]]),  # .405, .245, 1.62, 2
    ],
)
def test_rejected_divergences_worked_out_by_hand(f1, estimator, statistic, cap, expected):
    correction = DivergenceRejection(estimator=MismatchEstimator[estimator], statistic=Statistic[statistic], cap=cap)
    assert kept(correction, f1) == expected


def test_under_the_engines_samples_k3_is_its_divergence_from_the_learner():
    old_logprobs, rollout_logprobs, _ = two_tokens()
    one = torch.ones(1, 1, dtype=torch.bool)
    expected = 0.0
    for old, rollout in zip(old_logprobs.sum(-1), rollout_logprobs.sum(-1), strict=True):  # each sequence as one token
        measured = correction_metrics(None, old_logprobs=old[None, None], rollout_logprobs=rollout[None, None], response_mask=one)
        expected += rollout.exp().item() * measured.means["mismatch/k3"][0]
    exact = (rollout_logprobs.sum(-1).exp() * (rollout_logprobs - old_logprobs).sum(-1)).sum()
    assert expected == pytest.approx(exact.item())


@pytest.mark.parametrize("level", list(Level), ids=lambda level: level.name)
@pytest.mark.parametrize("kind", [TruncatedIS, MaskedIS, Rejection, DecoupledPPO])
def test_bounds_are_inclusive(level, kind):
    # One token of ratio 2 and one of ratio 1/2, each a response.
    bound = torch.tensor([[2.0], [0.5]], dtype=torch.float64)
    fields = {"rollout_logprobs": torch.zeros(2, 1, dtype=torch.float64), "response_mask": torch.ones(2, 1, dtype=torch.bool)}
    exact = bound.log().exp().flatten().tolist()  # 2 and 1/2 as the logarithm can carry them
    weights = kind(level=level, floor=exact[1], cap=exact[0])(old_logprobs=bound.log(), **fields)
    assert weights.keep.all()
    assert weights.weight.ne(0).all()
    assert not (weights.below | weights.above).any()
    outside = kind(level=level, floor=exact[1] + 1e-9, cap=exact[0] - 1e-9)(old_logprobs=bound.log(), **fields)
    assert outside.above.tolist() == [[True], [False]]
    assert outside.below.tolist() == [[False], [True]]


def metrics_of(correction, batch, rows=slice(None)):
    fields = {name: getattr(batch, name)[rows] for name in ("old_logprobs", "rollout_logprobs", "response_mask")}
    return correction_metrics(correction(**fields), **fields)


def test_the_metrics_of_ten_tokens_worked_out_by_hand(f1):
    measured = metrics_of(TruncatedIS(), f1)
    means = {name: total / count for name, (total, count) in measured.means.items()}
    # log rho: [0, .2, -.9, 0], [.7, -.05], [0, 1.8, -.2], [-2]
    assert means["mismatch/k1"] == pytest.approx(0.45 / 10)
    assert means["mismatch/k3"] == pytest.approx(0.5046668, abs=1e-6)  # 5.046668 / 10, the k3 above
    # minus the rows' means -.175, .325, .533333, -2, over four rows
    assert means["mismatch/log_perplexity_difference"] == pytest.approx(1.316667 / 4, abs=1e-6)
    assert means["mismatch/nonfinite_fraction"] == 0
    assert means["is/mean"] == pytest.approx(1.0533268, abs=1e-6)
    assert means["is/high_fraction"] == pytest.approx(0.2)  # (1, 0) and (2, 1)
    assert means["is/low_fraction"] == means["is/masked_token_fraction"] == means["is/masked_sequence_fraction"] == 0
    assert effective_fraction(means["is/mean"], means["is/square_mean"]) == pytest.approx(0.778562, abs=1e-6)
    assert measured.maxima["is/max"] == 2
    assert measured.minima["is/min"] == pytest.approx(0.135335, abs=1e-6)
    # (3, 0): exp(-1.6) for the learner, exp(.4) for the engine, which no probability is, but ten hand-made numbers may be
    assert measured.maxima["mismatch/probability_difference_max"] == pytest.approx(1.289928, abs=1e-6)


def test_the_effective_sample_size_depends_on_what_the_weights_are_held_to(f1):
    def effective(**bounds):
        means = metrics_of(TruncatedIS(**bounds), f1).means
        return effective_fraction(*(total / count for total, count in (means["is/mean"], means["is/square_mean"])))

    assert effective(floor=0.5) == pytest.approx(0.829342, abs=1e-6)  # verl reports weights held to [1 / cap, cap]
    assert effective(cap=INF) == pytest.approx(0.454252, abs=1e-6)  # nothing held: one token has a quarter of all weight
    means = metrics_of(Rejection(), f1).means
    assert effective_fraction(*(total / count for total, count in (means["is/mean"], means["is/square_mean"]))) == 0.6
    assert effective_fraction(0.0, 0.0) != effective_fraction(0.0, 0.0)  # NaN: no sample at all


def test_the_metrics_tell_masked_tokens_and_responses_and_unreported_tokens(f1):
    means = metrics_of(IcePop(), f1).means
    assert means["is/masked_token_fraction"] == (3, 10)
    assert means["is/masked_sequence_fraction"] == (1, 4)  # the response of one token
    assert means["is/low_fraction"] == (2, 10)
    assert means["is/high_fraction"] == (1, 10)
    means = metrics_of(Rejection(level=Level.sequence), f1).means
    assert means["is/masked_token_fraction"] == (8, 10)
    assert means["is/masked_sequence_fraction"] == (3, 4)
    assert "is/low_fraction" not in metrics_of(DivergenceRejection(), f1).means  # it has no lower bound
    unreported = f1.rollout_logprobs.clone()
    unreported[3, 0] = NAN
    measured = correction_metrics(None, old_logprobs=f1.old_logprobs, rollout_logprobs=unreported, response_mask=f1.response_mask)
    assert measured.means["mismatch/nonfinite_fraction"] == (1, 10)
    assert measured.means["mismatch/k1"][0] == pytest.approx(0.45 - 2.0)
    # The largest left is (2, 1): exp(-.9) = .406570 for the learner, exp(-2.7) = .067206 for the engine
    assert measured.maxima == {"mismatch/probability_difference_max": pytest.approx(0.339364, abs=1e-6)}
    assert not any(name.startswith("is/") for name in measured.means)  # without a correction there are no weights


def test_metrics_of_parts_merge_to_those_of_the_whole(ragged):
    whole = metrics_of(IcePop(), ragged)
    parts = [metrics_of(IcePop(), ragged, rows) for rows in (slice(0, 1), slice(1, 4), slice(4, 5), slice(5, 6))]
    assert not parts[2].means  # the row without a token
    for name, expected in whole.means.items():
        sums = tuple(sum(part.means[name][i] for part in parts if part.means) for i in range(2))
        assert sums == pytest.approx(expected)
    for name, expected in whole.maxima.items():
        assert max(part.maxima[name] for part in parts if part.maxima) == expected
    for name, expected in whole.minima.items():
        assert min(part.minima[name] for part in parts if part.minima) == expected


def test_no_correction_needs_nothing_and_weighs_nothing(f1):
    assert NoCorrection().needs == frozenset()
    assert not NoCorrection().whole_batch
    weights = weigh(NoCorrection(), f1)
    if weights is not None:  # either says "no weights" or hands out ones
        assert isinstance(weights, Weights)
        assert weights.weight[f1.response_mask].eq(1).all()
        assert torch.equal(weights.keep, f1.response_mask)
    assert pytest.approx(1.0) == ratio(torch.zeros(())).item()


@pytest.mark.parametrize("kind", [TruncatedIS, MaskedIS, IcePop, SequenceMaskedTIS, DecoupledPPO, Rejection])
@pytest.mark.parametrize("settings", [{"floor": -0.1}, {"floor": 1.5}, {"floor": NAN}, {"cap": 0.9}, {"cap": NAN}], ids=str)
def test_bounds_that_leave_out_a_ratio_of_one_are_refused_by_name(kind, settings):
    ((name, value),) = settings.items()
    with pytest.raises(ConfigError, match=rf"correction\.{name}={value}: .* has a ratio of 1, so write"):
        kind(**settings)


@pytest.mark.parametrize("cap", [0.0, -1.0, NAN])
def test_a_divergence_that_rejects_everything_is_refused_by_name(cap):
    with pytest.raises(ConfigError, match=rf"correction\.cap={cap}: .* write a value above 0"):
        DivergenceRejection(cap=cap)
