"""What a run's end will look like, fitted to its beginning, and what a larger model would learn.

A fit that would mean nothing is a `Refusal`, which says why.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

FloatArray = np.ndarray[tuple[int, ...], np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Refusal:
    """No fit."""

    reason: str  # one sentence


@dataclass(frozen=True, kw_only=True, slots=True)
class EntropyLaw:
    """score = -a * exp(entropy) + b, with a > 0: what is left to gain while entropy is spent."""

    a: float
    b: float
    r2: float  # share of the scores' variance that the law explains
    residual: float  # standard deviation of the scores around the law, with n - 2 degrees of freedom
    se_a: float  # standard errors
    se_ceiling: float
    num_points: int

    @property
    def ceiling(self) -> float:
        """The score at an entropy of 0."""
        return self.b - self.a

    def predict(self, entropy: float) -> float:
        """The score at an entropy, in nats."""
        return self.b - self.a * math.exp(entropy)

    def headroom(self, score: float) -> float:
        """How far a score is from the ceiling."""
        return self.ceiling - score

    def consumed(self, score: float, first_score: float) -> float:
        """Share of the way from the first score to the ceiling that lies behind; NaN where there was no way to go."""
        way = self.ceiling - first_score
        return (score - first_score) / way if way else math.nan

    def metrics(self, score: float) -> dict[str, float]:
        """What to log beside the newest score; the caller puts `predictor/` in front."""
        return {
            "a": self.a,
            "b": self.b,
            "ceiling": self.ceiling,
            "r2": self.r2,
            "se_ceiling": self.se_ceiling,
            "headroom": self.headroom(score),
        }


def fit_entropy_law(
    entropies: Sequence[float], scores: Sequence[float], weights: Sequence[float] | None = None
) -> EntropyLaw | Refusal:
    """Weighted least squares of held-out scores on exp(entropy), in closed form; equal weights unless given.

    entropies are means over tokens of the training policy's entropy in nats, at one temperature throughout; scores are of the
    same steps. The law is about runs that leave entropy alone: one that controls it breaks the law by design, and is plotted
    against a fit to a run that does not. Source of the law: arXiv:2505.22617; the fit is rlkit's.
    """
    y, w = np.asarray(scores, dtype=np.float64), np.ones(len(scores)) if weights is None else np.asarray(weights, np.float64)
    with np.errstate(over="ignore"):
        x = np.exp(np.asarray(entropies, dtype=np.float64))
    if not len(x) == len(y) == len(w):
        raise ValueError(f"fit_entropy_law got {len(x)} entropies, {len(y)} scores and {len(w)} weights: pass as many of each.")
    if len(x) < 3:
        return Refusal(
            reason=f"The law has two coefficients, and {len(x)} evaluations do not test them: evaluate at least 3 times."
        )
    if not (np.isfinite(x) & np.isfinite(y) & np.isfinite(w) & (w > 0)).all():
        return Refusal(reason="An entropy or a score is not finite, or a weight not above 0: leave those evaluations out.")
    x_mean, y_mean = np.average(x, weights=w), np.average(y, weights=w)
    spread = float((w * (x - x_mean) ** 2).sum())
    if spread < 1e-6:
        return Refusal(reason="The entropy has hardly moved between evaluations, so its effect cannot be seen: train on.")
    slope = float((w * (x - x_mean) * (y - y_mean)).sum()) / spread
    if not slope < 0:
        return Refusal(
            reason=f"Scores do not fall with entropy (a = {-slope:.3g}, not above 0), so the law does not describe this run."
        )
    intercept = y_mean - slope * x_mean
    squares = float((w * (y - intercept - slope * x) ** 2).sum())
    variance = squares / (len(x) - 2)
    return EntropyLaw(
        a=-slope,
        b=float(intercept),
        r2=1 - squares / float((w * (y - y_mean) ** 2).sum()),
        residual=math.sqrt(variance),
        se_a=math.sqrt(variance / spread),
        se_ceiling=math.sqrt(variance * (1 / w.sum() + (1 - x_mean) ** 2 / spread)),
        num_points=len(x),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """A law fitted to a run's first evaluations, and how far off it is on the later ones."""

    law: EntropyLaw
    holdout_rmse: float  # root mean square of score - prediction
    num_held_out: int

    def metrics(self, score: float) -> dict[str, float]:
        """As the law's, with the error on later evaluations."""
        return self.law.metrics(score) | {"holdout_rmse": self.holdout_rmse}


def forecast_entropy_law(entropies: Sequence[float], scores: Sequence[float], *, fit_fraction: float = 1 / 3) -> Forecast | Refusal:
    """Fits the law to the first evaluations, in the order of training, at least three of them, and tests it on the rest."""
    num_fitted = max(3, int(len(scores) * fit_fraction))
    if num_fitted >= len(scores):
        return Refusal(reason=f"Of {len(scores)} evaluations none is left to test the law on: evaluate at least 4 times.")
    law = fit_entropy_law(entropies[:num_fitted], scores[:num_fitted])
    if isinstance(law, Refusal):
        return law
    errors = [score - law.predict(entropy) for entropy, score in zip(entropies[num_fitted:], scores[num_fitted:], strict=True)]
    return Forecast(law=law, holdout_rmse=_root_mean_square(np.array(errors)), num_held_out=len(errors))


