"""Starts the process in which user code is imported."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rlkit.data.sandbox.run import UNSAFE


def start(module: str, arguments: Sequence[str], *, base_dir: Path, channel: socket.socket, unsandboxed: bool) -> subprocess.Popen:
    """`python -m module <descriptor of channel> <this process's number> *arguments`, in a session of its own: it and what it
    starts are killed together. `unsandboxed`: programs that a model wrote may run there without a sandbox, where none works."""
    return subprocess.Popen(
        # -P: a json.py in base_dir must not stand in for Python's own.
        [sys.executable, "-P", "-m", module, str(channel.fileno()), str(os.getpid()), *arguments],
        cwd=base_dir,
        # The cores belong to the engine and the learner; and a set of texts has one order in every run.
        env={"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", **os.environ, UNSAFE: "1" if unsandboxed else "0"},
        pass_fds=[channel.fileno()],
        stdin=subprocess.DEVNULL,
        stdout=2,  # what it prints is for people to see, and standard output may be a program's input
        start_new_session=True,
    )
