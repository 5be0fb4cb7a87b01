"""Where a run is heading: the entropy-performance law, fitted to its first evaluations."""

from __future__ import annotations

from rlkit.controller.tracking.format import number
from rlkit.controller.tracking.history import History
from rlkit.core.prediction import Forecast, Refusal, forecast_entropy_law


def scored(history: History) -> list[tuple[float, float]]:
    """Entropy and held-out pass@1 of one policy each, in the order of training.

    The policy of an evaluation is the one that the step after it samples from and measures, so the newest has no entropy yet.
    """
    entropies = {row["step"]: row["entropy/mean"] for row in history.steps if "entropy/mean" in row}
    return [
        (entropies[evaluated.step + 1], evaluated.estimates["pass@1"].value)
        for evaluated in history.evaluations
        if evaluated.step + 1 in entropies and "pass@1" in evaluated.estimates
    ]


def forecast(history: History) -> Forecast | Refusal:
    """The law of this run, or why there is none."""
    pairs = scored(history)
    return forecast_entropy_law([entropy for entropy, _ in pairs], [score for _, score in pairs])


def metrics(history: History) -> dict[str, float]:
    """For the curves, as `predictor/*`; nothing where there is no law."""
    found = forecast(history)
    if isinstance(found, Refusal):
        return {}
    return {f"predictor/{name}": value for name, value in found.metrics(scored(history)[-1][1]).items()}


def fact(history: History) -> str | None:
    """For the summary; None for a run that was evaluated too seldom to expect a forecast."""
    found = forecast(history)
    if isinstance(found, Forecast):
        return (
            f"pass@1 {number(found.law.ceiling)} +- {number(found.law.se_ceiling)} once all entropy is spent "
            f"(off by {number(found.holdout_rmse)} on {found.num_held_out} later evaluations)"
        )
    return f"none. {found.reason}" if len(scored(history)) > 3 else None
