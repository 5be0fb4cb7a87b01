"""The parts of a native transfer that need no vLLM: what an engine refuses, whom a failure is blamed on, who is used afterwards."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from rlkit.errors import ResourceError, SyncError, WorkerError
from rlkit.workers.native_transfer import (
    Announcement,
    EngineClient,
    Incoming,
    NativeTransport,
    TensorInfo,
    check_device,
    late,
    on_a_thread,
)

INFO = TensorInfo(dtype="float32", shape=(2, 3))


def announce(version: int = 1, **tensors: TensorInfo) -> Announcement:
    return Announcement(version=version, tensors=tensors or {"a": INFO, "b": INFO})


def part(*names: str, dtype: str = "float32") -> dict[str, Any]:
    return {"names": list(names), "dtype_names": [dtype] * len(names), "shapes": [[2, 3]] * len(names)}


@pytest.fixture
def incoming() -> Incoming:
    engine = Incoming({"a": INFO, "b": INFO})
    engine.open()
    return engine


def update(engine: Incoming, version: int) -> None:
    engine.start(announce(version), is_asleep=False)
    engine.receive(part("a"))
    engine.receive(part("b"))
    engine.finish(version)


def test_a_run_s_first_version_may_be_any_and_then_none_is_left_out(incoming):
    for version in (7, 8, 9):
        update(incoming, version)
    for version in (9, 11):
        with pytest.raises(SyncError, match=f"^Weight sync {version}: the engine has version 9, and 10 comes next"):
            incoming.start(announce(version), is_asleep=False)
    incoming.open()  # another run's learner
    update(incoming, 0)


@pytest.mark.parametrize(
    ("announcement", "sentence"),
    [
        (announce(a=INFO), r"1: the learner would send 1 tensors, and 1 of the 2 in the model's checkpoint are not .* first b"),
        (announce(a=INFO, b=INFO, c=INFO), "1: the learner would send c, which the model's checkpoint has not"),
        (
            announce(a=INFO, b=TensorInfo(dtype="float32", shape=(3, 2))),
            r"1: the learner would send b as float32 \[3, 2\]; the checkpoint has float32 \[2, 3\]",
        ),
        (
            announce(a=INFO, b=TensorInfo(dtype="bfloat16", shape=(2, 3))),
            r"b as bfloat16 \[2, 3\]; the checkpoint has float32",
        ),
    ],
)
def test_names_shapes_and_dtypes_are_checked_before_the_start(incoming, announcement, sentence):
    with pytest.raises(SyncError, match=sentence):
        incoming.start(announcement, is_asleep=False)
    update(incoming, 1)  # nothing had begun


def test_what_was_not_announced_or_comes_twice_or_never_is_refused(incoming):
    incoming.start(announce(), is_asleep=False)
    with pytest.raises(SyncError, match="c comes as float32"):
        incoming.receive(part("c"))
    with pytest.raises(SyncError, match=r"a comes as bfloat16 \[2, 3\], which was not announced"):
        incoming.receive(part("a", dtype="bfloat16"))
    engine = Incoming({"a": INFO, "b": INFO})
    engine.open()
    engine.start(announce(), is_asleep=False)
    engine.receive(part("a"))
    with pytest.raises(SyncError, match="1 tensors never came, first b"):
        engine.finish(1)
    with pytest.raises(SyncError, match="has come already"):
        engine.receive(part("a"))


def test_the_order_of_an_update_is_kept(incoming):
    with pytest.raises(SyncError, match="no learner has met this engine"):
        Incoming({}).start(announce(), is_asleep=False)
    with pytest.raises(SyncError, match="an update came without a start"):
        incoming.receive(part("a"))
    with pytest.raises(SyncError, match="finished without having been started"):
        incoming.finish(1)
    with pytest.raises(SyncError, match="the engine's weights are asleep"):
        incoming.start(announce(), is_asleep=True)
    incoming.start(announce(), is_asleep=False)
    with pytest.raises(SyncError, match="finished without having been started"):
        incoming.finish(2)
    with pytest.raises(SyncError, match="update 1 was never finished, so the engine is lost"):
        incoming.start(announce(2), is_asleep=False)


def test_without_a_gpu_the_sentence_says_what_to_write():
    check_device("nccl", "learner rank 0", is_gpu=True)
    with pytest.raises(ResourceError, match=r"^rollout\.weight_transport=nccl: learner rank 0 sees no GPU.* Write rollout\.wei"):
        check_device("nccl", "learner rank 0", is_gpu=False)


class Call:
    """`Pending` that answers, fails, or hangs until its deadline and is then killed, as a Ray actor is."""

    def __init__(self, name: str, outcome: Any):
        self._name, self._outcome = name, outcome

    def is_done(self) -> bool:
        return self._outcome is not threading.Event

    def result(self, deadline_s: float) -> Any:
        if self._outcome is threading.Event:
            time.sleep(deadline_s)
            raise WorkerError(f"{self._name} did not finish within {deadline_s:.0f} s and was killed.")
        if isinstance(self._outcome, Exception):
            raise self._outcome
        return self._outcome


class Engine:
    """`Handle` that notes its calls, all of which end as `outcome`."""

    def __init__(self, name: str = "engine", outcome: Any = None):
        self.name, self.outcome, self.calls, self.is_killed = name, outcome, [], False

    def call(self, method: str, *args: Any, **kwargs: Any) -> Call:
        self.calls.append((method, *args))
        return Call(self.name, self.outcome)

    def kill(self) -> None:
        self.is_killed = True


def client_of(*engines: Engine, ranks: tuple[int, ...] = (1, 1), waits_for: str = "") -> tuple[EngineClient, list[Exception]]:
    told: list[Exception] = []
    client = EngineClient(engines, ranks[: len(engines)], deadline_s=0.2, waits_for=lambda: waits_for)
    client.begin(told.append, announce(3))
    return client, told


def test_every_call_goes_to_every_engine_with_the_version_that_vllm_does_not_know():
    engines = Engine(), Engine()
    client, told = client_of(*engines)
    client.start_weight_update()
    client.update_weights(part("a"))
    client.finish_weight_update()
    for engine in engines:
        assert engine.calls == [("start_weight_update", announce(3)), ("update_weights", part("a")), ("finish_weight_update", 3)]
    assert not told


def test_each_engine_has_places_of_its_own_in_the_communicator():
    engines = Engine(), Engine(), Engine()
    client = EngineClient(engines, (2, 1, 4), deadline_s=1, waits_for=str)
    client.begin(lambda error: None)
    client.init_weight_transfer_engine({"rank_offset": 1, "world_size": 8})
    places = [engine.calls[0][1]["rank_offset"] for engine in engines]
    assert places == [1, 3, 4]  # rank 0 is the learner's
    client.init_weight_transfer_engine({"packed": True})  # ipc has no ranks
    assert engines[2].calls[1] == ("init_weight_transfer_engine", {"packed": True})


def test_a_failure_is_told_at_once_and_a_late_engine_is_named_unless_the_learner_is_late_itself():
    client, told = client_of(Engine(outcome=SyncError("Weight sync 3: no.")))
    with pytest.raises(SyncError, match="no"):
        client.start_weight_update()
    assert str(told[0]) == "Weight sync 3: no."
    client, told = client_of(Engine(name="rollout engine 0", outcome=threading.Event))
    with pytest.raises(WorkerError, match=r"^rollout engine 0 did not finish"):
        client.update_weights(part("a"))
    client, told = client_of(Engine(outcome=threading.Event), waits_for="model.norm.weight")
    with pytest.raises(WorkerError, match=r"^learner rank 0 did not finish gathering model\.norm\.weight with the other ranks"):
        client.update_weights(part("a"))
    assert "gathering" in str(told[0])


def test_what_hangs_on_a_thread_is_left_behind(stuck):
    def hang(tell):
        stuck.wait(100)

    def fail_elsewhere(tell):
        tell(WorkerError("the engine died"))
        stuck.wait(100)

    def run(action, deadline_s=100.0):
        return on_a_thread(action, deadline_s=deadline_s, at_the_end=lambda: late(1, "sending version 3", deadline_s))

    began = time.monotonic()
    with pytest.raises(WorkerError, match=r"^learner rank 1 did not finish sending version 3 within 0 s"):
        run(hang, deadline_s=0.2)
    with pytest.raises(WorkerError, match="the engine died"):
        run(fail_elsewhere)
    with pytest.raises(ZeroDivisionError):
        run(lambda tell: 1 // 0)
    assert run(lambda tell: 5) == 5
    assert time.monotonic() - began < 20


class Group:
    """Learner and engines together, as `NativeTransport` sees them; the learner fails at `fails_at`."""

    def __init__(self, fails_at: int = -1):
        self.handles, self.calls, self._fails_at = [Engine(), Engine()], [], fails_at

    def transfer_ranks(self) -> list[int]:
        return [1, 2]

    def open_transfer(self, kind, engines, ranks) -> None:
        self.calls.append((kind, engines is self.handles, ranks))

    def send_weights(self, version: int) -> None:
        if version == self._fails_at:
            raise WorkerError("rollout engine 1 died during update_weights.")
        self.calls.append(version)

    def discard(self) -> None:
        self.calls.append("discarded")


def test_the_learner_meets_the_engines_once_and_nobody_is_used_after_a_failure():
    learner, engines = Group(fails_at=2), Group()
    transport = NativeTransport(learner, engines, kind="nccl")
    transport.send(0)
    transport.send(1)
    with pytest.raises(WorkerError, match="rollout engine 1 died"):
        transport.send(2)
    assert learner.calls == [("nccl", False, [1, 2]), 0, 1, "discarded"]
    assert engines.calls == ["discarded"]
