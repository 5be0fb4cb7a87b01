"""The run's rewards: one judge of completions, or the weighted sum of several, each with workers of its own.

One that hangs or fails does not slow the others; a sample has a reward when every judge of its source gave one. Functions run in
pools of this machine's processes; reward models live where the run's workers do, and `rlkit/controller/rewards.py` brings them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from rlkit.data.rewards.parts import with_all_parts
from rlkit.data.rewards.pool import RewardItem, RewardPool
from rlkit.data.rewards.signatures import AUTO
from rlkit.errors import ConfigError
from rlkit.settings import EnvironmentReward, Reward, RewardChoice, WeightedRewards
from rlkit.types import Prompt, RewardResult, RewardStatus

# Where functions disagree about a sample: what kept it from being scored comes first, then what was found wrong with it.
_GRAVITY = (
    RewardStatus.timeout,
    RewardStatus.error,
    RewardStatus.skipped,
    RewardStatus.unparsable,
    RewardStatus.wrong,
    RewardStatus.ok,
)


class Rewards(Protocol):
    """Scores completions."""

    def score(self, items: Sequence[RewardItem]) -> list[RewardResult]:
        """In the order of the items, one each."""
        ...

    def missing(self, source: str, columns: Mapping[str, Any]) -> str | None:
        """The column without which a row of that source cannot be scored."""
        ...

    def start(self, prompts: Sequence[Prompt]) -> None:
        """Once, before the first item, when all else about the run is known to be right: starts what costs a device.

        `prompts`: of the data, held-out ones among them. Raises ConfigError where their completions cannot be scored.
        """
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Rewards: ...

    def __exit__(self, *_: object) -> None: ...


class Scoring(Protocol):
    """Items under way."""

    def result(self) -> list[RewardResult]:
        """Wait for it: in the order of the items, one each."""
        ...


class Judge(Rewards, Protocol):
    """Rewards that can be under way beside others."""

    def submit(self, items: Sequence[RewardItem]) -> Scoring: ...


def open_functions(settings: RewardChoice, *, base_dir: Path, models: Mapping[str, Judge] | None = None) -> Rewards:
    """Starts the workers and waits for them. Raises ConfigError for a function that cannot be found, imported or called.

    `models`: what scores for each of `reward.models`.
    """
    match settings:
        case WeightedRewards():
            return WeightedPools(settings, base_dir=base_dir, models=models or {})
        case EnvironmentReward():
            return NoFunction()
        case Reward():
            return RewardPool(settings.fn, settings, base_dir=base_dir, convention=settings.signature)
        case _:
            raise ConfigError(f"reward={type(settings).__name__}: rlkit/data/rewards/weighted.py cannot open it. Add it there.")


def check_sources(settings: RewardChoice, prompts: Iterable[Prompt]) -> None:
    """Raises ConfigError where `reward.sources` names a source that no prompt is of: its function would silently not judge it."""
    if not isinstance(settings, WeightedRewards):
        return
    sources = dict.fromkeys(prompt.source for prompt in prompts)
    for name, judged in settings.sources.items():
        if (stranger := next((source for source in judged if source not in sources), None)) is not None:
            raise ConfigError(
                f"reward.sources.{name}: no prompt is of the source {stranger}. The sources are {', '.join(sources)}; "
                "data.source_column says which column they come from, and without one it is the name of the data."
            )


class NoFunction:
    """Implements `Rewards` where the environment gives all that there is."""

    def score(self, items: Sequence[RewardItem]) -> list[RewardResult]:
        return [RewardResult(sample_id=item.sample_id, status=RewardStatus.ok, reward=0.0) for item in items]

    def missing(self, source: str, columns: Mapping[str, Any]) -> str | None:
        return None

    def start(self, prompts: Sequence[Prompt]) -> None: ...

    def close(self) -> None: ...

    def __enter__(self) -> NoFunction:
        return self

    def __exit__(self, *_: object) -> None: ...


class WeightedPools:
    """Implements `Rewards` with a pool per function, and models."""

    def __init__(self, settings: WeightedRewards, *, base_dir: Path, models: Mapping[str, Judge]):
        self._settings = settings
        self._pools: dict[str, Judge] = {}
        with ExitStack() as opened:  # what is open when the next one fails is closed
            for name, fn in settings.fns.items():
                pool = RewardPool(fn, settings, base_dir=base_dir, convention=settings.signatures.get(name, AUTO))
                self._pools[name] = opened.enter_context(pool)
            for name, model in models.items():
                opened.enter_context(model)
                self._pools[name] = model
            self._stack = opened.pop_all()

    def missing(self, source: str, columns: Mapping[str, Any]) -> str | None:
        judges = [pool for name, pool in self._pools.items() if self._judges(name, source)]
        if not judges:
            raise ConfigError(
                f"reward.sources: no function judges the data source {source}. Name it under one of them; data.source_column says "
                "which column has a row's source, and without one it is the name of the data."
            )
        return next((column for pool in judges if (column := pool.missing(source, columns)) is not None), None)

    def start(self, prompts: Sequence[Prompt]) -> None:
        for name, pool in self._pools.items():
            pool.start([prompt for prompt in prompts if self._judges(name, prompt.source)])

    def score(self, items: Sequence[RewardItem]) -> list[RewardResult]:
        under_way: dict[str, tuple[list[int], Scoring]] = {}
        for name, pool in self._pools.items():
            judged = [position for position, item in enumerate(items) if self._judges(name, item.source)]
            under_way[name] = (judged, pool.submit([items[position] for position in judged]))
        found: list[dict[str, RewardResult]] = [{} for _ in items]
        for name, (judged, scoring) in under_way.items():
            results = with_all_parts(scoring.result(), [items[position].source for position in judged])
            for position, result in zip(judged, results, strict=True):
                found[position][name] = result
        return [self._sum(item.sample_id, results) for item, results in zip(items, found, strict=True)]

    def _judges(self, name: str, source: str) -> bool:
        """Whether the function has a say about samples of that source."""
        return name not in self._settings.sources or source in self._settings.sources[name]

    def _sum(self, sample_id: str, results: Mapping[str, RewardResult]) -> RewardResult:
        """One sample's. A part that is itself a sum is one component: they share out the reward, each of it once. Its own parts
        stand beside them, as the function gave them."""
        status = min((result.status for result in results.values()), key=_GRAVITY.index)
        message = "; ".join(f"{name}: {result.message}" for name, result in results.items() if result.message)
        parts: dict[str, float] = {}
        total: float | None = 0.0
        for name, result in results.items():
            if result.reward is None:
                total = None
            else:
                weight = self._settings.weights.get(name, 1.0)
                total = None if total is None else total + weight * result.reward
                parts[name] = weight * result.reward
        return RewardResult(
            sample_id=sample_id,
            status=status,
            reward=total,
            components=parts,
            message=message,
            statuses={name: result.status for name, result in results.items()},
            subparts={f"{name}/{part}": value for name, result in results.items() for part, value in result.components.items()},
        )

    def close(self) -> None:
        self._stack.close()

    def __enter__(self) -> WeightedPools:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
