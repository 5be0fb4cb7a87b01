import gc
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import numpy as np
import pytest

from rlkit.data.rewards.pool import RewardItem, RewardPool
from rlkit.data.rewards.process import WorkerProcess
from rlkit.errors import ConfigError, DataError, RewardError
from rlkit.settings import BY_VALUE, OnFailure, Reward
from rlkit.types import RewardStatus

ok, skipped, timeout, error = RewardStatus.ok, RewardStatus.skipped, RewardStatus.timeout, RewardStatus.error

FUNCTIONS = '''
import asyncio, math, os, re, signal, subprocess, sys, time
import numpy as np
from rlkit.data.rewards import group_wise, unparsable, wrong

def number(completions):
    return [float(text) for text in completions]

def act(prompts, completions, **columns):
    """Does what the completion says."""
    [text] = completions
    match text.split():
        case ["sleep"]: time.sleep(100)
        case ["write", path]:
            with open(path, "w") as file:
                file.write(f"{os.getpid()}.")
            time.sleep(100)
        case ["spin"]:
            while True: pass
        case ["regex"]: re.match(r"(a+)+$", "a" * 60 + "b")  # C code that holds the interpreter's lock
        case ["stop"]: os.kill(os.getpid(), signal.SIGSTOP)
        case ["exit"]: os._exit(7)
        case ["segfault"]: os.kill(os.getpid(), signal.SIGSEGV)
        case ["sys.exit"]: sys.exit("bye")
        case ["raise"]: return 1 / 0
        case ["child"]: subprocess.run(["sleep", "1000"])
        case ["print"]:
            print("x" * 100_000)
            os.write(1, b"\\x00\\x00\\x00\\x02{}")  # what a message looks like
            os.write(2, b"\\x00\\x00\\x00\\x02{}")
        case ["pid"]: return [os.getpid()]
        case ["return", value]: return [eval(value)]
        case ["whole", value]: return eval(value)
        case ["once", path]:
            if not os.path.exists(path):
                open(path, "w").close()
                os._exit(1)
        case ["flaky", path]:
            if not os.path.exists(path):
                open(path, "w").close()
                raise OSError("at first")
        case ["hoard"]:
            kept = []
            while True:
                kept.append(bytearray(1 << 20))
                time.sleep(0.001)
    return [1.0]

def judge(completions):
    return [1.0 if text == "2" else wrong() if text.isdigit() else unparsable(-0.5, "no digits") for text in completions]

async def patient(completions, answer):
    await asyncio.sleep(0.001)
    return [float(text == wanted) for text, wanted in zip(completions, answer)]

@group_wise
def rank(prompts, completions, answer):
    assert len(set(prompts)) == 1
    return [sorted(completions).index(text) for text in completions]

@group_wise
def one_for_all(completions):
    return [1.0]

def echo(completions, x):
    return [float(repr(x) == text) for text in completions]

def slow_start(completions):
    return [1.0]
'''


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rewards")
    (folder / "mine.py").write_text(FUNCTIONS)
    (folder / "broken.py").write_text("import gone\n")
    (folder / "slow.py").write_text("import time; time.sleep(100)\n")
    (folder / "leaver.py").write_text("import os; os._exit(3)\n")
    return folder


@pytest.fixture
def open_pool(base_dir):
    pools = []

    def build(function="act", *, num_workers=1, max_error_rate=1.0, timeout_s=60.0, start_limit_s=60.0, **more):
        name = function if ":" in function else f"mine.py:{function}"
        settings = Reward(fn=name, timeout_s=timeout_s, num_workers=num_workers, max_error_rate=max_error_rate, **more)
        pools.append(RewardPool(name, settings, base_dir=base_dir, start_limit_s=start_limit_s))
        return pools[-1]

    yield build
    for pool in pools:
        pool.close()


