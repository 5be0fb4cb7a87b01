# ruff: noqa: E501  (a program is one line)
"""The adapter of a sandbox service, against a server that speaks SandboxFusion's /run_code and runs programs in bubblewrap."""

import json
import os
import shutil
import socket
import time

import pytest

from rlkit.data.environments.tools import Tools
from rlkit.data.rewards.pool import RewardItem, RewardPool
from rlkit.data.sandbox import Case, Limits, Program, open_sandbox
from rlkit.data.sandbox.remote import TOKEN, Remote
from rlkit.data.sandbox.run import UNSAFE, URL, Bubblewrap
from rlkit.errors import ConfigError, ResourceError
from rlkit.settings import Reward
from rlkit.types import RewardStatus

CANARY = "canary-9d2e"
CAPTURED = 1 << 20  # bytes of each text: a service keeps no more
QUICK = Limits(wall_s=1.5, total_s=10.0)  # of what would not end
PATIENT = Limits(wall_s=20.0, cpu_s=20, total_s=30.0)  # of what ends by itself, on however busy a machine


def fusion(number, body):
    """What SandboxFusion would answer."""
    status, ran = outcome_of(body)
    return 200, json.dumps({"status": status, "message": "", "compile_result": None, "run_result": ran, "files": {}})


def outcome_of(body):
    began = time.monotonic()
    path = shutil.which("bwrap", path="/usr/bin:/usr/local/bin:/bin")
    assert path, "install bubblewrap (Debian and Ubuntu: sudo apt install bubblewrap)"
    limits = Limits(wall_s=body["run_timeout"], total_s=60.0, memory_mib=body["memory_limit_MB"], output_bytes=CAPTURED)
    code = f"import os, sys; os.execv(sys.executable, [sys.executable, '-ISc', {body['code']!r}])"  # a service starts Python
    [outcome] = Bubblewrap(path).run(Program(code=code), [Case(stdin=body["stdin"])], limits)
    took = {"execution_time": time.monotonic() - began, "stdout": outcome.stdout, "stderr": outcome.stderr}
    if outcome.status == "timeout":
        return "Failed", {"status": "TimeLimitExceeded", "return_code": None, **took}
    code = {"ok": 0, "output": 0, "error": 1, "killed": -9}[outcome.status]
    return "Failed" if code else "Success", {"status": "Finished", "return_code": code, **took}


@pytest.fixture
def opened(monkeypatch):
    """Forgets sandboxes, before and after."""
    monkeypatch.delenv(TOKEN, raising=False)
    open_sandbox.cache_clear()
    yield
    open_sandbox.cache_clear()


def ok(stdout, seconds=0.1):
    ran = {"status": "Finished", "execution_time": seconds, "return_code": 0, "stdout": stdout, "stderr": ""}
    return 200, json.dumps({"status": "Success", "message": "", "run_result": ran})


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as gone:
        return gone.getsockname()[1]


def items(*texts, **columns):
    return [
        RewardItem(sample_id=f"s{i}", group_id="g", prompt="p", completion=text, columns=columns) for i, text in enumerate(texts)
    ]


def test_programs_read_print_and_return_as_in_the_local_sandbox(serve):
    sandbox = Remote(serve(fusion).url)
    first, second = sandbox.run(Program(code="print(input()[::-1])"), [Case(stdin="abc"), Case(stdin="\u00e9\U0001f680")])
    assert (first.status, first.stdout, second.stdout) == ("ok", "cba\n", "\U0001f680\u00e9\n")
    function = Program(code="print('seen')\ndef f(x, y=2): return [x * y, None, '\u00e9']", entry_point="f")
    good, bad = sandbox.run(function, [Case(arguments=[3]), Case(arguments=[None])])
    assert (good.status, good.value, good.stdout) == ("ok", [6, None, "\u00e9"], "seen\n")
    assert (bad.status, bad.value) == ("error", None)
    assert "TypeError" in bad.stderr
    statuses = {"import sys; sys.exit(3)": "error", "import sys; sys.exit()": "ok", "def f(:": "error", "\ud800": "error"}
    assert {code: sandbox.run(Program(code=code), [Case()])[0].status for code in statuses} == statuses
    assert sandbox.run(Program(code="", entry_point="gone"), [Case(arguments=[1])])[0].status == "error"
    assert sandbox.run(Program(code=""), []) == []


