"""JSON over HTTP with retries and a deadline, for rewards that another machine computes. Workers import this file, so it may not
import torch."""

from __future__ import annotations

import asyncio
import json
import os
import time
import urllib.error
import urllib.request
from typing import Any

FIRST_PAUSE_S = 0.2  # before the second attempt; doubled before each further one
PASSING = (408, 425, 429, 500, 502, 503, 504)  # statuses that another attempt may not meet again


async def post(url: str, body: dict[str, Any], *, deadline_s: float, headers: dict[str, str] | None = None) -> Any:
    """The JSON of the answer. Tries again after a broken connection or a passing status for as long as there is time.

    Raises OSError with what the last attempt met, ValueError for an answer that is no JSON.
    """
    end, pause = time.monotonic() + deadline_s, FIRST_PAUSE_S
    while True:
        try:
            return await asyncio.to_thread(_post_once, url, body, headers or {}, max(end - time.monotonic(), 0.01))
        except urllib.error.HTTPError as error:
            error.close()  # it holds the connection
            problem = OSError(f"{url} answered {error.code} {error.reason}")
            if error.code not in PASSING:
                raise problem from None
            wanted = error.headers.get("Retry-After", "")
            pause = max(pause, float(wanted)) if wanted.isdigit() else pause
        except OSError as error:  # urllib's URLError and timeouts are
            problem = OSError(f"{url}: {getattr(error, 'reason', error)}")
        if time.monotonic() + pause >= end:
            raise problem
        await asyncio.sleep(pause)
        pause *= 2


def _post_once(url: str, body: dict[str, Any], headers: dict[str, str], timeout_s: float) -> Any:
    request = urllib.request.Request(
        url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json", **headers}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=timeout_s) as answer:
        return json.load(answer)


def variable(name: str, what: str) -> str:
    """An environment variable. Addresses and keys are no settings, which run folders keep. Raises KeyError with what to do."""
    if not (value := os.environ.get(name)):
        raise KeyError(f"the environment variable {name} is not set: export {name}=<{what}> before the run")
    return value
