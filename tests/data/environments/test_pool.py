"""Episodes in processes of their own: what one of them does is no other's concern."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlkit.data.environments.pool import EnvironmentPool, Failure
from rlkit.errors import ConfigError, DataError, ResourceError, RewardError
from rlkit.settings import PythonEnvironment
from rlkit.types import RewardStatus

ENVIRONMENTS = '''
import os, random, re, signal, subprocess, sys, time
import numpy as np
from rlkit.data.environments import Step
from rlkit.errors import ConfigError

class Acts:
    """Does what the policy says."""
    def __init__(self, greeting=""):
        self.greeting = greeting
    def reset(self, row, seed):
        self.row, self.said, self.luck = row, [], (random.random(), float(np.random.rand()))
        if row.get("fail") == "reset": raise KeyError("the row is bad")
        return self.greeting or None
    def step(self, action):
        self.said.append(action)
        match action.split():
            case ["sleep"]: time.sleep(100)
            case ["spin"]:
                while True: pass
            case ["regex"]: re.match(r"(a+)+$", "a" * 60 + "b")  # C code that holds the interpreter's lock
            case ["stop"]: os.kill(os.getpid(), signal.SIGSTOP)
            case ["exit"]: os._exit(7)
            case ["segfault"]: os.kill(os.getpid(), signal.SIGSEGV)
            case ["sys.exit"]: sys.exit("bye")
            case ["raise"]: return 1 / 0
            case ["child"]: subprocess.run(["sleep", "1000"])
            case ["grow"]:
                hoard = []
                while True: hoard.append(bytearray(b"x" * (8 << 20)))
            case ["misconfigured"]: raise ConfigError("TOKEN is refused. Correct it.")
            case ["print"]: print("x" * 100_000)
            case ["leak"]: self.hoard = [*getattr(self, "hoard", ()), bytearray(b"x" * (60 << 20))]
            case ["huge"]: return "x" * (20 << 20), 0.0, False
            case ["half"]: return chr(0xd800) + "|" + chr(0xdc80), 0.0, False
            case ["hash"]: return ",".join({"alpha", "beta", "gamma", "delta", "epsilon"}), 0.0, False
            case ["luck"]: return repr(self.luck), 0.0, False
            case ["row"]: return repr(self.row), 0, False
            case ["numpy"]: return Step("", np.float32(0.5), bool(np.bool_(True)))
            case ["return", *what]: return eval(" ".join(what))
        return "|".join(self.said), float(len(self.said)), action == "end"

class Appraises(Acts):
    def cut(self): return eval(self.said[-1])

class NoStep:
    def reset(self, row, seed): ...

class Tooled(NoStep):
    tools = [print]
    def step(self, action): ...

class Raises:
    def __init__(self): raise RuntimeError("no such service")
'''


@pytest.fixture
def open_pool(tmp_path):
    (tmp_path / "worlds.py").write_text(ENVIRONMENTS)
    pools = []

    def build(name: str = "Acts", **settings) -> EnvironmentPool:
        pools.append(EnvironmentPool(PythonEnvironment(env=f"worlds.py:{name}", **settings), base_dir=tmp_path))
        return pools[-1]

    yield build
    for pool in pools:
        pool.close()


def begin(pool: EnvironmentPool, count: int = 1, **row):
    started = pool.begin([(row, number) for number in range(count)])
    assert not any(isinstance(each, Failure) for each in started)
    return [each[0] for each in started if not isinstance(each, Failure)]


def test_episodes_side_by_side_keep_their_own_state(open_pool):
    pool = open_pool()
    workers = begin(pool, 20)
    for turn in range(3):
        steps = pool.step([(worker, f"{number}.{turn}") for number, worker in enumerate(workers)])
        assert [step.observation for step in steps] == ["|".join(f"{n}.{t}" for t in range(turn + 1)) for n in range(20)]
        assert all((step.reward, step.done) == (turn + 1.0, False) for step in steps)
    assert pool.step([(workers[3], "end")])[0].done


def test_what_the_environment_is_given_and_says_at_the_start(open_pool):
    pool = open_pool(options={"greeting": "hello"})
    [(worker, opening)] = pool.begin([({"secret": 3, "tags": ("a", "b")}, 5)])
    assert opening == "hello"
    assert pool.step([(worker, "row")])[0].observation == "{'secret': 3, 'tags': ['a', 'b']}"
    assert pool.step([(worker, "numpy")])[0] == ("", 0.5, True)
    with pytest.raises(DataError, match="A row of the data holds a date, which cannot be sent to an environment"):
        pool.begin([({"day": __import__("datetime").date(2020, 1, 1)}, 0)])


def test_an_episode_is_the_same_for_the_same_seed_whatever_ran_before_it(open_pool):
    pool = open_pool()

    def luck(seed: int) -> str:
        [(worker, _)] = pool.begin([({}, seed)])
        [step] = pool.step([(worker, "luck")])
        pool.end(worker)
        return step.observation

    first = luck(2**62 + 5)
    assert luck(2**62 + 6) != first
    assert luck(2**62 + 5) == first
    assert len(pool.worker_pids) == 1  # one process after another episode in it


@pytest.mark.parametrize("action", ["sleep", "spin", "regex", "stop", "child"])
def test_an_episode_that_hangs_is_killed_alone(open_pool, action):
    pool = open_pool(timeout_s=1.0, max_calls_at_once=4)
    workers = begin(pool, 4)
    started = time.monotonic()
    steps = pool.step([(worker, action if number == 2 else "go") for number, worker in enumerate(workers)])
    assert time.monotonic() - started < 20  # and not the 100 that some of them sleep
    assert [step.observation for step in steps if not isinstance(step, Failure)] == ["go"] * 3
    assert steps[2] == Failure(
        status=RewardStatus.timeout, message="no answer within environment.timeout_s=1; its process was killed"
    )
    steps = pool.step([(worker, "on") for number, worker in enumerate(workers) if number != 2])
    assert [step.observation for step in steps] == ["go|on"] * 3
    assert len(pool.worker_pids) == 3
    assert not Path(f"/proc/{workers[2].pid}").exists()


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("exit", "its process ended within a turn"),
        ("segfault", "its process ended within a turn"),
        ("sys.exit", "SystemExit: bye"),
        ("raise", "ZeroDivisionError: division by zero (worlds.py:"),
    ],
)
def test_an_episode_that_crashes_is_an_error_of_its_own(open_pool, action, message):
    pool = open_pool()
    one, other = begin(pool, 2)
    failed, fine = pool.step([(one, action), (other, "go")])
    assert isinstance(failed, Failure)
    assert failed.status is RewardStatus.error
    assert message in failed.message
    assert fine.observation == "go"
    [(worker, _)] = pool.begin([({}, 0)])  # there is room for another
    assert pool.step([(worker, "new")])[0].observation == "new"


def test_an_episode_that_takes_too_much_memory_is_killed(open_pool):
    pool = open_pool(max_worker_mib=256, timeout_s=20.0)
    [failed] = pool.step([(begin(pool)[0], "grow")])
    assert isinstance(failed, Failure)
    assert failed.status is RewardStatus.error
    assert failed.message.startswith("grew to ")
    assert failed.message.endswith("above environment.max_worker_mib=256")


def test_an_episode_that_grows_in_quick_steps_is_killed_too(open_pool):
    pool = open_pool(max_worker_mib=256)
    worker = begin(pool)[0]
    for _ in range(5):
        [step] = pool.step([(worker, "leak")])
        if isinstance(step, Failure):
            break
    assert isinstance(step, Failure)
    assert step.message.startswith("grew to ")


def test_an_answer_that_is_too_long_is_an_error_of_its_episode(open_pool):
    pool = open_pool()
    one, other = begin(pool, 2)
    failed, fine = pool.step([(one, "huge"), (other, "go")])
    assert failed == Failure(status=RewardStatus.error, message="its answer has more than 16 MiB")
    assert fine.observation == "go"


def test_half_characters_do_not_reach_the_tokenizer(open_pool):
    pool = open_pool()
    assert pool.step([(begin(pool)[0], "half")])[0].observation == "?|?"


def test_a_set_has_the_same_order_in_every_run(open_pool):
    said = set()
    for _ in range(4):
        pool = open_pool()
        said.add(pool.step([(begin(pool)[0], "hash")])[0].observation)
    assert len(said) == 1


def test_a_worker_that_died_while_it_was_idle_costs_no_episode(open_pool, wait_until):
    pool = open_pool()
    one, other = begin(pool, 2)
    pool.end(one)
    pool.end(other)
    os.kill(other.pid, signal.SIGKILL)
    assert wait_until(lambda: not running(other.pid))
    assert len(begin(pool, 2)) == 2
    assert not Path(f"/proc/{other.pid}").exists()


def test_a_row_that_reset_cannot_take_is_a_failure_of_that_episode(open_pool):
    pool = open_pool()
    bad, good = pool.begin([({"fail": "reset"}, 0), ({}, 1)])
    assert isinstance(bad, Failure)
    assert "KeyError: 'the row is bad'" in bad.message
    assert not isinstance(good, Failure)


@pytest.mark.parametrize(
    ("returned", "what"),
    [
        ("5", "step() returned a int (5), not"),
        ("('', 1.0)", "step() returned a tuple (('', 1.0)), not"),
        ("(3, 1.0, True)", "a int (3) for its observation"),
        ("('', 'much', True)", "a str ('much') for its reward"),
        ("('', float('nan'), True)", "a float (nan) for its reward"),
        ("('', 1.0, 'yes')", "a str ('yes') for done"),
    ],
)
def test_a_broken_contract_stops_the_run(open_pool, returned, what):
    pool = open_pool()
    with pytest.raises(DataError, match=r"environment.env=worlds.py:Acts: .* Fix what it returns.") as caught:
        pool.step([(begin(pool)[0], f"return {returned}")])
    assert what in str(caught.value)


def test_an_environment_may_say_what_a_cut_off_episode_is_worth(open_pool):
    assert not open_pool().scores_cut
    pool = open_pool("Appraises")
    assert pool.scores_cut
    workers = begin(pool, 3)
    pool.step([*zip(workers, ["0.25", "1/0", "np.float32(2)"], strict=True)])
    first, failed, last = pool.cut(workers)
    assert (first, last) == (0.25, 2.0)
    assert isinstance(failed, Failure)
    assert "ZeroDivisionError" in failed.message
    pool.step([(workers[0], "'much'")])
    with pytest.raises(DataError, match=r"cut\(\) returned a str \('much'\), not a finite number. Fix what it returns."):
        pool.cut(workers[:1])


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("Tooled", {}, "Make it a list of dicts|a list of dicts"),
        ("Gone", {}, "there is no Gone in it. It has Acts, Appraises, NoStep, Raises"),
        ("NoStep", {}, r"it has no step\(\). Write reset\(row, seed\) and step\(action\)"),
        ("Raises", {}, "importing it raised RuntimeError: no such service"),
        ("Acts", {"options": {"colour": 1}}, r"environment.options=\{'colour': 1\}: .* refuses them: .*colour"),
    ],
)
def test_what_cannot_be_used_is_refused_when_the_pool_opens(open_pool, name, settings, message):
    with pytest.raises(ConfigError, match=message):
        open_pool(name, **settings)


def test_a_missing_file_is_refused_and_slow_imports_too(tmp_path):
    with pytest.raises(ConfigError, match=r"environment.env=maze.py:Maze: there is no file"):
        EnvironmentPool(PythonEnvironment(env="maze.py:Maze"), base_dir=tmp_path)
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(100)\nclass A: ...\n")
    with pytest.raises(RewardError, match=r"importing it took longer than 0.5 s"):
        EnvironmentPool(PythonEnvironment(env="slow.py:A"), base_dir=tmp_path, start_limit_s=0.5)
    (tmp_path / "gone.py").write_text("import os\nos._exit(3)\n")
    with pytest.raises(ResourceError, match=r"environment.env=gone.py:A: its process ended while importing it. See what"):
        EnvironmentPool(PythonEnvironment(env="gone.py:A"), base_dir=tmp_path)


def test_a_setting_that_turns_out_wrong_in_an_episode_stops_the_run(open_pool):
    pool = open_pool()
    with pytest.raises(ConfigError, match="TOKEN is refused"):
        pool.step([(begin(pool)[0], "misconfigured")])


def test_too_many_failed_episodes_stop_the_run(open_pool):
    pool = open_pool()
    for number in range(7):
        pool.count(f"s{number}", Failure(status=RewardStatus.error, message="it broke"))
    with pytest.raises(RewardError, match=r"8 of the last 8 samples failed, .*environment.max_error_rate=0.2.*sample s0: it broke"):
        pool.count("s7", Failure(status=RewardStatus.error, message="again"))
    pool = open_pool()
    pool.count("fine", None)
    for number in range(20):
        pool.count(f"s{number}", Failure(status=RewardStatus.error, message="it broke"))  # could still be few of 200


def running(pid: int) -> bool:
    """More than a zombie, which whoever inherits it may leave."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


