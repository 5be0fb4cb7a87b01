"""Engines and learner on the same devices: who may use them when."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import pytest

from rlkit.controller.local import Done
from rlkit.controller.turns import ByTurns


@dataclass
class Device:
    """What lies on it."""

    held: set[str] = field(default_factory=set)


class Fake:
    def kill(self) -> None:
        raise AssertionError("turns kill nobody")


class FakeEngine(Fake):
    """As strict as vLLM is: what is awake in part cannot be put to sleep, and what is awake cannot be woken."""

    name = "rollout engine 0"

    def __init__(self, device: Device):
        self.device = device
        device.held |= {"weights", "kv_cache"}

    def call(self, method: str, *args: Any, **kwargs: Any) -> Done:
        held = self.device.held
        if method == "sleep":
            assert {"weights", "kv_cache"} <= held
            held -= {"weights", "kv_cache"}
        else:
            (what,) = args
            assert method == "wake"
            assert what not in held
            held.add(what)
        assert not {"kv_cache", "learner"} <= held, "both do not fit"
        return Done(None)


class FakeLearner(Fake):
    name = "learner rank 0"

    def __init__(self, device: Device):
        self.device = device
        device.held.add("learner")

    def call(self, method: str, *args: Any, **kwargs: Any) -> Done:
        held = self.device.held
        if method == "offload":
            assert "learner" in held
            held.remove("learner")
        else:
            assert method == "onload"
            assert "learner" not in held
            held.add("learner")
        assert not {"kv_cache", "learner"} <= held, "both do not fit"
        return Done(None)


@pytest.fixture
def shared() -> tuple[ByTurns, Device]:
    device, turns = Device(), ByTurns()
    turns.add_engines([FakeEngine(device)])
    assert device.held == set()  # the learner has the device to itself while it loads
    turns.add_learner([FakeLearner(device)])
    return turns, device


def test_each_turn_has_on_the_device_what_it_needs_and_nothing_else(shared):
    turns, device = shared
    turns.sample()
    assert device.held == {"weights", "kv_cache"}
    turns.learn()
    assert device.held == {"learner"}
    turns.sync()
    assert device.held == {"learner", "weights"}


def test_any_order_of_turns_keeps_within_the_memory_and_never_wakes_or_sleeps_twice(shared):
    turns, device = shared
    expected = {"sample": {"weights", "kv_cache"}, "learn": {"learner"}, "sync": {"learner", "weights"}}
    draw = random.Random(0)
    for _ in range(300):
        turn = draw.choice(sorted(expected))
        getattr(turns, turn)()
        assert device.held == expected[turn]
