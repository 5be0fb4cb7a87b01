from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch

from rlkit.core.objectives import ClippedSurrogate, Surrogate, UnclippedSurrogate
from rlkit.core.reduce import Aggregation, Denominators, reduce
from rlkit.core.selectors import (
    ClipB,
    ClipCov,
    ClipV,
    KLCov,
    LogprobSource,
    NoSelector,
    NoTokenFilter,
    Scope,
    Sides,
    covariance,
    covariance_metrics,
    row_quantile,
)
from rlkit.errors import ConfigError

NAN, INF = float("nan"), float("inf")
UNBOUNDED = ClippedSurrogate(clip_low=1.0, clip_high=1.0)  # as Clip-Cov's published runs have it


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def fields_of(batch, rows: Any = slice(None), **override: Any):
    names = ("logprobs", "old_logprobs", "advantages", "response_mask")
    return {name: x[rows] for name, x in ({name: getattr(batch, name) for name in names} | override).items()}


def run(selector, fields, *, objective=None, denominators=None, seed=0, chosen=None):
    """The token mean of the loss, its gradient in the log-probabilities, and the selector's surrogate."""
    fields = fields | {"logprobs": fields["logprobs"].detach().requires_grad_()}
    mask = fields["response_mask"]
    surrogate = selector((objective or ClippedSurrogate())(**fields), **fields, generator=seeded(seed), chosen=chosen)
    denominators = denominators or Denominators.count(mask, max_response_tokens=9)
    loss = reduce(surrogate.loss, mask, aggregation=Aggregation.token_mean, denominators=denominators)
    (gradient,) = torch.autograd.grad(loss, fields["logprobs"])
    return loss.item(), gradient, surrogate


def chosen_by(selector, fields, *, old=True, seed=0):
    logprobs = fields["old_logprobs"] if old else fields["logprobs"].detach()
    asked = {name: fields[name] for name in ("advantages", "response_mask")}
    return selector.choose(logprobs=logprobs, **asked, generator=seeded(seed))


def indices(mask):
    return [tuple(index) for index in mask.nonzero().tolist()]


# --- covariance -------------------------------------------------------------------------------------------------------------


def test_the_covariances_of_ten_tokens_worked_out_by_hand(f1):
    # mean A .3, mean logprobs -.728
    cov = covariance(f1.logprobs, f1.advantages, f1.response_mask)
    expected = torch.tensor(
        [[0.4396, 0.3346, -1.1704, 0.4886], [-0.0364, -0.4264, 0, 0], [-0.0544, -0.0144, 0.1056, 0], [0.5376, 0, 0, 0]],
        dtype=torch.float64,
    )
    torch.testing.assert_close(cov, expected, rtol=0, atol=1e-10)
    assert not cov.requires_grad
    metrics = covariance_metrics(logprobs=f1.logprobs, advantages=f1.advantages, response_mask=f1.response_mask)
    assert metrics["entropy/cov_mean"] == pytest.approx(0.0204)
    assert metrics["entropy/cov_top0.2pct_mean"] == metrics["entropy/cov_top0.02pct_mean"] == pytest.approx(0.5376)


def test_their_mean_is_the_population_covariance_and_shifts_do_not_matter(ragged):
    mask = ragged.response_mask
    cov = covariance(ragged.logprobs, ragged.advantages, mask)
    both = torch.stack([ragged.logprobs.detach()[mask], ragged.advantages[mask]])
    assert cov[mask].mean().item() == pytest.approx(torch.cov(both, correction=0)[0, 1].item())
    torch.testing.assert_close(covariance(ragged.logprobs - 3.0, ragged.advantages + 7.0, mask), cov, rtol=0, atol=1e-12)
    constant = torch.full_like(ragged.advantages, 0.7)
    torch.testing.assert_close(covariance(ragged.logprobs, constant, mask), torch.zeros_like(cov), rtol=0, atol=1e-12)