def test_after_many_failures_nothing_is_left_and_room_is_as_before(open_pool):
    pool = open_pool(timeout_s=2.0, max_calls_at_once=4)
    [worker] = begin(pool)
    pool.end(worker)
    before = len(os.listdir("/proc/self/fd"))
    seen: set[int] = set()
    for _ in range(2):
        workers = begin(pool, 32)
        seen |= {worker.pid for worker in workers}
        steps = pool.step([(worker, ("spin", "exit", "raise", "go")[number % 4]) for number, worker in enumerate(workers)])
        fine = [worker for worker, step in zip(workers, steps, strict=True) if not isinstance(step, Failure)]
        assert len(fine) == 8
        for worker in fine:
            pool.end(worker)
    kept = pool.worker_pids
    assert len(kept) == 8
    assert sorted(alive([*seen])) == sorted(kept)  # not even as zombies
    assert len(os.listdir("/proc/self/fd")) == before + 7  # a socket each
    pool.close()
    assert not alive([*seen])
    assert len(os.listdir("/proc/self/fd")) == before - 2  # with that of the process they were forked from


def test_everything_goes_with_the_process_that_trains(tmp_path, wait_until):
    (tmp_path / "worlds.py").write_text(ENVIRONMENTS)
    code = (
        "import json, time\nfrom pathlib import Path\nfrom rlkit.data.environments.pool import EnvironmentPool\n"
        "from rlkit.settings import PythonEnvironment\n"
        "pool = EnvironmentPool(PythonEnvironment(env='worlds.py:Acts'), base_dir=Path('.'))\n"
        "pool.begin([({}, n) for n in range(3)])\nprint(json.dumps(pool.worker_pids), flush=True)\ntime.sleep(100)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pids = json.loads(process.stdout.readline())
    assert len(alive(pids)) == 3
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert wait_until(lambda: not any(map(running, pids)))


def limited(tmp_path: Path, soft: int, hard: int, *lines: str) -> subprocess.CompletedProcess:
    """What a process says that may open so many files, and raises what it raises."""
    (tmp_path / "worlds.py").write_text(ENVIRONMENTS)
    code = [
        "import resource",
        "from pathlib import Path",
        "from rlkit.data.environments.pool import EnvironmentPool, Failure",
        "from rlkit.settings import PythonEnvironment",
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))",
        "settings = PythonEnvironment(env='worlds.py:Acts')",
        *lines,
    ]
    return subprocess.run([sys.executable, "-c", "\n".join(code)], cwd=tmp_path, capture_output=True, text=True, check=False)


