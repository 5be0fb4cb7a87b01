"""Statistics of a held-out evaluation: pass@k and its uncertainty."""

from collections.abc import Iterable, Sequence

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


def pass_at_k_curve(num_correct: Sequence[int], num_samples: Sequence[int], ks: Iterable[int]) -> dict[int, float]:
    """k -> pass@k, averaged over prompts; both counts are [P]. Raises DataError as `pass_at_k` does, and without prompts."""
    if len(num_correct) == 0:
        raise DataError("pass@k: num_correct is empty; evaluate at least one prompt.")
    counts = list(zip(num_samples, num_correct, strict=True))
    return {k: float(np.mean([pass_at_k(int(n), int(c), k) for n, c in counts])) for k in ks}


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
