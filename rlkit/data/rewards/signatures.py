"""The conventions that reward functions are written in, and how a function of each is called. Workers import this file, so it
may not import torch.

    rlkit       def f(prompts, completions, <columns>, **columns) -> list          text in; also with completion_ids
    trl         the same, and where the row's prompt is chat messages, prompts and completions are lists of messages; what it
                logs by log_metric and log_extra goes nowhere
    verl        def f(data_source, solution_str, ground_truth, extra_info) -> float | {"score": float, ...}
    verifiers   def f(completion, answer, prompt, state, info, task, **kwargs) -> float     messages in
    plain       def f(prompt, completion, answer) -> float                         text in; other arguments are columns

All may be async; the first two see the rows of a call as lists, the others are called once a row. A function is recognised by
its arguments' names, or its convention is named in `reward.signature`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from rlkit.errors import ConfigError, DataError

TEXTS = ("prompts", "completions", "completion_ids")  # arguments of a function of lists
TRL_LOGS = ("log_metric", "log_extra")  # functions that TRL's trainer gives; what they are told goes nowhere here
AUTO = "auto"
CONVENTIONS = {  # arguments that are no columns
    "rlkit": TEXTS,
    "trl": (*TEXTS, *TRL_LOGS),
    "verl": ("data_source", "solution_str", "ground_truth", "extra_info"),
    "verifiers": ("completion", "prompt", "state", "info", "task"),
    "plain": ("prompt", "completion"),
}
_UNASKED = {"verl": ("data_source", "extra_info"), "verifiers": ("answer", "info")}  # columns that the convention looks for itself
_GROUND_TRUTHS = ("ground_truth", "reward_model", "answer")  # verl's rows keep it in reward_model
_FOREIGN = {  # arguments that nothing here can fill, whose they are, and what default stands in for them
    "trainer_state": ("only TRL's trainer has", "None"),
    "parser": ("only a verifiers environment has", "the environment's own, made in this file"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardSignature:
    """What a reward function takes, as its worker read it."""

    name: str  # as in `reward.fn`
    convention: str
    fields: tuple[str, ...]  # of `RewardItem`, that are sent to it: prompt, completion, completion_ids, messages, turns, source
    columns: tuple[str, ...]  # without these it cannot be called
    one_of: tuple[str, ...] = ()  # without any of these neither
    optional_columns: tuple[str, ...]  # these have defaults
    takes_all_columns: bool  # it ends in **columns
    group_wise: bool
    is_async: bool = False

    def missing(self, columns: Mapping[str, Any]) -> str | None:
        """The column that is needed and not there."""
        for name in self.columns:
            if name not in columns:
                return name
        return self.one_of[0] if self.one_of and not any(name in columns for name in self.one_of) else None

    def unfound(self, columns: Collection[str]) -> list[str]:
        """The arguments with defaults that no column fills, without those that the convention looks for itself."""
        unasked = _UNASKED.get(self.convention, ())
        return [name for name in self.optional_columns if name not in unasked and name not in columns]

    def select(self, columns: Mapping[str, Any]) -> dict[str, Any]:
        """The part of a row to send. Raises DataError for a column that is needed and missing."""
        if (name := self.missing(columns)) is not None:
            listed = ", ".join(columns)
            raise DataError(
                f"{self.name} needs a column {name}. The columns are {listed}; write data.columns.{name}=<one of them>."
            )
        if self.takes_all_columns:
            return {name: value for name, value in columns.items() if name not in TEXTS}
        wanted = (*self.columns, *self.one_of, *self.optional_columns)
        return {name: columns[name] for name in wanted if name in columns}


def read_signature(name: str, function: Callable, convention: str = AUTO) -> RewardSignature:
    """Raises ConfigError for a function that nothing here can call."""
    parameters = list(inspect.signature(function).parameters.values())
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {parameter.name: parameter for parameter in parameters if parameter.kind in kinds}
    if convention == AUTO:
        convention = _recognise(name, function, set(named), takes_all)
    for argument, (owner, default) in _FOREIGN.items():
        if argument in named and named[argument].default is inspect.Parameter.empty:
            raise ConfigError(
                f"reward.fn={name}: takes {argument}, which {owner}. Give it a default, such as {default}; or leave it out."
            )
    group_wise = bool(getattr(function, "group_wise", False))
    if group_wise and convention not in ("rlkit", "trl"):
        raise ConfigError(
            f"reward.fn={name}: @group_wise is for functions that see all completions of a prompt, and those of the convention "
            f"{convention} see one. Write def f(prompts, completions, <columns>, **columns) -> list, or leave @group_wise out."
        )
    if convention == "plain" and not {"prompt", "completion"} & set(named):
        needed, optional = (["answer"] if len(named) > 2 else []), []  # arguments count by their place
    else:
        columns = {argument: each for argument, each in named.items() if argument not in (*CONVENTIONS[convention], *_FOREIGN)}
        needed = [argument for argument, each in columns.items() if each.default is each.empty]
        optional = [argument for argument in columns if argument not in needed]
    unasked = [column for column in _UNASKED.get(convention, ()) if column not in (*needed, *optional)]
    return RewardSignature(
        name=name,
        convention=convention,
        fields=_fields(convention, set(named), takes_all),
        columns=tuple(needed),
        one_of=_GROUND_TRUTHS if convention == "verl" else (),
        optional_columns=(*optional, *unasked),
        takes_all_columns=takes_all,
        group_wise=group_wise,
        is_async=inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__),
    )


def _fields(convention: str, named: set[str], takes_all: bool) -> tuple[str, ...]:
    if convention in ("rlkit", "trl"):
        unasked = TEXTS if convention == "trl" else ("prompts", "completions")  # many tokens to carry for nothing
        sent = tuple(text.removesuffix("s") for text in TEXTS[:2] if text in named or (takes_all and text in unasked))
        ids = ("completion_ids",) if "completion_ids" in named or (takes_all and "completion_ids" in unasked) else ()
        return (*sent, *ids, *(("messages", "turns") if convention == "trl" else ()))
    return ("prompt", "completion", *{"verl": ("source",), "verifiers": ("messages", "turns", "source"), "plain": ()}[convention])


def _recognise(name: str, function: Callable, named: set[str], takes_all: bool) -> str:
    if {"data_source", "solution_str"} & named:
        return "verl"
    if "completions" in named:
        return "trl" if {"completion_ids", "trainer_state", *TRL_LOGS} & named else "rlkit"
    if "completion" in named:
        return "verifiers" if {"state", "info", "task", "parser"} & named else "plain"
    if takes_all and not named:
        return "rlkit"
    raise ConfigError(
        f"reward.fn={name}: takes ({', '.join(sorted(named))}), and no convention has these. Write "
        f"def {getattr(function, '__name__', 'reward')}(prompts, completions, **columns), or name the convention: "
        f"reward.signature= one of {', '.join(CONVENTIONS)}."
    )


def caller(function: Callable, signature: RewardSignature) -> Callable[[Mapping[str, Any]], Any]:
    """What answers a call: {field: [value per completion], "columns": {name: [value per completion]}} -> one value per
    completion, or an awaitable of it."""
    parameters = inspect.signature(function).parameters
    if signature.convention == "rlkit":
        return lambda call: function(**_rlkit_arguments(call))
    if signature.convention == "trl":
        logs = {name: _log_nowhere for name in TRL_LOGS if signature.takes_all_columns or name in parameters}
        return lambda call: function(**_trl_arguments(call) | logs)
    of_one = {"verl": _verl_arguments, "verifiers": _verifiers_arguments, "plain": _plain_arguments}[signature.convention]
    score = _score_of if signature.convention == "verl" else lambda value: value
    by_place = signature.convention == "plain" and not {"prompt", "completion"} & set(parameters)

    def one(row: Mapping[str, Any]) -> Any:
        if by_place:
            return function(*[row["prompt"], row["completion"], row["columns"].get("answer")][: len(parameters)])
        given, columns = of_one(row)
        if not signature.takes_all_columns:
            given = {name: value for name, value in given.items() if name in parameters}
            columns = {name: value for name, value in columns.items() if name in parameters}
        return function(**columns | given)

    if signature.is_async:

        async def wait(call: Mapping[str, Any]) -> list[Any]:
            return [score(await one(row)) for row in _rows(call)]

        return wait
    return lambda call: [score(one(row)) for row in _rows(call)]


def _rows(call: Mapping[str, Any]) -> list[dict[str, Any]]:
    columns: Mapping[str, list[Any]] = call["columns"]
    fields = {name: values for name, values in call.items() if name != "columns"}
    return [
        {name: values[index] for name, values in fields.items()}
        | {"columns": {name: values[index] for name, values in columns.items()}}
        for index in range(len(call["completion"]))
    ]


def _rlkit_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    plurals = {"prompt": "prompts", "completion": "completions", "completion_ids": "completion_ids"}
    return {plurals[name]: values for name, values in call.items() if name in plurals} | call["columns"]


def _trl_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    arguments = _rlkit_arguments(call)
    if all(messages is not None for messages in call["messages"]):
        arguments |= {"prompts": call["messages"]} if "prompts" in arguments else {}
        said = [_said(text, turns) for text, turns in zip(call["completion"], call["turns"], strict=True)]
        arguments |= {"completions": said} if "completions" in arguments else {}
    arguments.pop("prompt", None)  # the column that TRL makes `prompts` of
    return arguments


def _log_nowhere(*_: Any, **__: Any) -> None:
    """TRL's log_metric(name, value) and log_extra(name, values)."""