@dataclass(frozen=True, kw_only=True, slots=True)
class ScalingLaw:
    """log10 loss = -k(N) * log10 X + E(N), k(N) = k_max / (1 + n_0 / N), for a model of N parameters and a training resource X.

    With a single size only its own k and E can be known: k_max and n_0 are None.
    """

    k_max: float | None  # what k approaches for large models
    n_0: float | None  # parameters at which k is half of that
    k: dict[float, float]  # N -> k(N), the speed of learning
    intercept: dict[float, float]  # N -> E(N), free for each size
    rmse_log10: float  # of the fit, every size counting the same, in log10 loss
    rmse_linear: float  # and in the loss itself, which large losses dominate
    n_0_at_bound: bool  # whether n_0 ended at an edge of its search: these sizes then say only on which side of it
    holdout_rmse: float | None  # of the loss at each size's last fifth of X, from a fit to the rest; None where that is refused

    def speed(self, num_parameters: float) -> float:
        """k of a size, fitted or not. Raises ValueError for one that was not where only one was."""
        if self.k_max is None or self.n_0 is None:
            if num_parameters not in self.k:
                raise ValueError("ScalingLaw.speed: fitted to a single size, it says nothing about another; fit two or more.")
            return self.k[num_parameters]
        return self.k_max / (1 + self.n_0 / num_parameters)

    def predict(self, num_parameters: float, resource: float) -> float:
        """The loss of a fitted size after a resource."""
        return 10.0 ** (self.intercept[num_parameters] - self.k[num_parameters] * math.log10(resource))

    def metrics(self) -> dict[str, float]:
        """What to log; the caller puts `predictor/` in front."""
        report = {"scaling_rmse_log10": self.rmse_log10, "scaling_rmse_linear": self.rmse_linear}
        report |= {f"scaling_k_{size:g}": k for size, k in self.k.items()}
        report |= {f"scaling_E_{size:g}": intercept for size, intercept in self.intercept.items()}
        optional = {"scaling_Kmax": self.k_max, "scaling_N0": self.n_0, "scaling_holdout_rmse": self.holdout_rmse}
        return report | {name: value for name, value in optional.items() if value is not None}


LOWEST_LOSS = 1e-4  # below it the logarithm would be about chance
MAX_SPEED = 2.0  # bound on k_max