def test_the_top_percentiles_are_means_over_that_share_of_the_tokens():
    logprobs = -torch.arange(10_000, dtype=torch.float64).view(100, 100)
    advantages = torch.where(torch.arange(100)[:, None] < 50, 1.0, -1.0).double().expand(100, 100)
    mask = torch.ones(100, 100, dtype=torch.bool)
    metrics = covariance_metrics(logprobs=logprobs, advantages=advantages, response_mask=mask)
    # |logprobs - mean| of the two ends: 4999.5, 4999.5, 4998.5, 4998.5, ...
    assert metrics["entropy/cov_top0.02pct_mean"] == pytest.approx(4999.5)
    assert metrics["entropy/cov_top0.2pct_mean"] == pytest.approx(4999.5 - sum(range(10)) / 10)
    assert covariance_metrics(logprobs=logprobs, advantages=advantages, response_mask=torch.zeros_like(mask)) == {}


def test_a_row_quantile_is_numpys_over_the_rows_tokens(ragged):
    values = ragged.entropy
    for q in (0.0, 0.3, 0.8, 1.0):
        expected = values.nanquantile(q, dim=-1)
        torch.testing.assert_close(row_quantile(values, ragged.response_mask, q), expected, equal_nan=True)


# --- selectors --------------------------------------------------------------------------------------------------------------


def test_no_selector_hands_the_surrogate_on_untouched(f1):
    surrogate = Surrogate(loss=-f1.advantages * f1.logprobs, clipped=torch.zeros_like(f1.response_mask))
    generator = seeded()
    before = generator.get_state()
    selected = NoSelector()(surrogate, **fields_of(f1), generator=generator)
    assert selected.loss is surrogate.loss
    assert selected.clipped is surrogate.clipped
    assert torch.equal(generator.get_state(), before)
    assert not chosen_by(NoSelector(), fields_of(f1)).any()
    assert NoSelector().needs == frozenset()
    assert not NoSelector().whole_batch


HALF: dict[str, Any] = {"token_fraction": 0.5, "cov_low": 0.3, "cov_high": 5.0, "scope": Scope.micro}  # five tokens of ten


def test_clip_cov_takes_the_loss_from_tokens_of_large_covariance_that_are_not_clipped(f1):
    loss, gradient, surrogate = run(ClipCov(**HALF), fields_of(f1))
    assert loss == pytest.approx(-0.073976, abs=1e-6)
    zeroed = [(0, 0), (0, 3), (3, 0)]  # (0, 1) has a covariance of .3346 too, but PPO's bound already holds it
    _, plain, before = run(NoSelector(), fields_of(f1))
    for index in indices(f1.response_mask):
        assert gradient[index] == (0.0 if index in zeroed else plain[index])
        assert surrogate.loss[index] == (0.0 if index in zeroed else before.loss[index])
    # With wide bounds nothing is clipped: (0, 1) goes as well.
    assert run(ClipCov(**HALF), fields_of(f1), objective=UNBOUNDED)[0] == pytest.approx(0.046024, abs=1e-6)
    # The same when clipped tokens may be chosen.
    loose = run(ClipCov(**HALF, exclude_clipped=False), fields_of(f1))[2]
    assert indices(f1.response_mask & (loose.loss == 0)) == [(0, 0), (0, 1), (0, 3), (3, 0)]


def test_clip_cov_draws_among_its_candidates_and_always_at_least_one(f1):
    selector = replace(ClipCov(**HALF), token_fraction=2e-4)
    losses = sorted({run(selector, fields_of(f1), seed=seed)[0] for seed in range(40)})
    assert losses == pytest.approx([-0.275996, -0.114926, -0.112906], abs=1e-6)


