"""JSON over HTTP with retries and a deadline, for rewards that another machine computes. Workers import this file, so it may not
import torch."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from typing import Any

from rlkit.errors import ConfigError

FIRST_PAUSE_S = 0.2  # before the second attempt; doubled before each further one
PASSING = (408, 425, 429)  # statuses that another attempt may not meet again; and those of the server's own errors, 500 and up
MAX_ANSWER = 16 << 20  # bytes


class Refused(OSError):
    """The server will not have such a request, however often it is made."""

    def __init__(self, message: str, status: int):
        super().__init__(message)
        self.status = status


async def post(url: str, body: dict[str, Any], *, deadline_s: float, headers: dict[str, str] | None = None) -> Any:
    """The JSON of the answer. Tries again after a broken connection or a passing status for as long as there is time.

    Raises OSError with what the last attempt met (Refused where another would meet the same), ValueError for an answer that is no
    JSON.
    """
    exchange = _Exchange(url, body, headers or {}, deadline_s)
    while not await asyncio.to_thread(exchange.attempt):
        await asyncio.sleep(exchange.pause_s)
    return exchange.answer


def post_and_wait(url: str, body: dict[str, Any], *, deadline_s: float, headers: dict[str, str] | None = None) -> Any:
    """As `post`, for code that is not async."""
    exchange = _Exchange(url, body, headers or {}, deadline_s)
    while not exchange.attempt():
        time.sleep(exchange.pause_s)
    return exchange.answer


class _Exchange:
    """One request, and its attempts."""

    def __init__(self, url: str, body: dict[str, Any], headers: dict[str, str], deadline_s: float):
        self._url, self._end, self._next_pause_s = url, time.monotonic() + deadline_s, FIRST_PAUSE_S
        self._request = urllib.request.Request(
            url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json", **headers}, method="POST"
        )
        self.answer: Any = None
        self.pause_s = 0.0  # to be made before the next attempt

    def attempt(self) -> bool:
        """Whether the answer is there."""
        self.pause_s = self._next_pause_s
        try:
            self.answer = json.loads(self._read())
            return True
        except urllib.error.HTTPError as error:
            error.close()  # it holds the connection
            problem = f"{self._url} answered {error.code} {error.reason}"
            if error.code < 500 and error.code not in PASSING:
                raise Refused(problem, error.code) from None
            wanted = error.headers.get("Retry-After", "")
            self.pause_s = max(self.pause_s, float(wanted)) if wanted.isdigit() else self.pause_s
        except (OSError, http.client.HTTPException) as error:  # urllib's URLError and timeouts are OSError
            problem = f"{self._url}: {getattr(error, 'reason', error)}"
        if time.monotonic() + self.pause_s >= self._end:
            raise OSError(problem)
        self._next_pause_s = 2 * self.pause_s
        return False

    def _read(self) -> bytes:
        """The answer's text. Each wait for the network has a limit of its own, and there may be many: so the clock is looked at."""
        content = bytearray()
        with _OPENER.open(self._request, timeout=max(self._end - time.monotonic(), 0.01)) as answer:
            while chunk := answer.read1(1 << 16):
                content += chunk
                if len(content) > MAX_ANSWER:
                    raise ValueError(f"{self._url} answered more than {MAX_ANSWER >> 20} MiB")
                if time.monotonic() > self._end:
                    raise TimeoutError("timed out")
            if answer.length:  # that are still to come
                raise ConnectionError("the connection broke within the answer")
        return bytes(content)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirected POST would arrive as a GET without its body, and its key at a host that nobody named."""

    def redirect_request(self, *_: Any) -> None:
        return None


_OPENER = urllib.request.build_opener(_NoRedirect)


def variable(name: str, what: str) -> str:
    """An environment variable. Addresses and keys are no settings, which run folders keep. Raises ConfigError."""
    if not (value := os.environ.get(name)):
        raise ConfigError(f"the environment variable {name} is not set: export {name}=<{what}> before the run.")
    return value
