"""Weights from GPU to GPU by vLLM's own back ends, `nccl` and `ipc`: what needs no vLLM of it. Not run on a GPU yet.

vLLM lets the learner's rank 0 drive the engines: start, update (beside its own broadcast), finish. Only these control messages
pass through here. Names, shapes and dtypes are checked against the model's checkpoint before anything is received. The bytes are
not digested, for they never leave the GPUs; that they are the right ones is what the sync's check of behaviour shows.

A collective waits for ever for a member that died. So every update has a deadline, and after a failure nothing is tried again and
nobody who took part is used again: a communicator in which a call is stuck stays stuck, and half-loaded weights stay half-loaded.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

from rlkit.errors import ResourceError, RlkitError, SyncError, WorkerError
from rlkit.workers.handle import Handle, wait

# A hang is told by whoever waits closest to it: the engines' calls end first, then the learner's own, then the controller's.
GRACE_S = 5.0

Tell = Callable[[RlkitError], None]  # hears of a failure before whoever met it can raise it


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """What is known of a tensor without its bytes."""

    dtype: str  # of torch, such as "bfloat16"
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Announcement:
    """What an update is about to bring, in the order of its arrival."""

    version: int
    tensors: dict[str, TensorInfo]


def check_device(kind: str, who: str, *, is_gpu: bool) -> None:
    """Raises ResourceError where a native transport has no device to work on."""
    if not is_gpu:
        raise ResourceError(
            f"rollout.weight_transport={kind}: {who} sees no GPU, and {kind} moves weights between GPUs. "
            "Write rollout.weight_transport=host."
        )


# --- the engine's side --------------------------------------------------------------------------------------------------


class Incoming:
    """What may be done to one engine's weights, and when. Each method raises SyncError before the engine does anything."""

    def __init__(self, expected: Mapping[str, TensorInfo]):
        """`expected`: the tensors of the engine's own checkpoint, so that a learner that forgets one cannot vouch for itself."""
        self._expected = expected
        self._is_open = False
        self._last: int | None = None  # version that the present learner sent
        self._under_way: Announcement | None = None  # stays after a failure: half-loaded weights cannot be updated again
        self._missing: dict[str, TensorInfo] = {}

    def open(self) -> None:
        """A learner has met the engine. Its first version may be any; the engine may have served another run."""
        self._is_open, self._last = True, None

    def start(self, announcement: Announcement, *, is_asleep: bool) -> None:
        version, tensors = announcement.version, announcement.tensors
        if not self._is_open:
            raise SyncError(f"Weight sync {version}: no learner has met this engine.")
        if self._under_way is not None:
            raise SyncError(f"Weight sync {version}: update {self._under_way.version} was never finished, so the engine is lost.")
        if is_asleep:  # vLLM would write to memory that it gave back
            raise SyncError(f"Weight sync {version}: the engine's weights are asleep. Wake them first.")
        if self._last is not None and version != self._last + 1:
            raise SyncError(f"Weight sync {version}: the engine has version {self._last}, and {self._last + 1} comes next.")
        if missing := sorted(self._expected.keys() - tensors.keys()):
            raise SyncError(
                f"Weight sync {version}: the learner would send {len(tensors)} tensors, and {len(missing)} of the "
                f"{len(self._expected)} in the model's checkpoint are not among them, first {missing[0]}."
            )
        if extra := sorted(tensors.keys() - self._expected.keys()):
            raise SyncError(f"Weight sync {version}: the learner would send {extra[0]}, which the model's checkpoint has not.")
        for name, info in tensors.items():
            if info != (expected := self._expected[name]):
                raise SyncError(f"Weight sync {version}: the learner would send {name} as {info}; the checkpoint has {expected}.")
        self._under_way, self._missing = announcement, dict(tensors)

    def receive(self, update_info: Mapping[str, Any]) -> None:
        """`update_info`: vLLM's own, of one part or of all."""
        if self._under_way is None:
            raise SyncError("Weight sync: an update came without a start.")
        parts = zip(update_info["names"], update_info["dtype_names"], update_info["shapes"], strict=True)
        for name, dtype, shape in parts:
            info = TensorInfo(dtype=dtype, shape=tuple(shape))
            if self._missing.pop(name, None) != info:
                raise SyncError(
                    f"Weight sync {self._under_way.version}: {name} comes as {info}, which was not announced or has come already."
                )

    def finish(self, version: int) -> None:
        if self._under_way is None or version != self._under_way.version:
            raise SyncError(f"Weight sync {version}: it is finished without having been started.")
        if self._missing:
            raise SyncError(f"Weight sync {version}: {len(self._missing)} tensors never came, first {next(iter(self._missing))}.")
        self._under_way, self._last = None, version