def test_what_the_service_is_asked(serve):
    server = serve(lambda number, body: ok("1\n"))
    Remote(server.url, token=CANARY).run(Program(code="print(input())"), [Case(stdin="1")], Limits(wall_s=2.0, memory_mib=99))
    [request] = server.seen
    assert (request.path, request.authorization) == ("/run_code", f"Bearer {CANARY}")
    body = request.body
    assert (body["language"], body["code"], body["stdin"]) == ("python", "print(input())", "1")
    assert (body["run_timeout"], body["compile_timeout"], body["memory_limit_MB"]) == (2.0, 2.0, 99)


@pytest.mark.parametrize("entry_point", ["", "f"])
@pytest.mark.parametrize(
    ("code", "statuses"),
    [
        ("while True: pass", {"timeout"}),
        ("print('x' * 100_000)", {"output"}),
        ("while True: print('x' * 1000)", {"output", "error", "timeout", "killed"}),  # a full disk
        ("import sys\nsys.stderr.write('x' * 100_000)", {"output"}),
        ("x = bytearray(1 << 40)", {"error"}),
        ("import os, signal; os.kill(os.getppid(), signal.SIGKILL)", {"error", "killed", "ok"}),
        ("import os\nwhile True: os.fork()", {"timeout", "error"}),
    ],
)
def test_whatever_a_program_does_there_is_an_outcome(serve, code, statuses, entry_point):
    case, limits = Case(arguments=[]) if entry_point else Case(), QUICK if "timeout" in statuses else PATIENT
    began = time.monotonic()
    [outcome] = Remote(serve(fusion).url).run(Program(code=f"{code}\ndef f(): return 1", entry_point=entry_point), [case], limits)
    assert outcome.status in statuses, outcome
    assert len(outcome.stdout) <= QUICK.output_bytes
    assert len(outcome.stderr) <= QUICK.output_bytes
    assert time.monotonic() - began < 40


LOOK = """
import ctypes, gc, os, re, sys
found, pattern = set(), re.compile(rb"(?<![0-9a-f])([0-9a-f]{32})(?![0-9a-f])")
def look(content): found.update(pattern.findall(content))
frame = sys._getframe()
while frame: look(repr([frame.f_locals, frame.f_globals]).encode()); frame = frame.f_back
look(repr(gc.get_objects()).encode("utf-8", "replace"))
for pid in ("self", os.getppid()):
    for name in ("environ", "cmdline", "fd/0", "fd/1"):
        try:
            descriptor = os.open(f"/proc/{pid}/{name}", os.O_RDONLY | os.O_NONBLOCK)
            look(os.read(descriptor, 1 << 16))
        except OSError: pass
    try:
        with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb") as memory:
            for line in maps:
                first, last = (int(each, 16) for each in line.split()[0].split("-"))
                if "rw" in line and last - first < 1 << 26:
                    try: memory.seek(first); look(memory.read(last - first))
                    except (OSError, ValueError, OverflowError): pass
    except OSError: pass
for nonce in found or [b"0" * 32]:
    text = "\\n" + nonce.decode() + ' {"status": "ok", "stdout": "", "stderr": "", "returned": "42"}\\n'
    for name in ("/proc/self/fd/1", f"/proc/{os.getppid()}/fd/1"):
        try: os.write(os.open(name, os.O_WRONLY | os.O_APPEND), text.encode())
        except OSError: pass
"""


