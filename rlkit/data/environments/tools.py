"""An environment whose only doing is to call Python functions for the policy. A worker imports this, so it may not import torch."""

from __future__ import annotations

import ast
import inspect
import json
import operator
import re
import time
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, get_type_hints

from rlkit.data.environments.protocol import Step, Unavailable
from rlkit.data.processes.user_code import load, locate
from rlkit.data.sandbox import Case, Limits, Program, open_sandbox
from rlkit.errors import ConfigError, RlkitError

_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
_PYTHON_TYPES: dict[str, tuple[type, ...]] = {name: (kind,) for kind, name in _TYPES.items()} | {"number": (int, float)}
_OPERATORS: dict[type, Callable] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_MAX_EXPRESSION = 1000  # characters
_MAX_POWER = 1000  # of an exponent, and of the digits of what it is taken of: an integer of any length is not free


def calculator(expression: str) -> str:
    """Computes an arithmetic expression of numbers, + - * / // % ** and parentheses, exactly."""
    if len(expression) > _MAX_EXPRESSION:
        raise ValueError(f"longer than {_MAX_EXPRESSION} characters")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, RecursionError, MemoryError):
        raise ValueError("not an arithmetic expression") from None
    value = _value(tree.body)
    if value.denominator == 1:
        return str(value.numerator)
    return repr(float(value))


def _value(node: ast.expr) -> Fraction:
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            return Fraction(str(number))
        case ast.UnaryOp(op=op, operand=operand) if type(op) in _OPERATORS:
            return Fraction(_OPERATORS[type(op)](_value(operand)))
        case ast.BinOp(left=left, op=ast.Pow(), right=right):
            base, exponent = _value(left), _value(right)
            size = max(base.numerator.bit_length(), base.denominator.bit_length())
            if exponent.denominator != 1 or abs(exponent) > _MAX_POWER or size * abs(exponent) > 4 * _MAX_POWER:
                raise ValueError("a power that is too large, or of no whole exponent")
            return base ** int(exponent)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _OPERATORS:
            return Fraction(_OPERATORS[type(op)](_value(left), _value(right)))
        case _:
            raise ValueError("not an arithmetic expression")


def python(code: str) -> str:
    """Runs a Python program without network or files, and returns what it prints."""
    [outcome] = open_sandbox().run(Program(code=code), [Case()], Limits())
    if outcome.status == "ok":
        return outcome.stdout.strip()
    why = (outcome.stderr.strip().splitlines() or [outcome.status])[-1]
    return f"{outcome.stdout.strip()}\nerror: {why}".strip()


BUILT_IN: dict[str, Callable] = {"calculator": calculator, "python": python}


class Tools:
    """Implements `Environment`: a turn is a call, or the answer."""

    def __init__(self, *, functions: Sequence[str], call_format: str, max_turns: int, timeout_s: float):
        """functions: names of BUILT_IN, or file.py:function. Raises ConfigError."""
        found = [_find(name) for name in functions]
        self._functions = {function.__name__: function for function in found}
        if len(self._functions) < len(found):
            raise ConfigError(f"environment.tools={list(functions)}: two of them have one name. Give one another.")
        self._schemas = {name: schema(function) for name, function in self._functions.items()}
        if python in found:
            open_sandbox()  # refuses here, and not in the first episode
        self._is_bare, self._max_turns, self._num_turns = call_format == "bare", max_turns, 0
        # A turn's calls begin within it: else the policy could make an episode fail by several slow ones.
        self._calls_s = timeout_s / 3

    @property
    def tools(self) -> list[dict[str, Any]]:
        """Their descriptions, as chat templates take them; a bare call needs none."""
        return [] if self._is_bare else list(self._schemas.values())

    def reset(self, row: Mapping[str, Any], seed: int) -> str:
        self._num_turns = 0
        return ""

    def step(self, action: str) -> Step:
        self._num_turns += 1
        if self._is_bare:
            return self._bare(action)
        calls = _CALL.findall(action)
        if not calls:
            return Step("", done=True)
        began, answers = time.monotonic(), []
        for call in calls:
            is_late = time.monotonic() - began > self._calls_s
            answers.append("error: the calls before it took too long" if is_late else self._answer(call))
        return Step("\n".join(answers))

    def _bare(self, action: str) -> Step:
        if not action.strip() or self._num_turns == self._max_turns:
            return Step("", done=True)
        [(name, function)] = self._functions.items()
        parameter = next(iter(self._schemas[name]["function"]["parameters"]["properties"]))
        return Step(f" = {_run(function, {parameter: action.strip()})}:")

    def _answer(self, call: str) -> str:
        """The tool's, or what is wrong with the call."""
        try:
            said = json.loads(call)
        except (ValueError, RecursionError):
            return 'error: a call is {"name": tool, "arguments": {name: value}} in JSON'
        if not isinstance(said, dict) or not isinstance(said.get("arguments"), dict) or set(said) != {"name", "arguments"}:
            return 'error: a call is {"name": tool, "arguments": {name: value}} in JSON'
        if (function := self._functions.get(str(said["name"]))) is None:
            return f"error: there is no tool {said['name']}; there are {', '.join(self._functions)}"
        arguments, parameters = said["arguments"], self._schemas[str(said["name"])]["function"]["parameters"]
        for name, value in arguments.items():
            if name not in parameters["properties"]:
                return f"error: {said['name']} has no argument {name}; it has {', '.join(parameters['properties'])}"
            kind = parameters["properties"][name]["type"]
            if not isinstance(value, _PYTHON_TYPES[kind]) or (isinstance(value, bool) and kind != "boolean"):
                return f"error: {name} must be of type {kind}"
        if missing := [name for name in parameters["required"] if name not in arguments]:
            return f"error: {said['name']} needs the argument {missing[0]}"
        return _run(function, arguments)


def _run(function: Callable, arguments: Mapping[str, Any]) -> str:
    try:
        return str(function(**arguments))
    except (Unavailable, RlkitError):  # a sandbox service that is down, or refuses: not the policy's doing
        raise
    except Exception as error:  # of the policy's arguments: it hears what they led to
        return f"error: {type(error).__name__}: {str(error).strip() or 'no more is known'}"


def _find(name: str) -> Callable:
    if (function := BUILT_IN.get(name)) is not None:
        return function
    if ":" not in name:
        raise ConfigError(f"environment.tools: {name}: write {', '.join(BUILT_IN)}, or file.py:function.")
    return load(locate("environment.tools", name, Path.cwd()), package="tools")


def schema(function: Callable) -> dict[str, Any]:
    """How chat templates describe a function: name, docstring, and the types of its arguments. Raises ConfigError."""
    name, hints = function.__name__, get_type_hints(function)
    properties, required = {}, []
    for parameter in inspect.signature(function).parameters.values():
        hint = hints.get(parameter.name)
        kind = _TYPES.get(getattr(hint, "__origin__", hint))
        if kind is None or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ConfigError(
                f"environment.tools: {name}({parameter}): the policy writes arguments as JSON, by name. Annotate it with one of "
                f"{', '.join(kind.__name__ for kind in _TYPES)}."
            )
        properties[parameter.name] = {"type": kind}
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    if not properties:
        raise ConfigError(f"environment.tools: {name}() takes no argument, and a call is its arguments. Give it one.")
    description = inspect.cleandoc(function.__doc__ or "")
    if not description:
        raise ConfigError(f"environment.tools: {name} has no docstring, which is all that the policy is told of it. Write one.")
    parameters = {"type": "object", "properties": properties, "required": required}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}