def _verl_arguments(row: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    columns = dict(row["columns"])
    truth = columns.pop("ground_truth", None)
    if truth is None and isinstance(model := columns.get("reward_model"), dict):
        truth = model.get("ground_truth")
    if truth is None:
        truth = columns.get("answer")
    given = {
        "data_source": columns.pop("data_source", row["source"]),
        "solution_str": row["completion"],
        "ground_truth": truth,
        "extra_info": columns.pop("extra_info", None) or {},
    }
    return given, columns


def _verifiers_arguments(row: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    columns = dict(row["columns"])
    messages = row["messages"]
    given: dict[str, Any] = {
        "prompt": [{"role": "user", "content": row["prompt"]}] if messages is None else messages,
        "completion": _said(row["completion"], row["turns"]),
        "answer": columns.pop("answer", ""),
        "info": columns.pop("info", None) or {},
        "task": row["source"],
    }
    given["state"] = dict(given)
    return given, columns


def _plain_arguments(row: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return {"prompt": row["prompt"], "completion": row["completion"]}, row["columns"]


def _said(text: str, turns: list[dict[str, str]] | None) -> list[dict[str, str]]:
    """A completion as messages: of an episode with tools or an environment, theirs among them."""
    return [{"role": "assistant", "content": text}] if turns is None else turns


def _score_of(value: Any) -> Any:
    """verl's functions may return further things to log beside the score, which are no parts of the reward."""
    return value["score"] if isinstance(value, dict) and "score" in value else value