@pytest.mark.parametrize(
    ("forgery", "status"),
    [
        ('print(\'\\n{"status": "ok", "stdout": "", "stderr": "", "returned": "42"}\\n\')\ndef f(): return 41', "ok"),
        ("import os\ndef f():\n    print('42'); os._exit(0)", "error"),
        (
            "import os\ndef f():\n    for fd in range(64):\n        try: os.write(fd, b'\\n' + b'0' * 32 + b' 42\\n')\n        except OSError: pass\n    os._exit(0)",
            "error",
        ),
        (f"{LOOK}\ndef f(): return 41", "ok"),
        (f"{LOOK}\nos._exit(0)", "error"),
        (f"{LOOK}\nimport signal; os.kill(os.getppid(), signal.SIGKILL)", "killed"),
        ("import os, sys\nsys.stdout = sys.stderr\ndef f(): raise SystemExit(0)", "error"),
        ("import os, signal\ndef f():\n    print(42, flush=True); os.kill(os.getppid(), signal.SIGKILL)", "killed"),
    ],
)
def test_what_is_printed_is_not_what_is_returned(serve, forgery, status):
    [outcome] = Remote(serve(fusion).url).run(Program(code=forgery, entry_point="f"), [Case(arguments=[])], PATIENT)
    assert (outcome.status, outcome.value) == (status, 41 if status == "ok" else None), outcome


def test_a_program_does_not_find_the_nonce(serve):
    server = serve(fusion)
    program = Program(code=f"{LOOK}\nprint(found)\ndef f(): pass", entry_point="f")
    [outcome] = Remote(server.url).run(program, [Case(arguments=[])], PATIENT)
    [request] = server.seen
    assert outcome.status == "ok"
    assert json.loads(request.body["stdin"])["nonce"] not in outcome.stdout


def test_a_program_that_takes_all_the_time_is_late_and_a_slow_service_is_an_error(serve, monkeypatch):
    monkeypatch.setattr("rlkit.data.sandbox.remote.GRACE_S", 60.0)  # the service may be late itself
    limits = Limits(wall_s=0.4, total_s=0.8)
    outcomes = Remote(serve(fusion).url).run(Program(code="while True: pass"), [Case()] * 12, limits)
    assert {outcome.status for outcome in outcomes} == {"timeout"}
    slow = serve(lambda number, body: time.sleep(1.0) or ok("", seconds=0.03))  # four at once, after which there is no time left
    with pytest.raises(ResourceError, match=r"is slow: 8 of 12 tests were not run within 0.8 s, of which the program took 0.1 s"):
        Remote(slow.url).run(Program(code=""), [Case()] * 12, Limits(total_s=0.8))


def test_beyond_the_deadline_it_is_an_error(serve, stuck, monkeypatch):
    monkeypatch.setattr("rlkit.data.sandbox.remote.GRACE_S", 0.2)
    limits = Limits(wall_s=0.3, total_s=0.3)
    hanging = serve(lambda number, body: stuck.wait(100) and ok(""))
    trickling = serve(lambda number, body: (200, [lambda: b" " * (1 + stuck.wait(0.1))] * 1000))
    for server in (hanging, trickling):
        began = time.monotonic()
        with pytest.raises(ResourceError, match=r"does not answer: .*timed out"):
            Remote(server.url).run(Program(code=""), [Case()], limits)
        assert time.monotonic() - began < 20


def test_a_service_that_stumbles_is_asked_again(serve):
    def answer(number, body):
        return [None, (500, ""), (429, ""), (503, "")][number - 1] if number < 5 else ok("x\n")

    server = serve(answer)
    assert Remote(server.url).run(Program(code="print('x')"), [Case()])[0].stdout == "x\n"
    assert len(server.seen) == 5


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ((200, "<html>"), "answered what SandboxFusion's /run_code does not"),
        ((200, "[" * 100_000), "answered what"),
        ((200, "null"), "answered what .* None"),
        ((200, '{"status": "Success"}'), "answered what"),
        ((200, '{"status": "Success", "run_result": 3}'), "answered what"),
        ((200, '{"status": "Success", "run_result": {"status": "Finished"}}'), "answered what"),
        ((200, '{"status": "Success", "run_result": {"status": "Finished", "return_code": 0, "stdout": 5}}'), "answered what"),
        ((200, '{"status": "SandboxError", "message": "no disk"}'), "failed: 'no disk'"),
        ((200, '{"status": "SandboxError", "message": "", "run_result": {"status": "Error"}}'), "failed"),
        ((200, [lambda: b"x" * (1 << 20)] * 17), "more than 16 MiB"),
    ],
)
def test_an_answer_that_says_nothing_of_the_program_is_an_error(serve, said, message):
    with pytest.raises(ResourceError, match=message):
        Remote(serve(lambda number, body: said).url).run(Program(code=""), [Case()], PATIENT)


