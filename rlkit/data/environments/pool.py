"""Runs many episodes side by side, each in a process that can be killed without harm to the others."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rlkit.data.environments.calls import MAX_ANSWER, Calls, EpisodeWorker, Failure
from rlkit.data.environments.protocol import Step
from rlkit.data.processes.budget import ErrorBudget
from rlkit.data.processes.channel import Channel
from rlkit.data.processes.start import start
from rlkit.data.processes.user_code import locate
from rlkit.errors import ConfigError, ResourceError, RewardError
from rlkit.settings import GuessingGame, MultiTurn, PythonEnvironment, ToolEnvironment, VerifiersEnvironment

OTHER_FILES = 512  # that a run may open beside those that it has open when it opens its environment
EPISODES_PER_WORKER = 1000  # then it makes room for a fresh one


class EnvironmentPool:
    """The processes of a run's environment. Several threads may use it; an episode belongs to one."""

    def __init__(
        self,
        settings: MultiTurn,
        *,
        base_dir: Path,
        num_episodes: int | None = None,
        num_batches: int = 1,
        start_limit_s: float | None = None,
    ):
        """Imports the environment, in another process. Raises ConfigError where it cannot be found, imported or made, and
        ResourceError where fewer files may be open than `num_episodes` under way at once need, which are of `num_batches`.

        The kernel kills everything when the thread that called this ends.
        """
        self._settings = settings
        self._start_limit_s = settings.start_limit_s if start_limit_s is None else start_limit_s
        made = made_of(settings)
        self.name = made.name  # for messages: the setting that chose it
        self._at_once = settings.max_calls_at_once or len(os.sched_getaffinity(0))
        _make_room(num_episodes or settings.max_episodes_at_once, num_batches)
        base_dir = base_dir.resolve()
        locate("environment.env", made.entry, base_dir)
        self._budget = ErrorBudget(
            self.name,
            key="environment.max_error_rate",
            limit=settings.max_error_rate,
            fix="Fix the environment, or what it depends on.",
        )
        self._lock = threading.Lock()  # guards what follows
        self._idle: list[EpisodeWorker] = []
        self._busy: set[EpisodeWorker] = set()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = start(
                "rlkit.data.environments.worker",
                [made.entry, str(base_dir), json.dumps(made.options)],
                base_dir=base_dir,
                channel=theirs,
                unsandboxed=settings.unsafe_allow_unsandboxed,
            )
        try:
            hello = self._hello()
            self.tools: tuple[dict[str, Any], ...] = tuple(hello["tools"])  # that the policy must be told of
            self.scores_cut: bool = hello["scores_cut"]  # an episode that ends for want of tokens or turns
        except BaseException:
            self.close()
            raise

    @property
    def worker_pids(self) -> list[int]:
        """Of the workers alive now."""
        with self._lock:
            return [worker.pid for worker in (*self._idle, *self._busy)]

    def calls(self) -> Calls:
        """To call its episodes, new ones and old ones, in one thread. Close it."""
        return Calls(self._settings, name=self.name, at_once=self._at_once, take=self._worker, drop=self._drop)

    def begin(self, starts: Sequence[tuple[Mapping[str, Any], int]]) -> list[tuple[EpisodeWorker, str] | Failure]:
        """All of them, each of a row and a seed. See `Calls.begin`."""
        return self._all(starts, lambda calls, start, then: calls.begin(start[0], start[1], then))

    def step(self, actions: Sequence[tuple[EpisodeWorker, str]]) -> list[Step | Failure]:
        """All of them, in their order. See `Calls.step`."""
        return self._all(actions, lambda calls, action, then: calls.step(action[0], action[1], then))

    def cut(self, workers: Sequence[EpisodeWorker]) -> list[float | Failure]:
        """All of them, in their order. See `Calls.cut`."""
        return self._all(workers, lambda calls, worker, then: calls.cut(worker, then))

    def _all(self, given: Sequence[Any], call: Callable[[Calls, Any, Callable[[Any], None]], None]) -> list[Any]:
        answers: list[Any] = [None] * len(given)
        with self.calls() as calls:
            for place, each in enumerate(given):
                call(calls, each, partial(answers.__setitem__, place))
            while calls:
                calls.poll()
        return answers

    def end(self, worker: EpisodeWorker) -> None:
        """Its episode is over."""
        with self._lock:
            self._busy.discard(worker)
            worker.num_episodes += 1
            if is_fresh := worker.num_episodes < EPISODES_PER_WORKER:
                self._idle.append(worker)
        if not is_fresh:
            self._kill(worker)

    def count(self, sample_id: str, failure: Failure | None) -> None:
        """One more episode is over. Raises RewardError once too many have failed."""
        with self._lock:
            stop = self._budget.count(sample_id, "" if failure is None else failure.message)
        if stop is not None:
            raise stop

    def close(self) -> None:
        """Kills every worker, and what they started, but for what has made a session of its own."""
        with self._lock:
            workers, self._idle, self._busy = [*self._idle, *self._busy], [], set()
        for worker in workers:
            with suppress(ResourceError):  # they are all gone with the process they were forked from
                self._kill(worker)
        self._control.close()
        with suppress(ProcessLookupError, PermissionError):  # only the zombie is left
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> EnvironmentPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _worker(self) -> EpisodeWorker:
        with self._lock:
            gone = []
            while self._idle and self._idle[-1].channel.has_input():  # it says nothing unasked: it has ended
                gone.append(self._idle.pop())
            worker = self._idle.pop() if self._idle else self._fork()
            self._busy.add(worker)
        for each in gone:
            self._kill(each)
        return worker

    def _fork(self) -> EpisodeWorker:
        with ExitStack() as unused:
            try:
                ours, theirs = map(unused.enter_context, socket.socketpair())
            except OSError as error:
                if error.errno != errno.EMFILE:
                    raise
                raise ResourceError(
                    f"{len(self._busy)} episodes at once use up this process's open files. Raise the limit (ulimit -n), or lower "
                    "environment.max_episodes_at_once."
                ) from error
            pid = self._answer(b"fork", theirs)["pid"]
            unused.pop_all()
            theirs.close()
        return EpisodeWorker(pid, Channel(ours, max_bytes=MAX_ANSWER))

    def _hello(self) -> dict[str, Any]:
        """What the process that forks says once it can. Raises ConfigError where it says that it cannot."""
        self._control.settimeout(self._start_limit_s)
        try:
            said = self._control.recv(1 << 20)
        except TimeoutError:
            raise RewardError(
                f"{self.name}: importing it took longer than {self._start_limit_s:g} s. Move slow work out of its top level."
            ) from None
        except ConnectionResetError:
            said = b""
        if not said:
            raise ResourceError(f"{self.name}: its process ended while importing it. See what it printed before.")
        hello = json.loads(said)
        if "config_error" in hello:
            raise ConfigError(hello["config_error"])
        if "import_error" in hello:
            error = hello["import_error"]
            raise ConfigError(f"{self.name}: importing it raised {error['summary']}. Fix it.\n{error['traceback']}")
        return hello

    def _answer(self, request: bytes, *sockets: socket.socket) -> dict[str, Any]:
        """What the process that forks says to a request. Raises ResourceError where it says nothing, which is its end."""
        self._control.settimeout(self._start_limit_s)
        try:
            socket.send_fds(self._control, [request], [each.fileno() for each in sockets])
            said = self._control.recv(1 << 20)
        except TimeoutError:
            with suppress(ProcessLookupError, PermissionError):  # only the zombie is left
                os.killpg(self._process.pid, signal.SIGKILL)  # whoever asks next would hear this answer, or wait as long
            raise ResourceError(
                f"{self.name}: the process that its episodes are forked from did not answer within {self._start_limit_s:g} s. "
                "See whether this machine is short of memory."
            ) from None
        except OSError:
            said = b""
        if not said:
            raise ResourceError(
                f"{self.name}: the process that its episodes are forked from has ended. See what it printed before."
            )
        return json.loads(said)

    def _drop(self, worker: EpisodeWorker) -> None:
        """Of an episode that failed: whatever state it is in, nobody shall have it."""
        with self._lock:
            self._busy.discard(worker)
        self._kill(worker)

    def _kill(self, worker: EpisodeWorker) -> None:
        with suppress(ProcessLookupError, PermissionError):  # only the zombie is left
            os.killpg(worker.pid, signal.SIGKILL)
        worker.channel.close()
        with self._lock:
            self._answer(str(worker.pid).encode())


