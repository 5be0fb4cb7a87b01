"""The process that runs a reward function: `python -m rlkit.data.rewards.worker`, started and killed by `process.py`.

It starts in a fraction of a second because neither it nor what it imports touches torch. Tracebacks, not policies: what a
failure means is decided by the pool.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import socket
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlkit.data.processes.channel import Channel
from rlkit.data.processes.user_code import describe, die_with, show
from rlkit.data.rewards import limits
from rlkit.data.rewards.functions import load, locate
from rlkit.data.rewards.signatures import caller
from rlkit.data.rewards.verdicts import Verdict
from rlkit.errors import ConfigError

MAX_MESSAGE = 500  # characters of what a verdict says: a run keeps one for every sample
Answerer = Callable[[dict[str, Any]], Any]  # a call -> one value per completion, or an awaitable of it


def main(arguments: list[str]) -> None:
    fd, parent_pid, name, base_dir, convention = (
        int(arguments[0]),
        int(arguments[1]),
        arguments[2],
        Path(arguments[3]),
        arguments[4],
    )
    die_with(parent_pid)
    os.set_inheritable(fd, False)  # a program that the function starts must not hold the channel open
    channel = Channel(socket.socket(fileno=fd))
    try:
        function, signature = load(locate(name, base_dir), convention)
    except ConfigError as error:
        channel.send({"config_error": str(error)})
        return
    except BaseException as error:  # whatever user code raises while it is imported, SystemExit included
        channel.send({"import_error": describe(error)})
        return
    channel.send({"signature": asdict(signature)})
    answer = caller(function, signature)
    with asyncio.Runner() as runner:  # one event loop, so that an async function may keep its connections
        while (message := channel.receive()) is not None:
            if "recall" in message:
                channel.send({"recalled": True})
                continue
            limits.allow(message["limit_s"])
            if message["together"]:
                channel.send({"begin": 0})
                for index, found in enumerate(runner.run(_answer_together(answer, message["calls"], message["limit_s"]))):
                    channel.send({"end": index, **found})
            else:
                _answer_in_turn(answer, message["calls"], runner, channel)


def _answer_in_turn(answer: Answerer, calls: list[dict[str, Any]], runner: asyncio.Runner, channel: Channel) -> None:
    for index, call in enumerate(calls):
        channel.send({"begin": index})
        try:
            returned = answer(call)
            if inspect.isawaitable(returned):
                returned = runner.run(_wait_for(returned))
            found = _read(returned, call)
        except ConfigError as error:  # it would fail on every other sample as well
            found = {"config_error": str(error)}
        except BaseException as error:  # a function that calls sys.exit failed on this sample, not on the run
            found = {"error": describe(error)}
        channel.send({"end": index, **found})
        if channel.has_input():  # a recall, or the end: the rest is wanted no more
            break


async def _answer_together(answer: Answerer, calls: list[dict[str, Any]], limit_s: float) -> list[dict[str, Any]]:
    """Those of an async function, which wait for others and not for each other. One that blocks the event loop hangs them all,
    and the pool kills the worker."""

    async def of_one(call: dict[str, Any]) -> dict[str, Any]:
        try:
            return _read(await asyncio.wait_for(answer(call), limit_s), call)
        except TimeoutError:
            return {"timeout": {"summary": f"no answer within reward.timeout_s={limit_s:g}", "traceback": ""}}
        except ConfigError as error:
            return {"config_error": str(error)}
        except Exception as error:
            return {"error": describe(error)}

    return await asyncio.gather(*map(of_one, calls))


async def _wait_for(awaitable: Any) -> Any:
    return await awaitable


def _read(returned: Any, call: dict[str, Any]) -> dict[str, Any]:
    """{"values": what became of each completion, as `_check` says} or {"contract": what is wrong with the whole}."""
    num_completions = len(next(iter(call.values())))
    if hasattr(returned, "tolist"):  # an array or a tensor, of a package that is not imported here
        returned = returned.tolist()
    expected = f"a list of {num_completions} numbers or None, one per completion"
    if not isinstance(returned, list | tuple):
        return {"contract": f"returned {show(returned)}, not {expected}"}
    if len(returned) != num_completions:
        return {"contract": f"returned a list of {len(returned)}, not {expected}"}
    return {"values": [_check(value) for value in returned]}


def _check(value: Any) -> dict[str, Any]:
    """{"reward": number} with "parts", "status", "message" where there is something to say; {} for None; {"problem"}."""
    if value is None:
        return {}
    if isinstance(value, Verdict):
        return _check_number(value) | {"status": value.status, "message": value.message[:MAX_MESSAGE]}
    return _check_parts(value) if isinstance(value, dict) else _check_number(value)


def _check_parts(value: dict[Any, Any]) -> dict[str, Any]:
    """Named parts of a reward, which is their sum."""
    if not value or not all(isinstance(name, str) and name for name in value):
        return {"problem": f"returned {show(value)}, whose keys are not names"}
    parts = {}
    for name, part in value.items():
        found = {"problem": "returned None"} if part is None else _check_number(part)
        if "problem" in found:
            return {"problem": f"{found['problem']} for its part {name}"}
        parts[name] = found["reward"]
    return _check_number(sum(parts.values())) | {"parts": parts}


def _check_number(value: Any) -> dict[str, Any]:
    if not isinstance(value, bool | int | float) and hasattr(value, "item"):  # a scalar of numpy or torch
        try:
            value = value.item()
        except Exception as error:
            return {"problem": f"returned {show(value)}: {error}"}
    if not isinstance(value, bool | int | float):
        return {"problem": f"returned {show(value)}, not a number or None"}
    try:
        number = float(value)
    except OverflowError:
        return {"problem": "returned an integer that no float holds"}
    if not math.isfinite(number):
        return {"problem": f"returned {number}"}
    return {"reward": number}


if __name__ == "__main__":
    main(sys.argv[1:])