def test_a_service_that_goes_on_to_stumble_is_an_error(serve, monkeypatch):
    monkeypatch.setattr("rlkit.data.sandbox.remote.GRACE_S", 0.2)
    with pytest.raises(ResourceError, match=r"does not answer: .*answered 500"):
        Remote(serve(lambda number, body: (500, "")).url).run(Program(code=""), [Case()], Limits(total_s=1.0))


def test_a_service_that_cannot_start_what_calls_a_function_is_an_error(serve):
    """As when its disk is full: the program did not even begin."""
    with pytest.raises(ResourceError, match="cannot call functions: 'No space left on device'"):
        Remote(serve(lambda number, body: ok("No space left on device")).url).run(
            Program(code="", entry_point="f"), [Case(arguments=[])]
        )


def test_a_service_that_is_gone_is_an_error():
    with pytest.raises(ResourceError, match=r"does not answer: .*[Rr]efused. Start it"):
        Remote(f"http://127.0.0.1:{closed_port()}").run(Program(code=""), [Case()], Limits(total_s=0.1))


@pytest.mark.parametrize(
    ("status", "fix"), [(401, f"Correct {TOKEN}"), (404, f"Correct {URL}"), (422, f"Correct {URL}"), (302, f"Correct {URL}")]
)
def test_a_refusal_is_a_wrong_setting_and_never_says_the_token(serve, status, fix):
    elsewhere = serve(fusion)
    server = serve(lambda number, body: (status, ""), Location=elsewhere.url)
    with pytest.raises(ConfigError, match=rf"refuses programs: .* answered {status} .*{fix}") as raised:
        Remote(server.url, token=CANARY).run(Program(code=""), [Case()])
    assert CANARY not in str(raised.value)
    assert CANARY not in repr(Remote(server.url, token=CANARY))
    assert len(server.seen) == 1
    assert not elsewhere.seen
    repeating = serve(lambda number, body: (200, json.dumps({"status": "SandboxError", "message": f"Bearer {CANARY}"})))
    with pytest.raises(ResourceError, match="Bearer <redacted>"):
        Remote(repeating.url, token=CANARY).run(Program(code=""), [Case()])


def test_a_service_is_checked_before_it_is_used(serve, opened, monkeypatch):
    server = serve(fusion)
    monkeypatch.setenv(URL, f"{server.url}/run_code/")
    monkeypatch.setenv(TOKEN, f" {CANARY}\n")
    sandbox = open_sandbox()
    assert isinstance(sandbox, Remote)
    assert open_sandbox() is sandbox
    assert [request.path for request in server.seen] == ["/run_code"] * 2
    assert {request.authorization for request in server.seen} == {f"Bearer {CANARY}"}


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            lambda number, body: ok("43\n"),
            r"the service cannot be used. Of print\(6 \* 7\) it should have said 42, and said ok: '43\\n'",
        ),
        (lambda number, body: ok("42\n"), r"the service cannot be used. The sandbox service cannot call functions"),
        (lambda number, body: (200, "hello"), r"the service cannot be used. The sandbox service answered what"),
        (lambda number, body: (403, ""), r"refuses programs: .* answered 403 .*Correct RLKIT_SANDBOX_TOKEN"),
        (lambda number, body: (500, ""), r"the service cannot be used. The sandbox service does not answer: .*answered 500"),
    ],
)
def test_a_service_that_does_not_work_is_refused(serve, opened, monkeypatch, answer, message):
    monkeypatch.setattr("rlkit.data.sandbox.remote.USUAL", Limits(total_s=1.0))
    monkeypatch.setattr("rlkit.data.sandbox.remote.GRACE_S", 0.2)
    monkeypatch.setenv(URL, serve(answer).url)
    monkeypatch.setenv(UNSAFE, "1")  # which is about bubblewrap, and lets no program run here
    with pytest.raises(ConfigError, match=message):
        open_sandbox()


