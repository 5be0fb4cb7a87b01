"""Places workers, calls them, and turns a death into an error. The only module that imports Ray."""

from __future__ import annotations

import importlib
import logging
import os
import socket
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from rlkit.controller.local import InProcessCluster
from rlkit.controller.placement import Seat
from rlkit.errors import EngineLostError, ResourceError, RlkitError, WorkerError
from rlkit.settings import ClusterSettings, ExistingRay, InProcess, LocalRay
from rlkit.workers.handle import Handle
from rlkit.workers.memory import keep_freed_memory

START_DEADLINE_S = 600.0  # a worker's first call also waits for its imports and its model
PLACEMENT_DEADLINE_S = 10.0  # until Ray has found room; it may just be taking back what a worker held that was stopped
ROOM_S = 2.0  # until what an earlier run of this process holds is given up for a worker of this one


class Cluster(Protocol):
    """Where workers live. It outlives a run: the next run with equal needs finds its engines still there."""

    def begin_run(self) -> None:
        """What is not asked for from here on may be stopped where its room is needed."""
        ...

    def worker(self, key: Hashable, name: str, target: str, *args: Any, seat: Seat, **kwargs: Any) -> Handle:
        """The worker known by `key`, started as `target` ("module:Class") with these arguments if there is none yet.

        Kinds of workers take turns on the same cores: that is right while a step samples, scores and learns one after the other.
        """
        ...

    def meeting_point(self, keys: Sequence[Hashable]) -> str:
        """host:port of a store where these workers find each other once they start, wherever they are placed; it stays until
        `close`. Where only some of them run already, those are stopped: they could not meet the others any more."""
        ...

    def places(self) -> dict[str, str]:
        """Name of every worker -> "host:process id", for debuggers and profilers."""
        ...

    def close(self) -> None: ...


@contextmanager
def open_cluster(settings: ClusterSettings) -> Iterator[Cluster]:
    """The cluster that the settings name, closed at the end whatever happens."""
    cluster: Cluster = InProcessCluster() if isinstance(settings, InProcess) else RayCluster(settings)
    try:
        yield cluster
    finally:
        cluster.close()


def core_share(share: tuple[int, int]) -> list[int]:
    """The cores of part i of n of those that this process may use; with more parts than cores, parts share."""
    cores = sorted(os.sched_getaffinity(0))
    index, count = share
    if count >= len(cores):
        return [cores[index % len(cores)]]
    bounds = [round(part * len(cores) / count) for part in range(count + 1)]
    return cores[bounds[index] : bounds[index + 1]]


class ActorShell:
    """What runs in a Ray actor: binds its cores, keeps its memory, then builds the worker and passes calls on."""

    def __init__(self, target: str, share: tuple[int, int], args: tuple, kwargs: dict):
        keep_freed_memory()
        # Explicit cores: two thread pools of unequal mind on the same cores cost several times their fair share.
        os.sched_setaffinity(0, core_share(share))
        module, cls = target.split(":")
        self._worker = getattr(importlib.import_module(module), cls)(*args, **kwargs)

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        return getattr(self._worker, method)(*args, **kwargs)

    def place(self) -> str:
        return f"{socket.gethostname()}:{os.getpid()}"


class RayPending:
    """Implements `Pending`."""

    def __init__(self, ref: Any, handle: RayHandle, method: str):
        self.ref = ref
        self._handle = handle
        self._method = method

    def is_done(self) -> bool:
        import ray

        done, _ = ray.wait([self.ref], timeout=0)
        return bool(done)

    def result(self, deadline_s: float) -> Any:
        import ray
        from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

        name = self._handle.name
        try:
            return ray.get(self.ref, timeout=deadline_s)
        except GetTimeoutError:
            self._handle.kill()
            message = f"{name} did not finish {self._method} within {deadline_s:.0f} s and was killed."
            raise WorkerError(message, worker=name) from None
        except RayActorError as error:
            self._handle.is_alive = False
            if self._handle.failure is not None:  # another call's, which it was stopped for
                raise self._handle.failure from None
            raise WorkerError(f"{name} died during {self._method}: {cause_of_death(error)}", worker=name) from error
        except RayTaskError as error:
            raise self._failure(error.cause) from error

    def _failure(self, cause: BaseException | None) -> BaseException:
        """What the worker's own exception becomes here."""
        name = self._handle.name
        if isinstance(cause, RlkitError) and not isinstance(cause, WorkerError):
            return cause
        if not isinstance(cause, WorkerError):
            failure = WorkerError(f"{name} failed in {self._method}: {type(cause).__name__}: {first_line(cause)}", worker=name)
        else:
            failure = cause if cause.worker else type(cause)(f"{name}: {cause}", worker=name)
        if isinstance(cause, EngineLostError) or not isinstance(cause, RlkitError):
            # Nobody knows what state it is in, and a later run would find it.
            self._handle.failure = failure
            self._handle.kill()
        return failure


