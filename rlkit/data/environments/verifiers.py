"""Environments of the package `verifiers`: each runs its own rollout, and hears the policy where it would ask a server.

A worker imports this, so it may not import torch. As a program (`python -m rlkit.data.environments.verifiers`) it prints the rows
of an environment's data set, because making one takes over the signals of the process that does.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext, suppress
from copy import deepcopy
from importlib import import_module, metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rlkit.data.environments.protocol import Step, Unavailable
from rlkit.data.processes.channel import Unsendable, plain
from rlkit.data.processes.user_code import describe, load, locate
from rlkit.errors import ConfigError, ResourceError, RlkitError

SUPPORTED = "0.1.9"  # later ones ask another client, earlier ones run other rollouts
MODEL = "policy"  # what it is told that it speaks with
FULL = "this model's maximum context length is reached"  # by these words it knows an overlong prompt
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>|<tool_call>(.*)", re.DOTALL)  # a last one may lack its end

Messages = str | list[dict[str, Any]]  # plain text, or chat


def require_package() -> None:
    """Raises ResourceError where it is not installed, or not in a version that this file knows."""
    fix = "Install rlkit-llm[verifiers]."
    try:
        version = metadata.version("verifiers")
    except metadata.PackageNotFoundError:
        raise ResourceError(f"environment=verifiers: the package verifiers is not installed. {fix}") from None
    if version != SUPPORTED and not version.startswith(f"{SUPPORTED}."):
        raise ResourceError(
            f"environment=verifiers: verifiers {version} is installed, and rlkit runs environments of {SUPPORTED} alone. {fix}"
        )


def load_environment(key: str, env_id: str, options: Mapping[str, Any]) -> Any:
    """key: `environment` or `data`, the group whose settings these are. Raises ConfigError or ResourceError."""
    require_package()
    os.environ.setdefault("VF_LOG_LEVEL", "WARNING")  # else it tells of every rubric
    package = import_module("verifiers")
    if ":" in env_id:
        make = load(locate(f"{key}.env_id", env_id, Path.cwd()), package="environments")
    else:
        make = functools.partial(package.load_environment, env_id)
    try:
        environment = make(**options)
    except Exception as error:  # whatever its author's code raises
        raise ConfigError(
            f"{key}.env_id={env_id}, {key}.options={dict(options)}: loading it raised {describe(error)['summary']}. Install "
            "what it needs, or correct the settings."
        ) from error
    if not isinstance(environment, package.Environment):
        kind = type(environment).__name__
        raise ConfigError(f"{key}.env_id={env_id} makes a {kind}, not a verifiers.Environment. Name a function that returns one.")
    return environment


class Verifiers:
    """Implements `Environment`: its rewards come on the last turn, from the environment's rubric."""

    def __init__(self, *, env_id: str, options: Mapping[str, Any], observation_role: str):
        """Raises ConfigError for one that cannot be played here."""
        self._environment = load_environment("environment", env_id, options)
        self._name = f"environment.env_id={env_id}"
        self._rubrics = list(_rubrics(self._environment.rubric))
        self.tools: list[dict[str, Any]] = list(self._environment.oai_tools or ())
        self._check(observation_role)
        self._loop: asyncio.AbstractEventLoop | None = None  # made in the process that the episodes run in
        self._client = _Client([])
        self._task: asyncio.Task[Any] | None = None
        self._seen: Messages = ""  # what the policy had read and written when it was last asked
        self._num_scored, self._failure = 0, ""  # reward functions that have run; what the first that failed raised

    def reset(self, row: Mapping[str, Any], seed: int) -> str:
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
            asyncio.set_event_loop(self._loop)
        self._abandon(self._loop)
        if "prompt" not in row:
            raise Unavailable(f"its row has no prompt, but {', '.join(row)}; its rows are those of data=verifiers")
        self._client = _Client(self.tools)
        self._seen = deepcopy(row["prompt"])
        self._task = self._loop.create_task(self._environment.rollout(dict(row), self._client, MODEL, {}))
        asked = self._until_asked()
        if asked is None:
            self._state()
            raise Unavailable("its rollout ended before the policy's first turn")
        return self._opening(asked)

    def step(self, action: str) -> Step:
        said = self._client.hear(action)
        asked = self._until_asked()
        return Step("", self._score(), done=True) if asked is None else Step(self._news(said, asked))

    def cut(self) -> float:
        """The rollout ends as one whose context is full, and is scored as it is."""
        self._client.refuse()
        if self._until_asked() is not None:
            raise Unavailable("its rollout goes on when the context is full")
        return self._score()

    def _check(self, observation_role: str) -> None:
        role = "tool" if self.tools else "user"
        if observation_role != role:
            kind = "has tools, and their results are" if self.tools else "has no tools, and its answers are"
            raise ConfigError(
                f"environment.observation_role={observation_role}: {self._name} {kind} of the role {role}. Write "
                f"environment.observation_role={role}."
            )
        if self._environment.interleaved_rollouts:
            raise ConfigError(f"{self._name}: it sends tokens to a server of its own. Load it with interleaved_rollouts=false.")
        if not self._environment.score_rollouts:
            raise ConfigError(f"{self._name}: it gives no reward. Load it with score_rollouts=true.")
        usual = [rubric for rubric in self._rubrics if _scores_as_usual(rubric)]
        for rubric in usual:
            for function in rubric.funcs:
                if rubric._is_group_func(function):
                    raise ConfigError(
                        f"{self._name}: its reward function {function.__name__} compares the samples of a group, which rlkit "
                        "scores one by one. Write one that takes completion, not completions."
                    )
        if any(not rubric.funcs for rubric in usual) or (
            usual == self._rubrics and not any(weight for rubric in usual for weight in rubric.weights)
        ):
            raise ConfigError(f"{self._name}: its rubric has no reward function. Give it one, or choose another environment.")

    def _until_asked(self) -> Messages | None:
        """Run on until it wants a turn of the policy; None where the rollout has ended."""
        assert self._loop is not None, "reset comes first"
        assert self._task is not None, "reset comes first"
        asked = self._client.asked = self._loop.create_future()
        self._loop.run_until_complete(asyncio.wait({self._task, asked}, return_when=asyncio.FIRST_COMPLETED))
        if self._task.done():
            self._client.close()
            return None
        return asked.result()

    def _abandon(self, loop: asyncio.AbstractEventLoop) -> None:
        """An episode that nobody plays on: let it clean up."""
        if self._task is None or self._task.done():
            return
        with suppress(Exception):  # nobody asks how it ended
            self._client.refuse()
            self._until_asked()
        self._task.cancel()
        loop.run_until_complete(asyncio.wait({self._task}))

    def _opening(self, asked: Messages) -> str:
        """What it puts behind the row's prompt."""
        prompt, self._seen = self._seen, asked
        if isinstance(prompt, str) and isinstance(asked, str) and asked.startswith(prompt):
            return asked[len(prompt) :]
        if isinstance(prompt, list) and isinstance(asked, list) and asked[: len(prompt)] == prompt:
            return "\n\n".join(_text(message, ("user",)) for message in asked[len(prompt) :])
        raise Unavailable("it rewrites the prompt of its row, which the policy has read as it was")

    def _news(self, said: Any, asked: Messages) -> str:
        """What it has added behind the policy's turn. `said`: that turn, as the environment was told it."""
        before, self._seen = self._seen, asked
        if isinstance(before, str) and isinstance(asked, str) and asked.startswith(before + said):
            return asked[len(before + said) :]
        turn = len(before)
        if not isinstance(asked, list) or asked[:turn] != before or asked[turn : turn + 1] != [said]:
            raise Unavailable("it rewrites earlier turns, which the policy has read as they were")
        if len(asked) == turn + 1:
            raise Unavailable("it asks for a turn right after another, which a chat has no place for")
        return "\n".join(_text(message, ("user", "tool")) for message in asked[turn + 1 :])

    def _state(self) -> Any:
        """Of the rollout that has ended. Raises what ended it."""
        assert self._task is not None
        state = self._task.result()
        if (error := state.get("error")) is not None:
            raise Unavailable(_chain(error)) from error
        return state

    def _score(self) -> float:
        state = self._state()
        assert self._loop is not None
        self._num_scored, self._failure = 0, ""
        for rubric in self._rubrics:  # now: a rollout may have added functions
            rubric.funcs = [self._watched(function, weight) for function, weight in zip(rubric.funcs, rubric.weights, strict=True)]
        self._loop.run_until_complete(self._environment.rubric.score_rollout(state, score_sem=nullcontext()))
        if self._failure:
            raise Unavailable(self._failure)
        if self._num_scored == 0 and any(rubric.funcs for rubric in self._rubrics):
            raise Unavailable(f"its rubric calls no reward function for the task {state.get('task')}")
        reward = state.get("reward")
        if not isinstance(reward, int | float) or not math.isfinite(reward):
            raise Unavailable(f"its rubric gives {reward!r} for a reward")
        return float(reward)

    def _watched(self, function: Callable, weight: float) -> Callable:
        """The same to its rubric, which takes a zero from a function that raises. What weighs nothing may fail."""
        if hasattr(function, "watched_by_rlkit"):
            return function

        @functools.wraps(function)
        async def watched(*args: Any, **kwargs: Any) -> float:
            self._num_scored += 1
            try:
                value = function(*args, **kwargs)
                return float(await value if inspect.isawaitable(value) else value)
            except Exception as error:
                if weight and not self._failure:
                    self._failure = f"its reward function {function.__name__} raised {describe(error)['summary']}"
                raise

        vars(watched)["watched_by_rlkit"] = True
        return watched


