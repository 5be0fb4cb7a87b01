"""Runs a program in bubblewrap: no network, no files but Python's, no environment, limits on all that it can use up.

What passes is decided outside, by whoever called: inputs go in and outputs come out, over a descriptor that the program does not
have. Reward workers import this file, so it may not import torch.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from rlkit.data.sandbox import seccomp
from rlkit.errors import ConfigError, ResourceError

logger = logging.getLogger(__name__)

NOBODY = 65534
GRACE_S = 2.0  # beyond the cases' own limits, for the sandbox to start and to answer
MAX_ANSWER = 16 << 20  # bytes
ANSWER = {"status", "stdout", "stderr", "returned"}  # what `inside.py` says of each case, in texts
UNSAFE = "RLKIT_ALLOW_UNSANDBOXED"  # set in reward workers by reward.unsafe_allow_unsandboxed
URL = "RLKIT_SANDBOX_URL"  # of a service that runs the programs; an address is no setting, which run folders keep
INSTALL = "install bubblewrap (Debian and Ubuntu: sudo apt install bubblewrap), or write reward.unsafe_allow_unsandboxed=true"


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What one case may use."""

    wall_s: float = 4.0
    total_s: float = 6.0  # of all cases of a call: below the usual reward.timeout_s, so that what hangs is wrong, and not late
    cpu_s: int = 4
    memory_mib: int = 512  # of address space, per process
    num_processes: int = 32
    files_mib: int = 16  # on its disk, which is memory
    num_open_files: int = 64
    output_bytes: int = 64 << 10  # of standard output, standard error and the returned value, each


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One run of a program: as a script that reads `stdin`, or as a call of `Program.entry_point` with `arguments`."""

    stdin: str = ""
    arguments: Sequence[Any] | None = None  # that JSON can carry


@dataclass(frozen=True, kw_only=True, slots=True)
class Program:
    """Python source, and the function that is called in it, if one is."""

    code: str
    entry_point: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of a case. Texts are cut at `Limits.output_bytes`."""

    status: str  # ok | error: it raised or left with another code than 0 | timeout | output: it wrote too much | killed: all of it
    stdout: str = ""
    stderr: str = ""
    value: Any = None  # that the entry point returned


class Sandbox(Protocol):
    """Runs hostile programs."""

    def run(self, program: Program, cases: Sequence[Case], limits: Limits = Limits()) -> list[Outcome]:
        """One outcome per case, in order. Whatever the program does, this returns."""
        ...


@cache
def open_sandbox() -> Sandbox:
    """The service's that $RLKIT_SANDBOX_URL names, or bubblewrap's. Raises ConfigError where it does not work; without bubblewrap,
    programs may run unsandboxed where that was asked for."""
    if os.environ.get(URL):
        from rlkit.data.sandbox.remote import open_remote  # which imports this file

        return open_remote()
    problem = ""
    if (path := shutil.which("bwrap")) is None:
        problem = "there is no bwrap"
    else:
        sandbox = Bubblewrap(path)
        try:
            [outcome] = sandbox.run(Program(code="print(6 * 7)"), [Case()])
        except ResourceError as error:
            problem = f"bwrap does not work here ({error})"
        else:
            if (outcome.status, outcome.stdout) == ("ok", "42\n"):
                return sandbox
            problem = f"bwrap does not work here ({(outcome.stderr.strip().splitlines() or [outcome.status])[-1]})"
    if os.environ.get(UNSAFE) != "1":
        raise ConfigError(f"the reward runs programs that the model wrote, and {problem}: {INSTALL}.")
    logger.warning("Programs that the model wrote run WITHOUT a sandbox, as this user, with network and files: %s.", problem)
    return Unsandboxed()


