"""One worker process: started, given calls, watched against the clock, killed."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlkit.data.processes.channel import Channel
from rlkit.data.processes.start import start
from rlkit.data.processes.user_code import memory_mib
from rlkit.data.rewards.signatures import RewardSignature
from rlkit.errors import ConfigError, RewardError

POLL_S = 0.25  # how often a silent worker is looked after: is it alive, does other work wait behind a slow call
TOGETHER_GRACE_S = 1.0  # calls that are under way together end by their own limit, and this is for telling so


class WorkerHung(Exception):
    """The call that the worker was busy with ran past its limit."""


class WorkerDied(Exception):
    """The worker ended by itself. Its message says how."""


class WorkerGrew(Exception):
    """The worker took more memory than it may. Its message says how much."""


class WorkerProcess:
    """A reward worker in a session of its own, so that it and what it started are killed together.

    The kernel kills it when the thread that constructed it ends: the thread that uses it must be that one.
    """

    def __init__(self, name: str, base_dir: Path, *, convention: str, max_mib: int, unsandboxed: bool, start_limit_s: float):
        """Starts the process; `wait_until_ready` waits for it. `max_mib` of memory is all that it may take.

        `unsandboxed`: programs that a model wrote may run there without a sandbox, where none works.
        """
        self._name, self._max_mib, self._start_limit_s = name, max_mib, start_limit_s
        ours, theirs = socket.socketpair()
        arguments = [name, str(base_dir), convention]
        with theirs:
            self._process = start(
                "rlkit.data.rewards.worker", arguments, base_dir=base_dir, channel=theirs, unsandboxed=unsandboxed
            )
        self._channel = Channel(ours)
        self._reaping = threading.Lock()

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait_until_ready(self) -> RewardSignature:
        """Raises ConfigError when the function cannot be imported, RewardError when that takes too long, and WorkerDied."""
        try:
            deadline, hello = time.monotonic() + self._start_limit_s, None
            while hello is None:
                hello = self._poll(deadline)
        except WorkerHung:
            raise RewardError(
                f"reward.fn={self._name}: importing it took longer than {self._start_limit_s:g} s. "
                f"Move slow work out of its top level."
            ) from None
        if "config_error" in hello:
            raise ConfigError(hello["config_error"])
        if "import_error" in hello:
            error = hello["import_error"]
            raise ConfigError(
                f"reward.fn={self._name}: importing it raised {error['summary']}. Fix the file.\n{error['traceback']}"
            )
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in hello["signature"].items()
        }
        return RewardSignature(**fields)

    def run(
        self, calls: list[dict[str, Any]], *, limit_s: float, recall: Callable[[int], None], together: bool = False
    ) -> Iterator[dict[str, Any]]:
        """Yields the answer to each call, in order. Raises WorkerHung, WorkerDied or WorkerGrew at the first that has none.

        The limit counts from the moment the worker says it begins a call. When a call is slow, those from `recall`'s
        argument on are taken back from this worker, so that another one can have them; their answers are not yielded.
        `together`: of an async function, all calls are begun at once, and each keeps its own limit.
        """
        deadline = time.monotonic() + self._start_limit_s
        self._send({"calls": calls, "together": together, "limit_s": limit_s})
        num_answered, num_wanted = 0, len(calls)
        recalled = True  # the worker knows which calls are wanted
        while num_answered < num_wanted or not recalled:
            message = self._poll(deadline)
            if message is None:
                self._check_memory()
                if not together and num_answered + 1 < num_wanted:
                    num_wanted, recalled = num_answered + 1, False
                    self._send({"recall": True})
                    recall(num_wanted)
            elif "recalled" in message:
                recalled = True
            elif "begin" in message:
                deadline = time.monotonic() + limit_s + (TOGETHER_GRACE_S if together else 0.0)
            else:
                deadline = time.monotonic() + self._start_limit_s
                if num_answered < num_wanted:
                    num_answered += 1
                    yield message

    def memory_mib(self) -> float:
        """Of the worker itself: what it starts is bound by limits of its own."""
        return memory_mib(self.pid)

    def _check_memory(self) -> None:
        if (mib := self.memory_mib()) > self._max_mib:
            raise WorkerGrew(f"grew to {mib:.0f} MiB, above reward.max_worker_mib={self._max_mib},")

    def kill(self) -> None:
        """Ends the process group. Safe from any thread, any number of times; `reap` must follow on the owner's."""
        with self._reaping:
            if self._process.returncode is None:  # not yet reaped, so the number is still ours
                with suppress(ProcessLookupError, PermissionError):  # only the zombie is left
                    os.killpg(self._process.pid, signal.SIGKILL)

    def reap(self) -> int:
        """Kills what is left and collects the exit status."""
        self.kill()
        with self._reaping:
            returncode = self._process.wait()
        self._channel.close()
        return returncode

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._channel.send(message, timeout_s=self._start_limit_s)
        except TimeoutError:
            raise WorkerHung from None
        except OSError:
            raise WorkerDied(self._how_it_ended()) from None

    def _poll(self, deadline: float) -> dict[str, Any] | None:
        """The next message, or None after POLL_S without one. Raises WorkerHung past the deadline, and WorkerDied."""
        remaining = deadline - time.monotonic()
        try:
            # At least one look at the socket: an answer that waits there was in time, even if we come late.
            message = self._channel.receive(timeout_s=min(max(remaining, 0.001), POLL_S))
        except TimeoutError:
            if remaining <= 0:
                raise WorkerHung from None
            if self._has_ended():  # and a program it started holds the channel open
                raise WorkerDied(self._how_it_ended()) from None
            return None
        if message is None:
            raise WorkerDied(self._how_it_ended())
        return message

    def _has_ended(self) -> bool:
        # WNOWAIT leaves the zombie, so the process number stays ours until `reap`.
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _how_it_ended(self) -> str:
        end = time.monotonic() + 1.0
        while not self._has_ended():
            if time.monotonic() > end:
                return "closed its channel"
            time.sleep(0.01)
        status = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        assert status is not None
        if status.si_code == os.CLD_EXITED:
            return f"exited with code {status.si_status}"
        return f"was killed by {signal.Signals(status.si_status).name}"