def test_clip_cov_draws_every_subset_alike_without_repeats_from_its_own_generator():
    logprobs, mask = torch.tensor([[0.0, 0.0, 0.0, 0.0, -4.0, -4.0]], dtype=torch.float64), torch.ones(1, 6, dtype=torch.bool)
    advantages = torch.tensor([[1.0, 1.0, 1.0, 1.0, -2.0, 1.0]], dtype=torch.float64)
    given = {"logprobs": logprobs, "advantages": advantages, "response_mask": mask}
    cov = covariance(**given)
    selector = ClipCov(token_fraction=0.4, cov_low=0.5, cov_high=1.0)  # two of the first four
    assert ((cov > 0.5) & (cov < 1.0)).flatten().tolist() == [True] * 4 + [False] * 2
    generator, counts = seeded(1), dict.fromkeys(combinations(range(4), 2), 0)
    global_state = torch.get_rng_state()
    for _ in range(600):
        counts[tuple(selector.choose(**given, generator=generator).nonzero()[:, 1].tolist())] += 1
    assert torch.equal(torch.get_rng_state(), global_state)
    assert all(60 < count < 140 for count in counts.values())  # 100 +- 4.4 standard deviations each
    again = [selector.choose(**given, generator=seeded(7)) for _ in range(2)]
    assert torch.equal(*again)


@pytest.mark.parametrize("candidates", [0, 1, 3])
def test_clip_cov_chooses_all_candidates_where_there_are_too_few(f1, candidates):
    low = {0: 0.6, 1: 0.5, 3: 0.4}[candidates]
    chosen = chosen_by(ClipCov(token_fraction=1.0, cov_low=low), fields_of(f1), old=False)
    assert chosen.sum() == candidates


def test_clip_cov_between_equal_bounds_is_the_plain_objective(ragged):
    fields = fields_of(ragged)
    empty = ClipCov(cov_low=1.0, cov_high=1.0, scope=Scope.micro)
    (loss, gradient, _), (plain, expected, _) = run(empty, fields), run(NoSelector(), fields)
    assert loss == plain
    assert torch.equal(gradient, expected)


def test_kl_cov_pulls_the_tokens_of_largest_covariance_back(f1):
    selector = KLCov(token_fraction=0.2, scope=Scope.micro)
    loss, gradient, _ = run(selector, fields_of(f1), objective=UnclippedSurrogate())
    assert loss == pytest.approx(-0.223328 + (0.20 + 0.02) / 10, abs=1e-6)  # tokens (3, 0) and (0, 3)
    _, plain, _ = run(NoSelector(), fields_of(f1), objective=UnclippedSurrogate())
    pull = gradient - plain
    assert indices(pull.abs() > 1e-12) == [(0, 3), (3, 0)]
    assert pull[3, 0].item() == pytest.approx(0.1)  # coef * sign / N
    everyone = KLCov(token_fraction=1.0, coef=2.0, scope=Scope.micro)
    mean_gap = (f1.logprobs - f1.old_logprobs)[f1.response_mask].abs().mean().item()
    assert run(everyone, fields_of(f1), objective=UnclippedSurrogate())[0] == pytest.approx(-0.223328 + 2 * mean_gap, abs=1e-6)


def test_kl_cov_pulls_to_the_old_policy_from_either_side(f1):
    negative = f1.logprobs.detach() < f1.old_logprobs
    fields = fields_of(f1)
    _, gradient, _ = run(KLCov(token_fraction=1.0), fields, objective=UnclippedSurrogate(), chosen=f1.response_mask)
    _, plain, _ = run(NoSelector(), fields, objective=UnclippedSurrogate())
    pull = (gradient - plain)[f1.response_mask]
    moved = (f1.logprobs != f1.old_logprobs)[f1.response_mask]
    assert pull[~moved].eq(0).all()
    torch.testing.assert_close(pull[moved], torch.where(negative[f1.response_mask], -0.1, 0.1)[moved].double())


def test_kl_cov_adds_nothing_where_the_policies_agree_or_the_coefficient_is_zero(ragged):
    equal = fields_of(ragged, logprobs=ragged.old_logprobs)
    for fields, coef in ((equal, 1.0), (fields_of(ragged), 0.0)):
        selected = run(KLCov(token_fraction=1.0, coef=coef, scope=Scope.micro), fields, objective=UnclippedSurrogate())
        plain = run(NoSelector(), fields, objective=UnclippedSurrogate())
        assert selected[0] == plain[0]
        assert torch.equal(selected[1], plain[1])


