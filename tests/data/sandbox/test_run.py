# ruff: noqa: E501  (a program is one line)
"""Programs that try to get out of the sandbox, and fail. None is skipped: without bubblewrap `open_sandbox` says what to do."""

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rlkit.data.sandbox import Case, Limits, Program, open_sandbox
from rlkit.data.sandbox.run import UNSAFE, Unsandboxed, _read_answer
from rlkit.errors import ConfigError, ResourceError

CANARY = "canary-4f1c"
QUICK = Limits(wall_s=1.5, cpu_s=2, total_s=3.0)  # of what would not end
PATIENT = Limits(wall_s=20.0, cpu_s=20, total_s=30.0)  # of what ends by itself, on however busy a machine

# Each prints ESCAPED where it reaches what it must not. {port}: of a server outside; {pid}: of this process; {folder}: a folder
# outside with a file `secret` in it; {canary}: a text that is in this process's environment, and in that file.
ATTEMPTS = {
    "connect": "import socket; socket.create_connection(('127.0.0.1', {port}), 1); print('ESCAPED')",
    "connect by another address": "import socket; socket.create_connection(('0.0.0.0', {port}), 1); print('ESCAPED')",
    "connect by the name of this machine": "import socket; socket.create_connection(({host!r}, {port}), 1); print('ESCAPED')",
    "look up a name": "import socket; print('ESCAPED', socket.getaddrinfo('example.org', 80))",
    "send a datagram": "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b'x', ('1.1.1.1', 53)); print('ESCAPED')",
    "raw socket": "import socket; socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP); print('ESCAPED')",
    "packet socket": "import socket; socket.socket(socket.AF_PACKET, socket.SOCK_RAW); print('ESCAPED')",
    "interfaces": "import socket; print('ESCAPED' if [n for _, n in socket.if_nameindex() if n != 'lo'] else 'only its own')",
    "abstract socket outside": "import socket; s = socket.socket(socket.AF_UNIX); s.connect('\\0' + {canary!r}); print('ESCAPED')",
    "socket in a file": "import socket; s = socket.socket(socket.AF_UNIX); s.connect('{folder}/socket'); print('ESCAPED')",
    "shadow": "print('ESCAPED', open('/etc/shadow').read())",
    "passwd": "print('ESCAPED', open('/etc/passwd').read())",
    "the home of the user": "import os; print('ESCAPED' if set(os.listdir({home!r})) - {{'.pyenv'}} else 'empty')",
    "a file outside": "print('ESCAPED', open('{folder}/secret').read())",
    "this repository": "print('ESCAPED', open({repository!r}).read())",
    "the outside by /proc/1/root": "import os; print('ESCAPED', open('/proc/1/root{folder}/secret').read())",
    "the outside by a working directory": "import os; print('ESCAPED', open(os.readlink('/proc/1/cwd') + '{folder}/secret').read())",
    "up and out": "print('ESCAPED', open('../' * 20 + '{folder}/secret'.lstrip('/')).read())",
    "symbolic link": "import os; os.symlink('{folder}/secret', '/tmp/link'); print('ESCAPED', open('/tmp/link').read())",
    "hard link": "import os; os.link('{folder}/secret', '/tmp/link'); print('ESCAPED')",
    "write to /usr": "open('/usr/lib/planted', 'w').write('x'); print('ESCAPED')",
    "write to /": "open('/planted', 'w').write('x'); print('ESCAPED')",
    "write to /dev": "open('/dev/planted', 'w').write('x'); print('ESCAPED')",
    "write to Python": "import os; open(os.__file__, 'a').write('x'); print('ESCAPED')",
    "write to the interpreter": "import sys; open(sys.executable, 'ab').write(b'x'); print('ESCAPED')",
    "write by /proc/self/exe": "open('/proc/self/exe', 'r+b').write(b'x'); print('ESCAPED')",
    "shared memory": "open('/dev/shm/planted', 'w').write('x'); print('ESCAPED')",
    "kernel settings": "open('/proc/sys/kernel/hostname', 'w').write('x'); print('ESCAPED')",
    "sysrq": "open('/proc/sysrq-trigger', 'w').write('h'); print('ESCAPED')",
    "memory device": "open('/dev/mem', 'rb').read(1); print('ESCAPED')",
    "kernel log": "open('/dev/kmsg').read(1); print('ESCAPED')",
    "block devices": "import os; print('ESCAPED' if [n for n in os.listdir('/dev') if n.startswith(('sd', 'vd', 'nvme', 'dm-'))] else 0)",
    "make a device": "import os, stat; os.mknod('/tmp/d', 0o600 | stat.S_IFBLK, os.makedev(254, 0)); open('/tmp/d', 'rb').read(1); print('ESCAPED')",
    "become root": "import os; os.setuid(0); print('ESCAPED')",
    "keep a set-uid bit": "import os; open('/tmp/s', 'w'); os.chown('/tmp/s', 0, 0); print('ESCAPED')",
    "environment": "import os; print('ESCAPED' if {canary!r} in str(os.environ) else 'clean')",
    "environment of others": "import glob; print('ESCAPED' if {canary!r}.encode() in b''.join(open(f, 'rb').read() for f in glob.glob('/proc/[0-9]*/environ')) else 'clean')",
    "processes outside": "import os; print('ESCAPED' if len([p for p in os.listdir('/proc') if p.isdigit()]) > 4 else 'only its own')",
    "signal outside": "import os; os.kill({pid}, 0); print('ESCAPED')",
    "signal everybody": "import os, signal; signal.signal(15, signal.SIG_IGN); os.kill(-1, 15)",
    "stop the process above": "import os, signal, time; os.kill(os.getppid(), signal.SIGSTOP); time.sleep(100)",
    "ptrace": "import ctypes, os; c = ctypes.CDLL(None, use_errno=True); print('ESCAPED' if c.ptrace(16, os.getppid(), 0, 0) == 0 else c)",
    "read memory of others": "import os; open('/proc/%d/mem' % os.getppid(), 'rb').read(1); print('ESCAPED')",
    "read others' descriptors": "import os; print('ESCAPED', os.listdir('/proc/%d/fd' % os.getppid()))",
    "process_vm_readv": "import ctypes, os; c = ctypes.CDLL(None); b = ctypes.create_string_buffer(64); v = (ctypes.c_size_t * 2)(ctypes.addressof(b), 8); print('ESCAPED' if c.process_vm_readv(os.getppid(), v, 1, v, 1, 0) > 0 else 0)",
    "new user namespace": "import ctypes; print('ESCAPED' if ctypes.CDLL(None).unshare(0x10000000) == 0 else 'refused')",
    "new mount namespace": "import ctypes; print('ESCAPED' if ctypes.CDLL(None).unshare(0x00020000) == 0 else 'refused')",
    "clone into a namespace": "import ctypes, os; n = ctypes.CDLL(None).syscall(56, 0x10000000 | 17, 0, 0, 0, 0); os._exit(0) if n == 0 else print('ESCAPED' if n > 0 else 'refused')",
    "mount": "import ctypes; print('ESCAPED' if ctypes.CDLL(None).mount(b'none', b'/tmp', b'tmpfs', 0, None) == 0 else 'refused')",
    "remount for writing": "import ctypes; print('ESCAPED' if ctypes.CDLL(None).mount(None, b'/usr/lib', None, 32 | 4096, None) == 0 else 'refused')",
    "chroot": "import os; os.chroot('/tmp'); print('ESCAPED')",
    "keyring": "import ctypes; print('ESCAPED' if ctypes.CDLL(None).syscall(248, b'user', b'k', b'v', 1, -3) > 0 else 'refused')",
    "io_uring": "import ctypes; b = ctypes.create_string_buffer(256); print('ESCAPED' if ctypes.CDLL(None).syscall(425, 8, b) >= 0 else 'refused')",
    "bpf": "import ctypes; b = ctypes.create_string_buffer(256); print('ESCAPED' if ctypes.CDLL(None).syscall(321, 0, b, 64) >= 0 else 'refused')",
    "personality": "import ctypes; print('ESCAPED' if ctypes.CDLL(None).personality(0x0040000) != -1 else 'refused')",
    "the clock": "import time; time.clock_settime(time.CLOCK_REALTIME, 0); print('ESCAPED')",
    "a higher priority": "import os; os.setpriority(os.PRIO_PROCESS, 0, -5); print('ESCAPED')",
    "raise a limit": "import resource; resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2); print('ESCAPED')",
    "type into the terminal": "import fcntl, termios; fcntl.ioctl(open('/dev/tty'), termios.TIOCSTI, b'x'); print('ESCAPED')",
    "install a package": "import subprocess, sys; subprocess.run([sys.executable, '-m', 'pip', 'download', 'six'], check=True, timeout=1); print('ESCAPED')",
    "run a shell": "import os; print('ESCAPED' if os.system('/bin/sh -c true') == 0 else 'no shell')",
    "memory of no process": "import ctypes; print('ESCAPED' if ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) >= 0 else 'refused')",
    "a file of no folder": "import os; os.memfd_create('x'); print('ESCAPED')",
    "a message queue": "import ctypes; print('ESCAPED' if ctypes.CDLL(None).msgget(0, 0o1600) >= 0 else 'refused')",
    "write to every descriptor": "import os, struct\nfor fd in range(3, 256):\n    try: os.write(fd, struct.pack('>I', 2) + b'[]'); print('ESCAPED')\n    except OSError: pass",
}


