"""What runs in the sandbox, as text given to its Python: nothing but the standard library, and no import that takes time.

It gets the program and the inputs on standard input and answers on a descriptor of its own, which the program does not have. Each
case runs in a child with its own limits; what is expected never comes in here, so there is nothing to forge a pass with.
"""

import json
import os
import resource
import signal
import struct
import sys
import time


def main(result_fd, uid):
    request = json.loads(sys.stdin.buffer.read())
    if uid:  # after which other processes of the sandbox cannot look into this one
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
    elif request["isolated"]:  # without another user the same takes a word to the kernel
        import ctypes

        pr_set_dumpable = 4
        if ctypes.CDLL(None).prctl(pr_set_dumpable, 0, 0, 0, 0) != 0:
            raise OSError("prctl(PR_SET_DUMPABLE) failed")
    answers, began = [], time.monotonic()
    for case in request["cases"]:
        left = request["limits"]["total_s"] - (time.monotonic() - began)
        if left <= 0:
            answers.append({"status": "timeout", "stdout": "", "stderr": "", "returned": ""})
            continue
        answers.append(run(request, case, result_fd, min(request["limits"]["wall_s"], left)))
        if request["isolated"]:
            end_all(time.monotonic() + 1.0)
            clear(request["folder"])
    payload = json.dumps(answers).encode()
    os.write(result_fd, struct.pack(">I", len(payload)))
    while payload:
        payload = payload[os.write(result_fd, payload) :]


def end_all(deadline):
    """What the program left behind does not run beside the next case."""
    while time.monotonic() < deadline:
        try:
            os.kill(-1, signal.SIGKILL)  # everything here but this process and the sandbox's first
        except ProcessLookupError:
            return
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:  # not ours: the first process collects it in a moment
            time.sleep(0.0005)


def clear(folder):
    """What a case wrote is neither read by the next one nor in its way."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                os.chmod(entry.path, 0o700)
                clear(entry.path)
                os.rmdir(entry.path)
            else:
                os.unlink(entry.path)


def run(request, case, result_fd, wall_s):
    """One case in a child of this process. What it writes goes to files that have no name, in the sandbox's own small memory."""
    limits = request["limits"]
    files = [os.open(request["folder"], os.O_TMPFILE | os.O_RDWR, 0o600) for _ in range(4)]
    stdin, outputs = files[0], files[1:]  # standard output, standard error, returned value
    os.write(stdin, case.get("stdin", "").encode("utf-8", "replace"))
    os.lseek(stdin, 0, os.SEEK_SET)
    began, pause = time.monotonic(), 0.0005
    pid = os.fork()
    if pid == 0:
        try:
            os.close(result_fd)
            child(request, case, limits, files)
        finally:
            os._exit(1)
    status = ""
    while not status:
        ended, code = os.waitpid(pid, os.WNOHANG)
        if ended:
            status = "ok" if code == 0 else "error"
        elif time.monotonic() - began > wall_s:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            status = "timeout"
        else:
            time.sleep(pause)
            pause = min(2 * pause, 0.01)
    texts = []
    for file in outputs:
        texts.append(os.pread(file, limits["output_bytes"], 0).decode("utf-8", "replace"))
        if os.fstat(file).st_size > limits["output_bytes"]:
            status = "output"
    for file in files:
        os.close(file)
    return {"status": status, "stdout": texts[0], "stderr": texts[1], "returned": texts[2]}


def child(request, case, limits, files):
    """Becomes the program. Does not return."""
    for target in range(3):
        os.dup2(files[target], target)
    value_fd = files[3] if "call" in case else -1
    for fd in range(3, 256):
        if fd != value_fd:
            try:
                os.close(fd)
            except OSError:
                continue
    for name, most in limits["rlimits"].items():
        kind = getattr(resource, name)
        resource.setrlimit(kind, (most, most))
    space = {"__name__": "__main__", "__builtins__": __builtins__}
    try:
        exec(compile(request["code"], "program.py", "exec"), space)
        if "call" in case:
            value = space[request["entry_point"]](*case["call"])
            payload = json.dumps(value).encode()
            while payload:
                payload = payload[os.write(value_fd, payload) :]
    except SystemExit as leaving:
        sys.stdout.flush()
        os._exit(leaving.code if isinstance(leaving.code, int) else 0 if leaving.code is None else 1)
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    sys.stdout.flush()
    os._exit(0)