@pytest.mark.parametrize(
    "url",
    ["host:80", "ftp://host", "http://", "http://user:pw@host", f"http://host?token={CANARY}", "http://host:port", "http://[x"],
)
def test_an_address_is_plain(url, opened, monkeypatch):
    monkeypatch.setenv(URL, url)
    with pytest.raises(ConfigError, match="RLKIT_SANDBOX_URL is no plain address") as raised:
        open_sandbox()
    assert CANARY not in str(raised.value)


def test_a_token_that_no_header_holds_is_refused_and_not_shown(opened, monkeypatch):
    monkeypatch.setenv(URL, "http://127.0.0.1:9")
    monkeypatch.setenv(TOKEN, f"{CANARY}\nx")
    with pytest.raises(ConfigError, match="RLKIT_SANDBOX_TOKEN holds a space") as raised:
        open_sandbox()
    assert CANARY not in str(raised.value)


RIGHT = "```python\nprint(int(input()) * 2)\n```"
LATE = "```python\nwhile True: pass\n```"


def test_code_tests_through_a_service(serve, monkeypatch, tmp_path):
    """Without a bubblewrap on this side, so that nothing else can have run the programs."""
    server = serve(fusion)
    monkeypatch.setenv(URL, server.url)
    monkeypatch.setenv("PATH", "/nowhere")
    wrong, returned = "```python\nprint(7)\n```", "```python\ndef f(x): return (x, 2 * x)\n```"
    with RewardPool("code_tests", Reward(fn="code_tests", num_workers=2), base_dir=tmp_path) as pool:
        tests = [{"input": "1", "output": "2"}, {"input": "21", "output": "42\n"}]
        results = pool.score(items(RIGHT, wrong, "```python\n1 / 0\n```", "", tests=tests))
        called = pool.score(items(returned, entry_point="f", tests=[{"call": [2], "returns": [2, 4]}]))
    assert [(each.reward, each.status.value) for each in results] == [(1, "ok"), (0, "wrong"), (0, "wrong"), (0, "unparsable")]
    assert "ZeroDivisionError" in results[2].message
    assert (called[0].reward, called[0].status) == (1, RewardStatus.ok)
    assert len(server.seen) >= 2 * 2 + 3 * 2 + 1


def test_a_service_that_breaks_later_gives_no_zero_and_a_refusal_stops(serve, monkeypatch, tmp_path):
    broken = {}
    server = serve(lambda number, body: broken.get("answer") or fusion(number, body))
    monkeypatch.setenv(URL, server.url)
    settings = Reward(fn="code_tests", num_workers=1, max_error_rate=1.0, timeout_s=20.0)
    with RewardPool("code_tests", settings, base_dir=tmp_path) as pool:
        row = items(RIGHT, tests=[{"input": "1", "output": "2"}])
        assert pool.score(row)[0].reward == 1
        broken["answer"] = (200, "garbage")
        [result] = pool.score(row)
        assert (result.reward, result.status) == (None, RewardStatus.error)
        assert "ResourceError: The sandbox service answered what" in result.message
        broken["answer"] = (401, "")
        with pytest.raises(ConfigError, match=r"refuses programs: .*401"):
            pool.score(row)


def test_a_service_that_is_not_there_stops_a_run_before_it_starts(serve, monkeypatch, tmp_path):
    monkeypatch.setenv(URL, f"http://127.0.0.1:{closed_port()}")
    with pytest.raises(ConfigError, match=r"RLKIT_SANDBOX_URL=.*cannot be used.*does not answer"):
        RewardPool("code_tests", Reward(fn="code_tests"), base_dir=tmp_path)


def test_the_python_tool_does_not_tell_the_policy_of_a_broken_service(serve, opened, monkeypatch):
    broken = {}
    server = serve(lambda number, body: broken.get("answer") or fusion(number, body))
    monkeypatch.setenv(URL, server.url)
    tools = Tools(functions=["python"], call_format="hermes", max_turns=4, timeout_s=10.0)
    call = '<tool_call>{"name": "python", "arguments": {"code": "print(6 * 7)"}}</tool_call>'
    assert tools.step(call).observation == "42"
    broken["answer"] = (200, "garbage")
    with pytest.raises(ResourceError):
        tools.step(call)
    assert os.environ[URL] == server.url