def make_items(*completions, columns=None, group_size=1):
    return [
        RewardItem(
            sample_id=f"s{i}", group_id=f"g{i // group_size}", prompt=f"p{i // group_size}", completion=text, columns=columns or {}
        )
        for i, text in enumerate(completions)
    ]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_results_have_the_order_of_the_items_whatever_worker_scored_them(open_pool):
    pool = open_pool("number", num_workers=3)
    results = pool.score(make_items(*map(str, range(2000))))
    assert [(result.sample_id, result.reward, result.status) for result in results] == [
        (f"s{i}", float(i), ok) for i in range(2000)
    ]
    assert pool.score([]) == []


def test_a_reward_of_named_parts_is_their_sum(open_pool):
    pool = open_pool()
    whole, one, plain = pool.score(make_items("return {'right':1,'brief':0.5}", "return {'right':np.float32(0.25)}", "return 2"))
    assert (whole.reward, whole.components, whole.status) == (1.5, {"right": 1.0, "brief": 0.5}, ok)
    assert (one.reward, one.components) == (0.25, {"right": 0.25})
    assert (plain.reward, plain.components) == (2.0, {})
    wrong = ["{}", "{1:2.0}", "{'a':None}", "{'a':1,'b':math.nan}", "{'a':{'b':1}}", "{'a':1e308,'b':1e308}"]
    results = pool.score(make_items(*(f"return {value}" for value in wrong)))
    assert {result.status for result in results} == {error}
    assert [result.message for result in results] == [
        "returned a dict ({}), whose keys are not names",
        "returned a dict ({1: 2.0}), whose keys are not names",
        "returned None for its part a",
        "returned nan for its part b",
        "returned a dict ({'b': 1}), not a number or None for its part a",
        "returned inf",
    ]


def test_cheap_calls_run_by_the_thousand_per_second(open_pool, monkeypatch):
    pool = open_pool("number", num_workers=2)
    items = make_items(*map(str, range(4000)))
    pool.score(items)
    run, sizes = WorkerProcess.run, []

    def counted(worker, calls, **settings):
        sizes.append(len(calls))
        return run(worker, calls, **settings)

    monkeypatch.setattr(WorkerProcess, "run", counted)
    started = time.monotonic()
    pool.score(items)
    assert time.monotonic() - started < 20  # 0.5 s on two quiet cores
    assert len(sizes) < len(items) / 8  # messages


def test_a_set_has_the_same_order_in_every_run(open_pool):
    [first, second] = [open_pool().score(make_items("return hash('alpha')%100003"))[0].reward for _ in range(2)]
    assert first == second


def test_a_worker_starts_without_torch():
    code = "import sys, rlkit.data.rewards.worker; print('torch' in sys.modules, 'omegaconf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False False\n"


@pytest.mark.parametrize("hang", ["sleep", "spin", "regex", "stop"])
def test_a_hanging_sample_is_killed_in_time_and_is_the_only_one_lost(open_pool, hang):
    pool = open_pool(num_workers=1, timeout_s=0.5)
    started = time.monotonic()
    results = pool.score(make_items("x", "x", hang, "x", "x"))
    assert time.monotonic() - started < 20
    assert [result.status for result in results] == [ok, ok, timeout, ok, ok]
    assert results[2].reward is None
    assert "no answer within reward.timeout_s=0.5" in results[2].message


def test_a_hang_does_not_delay_the_samples_of_other_workers(open_pool):
    pool = open_pool(num_workers=2)
    hanging = pool.submit(make_items("sleep"))
    started = time.monotonic()
    assert [result.status for result in pool.score(make_items(*"x" * 50))] == [ok] * 50
    assert time.monotonic() - started < 20
    assert not hanging.done()


