import math
import random

import numpy as np
import pytest

from rlkit.core.prediction import (
    EntropyLaw,
    Forecast,
    Refusal,
    ScalingLaw,
    fit_entropy_law,
    fit_scaling_law,
    forecast_entropy_law,
)

NAN, INF = float("nan"), float("inf")
ENTROPIES = [1.2, 0.9, 0.6, 0.4, 0.25]
SCORES = [0.201586, 0.304848, 0.381346, 0.420981, 0.445917]  # -.12 * exp(H) + .60, to six digits


def exact(entropies, a=0.12, b=0.60):
    return [b - a * math.exp(entropy) for entropy in entropies]


def law_of(*args, **kwargs):
    law = fit_entropy_law(*args, **kwargs)
    assert isinstance(law, EntropyLaw), law
    return law


def test_the_entropy_law_is_recovered_from_scores_without_noise():
    assert exact(ENTROPIES) == pytest.approx(SCORES, abs=5e-7)
    law = law_of(ENTROPIES, exact(ENTROPIES))
    assert (law.a, law.b, law.ceiling) == pytest.approx((0.12, 0.60, 0.48), abs=1e-12)
    assert law.r2 == pytest.approx(1.0, abs=1e-12)
    assert law.predict(0.9) == pytest.approx(0.304848, abs=5e-7)
    assert law.predict(0.0) == law.ceiling


def test_the_entropy_law_of_noisy_scores_has_the_worked_errors():
    noisy = [score + error for score, error in zip(exact(ENTROPIES), [0.002, -0.001, 0.0, 0.001, -0.002], strict=True)]
    law = law_of(ENTROPIES, noisy)
    assert (law.a, law.b, law.ceiling) == pytest.approx((0.118862, 0.597638, 0.478776), abs=6e-7)
    assert law.r2 == pytest.approx(0.999832, abs=6e-7)
    assert law.residual == pytest.approx(0.00146824, abs=6e-9)
    assert (law.se_a, law.se_ceiling) == pytest.approx((0.00088896, 0.00115986), abs=6e-9)
    assert law.metrics(0.4) == pytest.approx(
        {"a": law.a, "b": law.b, "ceiling": law.ceiling, "r2": law.r2, "se_ceiling": law.se_ceiling, "headroom": 0.078776},
        abs=6e-7,
    )


def test_the_standard_errors_are_the_spread_of_fits_to_repeated_noise():
    generator = np.random.default_rng(0)
    entropies = np.linspace(0.2, 1.4, 12).tolist()
    laws = [law_of(entropies, (np.array(exact(entropies)) + generator.normal(0, 0.01, 12)).tolist()) for _ in range(2000)]
    assert np.std([law.a for law in laws]) == pytest.approx(np.mean([law.se_a for law in laws]), rel=0.06)
    assert np.std([law.ceiling for law in laws]) == pytest.approx(np.mean([law.se_ceiling for law in laws]), rel=0.06)


def test_shifting_the_scores_shifts_b_alone():
    noisy = [score + 0.003 * (-1) ** k for k, score in enumerate(exact(ENTROPIES))]
    law, shifted = law_of(ENTROPIES, noisy), law_of(ENTROPIES, [score + 0.1 for score in noisy])
    assert shifted.b - law.b == pytest.approx(0.1)
    assert (shifted.a, shifted.r2, shifted.se_a, shifted.se_ceiling) == pytest.approx((law.a, law.r2, law.se_a, law.se_ceiling))


def test_a_weight_of_two_fits_as_two_measurements_and_the_scale_of_weights_does_not_matter():
    noisy = [score + 0.003 * (-1) ** k for k, score in enumerate(exact(ENTROPIES))]
    weighted = law_of(ENTROPIES, noisy, weights=[1.0, 2.0, 1.0, 1.0, 1.0])
    repeated = law_of([*ENTROPIES, ENTROPIES[1]], [*noisy, noisy[1]])
    assert (weighted.a, weighted.b, weighted.r2) == pytest.approx((repeated.a, repeated.b, repeated.r2))
    scaled = law_of(ENTROPIES, noisy, weights=[10.0, 20.0, 10.0, 10.0, 10.0])
    assert (scaled.a, scaled.se_a, scaled.se_ceiling) == pytest.approx((weighted.a, weighted.se_a, weighted.se_ceiling))


