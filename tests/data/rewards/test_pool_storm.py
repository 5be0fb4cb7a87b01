"""A thousand calls that hang, beside a function that does not."""

import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from rlkit.data.rewards.pool import RewardItem, RewardPool
from rlkit.settings import Reward
from rlkit.types import RewardStatus

HANGING = """
import os, time
os.nice(19 - os.nice(0))
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # spinners are kept to one core

def f(completions):
    if completions == ["spin"]:
        while True: pass
    if completions == ["sleep"]:
        time.sleep(1000)
    return [1.0]
"""
QUICK = "def f(completions):\n    return [float(len(text)) for text in completions]\n"
NUM_HANGS, NUM_WORKERS, LIMIT_S = 1000, 4, 0.2


def items(*texts):
    return [RewardItem(sample_id=f"s{i}", group_id="g", prompt="", completion=text, columns={}) for i, text in enumerate(texts)]


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def children() -> set[int]:
    """Processes of this one that run reward workers."""
    found = set()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and b"rlkit.data.rewards.worker" in (folder / "cmdline").read_bytes():
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                found |= {int(folder.name)} if parent == os.getpid() else set()
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            continue
    return found


def latencies(pool: RewardPool, until) -> list[float]:
    found = []
    while not until(found):
        began = time.monotonic()
        [result] = pool.score(items("12345"))
        found.append(time.monotonic() - began)
        assert result.reward == 5.0
        time.sleep(0.005)
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_thousand_hangs_cost_nothing_but_their_own_samples(tmp_path, wait_until):
    (tmp_path / "hanging.py").write_text(HANGING)
    (tmp_path / "quick.py").write_text(QUICK)
    before, running = descriptors(), children()
    hanging = Reward(fn="hanging.py:f", timeout_s=LIMIT_S, num_workers=NUM_WORKERS, max_error_rate=1.0)
    quick = Reward(fn="quick.py:f", num_workers=1)
    with RewardPool(hanging.fn, hanging, base_dir=tmp_path) as storm, RewardPool(quick.fn, quick, base_dir=tmp_path) as calm:
        opened = descriptors()
        quiet = latencies(calm, lambda found: len(found) == 500)
        results = []
        thread = threading.Thread(target=lambda: results.extend(storm.score(items(*["spin", "sleep"] * (NUM_HANGS // 2)))))
        thread.start()
        stormy = latencies(calm, lambda found: not thread.is_alive())
        assert [result.status for result in results] == [RewardStatus.timeout] * NUM_HANGS
        # At full size: as many calls as there are workers sleep side by side.
        assert [result.status for result in storm.score(items(*["fine"] * 100))] == [RewardStatus.ok] * 100
        assert len(storm.worker_pids) == NUM_WORKERS
        # A worker's memory is looked up after its last answer too, in a file that is open for a moment.
        assert wait_until(lambda: descriptors() == opened)
        p99_quiet, p99_stormy = np.percentile(quiet, 99), np.percentile(stormy, 99)
        print(f"p99 {1000 * p99_quiet:.1f} ms quiet, {1000 * p99_stormy:.1f} ms beside {NUM_HANGS} hangs, {len(stormy)} calls")
        assert p99_stormy <= 2 * p99_quiet + 0.05
    assert descriptors() == before
    assert children() == running
