"""Engines and learner on devices of their own, or by turns on the same ones (`cluster.placement`)."""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import Protocol

from rlkit.controller.cluster import START_DEADLINE_S
from rlkit.workers.handle import Handle, wait


class Turns(Protocol):
    """Who may use the devices. Engines and learner ask before they are used; nobody else has to think of it."""

    def add_engines(self, engines: Sequence[Handle]) -> None:
        """Once, before the learner loads its model."""
        ...

    def add_learner(self, learner: Sequence[Handle]) -> None:
        """Once, when the learner's model is loaded."""
        ...

    def sample(self) -> None:
        """Before engines are asked for tokens."""
        ...

    def learn(self) -> None:
        """Before the learner is asked for anything but weights."""
        ...

    def sync(self) -> None:
        """Before weights go from the learner to the engines: both have theirs on the device now, and no cache is there."""
        ...


class SideBySide:
    """Implements `Turns` where each has devices of its own: always everybody's."""

    def add_engines(self, engines: Sequence[Handle]) -> None: ...

    def add_learner(self, learner: Sequence[Handle]) -> None: ...

    def sample(self) -> None: ...

    def learn(self) -> None: ...

    def sync(self) -> None: ...


class Turn(Enum):
    """What the devices hold."""

    learn = "learn"  # the learner: weights, gradients, optimiser state. Engines sleep, their weights in host memory
    sync = "sync"  # the learner, and the engines' weights
    sample = "sample"  # engines: weights and caches. The learner waits in host memory


class ByTurns:
    """Implements `Turns` on shared devices.

    Never are a learner's optimiser state and an engine's cache there together, and an engine gets weights only while it has room
    for them: updating one that sleeps would crash it. A reference scorer and reward models, if there are any, keep their weights on
    their device.
    """

    def __init__(self):
        self._engines: Sequence[Handle] = ()
        self._learner: Sequence[Handle] = ()
        self._turn = Turn.learn

    def add_engines(self, engines: Sequence[Handle]) -> None:
        self._engines = engines
        self._all(engines, "sleep")

    def add_learner(self, learner: Sequence[Handle]) -> None:
        self._learner = learner

    def sample(self) -> None:
        if self._turn is not Turn.sample:
            self._all(self._learner, "offload")
        if self._turn is Turn.learn:
            self._all(self._engines, "wake", "weights")
        if self._turn is not Turn.sample:
            self._all(self._engines, "wake", "kv_cache")
        self._turn = Turn.sample

    def learn(self) -> None:
        if self._turn is Turn.sync:
            self.sample()  # vLLM puts to sleep what is wholly awake
        if self._turn is Turn.sample:
            self._all(self._engines, "sleep")
            self._all(self._learner, "onload")
        self._turn = Turn.learn

    def sync(self) -> None:
        if self._turn is Turn.sample:
            self.learn()
        if self._turn is Turn.learn:
            self._all(self._engines, "wake", "weights")
        self._turn = Turn.sync

    def _all(self, handles: Sequence[Handle], method: str, *args: str) -> None:
        wait([handle.call(method, *args) for handle in handles], START_DEADLINE_S)
