from itertools import combinations, product

import numpy as np
import pytest

from rlkit.core.evaluation import (
    best_of_n_exact_kl,
    best_of_n_kl,
    best_of_n_probs,
    best_of_n_reward,
    bootstrap_interval,
    hierarchical_interval,
    optimal_frontier,
    pass_at_k,
    pass_at_k_curve,
    support_loss,
)
from rlkit.errors import DataError


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


def test_the_hierarchical_interval_is_that_of_all_resamples():
    """Two runs and two prompts: sixteen equally likely resamples, and a tenth on either side falls within the second of them."""
    values = np.array([[0.0, 1.0], [2.0, 5.0]])
    pairs = list(product(range(2), repeat=2))
    means = [values[np.ix_(runs, prompts)].mean() for runs in pairs for prompts in pairs]
    expected = np.quantile(means, [0.1, 0.9], method="inverted_cdf")
    assert hierarchical_interval(values, confidence=0.8, num_resamples=20_000) == pytest.approx(expected)


def test_runs_and_prompts_both_widen_the_interval():
    generator = np.random.default_rng(0)
    runs, prompts = generator.normal(size=(30, 1)), generator.normal(size=(1, 200))
    low, high = hierarchical_interval(runs + prompts, num_resamples=4000)
    assert (high - low) / 2 == pytest.approx(1.96 * np.sqrt(runs.var() / 30 + prompts.var() / 200), rel=0.06)
    alone = hierarchical_interval(prompts, num_resamples=4000)  # one run says nothing of how runs differ
    assert (alone[1] - alone[0]) / 2 == pytest.approx(1.96 * np.sqrt(prompts.var() / 200), rel=0.06)
    without_prompts = hierarchical_interval(runs, num_resamples=4000)
    assert (without_prompts[1] - without_prompts[0]) / 2 == pytest.approx(1.96 * np.sqrt(runs.var() / 30), rel=0.06)


def test_what_makes_a_prompt_hard_cancels_in_a_difference_of_arms():
    prompts = np.random.default_rng(1).normal(size=(1, 50))
    base, better = np.repeat(prompts, 3, axis=0), np.repeat(prompts + 0.25, 5, axis=0)
    assert hierarchical_interval(better, base) == pytest.approx((0.25, 0.25))
    low, high = hierarchical_interval(better)
    assert high - low > 0.3  # apart, neither arm is known that well
    runs = np.array([[0.0], [1.0], [2.0]])  # the arms' runs are drawn apart: they do not cancel
    low, high = hierarchical_interval(base + runs, base + runs)
    assert low < -0.5
    assert high > 0.5


def test_the_hierarchical_interval_is_reproducible_and_refuses_what_cannot_be_paired():
    values = np.random.default_rng(2).normal(size=(4, 30))
    assert hierarchical_interval(values, seed=3) == hierarchical_interval(values, seed=3)
    assert hierarchical_interval(values, seed=3) != hierarchical_interval(values, seed=4)
    with pytest.raises(DataError, match=r"values are \[4, 30\] and \[4, 29\]"):
        hierarchical_interval(values, values[:, 1:])
    with pytest.raises(DataError, match=r"values are \[0, 30\]"):
        hierarchical_interval(values[:0])


def test_support_loss_is_the_share_of_prompts_that_only_the_base_solves():
    base, policy = np.array([3, 1, 0, 0, 2]), np.array([0, 4, 1, 0, 0])
    n = np.full(5, 4)
    assert support_loss(base, policy, num_samples_base=n, num_samples_policy=n).tolist() == [1, 0, 0, 0, 1]
    assert support_loss(policy, base, num_samples_base=n, num_samples_policy=n).tolist() == [0, 0, 1, 0, 0]  # gained
    assert not support_loss(base, base, num_samples_base=n, num_samples_policy=n).any()


def test_support_loss_looks_at_equally_many_samples_of_both():
    """The base has five samples, two of them right, the policy three, none or one right: subsets of three of the base's."""
    right = [True, True, False, False, False]
    subsets = [any(subset) for subset in combinations(right, 3)]
    for c_policy, missed in ((0, 1.0), (1, 0.0)):
        lost = support_loss([2], [c_policy], num_samples_base=[5], num_samples_policy=[3])
        assert lost == pytest.approx([missed * sum(subsets) / len(subsets)])


@pytest.mark.parametrize(
    ("n", "kl", "win_rate", "tilt_kl"),
    [
        (2, 0.193147, 0.666667, 0.172647),
        (4, 0.636294, 0.8, 0.616880),
        (8, 1.204442, 0.888889, None),
        (16, 1.835089, 0.941176, 1.833213),
        (64, 3.174508, 0.984615, None),
        (256, 4.549084, 0.996109, None),
    ],
)
def test_best_of_n_of_many_outcomes_without_ties(n, kl, win_rate, tilt_kl):
    assert best_of_n_kl(n) == pytest.approx(kl, abs=1e-6)
    size = 20_000  # so many that each is improbable
    ref, ranks = np.full(size, 1 / size), (np.arange(size) + 0.5) / size
    best = best_of_n_probs(ref, ranks, n)
    assert best.sum() == pytest.approx(1)
    assert best @ ranks == pytest.approx(win_rate, abs=1e-5)  # a rank is the chance to beat a sample of the reference, ties split
    assert best_of_n_exact_kl(ref, ranks, n) == pytest.approx(kl, abs=2e-3)
    assert best_of_n_exact_kl(ref, ranks, n) <= best_of_n_kl(n)
    if tilt_kl is not None:  # the highest win rate at a divergence is a little better than best of n
        low, high = 0.0, 100.0
        for _ in range(60):
            middle = (low + high) / 2
            reached = optimal_frontier(ranks, [middle], ref_probs=ref)
            low, high = (middle, high) if reached.rewards[0] < win_rate else (low, middle)
        assert optimal_frontier(ranks, [low], ref_probs=ref).kl[0] == pytest.approx(tilt_kl, abs=1e-4)