def test_calls_behind_a_slow_one_go_to_another_worker_and_are_answered_once(open_pool, base_dir, tmp_path, wait_until):
    (base_dir / "uneven.py").write_text(
        "import os, time\n"
        "def f(completions, log):\n"
        "    while completions == ['slow'] and not os.path.exists(f'{log[0]}.complete'): time.sleep(0.01)\n"
        "    with open(log[0], 'a') as file: file.write(f'{completions[0]} {os.getpid()}\\n')\n"
        "    return [1.0]\n"
    )
    pool = open_pool("uneven.py:f", num_workers=2, timeout_s=100.0)
    log = tmp_path / "log"
    pool.score(make_items(*["warm-up"] * 100, columns={"log": str(log)}))  # calls are found to be cheap, so messages are long
    log.unlink()
    future = pool.submit(make_items("slow", *map(str, range(40)), columns={"log": str(log)}))
    assert wait_until(lambda: log.exists() and log.read_text().count("\n") == 40)
    log.with_name("log.complete").touch()
    assert {result.status for result in future.result(timeout=30)} == {ok}
    calls, pids = zip(*(line.split() for line in log.read_text().splitlines()), strict=True)
    assert sorted(calls) == sorted(["slow", *map(str, range(40))])
    assert calls[-1] == "slow"
    assert len(set(pids)) == 2


def test_the_limit_is_per_call_not_per_message(open_pool, base_dir):
    (base_dir / "steady.py").write_text("import time\ndef f(completions):\n    time.sleep(float(*completions))\n    return [1.0]\n")
    pool = open_pool("steady.py:f", num_workers=1, timeout_s=1.5)
    pool.score(make_items(*["0"] * 100))  # calls are found to be cheap, so messages are long
    assert {result.status for result in pool.score(make_items(*["0.1"] * 20))} == {ok}


def test_twenty_hangs_leave_the_pool_at_full_size_without_processes_or_descriptors_left_over(open_pool, wait_until):
    pool = open_pool(num_workers=4, timeout_s=0.5)
    pool.score(make_items(*"x" * 4))
    gc.collect()  # a socket of an earlier test that waits for it would be missed below
    descriptors, threads, first_pids = len(os.listdir("/proc/self/fd")), threading.active_count(), pool.worker_pids
    pids = set(first_pids)
    for _ in range(5):
        results = pool.score(make_items(*["sleep"] * 4, "x"))
        assert [result.status for result in results] == [timeout] * 4 + [ok]
        assert wait_until(lambda: len(pool.worker_pids) == 4)
        pids |= set(pool.worker_pids)
    alive = {result.reward for result in pool.score(make_items(*["pid"] * 200))}
    assert alive <= {float(pid) for pid in pool.worker_pids}
    # For a moment more are open: of a replacement that is starting, and of a worker's memory that is looked up.
    assert wait_until(lambda: len(os.listdir("/proc/self/fd")) == descriptors)
    assert not any(is_running(pid) for pid in pids - set(pool.worker_pids))
    assert threading.active_count() == threads
    pool.close()
    assert not any(map(is_running, pids))
    assert len(os.listdir("/proc/self/fd")) == descriptors - 4  # one socket per worker


def test_a_crash_is_tried_once_more_then_an_error(open_pool, tmp_path):
    pool = open_pool(num_workers=2)
    results = pool.score(make_items("x", "exit", "x", f"once {tmp_path}/mark", "segfault", "x"))
    assert [result.status for result in results] == [ok, error, ok, ok, error, ok]
    assert results[1].message == "its worker exited with code 7, 2 times"
    assert results[4].message == "its worker was killed by SIGSEGV, 2 times"


def test_a_worker_killed_from_outside_loses_no_sample(open_pool, tmp_path, wait_until):
    pool = open_pool(num_workers=1)
    mark = tmp_path / "mark"
    future = pool.submit(make_items("x", f"write {mark}", "x"))
    for _ in range(2):
        assert wait_until(
            lambda: mark.exists() and mark.read_text().endswith("."),
        )
        pid = int(mark.read_text().rstrip("."))
        mark.unlink()
        os.kill(pid, signal.SIGKILL)
    first, second, third = future.result(timeout=30)
    assert (first.status, second.status, third.status) == (ok, error, ok)
    assert second.message == "its worker was killed by SIGKILL, 2 times"