class RayHandle:
    """Implements `Handle`."""

    def __init__(self, name: str, actor: Any, seat: Seat):
        self.name, self.seat = name, seat
        self.is_alive = True  # as far as its calls have shown
        self.failure: WorkerError | None = None  # that it was stopped for: what its other calls end with is only a consequence
        self._actor = actor

    def call(self, method: str, *args: Any, **kwargs: Any) -> RayPending:
        values = [arg.ref if isinstance(arg, RayPending) else arg for arg in args]
        return RayPending(self._actor.call.remote(method, *values, **kwargs), self, method)

    def place(self) -> RayPending:
        return RayPending(self._actor.place.remote(), self, "place")

    def kill(self) -> None:
        import ray

        self.is_alive = False
        ray.kill(self._actor)


def cause_of_death(error: BaseException) -> str:
    """Ray reports an exception in an actor's constructor as a traceback, whose last line is the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if "creation task" in str(error) and lines else first_line(error)


def first_line(error: BaseException | None) -> str:
    """The first line that says something."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def check_answers(address: str) -> None:
    """Raises ResourceError where nobody listens at host:port. Ray itself tries for minutes."""
    host, _, port = address.rpartition(":")
    if not host:
        return  # "auto": Ray knows where
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except (OSError, ValueError) as error:
        raise ResourceError(unreachable(address, error)) from error


def unreachable(address: str, error: Exception) -> str:
    return (
        f"cluster.address={address}: no Ray cluster answers there ({first_line(error)}). Start one with "
        "`bash launchers/ray_cluster.sh head`, or write cluster=local."
    )


def shape(seat: Seat) -> tuple[int, int]:
    """What a placement group must offer for a seat in it: bundles, and workers in each."""
    return seat.group_size, seat.workers_per_bundle


@dataclass(frozen=True, slots=True)
class Group:
    """A Ray placement group: room for the workers of one or several seats, kept until it is removed."""

    ray_group: Any
    shape: tuple[int, int]

    @classmethod
    def reserve(cls, seat: Seat, name: str, *, has_devices: bool, make_room: Callable[[], bool]) -> Group:
        """For a seat of the worker `name`. `make_room` gives up something else, and says whether there was anything.

        Raises ResourceError where the cluster has no room for it even so.
        """
        import ray

        size, workers = shape(seat)
        bundle = {"CPU": float(workers)} | ({"GPU": 1.0} if has_devices else {})
        group = ray.util.placement_group([bundle] * size, strategy="STRICT_PACK")
        while not (has_room := group.wait(ROOM_S)) and make_room():
            pass
        if not has_room and not group.wait(PLACEMENT_DEADLINE_S):
            ray.util.remove_placement_group(group)
            free, total = ray.available_resources(), ray.cluster_resources()
            wanted = " and ".join(f"{size * each:g} {resource}" for resource, each in bundle.items())
            found = " and ".join(f"{free.get(r, 0):g} of {total.get(r, 0):g} {r}" for r in bundle)
            raise ResourceError(
                f"{name} needs {wanted} on one node, and {found} are free in the cluster. Add nodes, raise cluster.num_cpus, or "
                "start fewer engines or ranks."
            )
        return cls(group, (size, workers))

    def remove(self) -> None:
        import ray

        ray.util.remove_placement_group(self.ray_group)


