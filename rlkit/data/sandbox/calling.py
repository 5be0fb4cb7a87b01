"""What a service runs for a case that calls a function, as text behind that of `inside.py`: a service returns printed text only.

The program runs in a child that was forked before the nonce came in, and that has no descriptor of the service's: nothing that it
prints is where the answer is, and it cannot know the nonce that the answer follows.
"""

import ctypes
import json
import os
import resource
import sys
import tempfile


def call(child):
    """`child`: of `inside.py`."""
    files = [tempfile.TemporaryFile() for _ in range(4)]  # noqa: SIM115  (stdin, stdout, stderr, returned value)
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(writer)
            with os.fdopen(reader, "rb") as pipe:
                request = json.loads(pipe.read())
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            most = request["files_bytes"] if hard == resource.RLIM_INFINITY else min(request["files_bytes"], hard)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
            child(request, {"call": request["arguments"]}, {"rlimits": {}}, [file.fileno() for file in files])
        finally:
            os._exit(1)
    os.close(reader)
    pr_set_dumpable = 4
    ctypes.CDLL(None).prctl(pr_set_dumpable, 0, 0, 0, 0)  # unless the child is root, this memory is closed to it from here on
    request = json.loads(sys.stdin.buffer.read())
    sys.stdout.write(f"\n{request['nonce']} begins\n")
    sys.stdout.flush()
    with os.fdopen(writer, "wb") as pipe:
        pipe.write(json.dumps(request["call"]).encode())
    _, code = os.waitpid(pid, 0)
    status, most = "ok" if code == 0 else "error", request["output_bytes"]
    texts = [os.pread(file.fileno(), most, 0).decode("utf-8", "replace") for file in files[1:]]
    if any(os.fstat(file.fileno()).st_size > most for file in files[1:]):
        status = "output"
    answer = {"status": status, "stdout": texts[0], "stderr": texts[1], "returned": texts[2]}
    sys.stdout.write(f"\n{request['nonce']} {json.dumps(answer)}\n")
