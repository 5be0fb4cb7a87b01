"""Places workers, calls them, and turns a death into an error. The only module that imports Ray."""

from __future__ import annotations

import importlib
import logging
import os
import socket
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from rlkit.controller.local import InProcessCluster
from rlkit.errors import ResourceError, RlkitError, WorkerError
from rlkit.settings import ClusterSettings, ExistingRay, InProcess, LocalRay
from rlkit.workers.handle import Handle

START_DEADLINE_S = 600.0  # a worker's first call also waits for its imports and its model


class Cluster(Protocol):
    """Where workers live. It outlives a run: the next run with equal needs finds its engines still there."""

    def worker(self, key: Hashable, name: str, target: str, *args: Any, share: tuple[int, int] = (0, 1), **kwargs: Any) -> Handle:
        """The worker known by `key`, started as `target` ("module:Class") with these arguments if there is none yet.

        `share` (i, n): it is number i of n workers that run at the same time, and gets the i-th part of the cores. Kinds of
        workers take turns on the same cores: that is right while a step samples, scores and learns one after the other.
        """
        ...

    def meeting_point(self) -> str:
        """host:port of a store where a new group of workers finds each other, wherever they are placed. It stays until `close`."""
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
    """What runs in a Ray actor: binds its cores, then builds the worker and passes calls on."""

    def __init__(self, target: str, share: tuple[int, int], args: tuple, kwargs: dict):
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
            raise WorkerError(f"{name} did not finish {self._method} within {deadline_s:.0f} s and was killed.") from None
        except RayActorError as error:
            self._handle.is_alive = False
            raise WorkerError(f"{name} died during {self._method}: {cause_of_death(error)}") from error
        except RayTaskError as error:
            cause = error.cause
            if isinstance(cause, RlkitError):
                raise cause from None
            raise WorkerError(f"{name} failed in {self._method}: {type(cause).__name__}: {first_line(cause)}") from error


class RayHandle:
    """Implements `Handle`."""

    def __init__(self, name: str, actor: Any):
        self.name = name
        self.is_alive = True  # as far as its calls have shown
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

    def worker(self, key: Hashable, name: str, target: str, *args: Any, share: tuple[int, int] = (0, 1), **kwargs: Any) -> Handle:
        if key not in self._workers or not self._workers[key].is_alive:
            self._workers[key] = self._start(name, target, args, kwargs, share)
        return self._workers[key]

    def _start(self, name: str, target: str, args: tuple, kwargs: dict, share: tuple[int, int]) -> RayHandle:
        import ray

        free = ray.available_resources().get("CPU", 0)
        if free < 1:
            total = ray.cluster_resources().get("CPU", 0)
            raise ResourceError(
                f"{name} needs 1 CPU, and {free:g} of the cluster's {total:g} are free ({len(self._workers)} workers of this run "
                "hold one each). Add nodes, raise cluster.num_cpus, or start fewer engines or ranks."
            )
        threads = str(len(core_share(share)))
        environment = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "OMP_WAIT_POLICY": "passive"}
        actor = (
            ray.remote(ActorShell)
            .options(num_cpus=1, max_restarts=0, max_task_retries=0, runtime_env={"env_vars": environment})
            .remote(target, share, args, kwargs)
        )
        return RayHandle(name, actor)

    def meeting_point(self) -> str:
        import ray
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]  # it is documented

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
        self._workers.clear()
        self._stores.clear()
        ray.shutdown()
