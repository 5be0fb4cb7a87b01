"""Runs programs at a service that speaks SandboxFusion's HTTP interface: one POST to /run_code per case, and judgement here.

How well a program is shut in is the service's affair. What is promised here: a service that fails is an error and never a verdict
on the program, and what a program prints is not taken for what it returns.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rlkit.data.rewards.http import Refused, post_and_wait
from rlkit.data.sandbox.run import GRACE_S, URL, Case, Limits, Outcome, Program, inside, is_answer, read_outcome
from rlkit.errors import ConfigError, ResourceError, RlkitError

TOKEN = "RLKIT_SANDBOX_TOKEN"  # sent as a bearer token where it is set
AT_ONCE = 4  # cases of one program
USUAL = Limits()
SHARE = 0.9  # of `Limits.total_s` that a program has itself used where not all of its cases could be run: else the service was slow


@dataclass(frozen=True, kw_only=True, slots=True)
class Answered:
    """What the service says of a case."""

    outcome: Outcome
    used_s: float = 0.0  # by the program
    is_cut_short: bool = False  # by what the cases before it took, so that nothing is known of it


def open_remote() -> Remote:
    """The service that the environment names, once it has run two programs as it should. Raises ConfigError."""
    service = Remote(url=_url(os.environ.get(URL, "")), token=_token(os.environ.get(TOKEN, "")))
    try:
        problem = service.check()
    except ResourceError as error:
        problem = str(error)
    if problem:
        raise ConfigError(f"{URL}={service.url}: the service cannot be used. {problem}")
    return service


@dataclass(slots=True)
class Remote:
    """Implements `Sandbox`; each case is a run of its own. Holds no connection, so processes and threads may share it.

    `run` returns whatever the program does, but raises ResourceError where the service fails, and ConfigError where it refuses.
    """

    url: str
    token: str = field(default="", repr=False)
    start_s: float = field(default=0.0, init=False)  # that the service counts for a program that does nothing

    def check(self) -> str:
        """What is wrong with the service, in a sentence; "" where it runs programs."""
        began, used_s = time.monotonic(), []
        for what, program, case in (
            ("print(6 * 7)", Program(code="print(6 * 7)"), Case()),
            ("a function of 7", Program(code="def f(x): return 6 * x", entry_point="f"), Case(arguments=[7])),
        ):
            answered = self._ask(program, case, USUAL, began)
            used_s.append(answered.used_s)
            outcome = answered.outcome
            if (outcome.status, outcome.stdout, outcome.value) not in (("ok", "42\n", None), ("ok", "", 42)):
                said = (outcome.stderr.strip().splitlines() or [outcome.stdout])[-1][:200]
                return f"Of {what} it should have said 42, and said {outcome.status}: {self._plain(said)!r}. See its log."
        self.start_s = min(used_s)
        return ""

    def run(self, program: Program, cases: Sequence[Case], limits: Limits = USUAL) -> list[Outcome]:
        began = time.monotonic()
        with ThreadPoolExecutor(AT_ONCE) as threads:
            asked = [threads.submit(self._ask, program, case, limits, began) for case in cases]
            try:
                answers = [each.result() for each in asked]
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise
        num_cut = sum(each.is_cut_short for each in answers)
        used_s = sum(each.used_s for each in answers)
        if num_cut and used_s < SHARE * limits.total_s:
            raise ResourceError(
                f"The sandbox service at {self.url} is slow: {num_cut} of {len(cases)} tests were not run within "
                f"{limits.total_s:g} s, of which the program took {used_s:.1f} s. Give it more workers, or ask less of it at once."
            )
        return [each.outcome for each in answers]

    def _ask(self, program: Program, case: Case, limits: Limits, began: float) -> Answered:
        left_s = began + limits.total_s - time.monotonic()
        if left_s <= 0:
            return Answered(outcome=Outcome(status="timeout"), is_cut_short=True)
        run_s, nonce = min(limits.wall_s, left_s), secrets.token_hex(16)
        body = {
            "language": "python",
            "compile_timeout": limits.wall_s,
            "run_timeout": run_s,
            "memory_limit_MB": limits.memory_mib,
            "files": {},
            "fetch_files": [],
        }
        if case.arguments is None:
            body |= {"code": _sendable(program.code), "stdin": _sendable(case.stdin)}
        else:
            body |= {"code": _calling(), "stdin": _call(program, case, limits, nonce)}
        try:
            told = _Told.read(self._post(body, began + limits.total_s + GRACE_S - time.monotonic()))
            outcome = told.printed(limits) if case.arguments is None else told.returned(case, nonce, limits)
        except RlkitError as error:
            raise type(error)(self._plain(str(error))) from None
        if told.status == "timeout":
            return Answered(outcome=outcome, used_s=run_s, is_cut_short=run_s < limits.wall_s)
        return Answered(outcome=outcome, used_s=max(told.seconds - self.start_s, 0.0))

    def _post(self, body: dict[str, Any], deadline_s: float) -> Any:
        headers = {"Authorization": f"Bearer {self.token}"} if self.token else {}
        try:
            return post_and_wait(f"{self.url}/run_code", body, deadline_s=deadline_s, headers=headers)
        except Refused as error:
            fix = f"Correct {TOKEN}" if error.status in (401, 403) else f"Correct {URL}, or what the service accepts"
            raise ConfigError(f"The sandbox service refuses programs: {error}. {fix}.") from None
        except OSError as error:
            raise ResourceError(f"The sandbox service does not answer: {error}. Start it, or give it more workers.") from None
        except (ValueError, RecursionError) as error:
            raise _strange(str(error)) from None

    def _plain(self, text: str) -> str:
        """What the service said, without the token, should it repeat it."""
        return text.replace(self.token, "<redacted>") if self.token else text


@dataclass(frozen=True, kw_only=True, slots=True)
class _Told:
    """An answer of the service."""

    status: str  # as of `Outcome`: ok, error or timeout
    seconds: float
    stdout: str
    stderr: str

    @classmethod
    def read(cls, answer: Any) -> _Told:
        """Raises ResourceError for one that says nothing of the program."""
        if not isinstance(answer, dict):
            raise _strange(repr(answer))
        compiled, ran = answer.get("compile_result"), answer.get("run_result")
        result = ran or compiled or {}  # a program that cannot be compiled is not run
        if not isinstance(result, dict):
            raise _strange(repr(answer))
        if answer.get("status") == "SandboxError" or result.get("status") == "Error":
            raise ResourceError(f"The sandbox service failed: {str(answer.get('message'))[:200]!r}. See its log.")
        status, code, seconds = result.get("status"), result.get("return_code"), result.get("execution_time")
        texts = [result.get(name) or "" for name in ("stdout", "stderr")]
        if (
            answer.get("status") not in ("Success", "Failed")
            or not (status == "TimeLimitExceeded" or (status == "Finished" and isinstance(code, int)))
            or not all(isinstance(text, str) for text in texts)
        ):
            raise _strange(repr(answer))
        return cls(
            status="timeout" if status == "TimeLimitExceeded" else "ok" if code == 0 and ran else "error",
            seconds=seconds if isinstance(seconds, int | float) else 0.0,
            stdout=texts[0],
            stderr=texts[1],
        )

    def printed(self, limits: Limits) -> Outcome:
        """Of a program that ran as it is."""
        texts = [_cut(text, limits.output_bytes) for text in (self.stdout, self.stderr)]
        is_long = texts != [self.stdout, self.stderr]
        return Outcome(status="output" if is_long else self.status, stdout=texts[0], stderr=texts[1])

    def returned(self, case: Case, nonce: str, limits: Limits) -> Outcome:
        """Of one that ran below `calling.py`."""
        stderr = _cut(self.stderr, limits.output_bytes)
        if self.status == "timeout":
            return Outcome(status="timeout", stderr=stderr)
        _, *frames = self.stdout.split(f"\n{nonce} ")
        if not frames:  # the program was never begun
            said = (stderr or self.stdout).strip()[-200:]
            raise ResourceError(f"The sandbox service cannot call functions: {said!r}. See its log.")
        answer: Any = None
        with suppress(ValueError, RecursionError):
            answer = json.loads(frames[-1].partition("\n")[0])
        if self.status != "ok" or not is_answer([answer], 1):  # the program ended what it ran below
            return Outcome(status="killed", stderr=stderr)
        return read_outcome(case, answer)


def _strange(said: str) -> ResourceError:
    return ResourceError(f"The sandbox service answered what SandboxFusion's /run_code does not: {said[:200]}. See its log.")


@cache
def _calling() -> str:
    """The program that calls an entry point."""
    return f"{inside()}\n{Path(__file__).with_name('calling.py').read_text(encoding='utf-8')}\ncall(child)\n"


def _call(program: Program, case: Case, limits: Limits, nonce: str) -> str:
    call = {
        "code": program.code,
        "entry_point": program.entry_point,
        "arguments": list(case.arguments or ()),
        "files_bytes": limits.files_mib << 20,
    }
    return json.dumps({"nonce": nonce, "output_bytes": limits.output_bytes, "call": call})


def _sendable(text: str) -> str:
    """Without half characters, at which a service would fail."""
    return text.encode("utf-8", "replace").decode()


def _cut(text: str, most: int) -> str:
    """At most so many bytes of it."""
    content = text.encode("utf-8", "replace")
    return text if len(content) <= most else content[:most].decode("utf-8", "ignore")


def _url(given: str) -> str:
    """Where /run_code is, without it."""
    try:
        parts = urlsplit(given.strip())
        is_plain = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:  # of a port that is no number
        is_plain = False
    if not is_plain or parts.username is not None or parts.query or parts.fragment:
        raise ConfigError(
            f"{URL} is no plain address. Write http://host:port, without a user, a password or a query; a token goes to {TOKEN}."
        )
    return parts.geturl().rstrip("/").removesuffix("/run_code")


def _token(given: str) -> str:
    """Raises ConfigError, without the token, for one that no header can hold."""
    token = given.strip()
    if not all("!" <= character <= "~" for character in token):
        raise ConfigError(f"{TOKEN} holds a space or another character that no token has. Export it anew.")
    return token