class _Client:
    """In the place of `openai.AsyncOpenAI`: a call waits until the policy has spoken."""

    def __init__(self, tools: list[dict[str, Any]]):
        self.chat = SimpleNamespace(completions=SimpleNamespace(create=self._ask_chat))
        self.completions = SimpleNamespace(create=self._ask_text)
        self.asked: asyncio.Future[Messages] | None = None  # done by the next call
        self._answer: asyncio.Future[Any] | None = None  # that the call waits for
        self._tools, self._num_turns, self._is_chat, self._is_closed = tools, 0, True, False

    def hear(self, action: str) -> Any:
        """Answer the call. Returns the turn as the environment keeps it: a message, or text."""
        self._num_turns += 1
        answer = self._take()
        if not self._is_chat:
            answer.set_result(_text_completion(action, self._num_turns))
            return action
        completion = _chat_completion(action, self._num_turns, with_tools=bool(self._tools))
        answer.set_result(completion)
        message = completion.choices[0].message
        said = {"role": "assistant", "content": message.content or ""}
        return said | ({"tool_calls": [call.model_dump() for call in message.tool_calls]} if message.tool_calls else {})

    def refuse(self) -> None:
        """Answer the call as a server does whose context is full."""
        from openai import BadRequestError

        # Of the response only this is read; which package's class it should be depends on openai's version.
        response: Any = SimpleNamespace(text=FULL, status_code=400, headers={}, request=None)
        self._take().set_exception(BadRequestError(FULL, response=response, body=None))

    def close(self) -> None:
        """The rollout is over."""
        self._is_closed = True

    def _take(self) -> asyncio.Future[Any]:
        answer, self._answer = self._answer, None
        assert answer is not None, "a call waits"
        return answer

    async def _ask_chat(self, *, messages: list[dict[str, Any]], tools: Any = None, **sampling: Any) -> Any:
        if list(tools or ()) != self._tools:
            raise Unavailable("it offers this row other tools than the prompts name")
        self._is_chat = True
        return await self._ask(messages)

    async def _ask_text(self, *, prompt: str, **sampling: Any) -> Any:
        self._is_chat = False
        return await self._ask(prompt)

    async def _ask(self, messages: Messages) -> Any:
        assert self.asked is not None
        if self._is_closed:
            raise Unavailable("it asks for a turn of the policy after the last")
        if self._answer is not None:
            raise Unavailable("it asks for two turns of the policy at once")
        self._answer = asyncio.get_running_loop().create_future()
        self.asked.set_result(deepcopy(messages))
        return await self._answer