@pytest.fixture(scope="module")
def outside(tmp_path_factory):
    """A server, a file, sockets and an environment variable that no program may reach."""
    folder = tmp_path_factory.mktemp("outside")
    (folder / "secret").write_text(CANARY)
    os.environ["RLKIT_TEST_SECRET"] = CANARY
    server, named, abstract = socket.create_server(("0.0.0.0", 0)), socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    here = Path.cwd()
    os.chdir(folder)  # a socket's path is short
    named.bind("socket")
    os.chdir(here)
    abstract.bind(f"\0{CANARY}")
    for each in (named, abstract):
        each.listen()
    yield {
        "port": server.getsockname()[1],
        "pid": os.getpid(),
        "folder": str(folder),
        "home": str(Path.home()),
        "host": socket.gethostname(),
        "repository": str(Path(__file__).resolve()),
        "canary": CANARY,
    }
    del os.environ["RLKIT_TEST_SECRET"]
    for each in (server, named, abstract):
        each.close()


def sandboxed() -> set[int]:
    """Processes of any sandbox. They end a moment after it: the kernel kills the last of them when the first is dead."""
    found = set()
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and b"bwrap" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


NAME = b"life-4f1c"


def called_so() -> list[str]:
    """Processes that have given themselves the name."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and (folder / "comm").read_bytes() == NAME + b"\n":
                found.append(folder.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def run(code: str, *cases: Case, limits: Limits = PATIENT, entry_point: str = ""):
    return open_sandbox().run(Program(code=code, entry_point=entry_point), cases or [Case()], limits)


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_an_attempt_to_get_out_fails_and_leaves_nothing_behind(attempt, outside, wait_until):
    planted = [
        Path(path) for path in ("/usr/lib/planted", "/planted", "/dev/planted", "/dev/shm/planted", "/tmp/link", "/tmp/d", "/tmp/s")
    ]
    [outcome] = run(ATTEMPTS[attempt].format(**outside), limits=QUICK if "SIGSTOP" in ATTEMPTS[attempt] else PATIENT)
    assert "ESCAPED" not in outcome.stdout, outcome
    assert CANARY not in outcome.stdout + outcome.stderr + str(outcome.value)
    if "ctypes" in ATTEMPTS[attempt]:  # the kernel was asked, and said no
        assert outcome.status == "ok", outcome
    assert not any(path.exists() for path in planted)
    assert wait_until(lambda: not sandboxed())


@pytest.mark.parametrize(
    ("bomb", "statuses"),
    [
        ("while True: pass", {"timeout"}),
        ("import time; time.sleep(100)", {"timeout"}),
        ("import re; re.match(r'(a+)+$', 'a' * 60 + 'b')", {"timeout"}),
        (
            "import signal\nfor n in range(1, 31):\n    try: signal.signal(n, signal.SIG_IGN)\n    except OSError: pass\nwhile True: pass",
            {"timeout"},
        ),
        ("import os\nwhile True: os.fork()", {"timeout", "error"}),
        ("import threading, time\nwhile True: threading.Thread(target=time.sleep, args=(100,)).start()", {"timeout", "error"}),
        ("x = bytearray(1 << 40)", {"error"}),
        ("x = []\nwhile True: x.append(bytearray(1 << 24))", {"error"}),
        ("f = open('/tmp/big', 'wb')\nwhile True: f.write(bytes(1 << 20))", {"error"}),
        ("n = 0\nwhile True:\n    open(f'/tmp/{n}', 'wb').write(bytes(1 << 20)); n += 1", {"error"}),
        ("x = []\nwhile True: x.append(open('/dev/null'))", {"error"}),
        ("while True: print('x' * 1000)", {"output", "error", "timeout"}),
        ("import sys\nwhile True: sys.stderr.write('x' * 1000)", {"output", "error", "timeout"}),
        ("def f(n): return f(n + 1)\nimport sys; sys.setrecursionlimit(1 << 30); f(0)", {"error", "timeout"}),
        ("import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(1000)\n    os._exit(0)", {"ok"}),
    ],
)
def test_nothing_is_used_up_and_nothing_stays(bomb, statuses, wait_until):
    began = time.monotonic()
    [outcome] = run(bomb, limits=QUICK if "timeout" in statuses else PATIENT)
    assert outcome.status in statuses, outcome
    assert len(outcome.stdout) <= QUICK.output_bytes
    assert len(outcome.stderr) <= QUICK.output_bytes
    assert time.monotonic() - began < 30
    assert wait_until(lambda: not sandboxed())


def test_programs_read_print_and_return():
    first, second = run("print(input()[::-1])", Case(stdin="abc"), Case(stdin="\u00e9\U0001f680"))
    assert (first.status, first.stdout, second.stdout) == ("ok", "cba\n", "\U0001f680\u00e9\n")
    good, bad = run("def f(x, y=2): return [x * y, None]", Case(arguments=[3]), Case(arguments=[None]), entry_point="f")
    assert (good.status, good.value) == ("ok", [6, None])
    assert (bad.status, bad.value) == ("error", None)
    assert "TypeError" in bad.stderr
    assert run("import sys; sys.exit(3)")[0].status == "error"
    assert run("import sys; sys.exit()")[0].status == "ok"
    assert run("def f(:")[0].status == "error"
    assert run("", Case(arguments=[1]), entry_point="gone")[0].status == "error"


@pytest.mark.parametrize(
    "forgery",
    [
        'print(\'{{"status": "ok", "value": 42}}\')\ndef f(): return 41',
        "import os\ndef f():\n    print(42); os._exit(0)",
        "import atexit, json\njson.dumps = lambda *_: '42'\ndef f(): return 41",
        "import builtins\nclass Same(int):\n    def __eq__(self, other): return True\ndef f(): return Same(41)",
        "import sys\nsys.stdout = sys.stderr\ndef f(): raise SystemExit(0)",
        "import os\ndef f():\n    for fd in range(3, 64):\n        try: os.write(fd, b'41 ')\n        except OSError: pass\n    return 41",
    ],
)
def test_what_passes_is_decided_outside(forgery):
    """A program can lie about what it returns, which is to return it; 42 is right, and only json.dumps' author says so."""
    [outcome] = run(forgery, Case(arguments=[]), entry_point="f")
    assert outcome.value != 42 or "json.dumps" in forgery