def test_kl_cov_chooses_equal_tokens_in_the_order_of_the_batch():
    given = {"logprobs": torch.zeros(2, 3), "advantages": torch.zeros(2, 3), "response_mask": torch.ones(2, 3, dtype=torch.bool)}
    assert indices(KLCov(token_fraction=0.5).choose(**given, generator=None)) == [(0, 0), (0, 1), (0, 2)]


SELECTORS = {
    "clip_cov": (ClipCov(token_fraction=0.3, cov_low=-0.2, cov_high=9.0), ClippedSurrogate()),
    "kl_cov": (KLCov(token_fraction=0.3), UnclippedSurrogate()),
}


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 3, 1], [5, 1]], ids=str)
@pytest.mark.parametrize("name", SELECTORS)
def test_a_choice_over_the_whole_step_does_not_depend_on_how_the_step_is_split(ragged, name, sizes):
    selector, objective = SELECTORS[name]
    fields = fields_of(ragged)
    chosen = chosen_by(selector, fields)
    assert 0 < chosen.sum() < ragged.response_mask.sum()
    loss, gradient, _ = run(selector, fields, objective=objective, chosen=chosen)
    plain, _, _ = run(NoSelector(), fields, objective=objective)
    assert loss != plain
    denominators = Denominators.count(ragged.response_mask, max_response_tokens=9)
    parts = []
    for rows in torch.arange(6).split(sizes):
        part = fields_of(ragged, rows=rows)
        parts.append(run(selector, part, objective=objective, chosen=chosen[rows], denominators=denominators))
    assert sum(part[0] for part in parts) == pytest.approx(loss, abs=1e-10)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SELECTORS)
def test_a_choice_among_a_microbatchs_tokens_does(f1, name):
    selector, objective = SELECTORS[name]
    selector = type(selector)(
        token_fraction=0.4, scope=Scope.micro, **{"cov_low": 0.0, "cov_high": 9.0} if name == "clip_cov" else {}
    )
    denominators = Denominators.count(f1.response_mask, max_response_tokens=9)
    whole = run(selector, fields_of(f1), objective=objective)[0]
    parts = [
        run(selector, fields_of(f1, rows=rows), objective=objective, denominators=denominators)[0]
        for rows in (slice(0, 2), slice(2, 4))
    ]
    assert abs(sum(parts) - whole) > 1e-3
    # With a single microbatch it is the whole step's choice, made with the present policy and knowing what is clipped.
    fields = fields_of(f1)
    by_hand = selector.choose(
        logprobs=fields["logprobs"].detach(),
        advantages=fields["advantages"],
        response_mask=fields["response_mask"],
        generator=seeded(),
        clipped=objective(**fields).clipped,
    )
    assert run(selector, fields, objective=objective, chosen=by_hand)[0] == whole


def test_permuted_rows_are_chosen_alike(ragged):
    order = torch.randperm(6, generator=seeded(3))
    chosen = chosen_by(KLCov(token_fraction=0.3), fields_of(ragged))
    assert torch.equal(chosen_by(KLCov(token_fraction=0.3), fields_of(ragged, rows=order)), chosen[order])
    everyone = ClipCov(token_fraction=1.0, cov_low=0.1, cov_high=9.0)  # no draw
    chosen = chosen_by(everyone, fields_of(ragged))
    assert torch.equal(chosen_by(everyone, fields_of(ragged, rows=order)), chosen[order])


def test_a_token_that_the_forward_pass_shows_to_be_clipped_keeps_its_loss(f1):
    _, _, surrogate = run(ClipCov(), fields_of(f1), chosen=f1.response_mask)
    assert indices(f1.response_mask & (surrogate.loss != 0)) == [(0, 1)]
    _, _, surrogate = run(ClipCov(exclude_clipped=False), fields_of(f1), chosen=f1.response_mask)
    assert surrogate.loss[f1.response_mask].eq(0).all()