class RayCluster:
    """Implements `Cluster` on Ray: one it starts on this machine, or a running one."""

    def __init__(self, settings: ClusterSettings):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        if isinstance(settings, ExistingRay):
            check_answers(settings.address)
            # Ray reads it when it is imported. Its own clusters, and so launchers/ray_cluster.sh, admit nobody without the token.
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        import ray
        from ray.exceptions import AuthenticationError

        self._workers: dict[Hashable, RayHandle] = {}
        self._groups: dict[str, Group] = {}
        self._in_use: set[str] = set()  # groups with a seat that this run asked for
        self._stores: list[Any] = []
        if isinstance(settings, LocalRay):
            cores = len(os.sched_getaffinity(0))
            ray.init(
                address="local",
                num_cpus=settings.num_cpus or max(cores, 8),  # bookkeeping: workers take turns on the real cores
                object_store_memory=settings.object_store_mib << 20,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        elif isinstance(settings, ExistingRay):
            try:
                ray.init(address=settings.address, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, AuthenticationError) as error:
                raise ResourceError(unreachable(settings.address, error)) from error
        self._has_devices = ray.cluster_resources().get("GPU", 0) > 0

    def begin_run(self) -> None:
        self._in_use.clear()

    def worker(self, key: Hashable, name: str, target: str, *args: Any, seat: Seat, **kwargs: Any) -> Handle:
        self._in_use.add(seat.group)
        known = self._workers.get(key)
        if known is None or not known.is_alive or known.seat != seat:
            self._clear(name, seat)
            self._workers[key] = self._start(name, target, args, kwargs, seat)
        return self._workers[key]

    def _clear(self, name: str, seat: Seat) -> None:
        """Stop what an earlier run of this process left in the seat: a worker of the same part that this run cannot use."""
        group = self._groups.get(seat.group)
        if group is not None and group.shape != shape(seat):
            self._give_up(seat.group)
        self._stop(lambda handle: handle.seat.group == seat.group and handle.name == name)

    def _make_room(self) -> bool:
        """Give up a group of earlier runs in which this run has no seat; False where there is none."""
        idle = next((group for group in self._groups if group not in self._in_use), None)
        if idle is not None:
            self._give_up(idle)
        return idle is not None

    def _give_up(self, group: str) -> None:
        self._stop(lambda handle: handle.seat.group == group)
        self._groups.pop(group).remove()

    def _stop(self, is_meant: Callable[[RayHandle], bool]) -> None:
        for key, handle in list(self._workers.items()):
            if is_meant(handle):
                if handle.is_alive:
                    handle.kill()
                del self._workers[key]

    def _start(self, name: str, target: str, args: tuple, kwargs: dict, seat: Seat) -> RayHandle:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        if seat.group not in self._groups:
            self._groups[seat.group] = Group.reserve(seat, name, has_devices=self._has_devices, make_room=self._make_room)
        threads = str(len(core_share(seat.share)))
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        if seat.yields_cores:
            environment["OMP_WAIT_POLICY"] = "passive"
        # A tensor-parallel engine's devices belong to the workers that vLLM places in its bundles, not to the engine's own actor.
        devices = seat.device_share if self._has_devices and len(seat.bundles) == 1 else 0
        actor = (
            ray.remote(ActorShell)
            .options(
                num_cpus=1,
                num_gpus=devices,
                max_restarts=0,
                max_task_retries=0,
                runtime_env={"env_vars": environment},
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    placement_group=self._groups[seat.group].ray_group,
                    placement_group_bundle_index=seat.bundles[0],
                    placement_group_capture_child_tasks=True,
                ),
            )
            .remote(target, seat.share, args, kwargs)
        )
        return RayHandle(name, actor, seat)

    def meeting_point(self, keys: Sequence[Hashable]) -> str:
        import ray
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  # it is documented

        running = [handle for key in keys if (handle := self._workers.get(key)) and handle.is_alive]
        if len(running) < len(keys):  # these met others, who are gone
            for handle in running:
                handle.kill()
        host = ray.util.get_node_ip_address()
        # Here and not in a rank: where Ray will place rank 0 is not known before it starts.
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self._stores.append(store)
        return f"{host}:{store.port}"

    def places(self) -> dict[str, str]:
        living = [handle for handle in self._workers.values() if handle.is_alive]
        return {handle.name: handle.place().result(START_DEADLINE_S) for handle in living}

    def close(self) -> None:
        import ray

        for handle in self._workers.values():
            if handle.is_alive:
                handle.kill()
        for group in self._groups.values():  # on a cluster that stays, they would hold their place
            group.remove()
        self._workers.clear()
        self._groups.clear()
        self._stores.clear()
        ray.shutdown()