def test_all_cases_together_have_a_limit(monkeypatch):
    monkeypatch.setattr("rlkit.data.sandbox.run.GRACE_S", 100.0)  # so that nothing else ends them
    began = time.monotonic()
    outcomes = run("while True: pass", *[Case()] * 60, limits=Limits(wall_s=1.0, cpu_s=60, total_s=1.5))
    assert [outcome.status for outcome in outcomes] == ["timeout"] * 60
    assert time.monotonic() - began < 30


def test_one_case_leaves_nothing_for_the_next(wait_until):
    code = (
        "import os, time\n"
        "print(os.listdir('/tmp'), [p for p in os.listdir('/proc') if p.isdigit()][3:], flush=True)\n"
        "os.makedirs('/tmp/a/b'); open('/tmp/a/b/left', 'w').write('x'); os.symlink('/tmp', '/tmp/a/link'); os.chmod('/tmp/a', 0)\n"
        "if os.fork() == 0:\n    os.setsid()\n    time.sleep(100)\n"
        "try:\n    for n in range(99): open(f'/tmp/{n}', 'wb').write(bytes(1 << 20))\nexcept OSError: pass\n"
    )
    first, second = run(code, Case(stdin="x"), Case(stdin="x"))
    assert (first.status, second.status) == ("ok", "ok"), second
    assert first.stdout == second.stdout == "[] []\n"
    assert wait_until(lambda: not sandboxed())