def test_headroom_and_consumption_are_measured_against_the_ceiling():
    law = law_of(ENTROPIES, exact(ENTROPIES))
    assert law.headroom(0.38) == pytest.approx(0.1)
    assert law.consumed(0.38, first_score=0.28) == pytest.approx(0.5)
    assert math.isnan(law.consumed(0.5, first_score=law.ceiling))


@pytest.mark.parametrize(
    ("entropies", "scores", "reason"),
    [
        ([1.0, 0.5], [0.1, 0.2], "2 evaluations do not test them: evaluate at least 3 times"),
        ([0.5, 0.5, 0.5], [0.1, 0.2, 0.3], "The entropy has hardly moved"),
        ([1.0, 0.5, 0.2], [0.3, 0.2, 0.1], "Scores do not fall with entropy"),
        ([1.0, 0.5, 0.2], [0.3, 0.3, 0.3], "Scores do not fall with entropy"),
        ([1.0, NAN, 0.2], [0.1, 0.2, 0.3], "not finite"),
        ([1000.0, 0.5, 0.2], [0.1, 0.2, 0.3], "not finite"),  # its exponential overflows
        ([1.0, 0.5, 0.2], [0.1, INF, 0.3], "not finite"),
    ],
)
def test_an_entropy_law_that_would_mean_nothing_is_refused_with_the_reason(entropies, scores, reason):
    refusal = fit_entropy_law(entropies, scores)
    assert isinstance(refusal, Refusal)
    assert reason in refusal.reason
    assert isinstance(fit_entropy_law([1.0, 0.5, 0.2], [0.1, 0.2, 0.3], weights=[1.0, 0.0, 1.0]), Refusal)


def test_a_forecast_fits_the_first_third_and_is_tested_on_the_rest():
    entropies = np.linspace(1.3, 0.1, 12).tolist()
    scores = exact(entropies)
    scores[4:] = [score + error for score, error in zip(scores[4:], [0.01, -0.01] * 4, strict=True)]
    forecast = forecast_entropy_law(entropies, scores)
    assert isinstance(forecast, Forecast)
    assert (forecast.law.a, forecast.law.num_points, forecast.num_held_out) == pytest.approx((0.12, 4, 8))
    assert forecast.holdout_rmse == pytest.approx(0.01)
    assert forecast.metrics(0.4)["holdout_rmse"] == forecast.holdout_rmse
    short = forecast_entropy_law(entropies[:4], exact(entropies[:4]))  # three are fitted at the least
    assert isinstance(short, Forecast)
    assert (short.law.num_points, short.num_held_out) == (3, 1)


def test_a_forecast_is_refused_without_a_law_or_without_anything_to_test_it_on():
    refusal = forecast_entropy_law([1.0, 0.5, 0.2], [0.1, 0.2, 0.3])
    assert isinstance(refusal, Refusal)
    assert "none is left to test the law on: evaluate at least 4 times" in refusal.reason
    refusal = forecast_entropy_law([1.0, 0.5, 0.2, 0.1], [0.3, 0.2, 0.1, 0.0])
    assert isinstance(refusal, Refusal)
    assert "do not fall with entropy" in refusal.reason


SIZES = [0.5e9, 1.5e9, 7e9, 14e9]
INTERCEPTS = [0.3, 0.9, 1.9, 2.2]
LOG_RESOURCE = [18.0, 18.5, 19.0, 19.5, 20.0]


def curves(*, k_max=0.2, n_0=5e9, sizes=SIZES, intercepts=INTERCEPTS, noise=lambda: 0.0):
    """Parallel sizes, resources and losses."""
    points = [(size, x, intercept) for size, intercept in zip(sizes, intercepts, strict=True) for x in LOG_RESOURCE]
    losses = [10.0 ** (intercept - k_max / (1 + n_0 / size) * x + noise()) for size, x, intercept in points]
    return [size for size, _, _ in points], [10.0**x for _, x, _ in points], losses


def scaling_of(*args, **kwargs):
    law = fit_scaling_law(*args, **kwargs)
    assert isinstance(law, ScalingLaw), law
    return law


