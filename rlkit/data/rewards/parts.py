"""The named parts of rewards, which every sample of a source must have: estimators and means compare them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rlkit.types import RewardResult


def with_all_parts(results: Sequence[RewardResult], sources: Sequence[str]) -> list[RewardResult]:
    """A batch's results with a part of 0 where a reward of 0 names none, as a verdict does: all that others of its source have.

    Any other reward keeps what it says: nobody can know how it divides.
    """
    names: dict[str, dict[str, float]] = {}
    for result, source in zip(results, sources, strict=True):
        names.setdefault(source, {}).update(dict.fromkeys(result.components, 0.0))
    return [
        replace(result, components=dict(names[source])) if result.reward == 0 and not result.components else result
        for result, source in zip(results, sources, strict=True)
    ]