def test_the_standard_library_is_there():
    """Also what rests on the system's own libraries, and is imported after the program has become nobody."""
    names = ["bz2", "ctypes", "decimal", "hashlib", "lzma", "sqlite3", "ssl", "zlib", "collections", "heapq", "numbers", "typing"]
    code = f"found = []\nfor name in {names}:\n    try: __import__(name); found.append(name)\n    except ImportError: pass\nprint(found)"
    bare = subprocess.run([Path(sys.base_prefix) / "bin" / "python3", "-ISc", code], capture_output=True, text=True, check=True)
    assert run(code)[0].stdout == bare.stdout


@pytest.mark.parametrize("depth", [500, 900, 980, 2000, 30000])
def test_no_returned_value_raises_outside(depth):
    code = f"import json\njson.dumps = lambda value: '[' * {depth} + ']' * {depth}\ndef f(): return 1"
    [outcome] = run(code, Case(arguments=[]), entry_point="f")
    assert outcome.status in ("ok", "error")


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"[]",
        b"{}",
        b"null",
        b"[" * 9000,
        b"[[]]",
        b'[{"status": "ok"}]',
        b"\xff",
        b'[{"status":1,"stdout":2,"stderr":3,"returned":4}]',
    ],
)
def test_an_answer_of_another_form_is_none(answer):
    reader, writer = os.pipe()
    os.write(writer, len(answer).to_bytes(4) + answer)
    os.close(writer)
    assert _read_answer(reader, time.monotonic() + 1, 1) is None
    os.close(reader)