def parse(action: str) -> tuple[str | None, list[tuple[str, str]]]:
    """Content, and the calls (name, arguments as JSON), as vLLM's server reads Hermes' format: all of them, or none."""
    if "<tool_call>" not in action:
        return action, []
    try:
        said = [json.loads(closed or open_) for closed, open_ in _CALL.findall(action)]
        calls = [(call["name"], json.dumps(call["arguments"], ensure_ascii=False)) for call in said]
    except (ValueError, KeyError, TypeError, RecursionError):
        return action, []
    if not all(isinstance(name, str) for name, _ in calls):
        return action, []
    return action[: action.find("<tool_call>")] or None, calls


def _chat_completion(action: str, turn: int, *, with_tools: bool) -> Any:
    from openai.types.chat import ChatCompletion

    content, calls = parse(action) if with_tools else (action, [])
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if calls:
        message["tool_calls"] = [
            {"id": f"call-{turn}-{number}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for number, (name, arguments) in enumerate(calls, start=1)
        ]
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls" if calls else "stop"}
    return ChatCompletion.model_validate(
        {"id": f"turn-{turn}", "object": "chat.completion", "created": 0, "model": MODEL, "choices": [choice]}
    )


def _text_completion(action: str, turn: int) -> Any:
    from openai.types import Completion

    choice = {"index": 0, "text": action, "finish_reason": "stop"}
    return Completion.model_validate(
        {"id": f"turn-{turn}", "object": "text_completion", "created": 0, "model": MODEL, "choices": [choice]}
    )


def _text(message: Mapping[str, Any], roles: tuple[str, ...]) -> str:
    if message.get("role") not in roles:
        raise Unavailable(f"it speaks as {message.get('role')}; what the policy hears is of {' or '.join(roles)}")
    content = message.get("content")
    if isinstance(content, list) and all(part.get("type") == "text" for part in content):
        return "\n".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise Unavailable("it shows something other than text")
    return content


def _chain(error: BaseException) -> str:
    """An error with its causes: those of verifiers say nothing but their names."""
    names = []
    cause: BaseException | None = error
    while cause is not None:
        names.append(f"{type(cause).__name__}: {cause}" if str(cause) else type(cause).__name__)
        cause = cause.__cause__
    return ", caused by ".join(names)


def _rubrics(rubric: Any) -> Iterator[Any]:
    """Those that hold reward functions, of groups and of groups of environments."""
    parts = [*getattr(rubric, "rubrics", ()), *(each.rubric for each in getattr(rubric, "env_map", {}).values())]
    if not parts:
        yield rubric
    for part in parts:
        yield from _rubrics(part)


def _scores_as_usual(rubric: Any) -> bool:
    return type(rubric).score_rollout is import_module("verifiers").Rubric.score_rollout


def _rows(dataset: Any) -> tuple[list[dict[str, Any]], set[str]]:
    """And the columns that JSON cannot carry, which are left out."""
    rows = dataset.to_list()
    left_out: set[str] = set()
    for row in rows:
        for name, value in row.items():
            try:
                plain(value)
            except Unsendable:
                left_out.add(name)
    return [{name: value for name, value in row.items() if name not in left_out} for row in rows], left_out


def _has_held_out(environment: Any) -> bool:
    """Of its own: a group takes rows to train on where one of its environments has none."""
    parts = getattr(environment, "envs", ())
    return all(map(_has_held_out, parts)) if parts else environment.eval_dataset is not None


def main(arguments: list[str]) -> None:
    """Prints {"train": rows, "held_out": rows or None}, or {"error": what a ConfigError is to say}."""
    with os.fdopen(os.dup(1), "w") as output:
        os.dup2(2, 1)  # what the environment prints is for people to see
        try:
            environment = load_environment("data", arguments[0], json.loads(arguments[1]))
            if environment.dataset is None:
                raise ConfigError(f"data.env_id={arguments[0]}: it has rows to evaluate on, and none to train on. Choose another.")
            train, left_out = _rows(environment.dataset)
            held_out = None
            if _has_held_out(environment):
                held_out, more = _rows(environment.eval_dataset)
                left_out |= more
            if left_out:
                print(f"data.env_id={arguments[0]}: left out what JSON cannot carry: the columns {', '.join(sorted(left_out))}.")
            answer = {"train": train, "held_out": held_out}
        except RlkitError as error:
            answer = {"error": str(error)}
        json.dump(answer, output)


if __name__ == "__main__":
    main(sys.argv[1:])
