"""Components that die, hang or are told to stop, in real runs: what the user reads, what is left on disk, what is left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file

from rlkit.controller.checkpoint import newest_valid

pytestmark = pytest.mark.slow

RLKIT = str(Path(sys.executable).with_name("rlkit"))
SETTINGS = [
    "run_dir=run",
    "num_steps=400",
    "evaluation=none",
    "checkpoint_every=1",
    "keep_checkpoints=2",
    "prompts_per_step=4",
    "group_size=4",
    "divergence=reverse_kl",
    "divergence.estimator=k3_weighted",
    "rollout.deadline_s=15",
    "learner.deadline_s=20",
]
MAX_STOP_S = 60.0  # from the failure to the end of the process
MAX_ORPHAN_S = 30.0  # until nothing that the run started is left


class Run:
    """A run in a session of its own, so that everything it started can be found again."""

    def __init__(self, folder: Path, *arguments: str):
        self.folder = folder
        # Ray's own processes leave the session; the marker in their environment does not leave them.
        self.marker = f"RLKIT_TEST_RUN={folder}"
        name, _, value = self.marker.partition("=")
        with (folder / "out.txt").open("w") as out, (folder / "err.txt").open("w") as err:
            self.process = subprocess.Popen(
                [RLKIT, "train", *arguments],
                cwd=folder,
                env=os.environ | {name: value},
                stdout=out,
                stderr=err,
                start_new_session=True,
            )

    def wait_for_steps(self, count: int, limit_s: float = 300, *, of: str = "run") -> None:
        """Until so many checkpoints' steps are behind it; `of`: the run's folder."""
        deadline = time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError((self.folder / "err.txt").read_text()[-3000:])
            file = self.folder / of / "metrics.jsonl"
            if file.exists() and file.read_text().count("\n") >= count and file.with_name("workers.json").exists():
                return
            time.sleep(0.1)
        raise AssertionError(f"no {count} steps within {limit_s} s")

    def wait_for_outcome(self, number: int, limit_s: float = 90) -> dict:
        """What a sweep noted of one of its runs, once it has ended."""
        file, deadline = self.folder / "run" / "sweep.json", time.monotonic() + limit_s
        while time.monotonic() < deadline:
            if file.exists() and (outcome := json.loads(file.read_text())[number])["exit_code"] is not None:
                return outcome
            time.sleep(0.1)
        raise AssertionError(f"run {number} had not ended after {limit_s} s")

    def pid_of(self, worker: str, *, of: str = "run") -> int:
        places = json.loads((self.folder / of / "workers.json").read_text())
        return int(places[worker].rpartition(":")[2])

    def end(self, limit_s: float = MAX_STOP_S) -> tuple[int, str]:
        """Exit code and what it said on standard error."""
        return self.process.wait(timeout=limit_s), (self.folder / "err.txt").read_text()

    def living(self) -> dict[int, str]:
        """Processes that the run started and that still live."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            try:
                if self.marker.encode() not in (entry / "environ").read_bytes().split(b"\0"):
                    continue
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z":
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:120]
            except (OSError, PermissionError):
                continue  # it ended while we looked
        return found

    def assert_nothing_is_left(self, *, ignoring: tuple[str, ...] = ()) -> None:
        deadline = time.monotonic() + MAX_ORPHAN_S

        def left() -> list[str]:
            return [command for command in self.living().values() if not command.startswith(ignoring)]

        while left() and time.monotonic() < deadline:
            time.sleep(0.2)
        assert not left()

    def destroy(self) -> None:
        for pid in {self.process.pid, *self.living()}:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Run]:
    run = Run(tmp_path, *SETTINGS)
    try:
        run.wait_for_steps(2)
        yield run
    finally:
        run.destroy()


def assert_resumable(folder: Path) -> None:
    found, passed_over = newest_valid(folder)
    assert found is not None
    assert not passed_over
    assert found.progress["step"] >= 1


def test_a_killed_worker_ends_the_run_with_its_name_and_the_way_to_go_on(started):
    assert len(started.living()) > 3
    os.kill(started.pid_of("rollout engine 0"), signal.SIGKILL)
    code, said = started.end()
    assert code == 4
    first = next(line for line in said.splitlines() if line.startswith("error: "))
    assert first.startswith("error: rollout engine 0 died during ")
    assert first.endswith("Go on with: rlkit train resume=run")
    started.assert_nothing_is_left()
    assert_resumable(started.folder / "run")


def test_the_death_of_vllms_own_process_ends_the_run_like_a_workers(tmp_path):
    """With rollout=vllm_async the model is in a child of the actor, and samples are under way between the actor's calls."""
    run = Run(tmp_path, *SETTINGS, "rollout=vllm_async", "max_staleness=1")
    try:
        run.wait_for_steps(2)
        actor = run.pid_of("rollout engine 0")
        children = {int(pid) for file in Path(f"/proc/{actor}/task").glob("*/children") for pid in file.read_text().split()}
        (engine,) = (pid for pid in children if b"EngineCore" in Path(f"/proc/{pid}/cmdline").read_bytes())
        os.kill(engine, signal.SIGKILL)
        began = time.monotonic()
        code, said = run.end()
        assert code == 4
        assert time.monotonic() - began < 30
        first = next(line for line in said.splitlines() if line.startswith("error: "))
        assert first.startswith("error: rollout engine 0")
        assert "EngineCore" in first or "EngineDeadError" in first
        assert first.endswith("Go on with: rlkit train resume=run")
        run.assert_nothing_is_left()
        assert_resumable(tmp_path / "run")
    finally:
        run.destroy()