def test_a_sandbox_dies_with_the_process_that_started_it(wait_until):
    program = f"import ctypes\nctypes.CDLL(None).prctl(15, {NAME!r}, 0, 0, 0)\nwhile True: pass"
    code = (
        "from rlkit.data.sandbox import *\n"
        f"open_sandbox().run(Program(code={program!r}), [Case()], Limits(wall_s=200, cpu_s=200, total_s=200))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code]) as owner:
        assert wait_until(called_so)
        owner.kill()
    assert wait_until(lambda: not sandboxed() and not called_so())


def test_several_threads_may_run_programs():
    found = []
    threads = [threading.Thread(target=lambda n=n: found.append((n, run(f"print({n})")[0].stdout))) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [(n, f"{n}\n") for n in range(4)]


def test_without_bubblewrap_programs_are_refused_unless_asked_for(monkeypatch, caplog):
    monkeypatch.setenv("PATH", "/nowhere")
    open_sandbox.cache_clear()
    try:
        with pytest.raises(
            ConfigError, match=r"there is no bwrap: install bubblewrap .* or write reward.unsafe_allow_unsandboxed=true"
        ):
            open_sandbox()
        monkeypatch.setenv(UNSAFE, "1")
        sandbox = open_sandbox()
        assert isinstance(sandbox, Unsandboxed)
        assert "WITHOUT a sandbox" in caplog.text
        [outcome] = sandbox.run(Program(code="print(input())"), [Case(stdin="x")], PATIENT)
        assert (outcome.status, outcome.stdout) == ("ok", "x\n")
        assert sandbox.run(Program(code="while True: pass"), [Case()], QUICK)[0].status == "timeout"
    finally:
        open_sandbox.cache_clear()


def test_where_the_kernel_refuses_namespaces_the_same_is_said_and_the_same_setting_helps(monkeypatch):
    """As in a container without privileges."""

    def refuse(*_):
        raise ResourceError("The kernel refuses user namespaces.")

    monkeypatch.setattr("rlkit.data.sandbox.run.Bubblewrap.run", refuse)
    open_sandbox.cache_clear()
    try:
        with pytest.raises(ConfigError, match=r"refuses user namespaces.*write reward.unsafe_allow_unsandboxed=true"):
            open_sandbox()
        monkeypatch.setenv(UNSAFE, "1")
        assert isinstance(open_sandbox(), Unsandboxed)
    finally:
        open_sandbox.cache_clear()