def test_a_replacement_killed_while_it_starts_is_replaced_too(open_pool, wait_until):
    pool = open_pool(num_workers=1)
    [first] = pool.worker_pids
    os.kill(first, signal.SIGKILL)
    future = pool.submit(make_items("x"))
    assert wait_until(lambda: pool.worker_pids and pool.worker_pids != [first])
    os.kill(pool.worker_pids[0], signal.SIGKILL)
    assert future.result(timeout=30)[0].status is ok


def test_an_idle_worker_killed_from_outside_is_replaced(open_pool):
    pool = open_pool(num_workers=1)
    os.kill(pool.worker_pids[0], signal.SIGKILL)
    assert [result.status for result in pool.score(make_items("x", "x"))] == [ok, ok]


@pytest.mark.parametrize(
    ("text", "status", "message"),
    [
        ("raise", error, "ZeroDivisionError: division by zero (mine.py:"),
        ("sys.exit", error, "SystemExit: bye"),
        ("return float('nan')", error, "returned nan"),
        ("return -math.inf", error, "returned -inf"),
        ("return 10**400", error, "returned an integer that no float holds"),
        ("return 'yes'", error, "returned a str ('yes'), not a number or None"),
        ("return [1]", error, "returned a list ([1]), not a number or None"),
        ("return np.float32('nan')", error, "returned nan"),
        ("return None", skipped, ""),
        ("return True", ok, ""),
        ("return np.float32(1)", ok, ""),
        ("whole np.ones(1)", ok, ""),
        ("whole (1,)", ok, ""),
        ("print", ok, ""),
    ],
)
def test_a_failure_is_an_error_and_never_a_number(open_pool, text, status, message):
    before, result, after = open_pool().score(make_items("x", text, "x"))
    assert (before.reward, after.reward) == (1.0, 1.0)
    assert (result.status, result.reward) == (status, 1.0 if status is ok else None)
    assert result.message.startswith(message)
    assert bool(result.message) is bool(message)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("whole []", "returned a list of 0"),
        ("whole [1,2]", "returned a list of 2"),
        ("whole 1.0", "returned a float (1.0)"),
        ("whole None", "returned a NoneType (None)"),
        ("whole np.ones((2,1))", "returned a list of 2"),
        ("whole {'a':1}", "returned a dict"),
    ],
)
def test_a_wrong_shape_breaks_the_contract_and_stops_everything(open_pool, text, found):
    pool = open_pool()
    with pytest.raises(DataError) as caught:
        pool.score(make_items("x", text))
    assert f"reward.fn=mine.py:act {found}" in str(caught.value)
    assert "not a list of 1 numbers or None, one per completion (sample s1)" in str(caught.value)
    with pytest.raises(DataError):
        pool.score(make_items("x"))


def test_async_functions_and_columns(open_pool):
    results = open_pool("patient").score(make_items("a", "b", columns={"answer": "b", "unused": object()}))
    assert [result.reward for result in results] == [0.0, 1.0]


def test_a_group_wise_function_sees_a_group_per_call(open_pool):
    pool = open_pool("rank")
    results = pool.score(make_items("b", "a", "c", "z", "y", "x", columns={"answer": 1}, group_size=3))
    assert [result.reward for result in results] == [1, 0, 2, 2, 1, 0]
    with pytest.raises(DataError, match=r"returned a list of 1, not a list of 3 numbers"):
        open_pool("one_for_all").score(make_items("a", "b", "c", group_size=3))


def test_columns_arrive_as_plain_values(open_pool):
    pool = open_pool("echo")
    for sent, arrives in [
        (np.int64(3), [3]),
        (np.array([1.5, 2]), [[1.5, 2.0]]),
        ((1, "é", None, True), [[1, "é", None, True]]),
        ({"a": {"b": np.bool_(True)}}, [{"a": {"b": True}}]),
        ("\ud800", ["\ud800"]),
    ]:
        [result] = pool.score(make_items(repr(arrives), columns={"x": sent}))
        assert result.reward == 1.0, sent
    for value, kind in [(date(2020, 1, 1), "date"), (b"x", "bytes"), ([{1: 2}], "dict")]:
        with pytest.raises(DataError, match=rf"column x of sample s0 holds a {kind}, which cannot be sent"):
            pool.score(make_items("", columns={"x": value}))
    with pytest.raises(DataError, match=r"needs a column x. The columns are y"):
        pool.score(make_items("", columns={"y": 1}))
    assert pool.score(make_items("[1]", columns={"x": 1}))[0].reward == 1.0  # a refused item breaks nothing