@dataclass(slots=True)
class Bubblewrap:
    """Implements `Sandbox`. Nothing of one call is left for the next."""

    path: str
    _has_size: bool = field(init=False)
    _filter: bytes | None = field(init=False)

    def __post_init__(self):
        done = subprocess.run([self.path, "--help"], capture_output=True, text=True, check=False, timeout=30)
        self._has_size = "--size" in done.stdout + done.stderr
        self._filter = seccomp.program()

    def run(self, program: Program, cases: Sequence[Case], limits: Limits = Limits()) -> list[Outcome]:
        with ExitStack() as stack:
            fds: list[int] = []
            command = [self.path, *self._namespaces(fds), *self._files(limits)]
            if self._filter is not None:
                reader, writer = os.pipe()
                stack.callback(os.close, reader)
                os.write(writer, self._filter)
                os.close(writer)
                fds.append(reader)
                command += ["--seccomp", str(reader)]
            uid = NOBODY if os.geteuid() == 0 else 0
            return _converse([*command, "--", *_python()], program, cases, limits, fds=fds, uid=uid, folder="/tmp")

    def _namespaces(self, fds: list[int]) -> list[str]:
        # Root is exempt from limits on the number of processes, also under another number inside; so for root the program really
        # becomes somebody else, in a user namespace that knows both.
        apart = [
            "--unshare-ipc",
            "--unshare-pid",
            "--unshare-net",
            "--unshare-uts",
            "--unshare-cgroup-try",
            "--hostname",
            "sandbox",
        ]
        safe = ["--die-with-parent", "--new-session", "--clearenv", "--setenv", "HOME", "/tmp", "--setenv", "LANG", "C.UTF-8"]
        if os.geteuid() != 0:
            return ["--unshare-user", "--uid", str(NOBODY), "--gid", str(NOBODY), *apart, *safe, "--cap-drop", "ALL"]
        fds.append(_root_and_nobody())
        capabilities = ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]  # gone before the program starts
        return ["--userns", str(fds[-1]), *apart, *safe, *capabilities]

    def _files(self, limits: Limits) -> list[str]:
        binds = ["--perms", "0755", "--dir", "/usr"]  # as the parent of a bind alone, nobody but root could enter it
        for name in ("/usr/lib", "/usr/lib64", "/usr/lib32"):
            binds += ["--ro-bind-try", name, name]
        for name in ("/lib", "/lib64", "/lib32"):
            if Path(name).is_symlink():
                binds += ["--symlink", os.readlink(name), name]
            else:
                binds += ["--ro-bind-try", name, name]
        prefix = Path(sys.base_prefix).resolve()
        for parent in reversed(prefix.parents[:-1]):
            binds += ["--perms", "0755", "--dir", str(parent)]
        if prefix != Path("/usr"):
            binds += ["--ro-bind", str(prefix), str(prefix)]
        else:
            binds += ["--ro-bind", "/usr/bin", "/usr/bin"]
        size = ["--size", str(limits.files_mib << 20)] if self._has_size else []
        disk = [*size, "--perms", "1777", "--tmpfs", "/tmp", "--chdir", "/tmp"]
        return [*binds, "--proc", "/proc", "--dev", "/dev", *disk, "--remount-ro", "/dev", "--remount-ro", "/"]


class Unsandboxed:
    """Implements `Sandbox` without one: limits and a clock, which keep accidents in, and nobody who means it."""

    def run(self, program: Program, cases: Sequence[Case], limits: Limits = Limits()) -> list[Outcome]:
        with tempfile.TemporaryDirectory() as folder:
            return _converse(_python(), program, cases, limits, fds=[], uid=0, folder=folder)


def _python() -> list[str]:
    """An interpreter that reads nothing of the user's, running `inside.main`."""
    interpreter = Path(sys.base_prefix).resolve() / "bin" / f"python{sys.version_info[0]}.{sys.version_info[1]}"
    return [str(interpreter), "-I", "-S", "-c"]


@cache
def inside() -> str:
    """The text of `inside.py`."""
    return Path(__file__).with_name("inside.py").read_text(encoding="utf-8")


