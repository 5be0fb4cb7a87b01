"""Statistics of held-out evaluations: pass@k, what training lost, best of n and the reward-divergence frontier, intervals."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from rlkit.errors import DataError


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased estimate of the chance that at least one of k samples is correct, from num_samples >= k of one prompt.

        1 - C(n - c, k) / C(n, k) = 1 - prod_{i = n - c + 1 .. n} (1 - k / i)

    The product stays in [0, 1] where the binomials would overflow. (The plug-in 1 - (1 - c / n)^k is biased low.)
    Raises DataError when k exceeds num_samples or a count is out of range. Source: arXiv:2107.03374 eq. 1.
    """
    if not 0 <= num_correct <= num_samples:
        raise DataError(
            f"pass@{k}: num_correct={num_correct} is not between 0 and num_samples={num_samples}; count each sample once."
        )
    if not 1 <= k <= num_samples:
        raise DataError(f"pass@{k} cannot be estimated from {num_samples} samples: draw at least k, and ask for a k of at least 1.")
    if num_samples - num_correct < k:
        return 1.0
    factors = 1.0 - k / np.arange(num_samples - num_correct + 1, num_samples + 1)
    return float(1.0 - factors.prod())


def pass_at_k_curve(
    num_correct: Sequence[int] | np.ndarray, num_samples: Sequence[int] | np.ndarray, ks: Iterable[int]
) -> dict[int, float]:
    """k -> pass@k, averaged over prompts; both counts are [P]. Raises DataError as `pass_at_k` does, and without prompts."""
    if len(num_correct) == 0:
        raise DataError("pass@k: num_correct is empty; evaluate at least one prompt.")
    counts = Counter(zip(map(int, num_samples), map(int, num_correct), strict=True))  # those alike are worked out once
    return {k: sum(times * pass_at_k(n, c, k) for (n, c), times in counts.items()) / counts.total() for k in ks}


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval (low, high) of the mean of values [P], resampling prompts with replacement.

    Prompts, not samples, are the unit that was drawn at random; hand in one value a prompt. The seed is the function's own:
    the same values give the same interval. Raises DataError when values is empty. Source: Efron (1979).
    """
    per_prompt = np.asarray(values, dtype=np.float64)
    if per_prompt.size == 0:
        raise DataError("bootstrap_interval: values is empty; evaluate at least one prompt.")
    generator, num_prompts = np.random.default_rng(seed), len(per_prompt)
    means = [per_prompt[generator.integers(num_prompts, size=num_prompts)].mean() for _ in range(num_resamples)]
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def hierarchical_interval(
    values: np.ndarray, minus: np.ndarray | None = None, *, confidence: float = 0.95, num_resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval (low, high) of the mean of values [S, P] over S runs (seeds) and P prompts, each asked in every run.

    A resample draws runs with replacement, then prompts: the same prompts for every run. With `minus` [S', P] it is the interval
    of the difference of the two means: its runs are drawn apart, its prompts are the same ones, so what makes a prompt hard
    cancels. What has no prompts, such as the entropy of training, has P = 1. One run says nothing of how runs differ: the
    interval is then that of prompts alone. A few runs make it too narrow: the variance between S runs is taken for (S - 1) / S
    of what it is. The seed is the function's own. Raises DataError when a side is empty or the prompts differ in number.
    """
    sides = [np.asarray(side, dtype=np.float64) for side in (values, minus) if side is not None]
    for side in sides:
        if side.ndim != 2 or side.size == 0 or side.shape[1] != sides[0].shape[1]:
            shapes = " and ".join(str(list(side.shape)) for side in sides)
            raise DataError(f"hierarchical_interval: values are {shapes}; give [runs, prompts], none of them 0, the same prompts.")
    prompts = _shares(sides[0].shape[1], num_resamples, np.random.default_rng((seed, 0)))
    means = [
        ((_shares(len(side), num_resamples, np.random.default_rng((seed, place))) @ side) * prompts).sum(-1)
        for place, side in enumerate(sides, start=1)
    ]
    low, high = np.quantile(means[0] - means[1] if len(means) == 2 else means[0], [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _shares(num_units: int, num_resamples: int, generator: np.random.Generator) -> np.ndarray:
    """[num_resamples, num_units]: the share of each unit in samples of as many, drawn with replacement."""
    return generator.multinomial(num_units, np.full(num_units, 1 / num_units), size=num_resamples) / num_units


def support_loss(
    num_correct_base: Sequence[int] | np.ndarray,
    num_correct_policy: Sequence[int] | np.ndarray,
    *,
    num_samples_base: Sequence[int] | np.ndarray,
    num_samples_policy: Sequence[int] | np.ndarray,
) -> np.ndarray:
    """[P]: 1 for a prompt that the base solved and the policy did not, else 0; its mean is the share of prompts lost.

    Both are looked at with the same number m of samples, the smaller count: a prompt that one has more of counts with the chance
    that m of them, drawn without replacement, decide it. Chance alone loses prompts too, those rarely solved, and gains as many:
    what is swapped, `support_loss(policy, base)`, is the gain to hold it against. All arguments are [P].
    """
    counts = zip(num_samples_base, num_correct_base, num_samples_policy, num_correct_policy, strict=True)
    lost = []
    for n_base, c_base, n_policy, c_policy in counts:
        m = min(int(n_base), int(n_policy))
        lost.append(pass_at_k(int(n_base), int(c_base), m) * (1.0 - pass_at_k(int(n_policy), int(c_policy), m)))
    return np.array(lost)


def best_of_n_kl(n: int) -> float:
    """log n - (n - 1) / n, in nats: the most that KL(best of n || reference) can be.

    Equal to it only where no two responses tie and each has a vanishing probability; with rewards of 0 and 1 it is far below,
    see `best_of_n_exact_kl`. Source: arXiv:2401.01879.
    """
    return math.log(n) - (n - 1) / n


def best_of_n_reward(rewards: Sequence[float] | np.ndarray, n: int) -> float:
    """Unbiased estimate of the expected best of n rewards, from at least n samples of one prompt, in any order.

        sum_i r_(i) C(i - 1, n - 1) / C(len, n)    r_(i): the i-th smallest

    which is the mean over all subsets of n. Raises DataError when n is not between 1 and the number of samples.
    """
    ordered = np.sort(np.asarray(rewards, dtype=np.float64))
    size = len(ordered)
    if not 1 <= n <= size:
        raise DataError(f"best of {n} cannot be estimated from {size} samples: draw at least n, and ask for an n of at least 1.")
    ranks = np.arange(size, n, -1)  # from the largest down: the chance that the best of n is of this rank
    chances = n / size * np.concatenate([[1.0], np.cumprod((ranks - n) / (ranks - 1))])
    return float(ordered[::-1][: len(chances)] @ chances)


def best_of_n_probs(ref_probs: Sequence[float] | np.ndarray, rewards: Sequence[float] | np.ndarray, n: int) -> np.ndarray:
    """[M] exact distribution of the best of n draws from a finite reference [M].

        F(y)^n - F(y-)^n    F: the chance of a reward at most that high

    Outcomes of the same reward share their group's probability in proportion to the reference.
    """
    probs = _distribution(ref_probs, len(rewards))
    _, group = np.unique(np.asarray(rewards, dtype=np.float64), return_inverse=True)
    mass = np.bincount(group, weights=probs)
    below = np.concatenate([[0.0], np.cumsum(mass)])
    below /= below[-1]
    won = below[1:] ** n - below[:-1] ** n
    return probs * np.divide(won, mass, out=np.zeros_like(mass), where=mass > 0)[group]


def best_of_n_exact_kl(ref_probs: Sequence[float] | np.ndarray, rewards: Sequence[float] | np.ndarray, n: int) -> float:
    """KL(best of n || reference) of a finite reference, in nats. Of samples with equal weights it is a plug-in estimate."""
    best, probs = best_of_n_probs(ref_probs, rewards, n), np.asarray(ref_probs, dtype=np.float64)
    possible = best > 0
    return float((best[possible] * np.log(best[possible] / probs[possible])).sum())


@dataclass(frozen=True, slots=True)
class Frontier:
    """Points of the highest reward at each divergence from the reference, all [L]."""

    lams: np.ndarray  # 1 / (coefficient of the divergence)
    rewards: np.ndarray
    kl: np.ndarray  # KL(optimum || reference), nats


MIN_EFFECTIVE_SAMPLES = 10


def optimal_frontier(
    rewards: Sequence[float] | np.ndarray, lams: Iterable[float], *, ref_probs: Sequence[float] | np.ndarray | None = None
) -> Frontier:
    """The optimum of E[reward] - KL(policy || ref) / lam, which is ref(y) exp(lam r(y)) up to a constant, for ascending lams.

    With `ref_probs` [M] the outcomes are all there are, and it is exact. Without, `rewards` [n] are of samples of the reference:
    w_i = softmax_i(lam r_i), KL = lam R - (logsumexp(lam r) - log n), and the frontier ends before the first lam at which fewer
    than ten samples carry the weight (1 / sum w^2 < 10) or KL > log n - 1: beyond, the samples and not the reference speak.
    Raises DataError when rewards are empty or the probabilities are none.
    """
    values = np.asarray(rewards, dtype=np.float64)
    if values.size == 0:
        raise DataError("optimal_frontier: rewards is empty; draw samples of the reference first.")
    size = len(values)
    probs = np.full(size, 1 / size) if ref_probs is None else _distribution(ref_probs, size)
    possible = probs > 0
    values, log_probs = values[possible], np.log(probs[possible])
    points = []
    for lam in lams:
        logits = lam * values + log_probs
        log_total = np.logaddexp.reduce(logits)
        weights = np.exp(logits - log_total)
        reward = float(weights @ values)
        kl = max(lam * reward - float(log_total), 0.0)  # rounding can put a zero below 0
        if ref_probs is None and (1 / (weights**2).sum() < MIN_EFFECTIVE_SAMPLES or kl > math.log(size) - 1):
            break
        points.append((lam, reward, kl))
    return Frontier(*np.array(points, dtype=np.float64).reshape(-1, 3).T)


def _distribution(probs: Sequence[float] | np.ndarray, size: int) -> np.ndarray:
    """Checked: one for each of `size` outcomes. Raises DataError."""
    checked = np.asarray(probs, dtype=np.float64)
    if checked.shape != (size,) or (checked < 0).any() or abs(checked.sum() - 1) > 1e-6:
        raise DataError(
            f"ref_probs: {checked.size} numbers with the sum {checked.sum():.6g} for {size} outcomes; give each outcome its "
            "probability."
        )
    return checked
