"""The process that environments are forked from: `python -m rlkit.data.environments.worker`, started by `pool.py`.

It imports the user's code once, and forks a worker for every episode that runs beside others: a millisecond each, sharing what
was imported. So an episode that hangs or crashes is killed alone.
"""

from __future__ import annotations

import gc
import inspect
import json
import os
import random
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlkit.data.environments.protocol import Environment
from rlkit.data.processes.channel import Channel
from rlkit.data.processes.user_code import Location, describe, die_with, load, locate, show
from rlkit.errors import ConfigError, ResourceError

MAX_REWARD = 1e30  # what is added up in float32 stays finite


def main(arguments: list[str]) -> None:
    control, parent_pid = socket.socket(fileno=int(arguments[0])), int(arguments[1])
    entry, base_dir, options = arguments[2], Path(arguments[3]), json.loads(arguments[4])
    die_with(parent_pid)
    control.set_inheritable(False)  # a program that an environment starts must not hold it open
    try:
        environment = make(locate("environment.env", entry, base_dir), options)
    except (ConfigError, ResourceError) as error:
        _tell(control, {"config_error": str(error)})
        return
    except BaseException as error:  # whatever user code raises while it is imported or made, SystemExit included
        _tell(control, {"import_error": describe(error)})
        return
    scores_cut = callable(getattr(environment, "cut", None))
    _tell(control, {"tools": list(getattr(environment, "tools", ())), "scores_cut": scores_cut})
    gc.collect()
    gc.freeze()  # else the first collection in each worker would copy what they share
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1 << 10, 1)
        if not message:
            return
        if descriptors:
            _tell(control, {"pid": _fork(environment, descriptors[0], control)})
        else:  # a worker that was killed; until now nobody else could get its number
            os.waitpid(int(message), 0)
            _tell(control, {})


def make(location: Location, options: dict[str, Any]) -> Environment:
    """Raises ConfigError where it is not one, or refuses its options."""
    made = load(location, package="environments")
    try:
        inspect.signature(made).bind(**options)
    except TypeError as error:
        raise ConfigError(f"environment.options={options}: {location.name} refuses them: {error}. Correct them.") from error
    environment = made(**options)
    for method in ("reset", "step"):
        if not callable(getattr(environment, method, None)):
            raise ConfigError(
                f"environment.env={location.name}: it has no {method}(). Write reset(row, seed) and step(action), which returns "
                "(observation, reward, done)."
            )
    if not all(isinstance(tool, dict) for tool in getattr(environment, "tools", ())):
        raise ConfigError(
            f"environment.env={location.name}: its `tools` are to be descriptions for the chat template, a list of dicts."
        )
    return environment


def _tell(control: socket.socket, message: dict[str, Any]) -> None:
    control.send(json.dumps(message).encode("ascii"))


def _fork(environment: Environment, descriptor: int, control: socket.socket) -> int:
    """The new worker's number."""
    mine = os.getpid()
    pid = os.fork()
    if pid:
        os.close(descriptor)
        return pid
    try:
        os.setsid()  # it and what it starts are killed together
        die_with(mine)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        control.close()
        os.set_inheritable(descriptor, False)
        serve(Channel(socket.socket(fileno=descriptor)), environment)
    finally:
        os._exit(0)  # never back into the parent's loop


def serve(channel: Channel, environment: Environment) -> None:
    """One episode after another, until the other end closes."""
    while (message := channel.receive()) is not None:
        if "reset" in message:
            _seed(message["seed"])
            answer = _answer(lambda row=message["reset"], seed=message["seed"]: environment.reset(row, seed), _read_opening)
        elif "cut" in message:
            answer = _answer(environment.cut, _read_reward)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            answer = _answer(lambda action=message["step"]: environment.step(action), _read_step)
        channel.send(answer)


def _seed(seed: int) -> None:
    """Of this process alone, so that an environment that uses global generators can be played again."""
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)


def _answer(call: Callable[[], Any], read: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    try:
        return read(call())
    except ConfigError as error:  # it would fail in every other episode as well
        return {"config_error": str(error)}
    except BaseException as error:  # one that calls sys.exit failed in this episode, not in the run
        return {"error": describe(error)}


def _read_opening(returned: Any) -> dict[str, Any]:
    if returned is not None and not isinstance(returned, str):
        return {"contract": f"reset() returned {show(returned)}, not text or None"}
    return {"observation": _text(returned)}


def _text(returned: str | None) -> str:
    """Without half characters, which no tokenizer takes: a policy can write them in JSON, and a tool repeat them."""
    return (returned or "").encode("utf-8", "replace").decode("utf-8")


def _read_reward(returned: Any) -> dict[str, Any]:
    reward = returned.item() if hasattr(returned, "item") else returned  # a scalar of numpy
    if not isinstance(reward, bool | int | float) or not abs(reward) <= MAX_REWARD:
        return {"contract": f"cut() returned {show(reward)}, not a finite number"}
    return {"reward": float(reward)}


def _read_step(returned: Any) -> dict[str, Any]:
    """{"observation", "reward", "done"}, or {"contract": what is wrong with it}."""
    expected = "(observation: text, reward: a finite number, done: bool)"
    if not isinstance(returned, tuple) or len(returned) != 3:
        return {"contract": f"step() returned {show(returned)}, not {expected}"}
    observation, reward, done = (each.item() if hasattr(each, "item") else each for each in returned)  # a scalar of numpy
    if observation is not None and not isinstance(observation, str):
        return {"contract": f"step() returned {show(observation)} for its observation, not {expected}"}
    if not isinstance(reward, bool | int | float) or not abs(reward) <= MAX_REWARD:
        return {"contract": f"step() returned {show(reward)} for its reward, not {expected}"}
    if not isinstance(done, bool):
        return {"contract": f"step() returned {show(done)} for done, not {expected}"}
    return {"observation": _text(observation), "reward": float(reward), "done": done}


if __name__ == "__main__":
    main(sys.argv[1:])