# --- the learner's side -------------------------------------------------------------------------------------------------


class EngineClient:
    """Implements vLLM's `VLLMWeightSyncClient`: each call goes to all engines and waits for all, within one deadline per update."""

    def __init__(self, engines: Sequence[Handle], ranks: Sequence[int], *, deadline_s: float, waits_for: Callable[[], str]):
        """`ranks`: processes of each engine that receive weights. `waits_for`: the tensor for which this rank waits for the
        learner's other ranks at the moment, or nothing: with one, it is not the engines that are late."""
        self._engines, self._ranks = engines, ranks
        self._deadline_s, self._waits_for = deadline_s, waits_for
        self._announcement = Announcement(version=-1, tensors={})
        self._ends = 0.0
        self._tell: Tell = lambda error: None

    def begin(self, tell: Tell, announcement: Announcement | None = None) -> None:
        """The deadline runs from now. `tell` hears of a failure at once, where vLLM's own caller may be stuck in a collective."""
        self._ends = time.monotonic() + self._deadline_s
        self._tell = tell
        if announcement is not None:
            self._announcement = announcement

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        # vLLM counts an engine's processes from the offset on; several engines would all take the first places.
        before = accumulate(self._ranks, initial=0)
        offsets = [{"rank_offset": init_info["rank_offset"] + n} if "rank_offset" in init_info else {} for n in before]
        self._all("init_weight_transfer_engine", [init_info | offset for offset in offsets[: len(self._engines)]])

    def start_weight_update(self) -> None:
        self._all("start_weight_update", [self._announcement] * len(self._engines))

    def update_weights(self, update_info: dict[str, Any] | list[dict[str, Any]]) -> None:
        assert isinstance(update_info, dict)  # the backends that send one per process are not used
        self._all("update_weights", [update_info] * len(self._engines))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """vLLM's trainers do not know the version; the announcement does."""
        self._all("finish_weight_update", [self._announcement.version] * len(self._engines))

    def _all(self, method: str, arguments: Sequence[Any]) -> None:
        try:
            pending = [handle.call(method, argument) for handle, argument in zip(self._engines, arguments, strict=True)]
            wait(pending, max(self._ends - time.monotonic(), 0.0))
        except RlkitError as error:
            name = self._waits_for() if time.monotonic() >= self._ends else ""
            failure = late(0, gathering(name), self._deadline_s) if name else error
            self._tell(failure)
            raise failure from error


def gathering(name: str) -> str:
    return f"gathering {name} with the other ranks"


def late(rank: int, what: str, deadline_s: float) -> WorkerError:
    name = f"learner rank {rank}"
    return WorkerError(f"{name} did not finish {what} within {deadline_s:.0f} s.", worker=name)


def on_a_thread(action: Callable[[Tell], Any], *, deadline_s: float, at_the_end: Callable[[], WorkerError]) -> Any:
    """The action's result, or the first failure that it ended with or told of; at the deadline, the error of `at_the_end`.

    On a thread of its own that nobody waits for, because a collective whose other side is gone never returns.
    """
    outcomes: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcomes.put((action(lambda error: outcomes.put((None, error))), None))
        except Exception as error:  # whatever it is belongs to the caller, not to a thread nobody watches
            outcomes.put((None, error))

    threading.Thread(target=run, name="weight transfer", daemon=True).start()
    try:
        result, failure = outcomes.get(timeout=deadline_s)
    except queue.Empty:
        raise at_the_end() from None
    if failure is not None:
        raise failure
    return result


# --- the controller's side ----------------------------------------------------------------------------------------------


class SendingLearner(Protocol):
    """What `NativeTransport` asks of all learner ranks together."""

    def open_transfer(self, kind: str, engines: Sequence[Handle], ranks: Sequence[int]) -> None: ...
    def send_weights(self, version: int) -> None: ...
    def discard(self) -> None: ...


class ReceivingEngines(Protocol):
    """What it asks of all engines together."""

    @property
    def handles(self) -> Sequence[Handle]: ...
    def transfer_ranks(self) -> list[int]: ...
    def discard(self) -> None: ...


class NativeTransport:
    """Implements `weight_sync.Transport`. The learner meets the engines before the first version."""

    def __init__(self, learner: SendingLearner, engines: ReceivingEngines, *, kind: str):
        self._learner, self._engines, self._kind = learner, engines, kind
        self._is_open = False

    def send(self, version: int) -> None:
        try:
            if not self._is_open:
                self._learner.open_transfer(self._kind, self._engines.handles, self._engines.transfer_ranks())
                self._is_open = True
            self._learner.send_weights(version)
        except WorkerError:
            # All of them, and not only the one at fault: the others may wait for it in a collective, for ever.
            self._learner.discard()
            self._engines.discard()
            raise