def fit_scaling_law(
    num_parameters: Sequence[float],
    resource: Sequence[float],
    loss: Sequence[float],
    *,
    n_0_bounds: tuple[float, float] = (1e8, 1e11),
) -> ScalingLaw | Refusal:
    """Least squares in log10 loss, every size counting the same; the three are parallel, one entry a measurement.

    loss is 1 - pass@1 on one held-out set; resource is training FLOPs or samples so far, without the start at 0. For a given
    n_0 the law is linear in k_max and the intercepts (variable projection), so n_0 alone is searched for, on a grid and then
    by golden section: the same numbers give the same fit. Form and bounds as in the repository
    tanzelin430/Mathematical-Reasoning-RL-Scaling-Law, which fits the loss itself by CMA-ES; the fit is rlkit's.
    """
    measured = [np.asarray(values, dtype=np.float64) for values in (num_parameters, resource, loss)]
    if len({len(values) for values in measured}) > 1:
        lengths = ", ".join(str(len(values)) for values in measured)
        raise ValueError(f"fit_scaling_law got {lengths} sizes, resources and losses: pass as many of each.")
    if refusal := _unfit(*measured):
        return refusal
    fit = _fit_curves(_curves(*measured), n_0_bounds)
    if isinstance(fit, Refusal):
        return fit
    return ScalingLaw(
        k_max=fit.k_max,
        n_0=fit.n_0,
        k=fit.k,
        intercept=fit.intercept,
        rmse_log10=math.sqrt(fit.error),
        rmse_linear=math.sqrt(float(np.mean([np.mean(_linear_errors(curve, fit) ** 2) for curve in fit.curves]))),
        n_0_at_bound=fit.n_0 is not None and any(abs(math.log10(fit.n_0 / bound)) < 1e-6 for bound in n_0_bounds),
        holdout_rmse=_holdout_rmse(fit.curves, n_0_bounds),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Curve:
    """The measurements of one model size, by growing resource."""

    size: float
    x: FloatArray  # log10 resource
    y: FloatArray  # log10 loss


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fit:
    curves: list[_Curve]
    k_max: float | None
    n_0: float | None
    k: dict[float, float]
    intercept: dict[float, float]
    error: float  # mean over sizes of the mean squared error in log10 loss


def _unfit(sizes: FloatArray, resource: FloatArray, loss: FloatArray) -> Refusal | None:
    if not (np.isfinite(loss) & (loss >= 0)).all():
        return Refusal(reason="A loss is not finite or below 0: pass 1 - pass@1, and leave failed evaluations out.")
    if not all((np.isfinite(values) & (values > 0)).all() for values in (sizes, resource)):
        return Refusal(reason="A size or a resource is not finite and above 0: leave out the evaluation before training.")
    if len(sizes) == 0:
        return Refusal(reason="There is no measurement to fit: evaluate at least 3 times.")
    for size in np.unique(sizes):
        if (num_points := len(np.unique(resource[sizes == size]))) < 3:
            return Refusal(
                reason=f"The model of {size:g} parameters has {num_points} different resources: evaluate it at 3 or more."
            )
    return None


def _curves(sizes: FloatArray, resource: FloatArray, loss: FloatArray) -> list[_Curve]:
    curves = []
    for size in np.unique(sizes):
        order = np.argsort(resource[sizes == size], kind="stable")
        x, y = np.log10(resource[sizes == size][order]), np.log10(np.maximum(loss[sizes == size][order], LOWEST_LOSS))
        curves.append(_Curve(size=float(size), x=x, y=y))
    return curves


def _fit_curves(curves: list[_Curve], n_0_bounds: tuple[float, float]) -> _Fit | Refusal:
    """Of one size a line, of more the law."""
    if len(curves) == 1:
        fit = _project(curves, None)
    else:
        low, high = (math.log10(bound) for bound in n_0_bounds)
        log_n_0 = _minimise(lambda log_n_0: _project(curves, 10.0**log_n_0).error, low, high)
        fit = _project(curves, 10.0**log_n_0)
    if not max(fit.k.values()) > 0:
        return Refusal(reason="The loss does not fall with the resource, so no speed of learning can be told: train on.")
    return fit


def _project(curves: list[_Curve], n_0: float | None) -> _Fit:
    """The best k_max and intercepts for an n_0, k_max in [0, MAX_SPEED]; without an n_0, k_max is k itself.

    With each size's measurements centred, its intercept drops out and k_max is one regression through the origin.
    """
    shares = [1.0 if n_0 is None else 1 / (1 + n_0 / curve.size) for curve in curves]
    centred = [(curve.x - curve.x.mean(), curve.y - curve.y.mean()) for curve in curves]
    down = sum(-share * float(np.mean(x * y)) for share, (x, y) in zip(shares, centred, strict=True))
    spread = sum(share**2 * float(np.mean(x * x)) for share, (x, _) in zip(shares, centred, strict=True))
    k_max = min(max(down / spread, 0.0), MAX_SPEED)
    errors = [float(np.mean((y + k_max * share * x) ** 2)) for share, (x, y) in zip(shares, centred, strict=True)]
    k = {curve.size: k_max * share for share, curve in zip(shares, curves, strict=True)}
    intercept = {curve.size: float(curve.y.mean() + k[curve.size] * curve.x.mean()) for curve in curves}
    many = n_0 is not None
    return _Fit(curves=curves, k_max=k_max if many else None, n_0=n_0, k=k, intercept=intercept, error=sum(errors) / len(errors))


def _minimise(function: Callable[[float], float], low: float, high: float, *, num_grid: int = 61, num_sections: int = 60) -> float:
    """The best point of a grid, then golden section between its neighbours."""
    grid = np.linspace(low, high, num_grid)
    best = int(np.argmin([function(float(x)) for x in grid]))
    left, right = float(grid[max(best - 1, 0)]), float(grid[min(best + 1, num_grid - 1)])
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(num_sections):
        inner_left, inner_right = right - golden * (right - left), left + golden * (right - left)
        if function(inner_left) <= function(inner_right):
            right = inner_right
        else:
            left = inner_left
    return (left + right) / 2


def _linear_errors(curve: _Curve, fit: _Fit) -> FloatArray:
    """[n]: loss minus the fit's."""
    return 10.0**curve.y - 10.0 ** (fit.intercept[curve.size] - fit.k[curve.size] * curve.x)


def _holdout_rmse(curves: list[_Curve], n_0_bounds: tuple[float, float]) -> float | None:
    """Of the last fifth of each size's measurements, at least one, when the others are fitted."""
    cuts = [len(curve.x) - max(1, len(curve.x) // 5) for curve in curves]
    early = [_Curve(size=curve.size, x=curve.x[:cut], y=curve.y[:cut]) for curve, cut in zip(curves, cuts, strict=True)]
    if any(len(np.unique(curve.x)) < 3 for curve in early):
        return None
    fit = _fit_curves(early, n_0_bounds)
    if isinstance(fit, Refusal):
        return None
    late = [_Curve(size=curve.size, x=curve.x[cut:], y=curve.y[cut:]) for curve, cut in zip(curves, cuts, strict=True)]
    return _root_mean_square(np.concatenate([_linear_errors(curve, fit) for curve in late]))


def _root_mean_square(errors: FloatArray) -> float:
    return math.sqrt(float(np.mean(errors**2)))