def test_more_episodes_than_there_may_be_files_are_refused_at_the_start(tmp_path):
    said = limited(
        tmp_path,
        200,
        700,
        "from rlkit.errors import ResourceError",
        "def refused(num_episodes, num_batches):",
        "    try: EnvironmentPool(settings, base_dir=Path('.'), num_episodes=num_episodes, num_batches=num_batches).close()",
        "    except ResourceError as error: return str(error)",
        "print(refused(300, 3))",
        "print(all(refused(3 * each, 3) for each in range(64, 100)), refused(3 * 20, 3))",
        "resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))",
        "print(refused(10, 1))",
    )
    assert not said.returncode, said.stderr
    refused, others, alone = said.stdout.splitlines()
    found = re.fullmatch(
        r"300 episodes may be under way at once, .* that is (\d+); this process may open 700 \(ulimit -Hn\). "
        r"Have its limit raised \(ulimit -n (\d+)\), or write environment.max_episodes_at_once=(\d+) or a lower max_staleness.",
        refused,
    )
    assert found, refused
    needed, written, fitting = map(int, found.groups())
    assert needed == written
    assert 3 * fitting <= 700 - (needed - 300) < 3 * (fitting + 1)
    assert others == "True None"
    assert re.search(r"Have its limit raised \(ulimit -n \d+\).$", alone), alone
    opened = "EnvironmentPool(settings, base_dir=Path('.'), num_episodes=300, num_batches=3).close()"
    assert not limited(tmp_path, 200, needed, opened).returncode  # what it says to write is enough


