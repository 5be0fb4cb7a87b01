"""Which prompts are drawn, by how often the policy has solved them."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from rlkit.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class CurriculumState:
    """What is known of the prompts, by id; plain values, for a checkpoint."""

    pass_rates: dict[str, float] = field(default_factory=dict)  # of those that were visited
    streaks: dict[str, int] = field(default_factory=dict)  # visits in a row that left the pass rate at retire_from or above
    passed_over: dict[str, int] = field(default_factory=dict)  # times that the order reached a retired prompt since its last visit


@dataclass(frozen=True, kw_only=True, slots=True)
class Picked:
    """Places of the order that a draw takes, and what it passed over on the way."""

    places: list[int]
    num_places: int  # of the order that are used up, taken or passed over
    num_retired: int  # passed over because their prompts are solved
    num_difficulty: int  # or too easy or too hard
    state: CurriculumState


@dataclass(kw_only=True, slots=True)
class Curriculum(ABC):
    """Base of the rules for which prompts of the order are drawn."""

    def initial(self) -> CurriculumState:
        """Nothing is known."""
        return CurriculumState()

    @abstractmethod
    def pick(
        self, state: CurriculumState, id_at: Callable[[int], str], *, start: int, count: int, skipped: int, seed: int
    ) -> Picked:
        """`count` places from `start` on, in order, or fewer where too many would be passed over for them.

        `id_at`: place -> the prompt's id. `skipped`: places that the step has passed over before. A function of the arguments
        alone, so a resumed run draws what it would have drawn.
        """

    def is_retired(self, state: CurriculumState, name: str) -> bool:
        """Whether the prompt of that id counts as solved."""
        return False

    def update(self, state: CurriculumState, visits: Iterable[tuple[str, list[float]]]) -> CurriculumState:
        """After visits: a prompt's id and the rewards of its responses."""
        return state

    def metrics(self, state: CurriculumState) -> dict[str, float]:
        """What is known."""
        return {}


@dataclass(kw_only=True, slots=True)
class NoCurriculum(Curriculum):
    """Every prompt is drawn in its turn."""

    def pick(
        self, state: CurriculumState, id_at: Callable[[int], str], *, start: int, count: int, skipped: int, seed: int
    ) -> Picked:
        """The next places."""
        return Picked(places=[*range(start, start + count)], num_places=count, num_retired=0, num_difficulty=0, state=state)