def test_a_selector_of_the_whole_step_does_not_choose_in_a_microbatch(f1):
    for selector in (ClipCov(), KLCov()):
        assert selector.whole_batch
        assert "old_pass" in selector.needs
        with pytest.raises(AssertionError, match="once per optimiser step"):
            run(selector, fields_of(f1))
    assert ClipCov(scope=Scope.micro).needs == {"old_logprobs"}


@pytest.mark.parametrize("name", SELECTORS)
def test_an_empty_microbatch_has_no_token_to_choose(name):
    selector, objective = SELECTORS[name]
    empty = torch.zeros(2, 3, dtype=torch.float64)
    fields = {"logprobs": empty, "old_logprobs": empty, "advantages": empty, "response_mask": empty.bool()}
    assert not chosen_by(selector, fields).any()
    loss, gradient, _ = run(selector, fields, objective=objective, chosen=chosen_by(selector, fields))
    assert loss == 0
    assert gradient.eq(0).all()


@pytest.mark.parametrize("scope", list(Scope), ids=lambda scope: scope.name)
@pytest.mark.parametrize("name", SELECTORS)
def test_garbage_in_masked_cells_changes_neither_choice_nor_loss_nor_gradient(ragged, name, scope):
    selector, objective = SELECTORS[name]
    mask = ragged.response_mask
    clean = {name: x.detach().masked_fill(~mask, 0.0) for name, x in fields_of(ragged).items() if name != "response_mask"}

    def result(fields):
        chosen = chosen_by(selector, fields, old=scope is Scope.mini)
        return chosen, *run(selector, fields, objective=objective, chosen=chosen)[:2]

    chosen, loss, gradient = result(clean | {"response_mask": mask})
    for garbage in (NAN, INF, -INF):
        for poisoned in (*clean, None):
            dirty = {name: x.masked_fill(~mask, garbage) if poisoned in (name, None) else x for name, x in clean.items()}
            got_chosen, got_loss, got_gradient = result(dirty | {"response_mask": mask})
            assert torch.equal(got_chosen, chosen)
            assert got_loss == loss
            assert torch.equal(got_gradient, gradient)
    assert gradient[~mask].eq(0).all()


@pytest.mark.parametrize("name", SELECTORS)
def test_the_selected_losss_gradient_agrees_with_finite_differences(ragged, name):
    selector, objective = SELECTORS[name]
    fields, mask = fields_of(ragged), ragged.response_mask
    chosen = chosen_by(selector, fields)
    log_ratio = (ragged.logprobs.detach() - ragged.old_logprobs)[mask]
    for kink in (0.0, *torch.tensor([0.8, 1.2]).log().tolist()):
        log_ratio = torch.where((log_ratio - kink).abs() < 1e-2, kink + 0.05, log_ratio)
    values = (ragged.old_logprobs[mask] + log_ratio).requires_grad_()

    def loss(values):
        logprobs = torch.full(mask.shape, NAN, dtype=torch.float64).masked_scatter(mask, values)
        moved = fields | {"logprobs": logprobs}
        return selector(objective(**moved), **moved, chosen=chosen).loss[mask]

    assert torch.autograd.gradcheck(loss, (values,))


# --- filters ----------------------------------------------------------------------------------------------------------------

NEC = [[0.10, 0.15, 0.05, 0.02], [0.20, 0.30], [0.12, 0.08, 0.25], [0.30]]


def expected_score(f1):
    return torch.tensor([row + [NAN] * (4 - len(row)) for row in NEC], dtype=torch.float64)


def dropped_by(token_filter, batch, rows: Any = slice(None), **override: Any):
    fields = {name: getattr(batch, name) for name in ("old_logprobs", "rollout_logprobs", "advantages", "response_mask", "entropy")}
    fields = {name: x[rows] for name, x in (fields | override).items()}
    keep = token_filter(**fields)
    assert keep.dtype == torch.bool
    assert not (keep & ~fields["response_mask"]).any()
    return fields["response_mask"] & ~keep


def test_no_filter_keeps_every_response_token(f1):
    assert not dropped_by(NoTokenFilter(), f1).any()
    assert NoTokenFilter().needs == frozenset()