# A loss of 1.5e9 parameters is above 1 in these worked numbers (10^(.9 - .046 * 18) = 1.17): 1 - pass@1 never is, so nothing
# is gained by cutting the loss off at 1, and doing so would bend exactly this curve.
def test_the_scaling_law_is_recovered_from_losses_without_noise():
    law = scaling_of(*curves())
    assert law.k_max == pytest.approx(0.2, abs=1e-8)
    assert law.n_0 == pytest.approx(5e9, rel=1e-8)
    assert list(law.intercept.values()) == pytest.approx(INTERCEPTS, abs=1e-8)
    assert law.rmse_log10**2 * 20 < 1e-20
    assert law.rmse_linear < 1e-10
    assert law.holdout_rmse is not None
    assert law.holdout_rmse < 1e-8
    assert not law.n_0_at_bound
    assert law.speed(5e9) == pytest.approx(0.1)  # half of k_max at n_0


@pytest.mark.parametrize(("n_0", "squares"), [(2e9, 0.00179589), (5e9, 0.0), (1e10, 0.00068355)])
def test_another_n_0_leaves_the_worked_squares(n_0, squares):
    law = scaling_of(*curves(), n_0_bounds=(n_0, n_0))
    assert law.rmse_log10**2 * 20 == pytest.approx(squares, abs=6e-9)  # twenty points


def test_speeds_and_losses_of_the_law_are_the_worked_ones():
    law = scaling_of(*curves(sizes=[0.5e9, 7e9, 72e9], intercepts=[0.3, 2.0, 3.2]))
    assert list(law.k.values()) == pytest.approx([0.0181818, 0.1166667, 0.1870130], abs=6e-8)
    predicted = [law.predict(7e9, 10.0**x) for x in (18, 19, 20)]
    assert predicted == pytest.approx([0.794328, 0.607202, 0.464159], abs=6e-7)


def squares_by_lstsq(sizes, resource, loss, n_0):
    """The mean over sizes of the mean squared residual, by a general least-squares solver on the full design."""
    size, x, y = np.array(sizes), np.log10(resource), np.log10(loss)
    names = np.unique(size)
    weight = np.array([1 / (len(names) * (size == one).sum()) for one in size])
    design = np.column_stack([-x / (1 + n_0 / size), *(size == one for one in names)]).astype(float)
    root = np.sqrt(weight)[:, None]
    solution = np.linalg.lstsq(design * root, y * root[:, 0], rcond=None)[0]
    return float((weight * (y - design @ solution) ** 2).sum()), solution


def test_the_fit_is_the_least_squares_solution_and_no_other_n_0_is_better():
    generator = random.Random(0)
    sizes, resource, loss = curves(noise=lambda: generator.gauss(0.0, 0.01))
    sizes, resource, loss = sizes[:-2], resource[:-2], loss[:-2]  # sizes count the same, however often they were measured
    law = scaling_of(sizes, resource, loss)
    assert law.n_0 is not None
    squares, solution = squares_by_lstsq(sizes, resource, loss, law.n_0)
    assert law.rmse_log10**2 == pytest.approx(squares, rel=1e-9)
    assert [law.k_max, *law.intercept.values()] == pytest.approx(solution, rel=1e-7)
    others = [squares_by_lstsq(sizes, resource, loss, n_0)[0] for n_0 in np.logspace(8, 11, 500)]
    assert squares <= min(others)


def test_the_order_of_measurements_does_not_matter_and_the_fit_is_the_same_every_time():
    generator = random.Random(1)
    points = list(zip(*curves(noise=lambda: generator.gauss(0.0, 0.02)), strict=True))
    law = scaling_of(*zip(*points, strict=True))
    assert scaling_of(*zip(*points, strict=True)) == law
    generator.shuffle(points)
    shuffled = scaling_of(*zip(*points, strict=True))
    assert (shuffled.k_max, shuffled.n_0, shuffled.holdout_rmse) == pytest.approx((law.k_max, law.n_0, law.holdout_rmse))


