"""Measurements that merge: over microbatches, ranks and optimiser steps, in any order, without a bias.

A mean of means is wrong whenever the parts differ in size, so a mean travels as its numerator and denominator.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from rlkit.core.values import ExplainedVariance


@dataclass(frozen=True, slots=True)
class Mean:
    """A ratio of two sums. `value` is NaN when nothing was counted."""

    total: float
    count: float

    def merge(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.count + other.count)

    @property
    def value(self) -> float:
        return self.total / self.count if self.count else float("nan")


@dataclass(frozen=True, slots=True)
class Sum:
    """A total."""

    total: float

    def merge(self, other: Sum) -> Sum:
        return Sum(self.total + other.total)

    @property
    def value(self) -> float:
        return self.total


@dataclass(frozen=True, slots=True)
class Max:
    """The largest seen."""

    value: float

    def merge(self, other: Max) -> Max:
        return Max(max(self.value, other.value))


@dataclass(frozen=True, slots=True)
class Min:
    """The smallest seen."""

    value: float

    def merge(self, other: Min) -> Min:
        return Min(min(self.value, other.value))


@dataclass(frozen=True, slots=True)
class Last:
    """A setting or state: the most recent wins (learning rate, coefficient)."""

    value: float

    def merge(self, other: Last) -> Last:
        return other


Metric = Mean | Sum | Max | Min | Last | ExplainedVariance
M = TypeVar("M", Mean, Sum, Max, Min, Last, ExplainedVariance)


def merge(parts: Iterable[Mapping[str, Metric]]) -> dict[str, Metric]:
    """Merge by name. Raises TypeError where one name carries two kinds of metric."""
    merged: dict[str, Metric] = {}
    for part in parts:
        for name, metric in part.items():
            merged[name] = _merge_pair(name, merged[name], metric) if name in merged else metric
    return merged


def _merge_pair(name: str, left: Metric, right: Metric) -> Metric:
    if type(left) is not type(right):
        raise TypeError(f"metric {name} is a {type(left).__name__} in one part and a {type(right).__name__} in another")
    return left.merge(right)  # pyright: ignore[reportArgumentType]  # the line above made the kinds equal


def values(metrics: Mapping[str, Metric]) -> dict[str, float]:
    """The plain numbers, for logging."""
    return {name: metric.value for name, metric in metrics.items()}