def test_clip_b_drops_bad_tokens_far_below_the_mean_score(f1):
    # S = [[.180967, .424571, .067668, .047561], [.180717, .222245], [.099317, .081314, .163746], [.080759]]; mean .154887,
    # deviation .105742. (0, 3) lies 1.01 deviations low as well, but its advantage is positive.
    assert indices(dropped_by(ClipB(), f1)) == []
    assert indices(dropped_by(ClipB(mu=0.5), f1)) == [(3, 0)]
    score = (f1.old_logprobs.exp() * (f1.entropy + f1.old_logprobs))[f1.response_mask]
    assert score.mean().item() == pytest.approx(0.154887, abs=1e-6)
    assert score.std(correction=0).item() == pytest.approx(0.105742, abs=1e-6)
    assert indices(dropped_by(ClipB(mu=0.7), f1)) == [(3, 0)]  # .701 deviations low
    assert indices(dropped_by(ClipB(mu=0.71), f1)) == []


def test_clip_b_may_drop_good_tokens_far_above_it_instead_or_as_well(f1):
    assert indices(dropped_by(ClipB(mu=0.5, sides=Sides.positive_high), f1)) == [(0, 1)]  # 2.55 deviations high
    assert indices(dropped_by(ClipB(mu=0.5, sides=Sides.both), f1)) == [(0, 1), (3, 0)]


def test_clip_b_can_score_the_engines_logprobs_as_its_published_code_does(f1):
    score = f1.rollout_logprobs.exp() * (f1.entropy + f1.rollout_logprobs)
    values = score[f1.response_mask]
    low = (score - values.mean()) / values.std(correction=0) < -0.3
    expected = indices(low & (f1.advantages < 0) & f1.response_mask)
    assert expected != indices(dropped_by(ClipB(mu=0.3), f1))
    assert indices(dropped_by(ClipB(mu=0.3, logprobs=LogprobSource.rollout), f1)) == expected


def test_clip_v_drops_bad_tokens_far_below_their_own_distributions_expectation(f1):
    # X = expected_score - S has deviation .120551 and mean .002113, which does not shift the bound.
    given = {"expected_score": expected_score(f1)}
    assert indices(dropped_by(ClipV(mu=0.5, max_fraction=1.0), f1, **given)) == [(1, 1), (3, 0)]
    assert indices(dropped_by(ClipV(mu=0.5, max_fraction=1e-4), f1, **given)) == [(3, 0)]  # X = .219241, the largest
    assert indices(dropped_by(ClipV(), f1, **given)) == []
    x = (given["expected_score"] - f1.old_logprobs.exp() * (f1.entropy + f1.old_logprobs))[f1.response_mask]
    assert x.std(correction=0).item() == pytest.approx(0.120551, abs=1e-6)
    assert x.mean().item() == pytest.approx(0.002113, abs=1e-6)
    both = ClipV(mu=0.5, max_fraction=1.0, sides=Sides.both)
    assert indices(dropped_by(both, f1, **given)) == [(0, 0), (0, 1), (1, 1), (3, 0)]  # S - expected .080967 and .274571
    assert indices(dropped_by(ClipV(mu=0.5, max_fraction=0.2, sides=Sides.both), f1, **given)) == [(0, 1), (3, 0)]


FILTERS = {"clip_b": ClipB(mu=0.4, sides=Sides.both), "clip_v": ClipV(mu=0.4, max_fraction=0.2, sides=Sides.both)}


def random_expected_score(batch):
    return 0.2 * torch.rand(batch.response_mask.shape, generator=seeded(5), dtype=torch.float64)


@pytest.mark.parametrize("name", FILTERS)
def test_an_infinite_mu_or_equal_tokens_drop_nothing(ragged, name):
    given = {"expected_score": random_expected_score(ragged)}
    assert dropped_by(FILTERS[name], ragged, **given).any()
    assert not dropped_by(type(FILTERS[name])(mu=INF), ragged, **given).any()
    equal = {"old_logprobs": torch.full_like(ragged.entropy, -0.7), "entropy": torch.full_like(ragged.entropy, 0.9)}
    equal["expected_score"] = torch.full_like(ragged.entropy, 0.2)
    assert not dropped_by(type(FILTERS[name])(mu=0.0), ragged, **equal).any()  # a uniform policy
    zero = torch.zeros_like(ragged.advantages)
    assert not dropped_by(FILTERS[name], ragged, **given, advantages=zero).any()