class Made(NamedTuple):
    """How an environment comes to be."""

    name: str  # the setting that chose it, as a user wrote it
    entry: str  # where its class is: file.py:Class or package.module:Class
    options: dict[str, Any]  # that the class is made with


def made_of(settings: MultiTurn) -> Made:
    """Raises ConfigError for settings that no class stands for."""
    match settings:
        case PythonEnvironment():
            return Made(f"environment.env={settings.env}", settings.env, settings.options)
        case ToolEnvironment():
            options = {"functions": settings.tools, "call_format": settings.call_format.value, "max_turns": settings.max_turns}
            return Made("environment=tools", "rlkit.data.environments.tools:Tools", options | {"timeout_s": settings.timeout_s})
        case VerifiersEnvironment():
            options = {"env_id": settings.env_id, "options": settings.options, "observation_role": settings.observation_role.value}
            return Made(f"environment.env_id={settings.env_id}", "rlkit.data.environments.verifiers:Verifiers", options)
        case GuessingGame():
            options = {"higher": settings.higher, "lower": settings.lower}
            return Made("environment=guessing_game", "rlkit.data.environments.guessing:Guessing", options)
        case _:
            raise ConfigError(
                f"environment={type(settings).__name__}: rlkit/data/environments/pool.py knows no class for it. Add it."
            )


def _make_room(num_episodes: int, num_batches: int) -> None:
    """Each episode holds a socket open, and the usual limit of 1024 is meant for less. Raises ResourceError where the system
    allows no more."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    others = len(os.listdir("/dev/fd")) + OTHER_FILES
    needed = num_episodes + others
    if hard != resource.RLIM_INFINITY and hard < needed:
        fitting = (hard - others) // num_batches
        fewer = f", or write environment.max_episodes_at_once={fitting}" if fitting > 0 else ""
        less = " or a lower max_staleness" if fewer and num_batches > 1 else ""
        raise ResourceError(
            f"{num_episodes} episodes may be under way at once, each with a file open, and with what else a run opens that is "
            f"{needed}; this process may open {hard} (ulimit -Hn). Have its limit raised (ulimit -n {needed}){fewer}{less}."
        )
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