def _converse(
    command: list[str],
    program: Program,
    cases: Sequence[Case],
    limits: Limits,
    *,
    fds: list[int],
    uid: int,
    folder: str,
) -> list[Outcome]:
    """Start the command, hand it the request, read its answer; kill it and all that it started whatever happens."""
    isolated = command[0].endswith("bwrap")
    request = {
        "code": program.code,
        "entry_point": program.entry_point,
        "folder": folder,
        "isolated": isolated,
        "cases": [{"stdin": case.stdin} if case.arguments is None else {"call": list(case.arguments)} for case in cases],
        "limits": asdict(limits)
        | {
            "rlimits": {
                "RLIMIT_CPU": limits.cpu_s,
                "RLIMIT_AS": limits.memory_mib << 20,
                "RLIMIT_FSIZE": limits.files_mib << 20,
                "RLIMIT_NOFILE": limits.num_open_files,
                "RLIMIT_CORE": 0,
            }
            | ({"RLIMIT_NPROC": limits.num_processes} if isolated else {})
        },
    }
    reader, writer = os.pipe()
    script = f"{inside()}\nmain({writer}, {uid})\n"
    deadline = time.monotonic() + GRACE_S + limits.total_s
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stderr:
        stdin.write(json.dumps(request).encode())
        stdin.seek(0)
        process = subprocess.Popen(
            [*command, script],
            stdin=stdin,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env={"LANG": "C.UTF-8"},
            cwd="/" if isolated else folder,
            pass_fds=[writer, *fds],
            start_new_session=True,
        )
        os.close(writer)
        try:
            answer = _read_answer(reader, deadline, len(cases))
        finally:
            os.close(reader)
            # The group, and with bubblewrap's first process everything in its namespace of processes.
            _kill(process)
        if answer is None:
            said = os.pread(stderr.fileno(), limits.output_bytes, 0).decode("utf-8", "replace")
            return [Outcome(status="killed", stderr=said) for _ in cases]
    return [read_outcome(case, each) for case, each in zip(cases, answer, strict=True)]


def read_outcome(case: Case, answer: dict[str, str]) -> Outcome:
    """Of what `is_answer` has let pass."""
    status, value = answer["status"], None
    if status == "ok" and case.arguments is not None:
        try:
            value = json.loads(answer["returned"])
        except (ValueError, RecursionError):  # it left before it returned, or nests deeper than anybody reads
            status = "error"
    return Outcome(status=status, stdout=answer["stdout"], stderr=answer["stderr"], value=value)


def _read_answer(reader: int, deadline: float, num_cases: int) -> list[dict[str, str]] | None:
    """The length-prefixed JSON; None when it does not come, or is not what `inside.py` writes."""
    content, wanted = b"", 4
    while len(content) < wanted:
        left = deadline - time.monotonic()
        if left <= 0 or not select.select([reader], [], [], left)[0]:
            return None
        if not (chunk := os.read(reader, 1 << 16)):
            return None
        content += chunk
        if wanted == 4 and len(content) >= 4:
            wanted += struct.unpack(">I", content[:4])[0]
            if wanted > MAX_ANSWER:
                return None
    try:
        answer = json.loads(content[4:wanted])
    except (ValueError, RecursionError):
        return None
    return answer if is_answer(answer, num_cases) else None


def is_answer(answer: Any, num_cases: int) -> bool:
    """Whoever wrote it cannot make the reward fail where it should say wrong."""
    return (
        isinstance(answer, list)
        and len(answer) == num_cases
        and all(isinstance(each, dict) and each.keys() == ANSWER for each in answer)
        and all(isinstance(text, str) for each in answer for text in each.values())
    )


def _kill(process: subprocess.Popen) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@cache
def _root_and_nobody() -> int:
    """A descriptor of a user namespace that has root and nobody of the one outside. Of this process; it is inherited by none.

    Raises ResourceError where the kernel refuses one.
    """
    ready, go = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:  # which only waits in the new namespace until it has been described
        clone_newuser = 0x10000000
        failed = ctypes.CDLL(None).unshare(clone_newuser)
        os.write(ready[1], b"n" if failed else b"y")
        os.read(go[0], 1)
        os._exit(0)
    try:
        if os.read(ready[0], 1) != b"y":
            raise ResourceError("The kernel refuses user namespaces, and the sandbox is made of them. Allow them (sysctl).")
        try:
            for name in ("uid_map", "gid_map"):
                Path(f"/proc/{pid}/{name}").write_text(f"0 0 1\n{NOBODY} {NOBODY} 1\n")
        except OSError as error:
            raise ResourceError(f"The kernel refuses to map users 0 and {NOBODY} in a namespace: {error}.") from None
        return os.open(f"/proc/{pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        os.write(go[1], b"x")
        os.waitpid(pid, 0)
        for fd in (*ready, *go):
            os.close(fd)