def test_the_first_failure_is_shown_once_with_its_traceback(open_pool, caplog):
    pool = open_pool(num_workers=1)
    with caplog.at_level(logging.WARNING, logger="rlkit.data.rewards.pool"):
        pool.score(make_items("x", "raise", "raise", "exit"))
    [record] = caplog.records
    assert "reward.fn=mine.py:act failed on sample s1: ZeroDivisionError: division by zero (mine.py:" in record.getMessage()
    assert 'case ["raise"]: return 1 / 0' in record.getMessage()


def test_too_many_failures_stop_the_run_with_one_sentence(open_pool, wait_until):
    pool = open_pool(max_error_rate=0.2, num_workers=1)
    pool.score(make_items(*["x"] * 150, *["raise"] * 40))  # 40 of the last 200 is exactly the limit
    with pytest.raises(RewardError) as caught:
        pool.score(make_items("raise"))
    message = str(caught.value)
    assert "reward.fn=mine.py:act: 41 of the last 191 samples failed" in message
    assert "The first was sample s150: ZeroDivisionError: division by zero (mine.py:" in message
    assert "reward.max_error_rate=0.2" in message
    with pytest.raises(RewardError):
        pool.submit(make_items("x"))
    assert wait_until(lambda: not pool.worker_pids)


def test_old_failures_are_forgotten(open_pool):
    pool = open_pool(max_error_rate=0.2, num_workers=1)
    for _ in range(3):
        pool.score(make_items(*["x"] * 200, *["raise"] * 40))


def test_a_small_run_whose_every_reward_fails_stops_early(open_pool):
    with pytest.raises(RewardError, match=r"8 of the last 8 samples failed"):
        open_pool(max_error_rate=0.2, num_workers=1).score(make_items(*["raise"] * 12))
    with pytest.raises(RewardError, match=r"1 of the last 1 samples failed"):
        open_pool(max_error_rate=0.0).score(make_items("raise"))


def test_a_pool_where_everything_hangs_ends_in_time(open_pool):
    started = time.monotonic()
    with pytest.raises(RewardError, match=r"no answer within reward.timeout_s=0.1"):
        open_pool(max_error_rate=0.2, num_workers=2, timeout_s=0.1).score(make_items(*["sleep"] * 500))
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    ("function", "kind", "message"),
    [
        ("broken.py:f", ConfigError, "reward.fn=broken.py:f: importing it raised ModuleNotFoundError: No module named 'gone'"),
        ("mine.py:typo", ConfigError, "there is no typo in it. It has act, echo"),
        ("gone.py:f", ConfigError, "there is no file"),
        ("leaver.py:f", RewardError, "its worker exited with code 3 while importing it"),
        ("slow.py:f", RewardError, "importing it took longer than 0.5 s"),
    ],
)
def test_a_function_that_cannot_be_imported_is_refused_at_the_start(open_pool, function, kind, message, wait_until):
    before = threading.active_count()
    with pytest.raises(kind) as caught:
        open_pool(function, num_workers=2, start_limit_s=0.5 if function == "slow.py:f" else 60.0)
    assert message in str(caught.value)
    assert wait_until(lambda: threading.active_count() == before)