def test_a_single_size_is_a_line_whose_k_max_is_not_known():
    law = scaling_of(*curves(sizes=[7e9], intercepts=[2.0]))
    assert law.k_max is None
    assert law.n_0 is None
    assert law.k[7e9] == law.speed(7e9) == pytest.approx(0.2 / (1 + 5 / 7))
    assert law.intercept[7e9] == pytest.approx(2.0)
    with pytest.raises(ValueError, match="fitted to a single size, it says nothing about another"):
        law.speed(1e9)
    assert set(law.metrics()) == {
        "scaling_rmse_log10",
        "scaling_rmse_linear",
        "scaling_holdout_rmse",
        "scaling_k_7e+09",
        "scaling_E_7e+09",
    }


def test_the_held_out_error_is_that_of_a_fit_to_the_first_four_fifths():
    sizes, resource, loss = curves(sizes=[7e9, 14e9], intercepts=[1.9, 2.2])
    last = [k for k, value in enumerate(resource) if value == 1e20]
    bent = [value + (0.02 if k in last else 0.0) for k, value in enumerate(loss)]
    assert scaling_of(sizes, resource, bent).holdout_rmse == pytest.approx(0.02, abs=1e-6)
    three = [k for k, value in enumerate(resource) if value <= 1e19]  # too few to hold any out
    assert scaling_of(*([values[k] for k in three] for values in (sizes, resource, loss))).holdout_rmse is None


def test_an_n_0_outside_the_search_is_said_to_be_at_its_bound():
    law = scaling_of(*curves(n_0=1e6))
    assert law.n_0_at_bound
    assert law.n_0 == pytest.approx(1e8, rel=1e-6)
    law = scaling_of(*curves(n_0=1e6, sizes=[1e6, 3e6, 1e7], intercepts=[1.0, 1.5, 2.0]), n_0_bounds=(1e5, 1e8))
    assert law.n_0 == pytest.approx(1e6, rel=1e-7)


def test_a_speed_beyond_its_bound_is_held_there():
    resource = [10.0 ** (18 + 0.1 * k) for k in range(5)] * 2
    law = scaling_of([7e9] * 5 + [14e9] * 5, resource, [(1e18 / x) ** 3 for x in resource])  # losses from 1 to .06
    assert law.k_max == 2.0
    assert law.rmse_log10 > 0.1


def test_a_loss_of_zero_is_taken_for_one_in_ten_thousand():
    sizes, resource, _ = curves(sizes=[7e9], intercepts=[2.0])
    losses = [1e-2, 1e-3, 1e-4, 0.0, 0.0]
    assert scaling_of(sizes, resource, losses) == scaling_of(sizes, resource, [1e-2, 1e-3, 1e-4, 1e-4, 1e-4])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda s, x, y: (s, x, [NAN, *y[1:]]), "A loss is not finite or below 0"),
        (lambda s, x, y: (s, x, [-0.1, *y[1:]]), "A loss is not finite or below 0"),
        (lambda s, x, y: (s, [0.0, *x[1:]], y), "A size or a resource is not finite and above 0"),
        (lambda s, x, y: (s[:-3], x[:-3], y[:-3]), "1.4e+10 parameters has 2 different resources: evaluate it at 3 or more"),
        (lambda s, x, y: (s, [1e19] * len(x), y), "5e+08 parameters has 1 different resources"),
        (lambda s, x, y: (s, x, [0.5] * len(y)), "The loss does not fall with the resource"),
        (lambda s, x, y: (s, x, [1 - value / 2 for value in y]), "The loss does not fall with the resource"),
        (lambda s, x, y: ([], [], []), "There is no measurement to fit"),
    ],
)
def test_a_scaling_law_that_would_mean_nothing_is_refused_with_the_reason(change, reason):
    refusal = fit_scaling_law(*change(*curves()))
    assert isinstance(refusal, Refusal)
    assert reason in refusal.reason


def test_lists_of_different_lengths_are_our_own_mistake():
    with pytest.raises(ValueError, match="got 3 entropies, 2 scores and 2 weights"):
        fit_entropy_law([1.0, 0.5, 0.2], [0.1, 0.2])
    with pytest.raises(ValueError, match="got 3, 2, 2 sizes, resources and losses"):
        fit_scaling_law([1e9] * 3, [1.0, 2.0], [0.5, 0.4])