KILLED, HANGS = "died during ", "did not finish "
FAILURES = [  # one in each run of a sweep; the next run finds what still lives, and starts what does not
    ("learner rank 0", signal.SIGKILL, KILLED, 0),
    ("reference scorer", signal.SIGKILL, KILLED, 0),
    ("rollout engine 0", signal.SIGSTOP, HANGS, 15),
    ("learner rank 0", signal.SIGSTOP, HANGS, 20),
]


@pytest.mark.timeout(900)  # one start of everything, then of what failed
def test_every_kind_of_worker_may_die_or_hang_and_the_next_run_of_a_sweep_starts(tmp_path):
    seeds = ",".join(str(seed) for seed in range(len(FAILURES)))
    sweep = Run(tmp_path, "-m", f"seed={seeds}", *SETTINGS)
    try:
        for seed, (worker, number, what, deadline_s) in enumerate(FAILURES):
            name = f"run/seed={seed}"
            sweep.wait_for_steps(2, of=name)
            os.kill(sweep.pid_of(worker, of=name), number)
            began = time.monotonic()
            outcome = sweep.wait_for_outcome(seed)
            assert time.monotonic() - began < deadline_s + 30
            assert outcome["exit_code"] == 4
            assert outcome["message"].startswith(f"{worker} {what}")
            assert outcome["message"].endswith(f"Go on with: rlkit train resume={name}")
            if what == HANGS:
                assert f"within {deadline_s} s and was killed." in outcome["message"]
            assert_resumable(tmp_path / name)
        assert sweep.end()[0] == 4
        sweep.assert_nothing_is_left()
    finally:
        sweep.destroy()


def test_a_killed_controller_leaves_no_process_behind(started):
    started.process.kill()
    started.end()
    # Ray 2.60's own two agents notice after a minute that nobody is left. They hold no weights and no device.
    started.assert_nothing_is_left(ignoring=("ray::DashboardAgent", "ray::RuntimeEnvAgent"))
    assert_resumable(started.folder / "run")


@pytest.mark.timeout(1200)  # three runs
def test_sigterm_stops_within_thirty_seconds_and_two_runs_made_of_parts_are_equal(tmp_path):
    """Real vLLM in Ray: a run stopped twice and resumed twice is the run that was never stopped, in every number and weight."""
    settings = [*SETTINGS, "num_steps=6", "evaluation=held_out", "evaluation.num_prompts=8", "evaluation.samples_per_prompt=4"]
    settings += [
        "evaluation.ks=[1]",
        "evaluation.every=3",
        "rollout.deadline_s=600",
        "learner.deadline_s=600",
        "max_response_tokens=12",
    ]
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = Run(tmp_path / "whole", *settings)
    assert whole.end(300)[0] == 0
    whole.assert_nothing_is_left()
    parts = Run(tmp_path / "parts", *settings)
    try:
        parts.wait_for_steps(3)  # the evaluation before the first step, and two steps
        began = time.monotonic()
        parts.process.terminate()
        code, said = parts.end()
        assert code == 75
        assert time.monotonic() - began < 30
        assert "error: Stopped by SIGTERM after step " in said
        parts.assert_nothing_is_left()
        resumed = Run(tmp_path / "parts", "resume=run")
        assert resumed.end(300)[0] == 0, (tmp_path / "parts" / "err.txt").read_text()[-3000:]
    finally:
        parts.destroy()
    assert scalars(tmp_path / "parts") == scalars(tmp_path / "whole")
    weights = [
        load_file(tmp_path / name / "run/checkpoints/step_000006/state/learner-0-of-1.safetensors") for name in ("whole", "parts")
    ]
    assert weights[0].keys() == weights[1].keys()
    for name, tensor in weights[0].items():
        assert tensor.equal(weights[1][name]), name


def scalars(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if not name.startswith(("time/", "rate/"))} for row in rows]


FULL_DISK = """
set -e
mount -t tmpfs -o size=16m tmpfs disk
cd disk
code=0; "$RLKIT" train $SETTINGS >../out.txt 2>../err.txt || code=$?
echo "full: $code"; ls run/checkpoints; grep -c 'Training goes on' run/log.txt
mount -o remount,size=64m .
"$RLKIT" train resume=run >>../out.txt 2>>../err.txt
echo "resumed: $?"
"""


def test_a_full_disk_is_met_once_stops_the_run_the_second_time_and_costs_no_checkpoint(tmp_path):
    """A file system of its own with room for one checkpoint of this model, in a mount namespace of the test's own."""
    (tmp_path / "disk").mkdir()
    settings = ["cluster=inprocess", "rollout=transformers", "run_dir=run", "num_steps=4", "evaluation=none", "checkpoint_every=1"]
    settings += ["prompts_per_step=2", "group_size=2", "max_response_tokens=12", "keep_checkpoints=1"]
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "bash", "-c", FULL_DISK],
        cwd=tmp_path,
        env=os.environ | {"RLKIT": RLKIT, "SETTINGS": " ".join(settings)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    said = (tmp_path / "err.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + said[-3000:]
    assert done.stdout.splitlines() == ["full: 3", "step_000001", "1", "resumed: 0"]
    (error,) = (line for line in said.splitlines() if line.startswith("error: "))
    assert error.startswith("error: checkpoint of step 3: cannot be written (")
    assert "No space left on device" in error
    assert error.endswith("MiB are free under run). Go on with: rlkit train resume=run")