@pytest.mark.parametrize(("size", "kl"), [(2, 0.459356), (4, 0.590310), (16, 0.633370), (256, 0.636283)])
def test_best_of_four_of_a_few_equally_likely_outcomes(size, kl):
    ref = np.full(size, 1 / size)
    assert best_of_n_exact_kl(ref, np.arange(size), 4) == pytest.approx(kl, abs=1e-6)
    if size == 2:
        assert best_of_n_probs(ref, [0, 1], 4) @ [0.25, 0.75] == pytest.approx(0.71875)


def test_the_distribution_of_the_best_of_n_is_that_of_all_draws():
    """Ties are broken as the reference would: five outcomes, two pairs of the same reward, one impossible."""
    ref, rewards = np.array([0.1, 0.3, 0.2, 0.4, 0.0]), np.array([1.0, 0.0, 1.0, 0.0, 2.0])
    for n in (1, 2, 3):
        expected = np.zeros(5)
        for drawn in product(range(5), repeat=n):
            tied = [y for y in drawn if rewards[y] == max(rewards[list(drawn)])]
            for y in tied:  # of those drawn with the best reward, one by chance
                expected[y] += np.prod(ref[list(drawn)]) / len(tied)
        found = best_of_n_probs(ref, rewards, n)
        assert found == pytest.approx(expected)
        assert found.sum() == pytest.approx(1)
    assert best_of_n_probs(ref, rewards, 1) == pytest.approx(ref)
    assert best_of_n_exact_kl(ref, rewards, 1) == pytest.approx(0, abs=1e-12)
    with pytest.raises(DataError, match=r"ref_probs: 2 numbers with the sum 0\.9 for 2 outcomes"):
        best_of_n_probs([0.5, 0.4], [0, 1], 2)


def test_the_expected_best_of_n_is_the_mean_over_all_subsets():
    assert best_of_n_reward([3.0, 0.0, 2.0, 1.0], 2) == pytest.approx(7 / 3)
    rewards = np.round(np.random.default_rng(3).normal(size=7), 1)
    for n in range(1, 8):
        assert best_of_n_reward(rewards, n) == pytest.approx(np.mean([max(subset) for subset in combinations(rewards, n)]))
    right = [1.0] * 3 + [0.0] * 7  # of rewards of 0 and 1 it is pass@n
    for n in range(1, 11):
        assert best_of_n_reward(right, n) == pytest.approx(pass_at_k(10, 3, n))
    for n in (0, 8):
        with pytest.raises(DataError, match=f"best of {n} cannot be estimated from 7 samples"):
            best_of_n_reward(rewards, n)


def test_the_frontier_is_the_optimum_of_reward_less_divergence():
    ref, rewards = np.array([0.5, 0.3, 0.2]), np.array([0.0, 1.0, 3.0])
    generator = np.random.default_rng(4)
    found = optimal_frontier(rewards, [0, 0.5, 2], ref_probs=ref)
    for lam, reward, kl in zip(found.lams, found.rewards, found.kl, strict=True):
        best = ref * np.exp(lam * rewards) / (ref * np.exp(lam * rewards)).sum()
        assert reward == pytest.approx(best @ rewards)
        assert kl == pytest.approx((best * np.log(best / ref)).sum(), abs=1e-12)
        for _ in range(20):  # no other policy does better
            other = generator.dirichlet([1, 1, 1])
            value = lam * other @ rewards - (other * np.log(other / ref)).sum()
            assert value <= lam * reward - kl + 1e-12


def test_the_frontier_of_two_outcomes_with_probability_one_half():
    exact = optimal_frontier([0, 1], [1.0], ref_probs=[0.5, 0.5])
    sampled = optimal_frontier([0] * 50 + [1] * 50, [1.0])
    for found in (exact, sampled):
        assert found.rewards[0] == pytest.approx(0.731059, abs=1e-6)
        assert found.kl[0] == pytest.approx(0.110944, abs=1e-6)


def test_the_frontier_of_samples_ends_where_few_of_them_carry_it():
    assert len(optimal_frontier([0.0, 1.0] * 4, [0.0]).lams) == 0  # eight samples are fewer than ten
    rewards = np.linspace(0, 1, 40)
    lams = np.linspace(0, 400, 4001)
    found = optimal_frontier(rewards, lams)
    assert 0 < len(found.lams) < len(lams)
    weights = np.exp(lams[:, None] * (rewards - 1))
    weights /= weights.sum(1, keepdims=True)
    few = 1 / (weights**2).sum(1) < 10
    kl = (weights * np.log(np.maximum(weights * 40, 1e-300))).sum(1)
    assert len(found.lams) == np.flatnonzero(few | (kl > np.log(40) - 1))[0]
    spread = np.concatenate([np.zeros(985), np.ones(15)])  # fifteen alike: never fewer than ten, but a KL near log(1000 / 15)
    ended = optimal_frontier(spread, np.linspace(0, 50, 501))
    assert len(ended.lams) == 501
    assert ended.kl[-1] == pytest.approx(np.log(1000 / 15), abs=1e-6)  # 4.2, below log(1000) - 1 = 5.9
    assert not (np.diff(found.kl) < 0).any()
    with pytest.raises(DataError, match="rewards is empty"):
        optimal_frontier([], [0.0])
