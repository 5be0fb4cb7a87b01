"""A cluster of two Ray nodes on this machine, made by the launcher; a run joins it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
RLKIT = str(Path(sys.executable).with_name("rlkit"))
MARKER = "RLKIT_TEST_CLUSTER"


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """Of a head with one worker node beside it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {MARKER: str(tmp_path), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def launch(*arguments: str) -> str:
        command = ["bash", str(ROOT / "launchers" / "ray_cluster.sh"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    try:
        said = launch("head", str(port))
        found = said.partition("head at ")[2].split()[0]
        assert f"bash launchers/ray_cluster.sh worker {found}" in said
        assert "joined" in launch("worker", found)
        yield found
    finally:  # not `stop`: it would stop every Ray on this machine, other tests' too
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and f"{MARKER}={tmp_path}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)


def test_a_run_joins_two_nodes_and_its_ranks_find_each_other(address, tmp_path):
    command = [RLKIT, "train", "cluster=ray", f"cluster.address={address}", "learner.num_ranks=2", "num_steps=2", "run_dir=run"]
    command += ["evaluation=none", "prompts_per_step=4", "group_size=4"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2]
    assert all(row["mismatch/max"] <= 1e-4 for row in rows)
    places = json.loads((tmp_path / "run" / "workers.json").read_text())
    assert places.keys() == {"rollout engine 0", "learner rank 0", "learner rank 1"}
    # A second run finds the cluster as the first left it.
    again = subprocess.run(
        [RLKIT, "train", "resume=run", "num_steps=3"], cwd=tmp_path, capture_output=True, timeout=400, check=False
    )
    assert again.returncode == 0, again.stderr[-3000:]


def test_an_address_where_nobody_answers_is_said_at_once(tmp_path):
    command = [RLKIT, "train", "cluster=ray", "cluster.address=127.0.0.1:1", "num_steps=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 3
    assert "error: cluster.address=127.0.0.1:1: no Ray cluster answers there" in done.stderr