@dataclass(kw_only=True, slots=True)
class PassRate(Curriculum):
    """Draws prompts that are sometimes solved, seldom those that always or never are, and retires solved ones.

        pass_rate = smoothing * pass_rate + (1 - smoothing) * share     the first visit's share as it is
        accept    = max(1 - |pass_rate - target| / max(target, 1 - target), min_accept)

    share is that of a visit's responses with a reward of right_from or more. A prompt that was never visited is always drawn. One
    whose pass rate was retire_from or more after each of retire_after visits in a row is drawn at every revisit_every-th time that
    the order reaches it alone, and is back once it falls below. A moderate difficulty as target: arXiv:2506.05316 and
    arXiv:2504.03380; solved prompts that come back now and then: arXiv:2505.07608. The rule itself is this project's choice.
    """

    target: float = 0.5  # pass rate of the prompts that are always drawn
    min_accept: float = 0.1  # probability of drawing a prompt as far from the target as can be; 1: difficulty does not matter
    right_from: float = 0.5  # a reward at least as high counts as a right answer
    smoothing: float = 0.5  # of the pass rate: share of the old value; 0: none
    retire_from: float = 0.95  # pass rate of a solved prompt; above 1 none is
    retire_after: int = 2  # visits in a row
    revisit_every: int = 10  # times that the order reaches a retired prompt; 0: it never comes back
    max_skipped: int = 10_000  # places of the order that one step may pass over

    def __post_init__(self):
        for name, low, what in (("target", 0, "0.5 is usual"), ("smoothing", 0, "0.5 is usual")):
            if not low <= getattr(self, name) <= 1:
                raise ConfigError(f"curriculum.{name}={getattr(self, name)}: write a number in [0, 1]; {what}.")
        if self.smoothing == 1:
            raise ConfigError("curriculum.smoothing=1.0: the first visit would decide for good. Write less; 0.5 is usual.")
        if not 0 < self.min_accept <= 1:
            raise ConfigError(
                f"curriculum.min_accept={self.min_accept}: a prompt that is never drawn is never measured again. Write a number in "
                "(0, 1]; 0.1 is usual."
            )
        if not self.retire_from > 0:
            raise ConfigError(f"curriculum.retire_from={self.retire_from}: every prompt is solved. Write a number above 0.")
        for name, lowest, usual in (("retire_after", 1, 2), ("revisit_every", 0, 10), ("max_skipped", 1, 10_000)):
            if (value := getattr(self, name)) < lowest:
                raise ConfigError(f"curriculum.{name}={value}: write {lowest} or more; {usual} is usual.")

    def pick(
        self, state: CurriculumState, id_at: Callable[[int], str], *, start: int, count: int, skipped: int, seed: int
    ) -> Picked:
        """See the base class; the state that is returned has counted the times that retired prompts were reached."""
        places: list[int] = []
        passed_over, num_retired, num_difficulty = dict(state.passed_over), 0, 0
        place = start
        while len(places) < count and skipped + num_retired + num_difficulty < self.max_skipped:
            name = id_at(place)
            if self.is_retired(state, name):
                passed_over[name] = passed_over.get(name, 0) + 1
                if self.revisit_every and passed_over[name] >= self.revisit_every:
                    passed_over[name] = 0  # in case that the order reaches it again before its visit is known
                    places.append(place)
                else:
                    num_retired += 1
            elif _uniform(seed, place) < self.accept(state.pass_rates.get(name)):
                places.append(place)
            else:
                num_difficulty += 1
            place += 1
        return Picked(
            places=places,
            num_places=place - start,
            num_retired=num_retired,
            num_difficulty=num_difficulty,
            state=CurriculumState(pass_rates=state.pass_rates, streaks=state.streaks, passed_over=passed_over),
        )

    def is_retired(self, state: CurriculumState, name: str) -> bool:
        """Then it is drawn for revisits alone."""
        return state.streaks.get(name, 0) >= self.retire_after

    def accept(self, pass_rate: float | None) -> float:
        """The probability that a prompt is drawn in its turn; None: of one that was never visited."""
        if pass_rate is None:
            return 1.0
        return max(1 - abs(pass_rate - self.target) / max(self.target, 1 - self.target), self.min_accept)

    def update(self, state: CurriculumState, visits: Iterable[tuple[str, list[float]]]) -> CurriculumState:
        """A visit without a reward says nothing."""
        pass_rates, streaks, passed_over = dict(state.pass_rates), dict(state.streaks), dict(state.passed_over)
        for name, rewards in visits:
            if not rewards:
                continue
            share = sum(reward >= self.right_from for reward in rewards) / len(rewards)
            old = pass_rates.get(name, share)
            pass_rates[name] = self.smoothing * old + (1 - self.smoothing) * share
            streaks[name] = streaks.get(name, 0) + 1 if pass_rates[name] >= self.retire_from else 0
            passed_over.pop(name, None)
        return CurriculumState(pass_rates=pass_rates, streaks=streaks, passed_over=passed_over)

    def metrics(self, state: CurriculumState) -> dict[str, float]:
        """Of the prompts that were ever visited: how many, how many of them are retired, and their mean pass rate."""
        rates, retired = state.pass_rates, sum(self.is_retired(state, name) for name in state.streaks)
        metrics = {"visited": float(len(rates)), "retired": float(retired)}
        return metrics | ({"pass_rate_mean": sum(rates.values()) / len(rates)} if rates else {})


def _uniform(seed: int, place: int) -> float:
    """In [0, 1). The order of an epoch comes from the same key with a counter that starts at 0."""
    key, counter = np.array([seed % 2**64, place], dtype=np.uint64), np.array([0, 0, 0, 1], dtype=np.uint64)
    return float(np.random.Philox(key=key, counter=counter).random_raw() >> 11) * 2.0**-53