def test_closing_kills_workers_and_what_they_started_and_ends_waiting_jobs(open_pool, wait_until):
    pool = open_pool(num_workers=1)
    future = pool.submit(make_items("child"))
    [pid] = pool.worker_pids
    children = Path(f"/proc/{pid}/task/{pid}/children")
    assert wait_until(lambda: children.read_text().split())
    [child] = map(int, children.read_text().split())
    pool.close()
    pool.close()
    assert not is_running(pid)
    assert wait_until(lambda: not is_running(child))
    with pytest.raises(RewardError, match=r"closed before it had scored everything"):
        future.result(timeout=1)
    with pytest.raises(RewardError, match=r"its pool is closed"):
        pool.score(make_items("x"))


def test_workers_die_with_their_owner(base_dir, wait_until):
    code = (
        "import os, signal, time\nfrom pathlib import Path\nfrom rlkit.data.rewards.process import WorkerProcess\n"
        "limits = dict(convention='auto', max_mib=999, unsandboxed=False, start_limit_s=60)\n"
        f"worker = WorkerProcess('mine.py:act', Path({str(base_dir)!r}), **limits)\n"
        "while worker._poll(time.monotonic() + 60) is None: pass\n"
        "call = {'prompt': ['p'], 'completion': ['spin'], 'columns': {}}\n"
        "worker._send({'calls': [call], 'together': False, 'limit_s': 60})\nworker._poll(time.monotonic() + 60)\n"
        "print(worker.pid, flush=True)\nos.kill(os.getpid(), signal.SIGKILL)\n"
    )
    owner = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=60)
    pid = int(owner.stdout)
    assert wait_until(lambda: not is_running(pid))


def test_many_threads_may_submit_at_once(open_pool):
    pool = open_pool("number", num_workers=2)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda n: pool.score(make_items(*[str(n)] * 50)), range(20)))
    assert [{result.reward for result in results} for results in found] == [{float(n)} for n in range(20)]


def test_a_failed_reward_becomes_what_the_settings_say(open_pool, tmp_path):
    raising, sleeping = make_items("raise"), make_items("sleep")
    pool = open_pool(on_error=BY_VALUE, on_timeout=BY_VALUE, failed_value=-1.0, timeout_s=0.5)
    [failed], [late] = pool.score(raising), pool.score(sleeping)
    assert (failed.status, failed.reward, late.status, late.reward) == (error, -1.0, timeout, -1.0)

    flaky = tmp_path / "tried"
    text = f"flaky {flaky}"
    assert open_pool().score(make_items(text))[0].status is error
    flaky.unlink()
    assert open_pool(on_error=OnFailure.retry).score(make_items(text))[0].status is ok
    [twice] = open_pool(on_timeout=OnFailure.retry, timeout_s=0.3).score(sleeping)
    assert (twice.status, twice.reward) == (timeout, None)

    with pytest.raises(RewardError, match=r"sample s0: ZeroDivisionError.*reward.on_error=stop ends the run"):
        open_pool(on_error=OnFailure.stop).score(raising)


def test_a_value_for_failures_that_nobody_reads_is_refused():
    with pytest.raises(ConfigError, match=r"reward.failed_value=0.0: nobody reads it"):
        Reward(fn="f", failed_value=0.0)
    with pytest.raises(ConfigError, match=r"reward.failed_value=None: no reward for a sample that failed"):
        Reward(fn="f", on_error=BY_VALUE)


def test_a_function_can_say_why_a_reward_is_what_it_is(open_pool):
    results = open_pool("judge").score(make_items("2", "3", "?"))
    assert [(each.status, each.reward) for each in results] == [
        (ok, 1.0),
        (RewardStatus.wrong, 0.0),
        (RewardStatus.unparsable, -0.5),
    ]
    assert results[2].message == "no digits"


def test_workers_make_room_for_new_ones(open_pool):
    pool = open_pool(max_calls_per_worker=1)
    pids = {pool.score(make_items("pid"))[0].reward for _ in range(3)}
    assert len(pids) == 3


def test_a_worker_that_takes_too_much_memory_is_killed(open_pool):
    pool = open_pool(max_worker_mib=256)
    hoarded, fine = pool.score(make_items("hoard", "fine"))
    assert hoarded.status is error
    assert "above reward.max_worker_mib=256" in hoarded.message
    assert fine.status is ok