@pytest.mark.parametrize("name", FILTERS)
def test_filters_ignore_the_order_of_rows_padding_and_garbage(ragged, name):
    given = {"expected_score": random_expected_score(ragged)}
    dropped = dropped_by(FILTERS[name], ragged, **given)
    order = torch.randperm(6, generator=seeded(3))
    assert torch.equal(dropped_by(FILTERS[name], ragged, rows=order, **given), dropped[order])
    names = ("old_logprobs", "rollout_logprobs", "advantages", "entropy")
    clean = {name: getattr(ragged, name) for name in names} | given
    for garbage in (0.0, NAN, INF, -INF):
        dirty = {name: x.masked_fill(~ragged.response_mask, garbage) for name, x in clean.items()}
        assert torch.equal(dropped_by(FILTERS[name], ragged, **dirty), dropped)
    wider = {name: torch.nn.functional.pad(x, (0, 3), value=NAN) for name, x in clean.items()}
    wider["response_mask"] = torch.nn.functional.pad(ragged.response_mask, (0, 3))
    assert torch.equal(dropped_by(FILTERS[name], ragged, **wider)[:, :9], dropped)


def test_what_clip_v_drops_is_what_would_lower_the_entropy_most():
    # Three contexts of one random policy, every token of them sampled and punished alike: the change of the entropy under a
    # step down the token's log-probability, found by taking that step, is what the filter ranks by.
    logits = torch.randn(3, 5, generator=seeded(11), dtype=torch.float64) * 1.5
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1, keepdim=True).expand(3, 5)
    expected = (logprobs.exp().square() * (logprobs + entropy)).sum(-1, keepdim=True).expand(3, 5)
    step, change = 1e-4, torch.empty(3, 5, dtype=torch.float64)
    for context in range(3):
        for token in range(5):
            moved = logits[context] - step * (torch.eye(5, dtype=torch.float64)[token] - logprobs[context].exp())
            change[context, token] = torch.distributions.Categorical(logits=moved).entropy() - entropy[context, 0]
    worst = change.flatten().argsort()[:2]
    keep = ClipV(mu=0.0, max_fraction=2 / 15)(
        old_logprobs=logprobs,
        rollout_logprobs=logprobs,
        advantages=-torch.ones(3, 5, dtype=torch.float64),
        response_mask=torch.ones(3, 5, dtype=torch.bool),
        entropy=entropy,
        expected_score=expected,
    )
    assert sorted((~keep).flatten().nonzero().squeeze(-1).tolist()) == sorted(worst.tolist())


def test_filters_say_what_they_need():
    assert ClipB().needs == {"old_entropy"}
    assert ClipV().needs == {"old_entropy", "old_expected_score"}
    assert (ClipB().mu, ClipV().mu) == (2.5, 8.5)


@pytest.mark.parametrize(
    ("choice", "settings", "key"),
    [
        (ClipB, {"mu": -1.0}, "token_filter.mu"),
        (ClipV, {"mu": -1.0}, "token_filter.mu"),
        (ClipV, {"max_fraction": 0.0}, "token_filter.max_fraction"),
        (ClipCov, {"token_fraction": 0.0}, "selector.token_fraction"),
        (KLCov, {"token_fraction": 1.5}, "selector.token_fraction"),
        (ClipCov, {"cov_low": 2.0, "cov_high": 1.0}, "selector.cov_high"),
        (KLCov, {"coef": -1.0}, "selector.coef"),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else str(value),
)
def test_impossible_settings_are_refused_by_name(choice, settings, key):
    value = settings[key.split(".")[1]]
    with pytest.raises(ConfigError, match=f"{key}={value}: .*rite".replace(".", r"\.", 1)):
        choice(**settings)