def test_as_many_episodes_begin_as_the_limit_is_raised_for(tmp_path):
    said = limited(
        tmp_path,
        64,
        2000,
        "pool = EnvironmentPool(settings, base_dir=Path('.'), num_episodes=150)",
        "begun = pool.begin([({}, number) for number in range(150)])",
        "print(len(begun), sum(isinstance(each, Failure) for each in begun))",
    )
    assert said.stdout.split() == ["150", "0"], said.stderr


def test_the_death_of_the_process_they_are_forked_from_is_loud(open_pool, wait_until):
    pool = open_pool()
    [worker] = begin(pool)
    os.killpg(pool._process.pid, signal.SIGKILL)
    ended = (
        r"^environment.env=worlds.py:Acts: the process that its episodes are forked from has ended. See what it printed before.$"
    )
    with pytest.raises(ResourceError, match=ended):
        pool.begin([({}, 0), ({}, 1)])
    assert wait_until(lambda: not running(worker.pid))  # it goes with it
    with pytest.raises(ResourceError, match=ended):
        pool.step([(worker, "go")])


def test_a_process_to_fork_from_that_stands_still_is_loud_and_holds_nobody_up_again(open_pool, monkeypatch, wait_until):
    pool = open_pool()
    begin(pool, 2)
    os.kill(pool._process.pid, signal.SIGSTOP)
    monkeypatch.setattr(pool, "_start_limit_s", 0.5)
    with pytest.raises(ResourceError, match=r"forked from did not answer within 0.5 s. See whether"):
        begin(pool)
    monkeypatch.setattr(pool, "_start_limit_s", 1000.0)
    with pytest.raises(ResourceError, match="has ended"):
        begin(pool)
    pids = pool.worker_pids
    pool.close()
    assert wait_until(lambda: not any(map(running, pids)))


def test_the_example_in_the_documentation_plays(tmp_path):
    text = (Path(__file__).parents[3] / "docs" / "environments.md").read_text(encoding="utf-8")
    (tmp_path / "maze.py").write_text(text.split("```python\n")[1].split("```")[0])
    settings = PythonEnvironment(env="maze.py:Maze", options={"width": 2})
    with EnvironmentPool(settings, base_dir=tmp_path) as pool:
        [worker] = begin(pool)
        steps = [pool.step([(worker, where)])[0] for where in ("left", "right", "right", "right")]
    said = [(step.observation, step.done) for step in steps if not isinstance(step, Failure)]
    assert said == [("You are at -1.", False), ("You are at 0.", False), ("You are at 1.", False), ("You are at 2.", True)]
