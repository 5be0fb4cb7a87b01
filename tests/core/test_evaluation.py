from itertools import combinations

import numpy as np
import pytest

from rlkit.core.evaluation import bootstrap_interval, pass_at_k, pass_at_k_curve


def test_pass_at_k_is_the_share_of_all_subsets_with_a_correct_answer():
    for n in range(1, 8):
        for c in range(n + 1):
            answers = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                subsets = [any(subset) for subset in combinations(answers, k)]
                assert pass_at_k(num_samples=n, num_correct=c, k=k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


@pytest.mark.parametrize(
    ("n", "c", "k", "expected"),
    [
        (10, 3, 1, 0.3),
        (10, 3, 2, 8 / 15),  # 1 - (7 * 6) / (10 * 9)
        (10, 3, 5, 11 / 12),  # not 1 - 0.7**5 = 0.831930
        (10, 3, 8, 1.0),  # only seven are wrong
        (10, 0, 5, 0.0),
        (4, 1, 4, 1.0),
        (200, 7, 64, 0.936099),
    ],
)
def test_pass_at_k_of_known_counts(n, c, k, expected):
    assert pass_at_k(num_samples=n, num_correct=c, k=k) == pytest.approx(expected, abs=1e-6)


def test_pass_at_k_stays_exact_where_factorials_overflow():
    # One correct answer among n: a subset of k holds it with probability k/n.
    assert pass_at_k(num_samples=100_000, num_correct=1, k=12_345) == pytest.approx(0.12345, rel=1e-9)


def test_pass_at_k_rises_with_k_and_with_the_number_of_correct_answers():
    for c in range(11):
        values = [pass_at_k(num_samples=10, num_correct=c, k=k) for k in range(1, 11)]
        assert values == sorted(values)
    for k in range(1, 11):
        values = [pass_at_k(num_samples=10, num_correct=c, k=k) for c in range(11)]
        assert values == sorted(values)


def test_the_curve_is_the_mean_over_prompts_even_with_unequal_sample_counts():
    num_correct, num_samples = [3, 0, 4], [10, 10, 4]
    curve = pass_at_k_curve(num_correct=num_correct, num_samples=num_samples, ks=[1, 2, 4])
    assert list(curve) == [1, 2, 4]
    assert curve[1] == pytest.approx((0.3 + 0 + 1) / 3)
    assert curve[2] == pytest.approx((8 / 15 + 0 + 1) / 3)
    assert curve[4] == pytest.approx((1 - (7 * 6 * 5 * 4) / (10 * 9 * 8 * 7) + 0 + 1) / 3)


def test_the_interval_is_reproducible_and_leaves_the_global_generator_alone():
    values = np.random.default_rng(0).normal(size=50)
    before = np.random.get_state(legacy=False)  # noqa: NPY002
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert repr(np.random.get_state(legacy=False)) == repr(before)  # noqa: NPY002
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


def test_the_interval_has_the_width_that_the_normal_approximation_gives():
    values = np.random.default_rng(1).normal(loc=5.0, size=400)
    standard_error = values.std() / 20  # sqrt(400)
    for confidence, quantile in ((0.95, 1.959964), (0.8, 1.281552), (0.5, 0.674490)):
        low, high = bootstrap_interval(values, confidence=confidence, num_resamples=4000, seed=0)
        assert low < values.mean() < high
        assert (high - low) / 2 == pytest.approx(quantile * standard_error, rel=0.1)


def test_prompts_that_agree_leave_no_interval():
    assert bootstrap_interval([0.25, 0.25, 0.25]) == pytest.approx((0.25, 0.25))
    assert bootstrap_interval([0.5]) == pytest.approx((0.5, 0.5))


def test_intervals_hold_the_truth_about_as_often_as_they_promise():
    generator = np.random.default_rng(2)
    hits = 0
    for seed in range(200):
        low, high = bootstrap_interval(generator.normal(size=60), confidence=0.9, num_resamples=300, seed=seed)
        hits += low <= 0.0 <= high
    assert 0.82 <= hits / 200 <= 0.96  # binomial: 0.9 +- 3.8 standard deviations of 0.021, less for the percentile method's bias
