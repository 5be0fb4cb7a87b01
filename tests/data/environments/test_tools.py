"""Tools: what a call is, what a wrong one is answered with, and what the policy is told of them."""

import json
from pathlib import Path

import pytest

from rlkit.data.environments.protocol import Step, Unavailable
from rlkit.data.environments.tools import Tools, calculator, python, schema
from rlkit.errors import ConfigError


def call(name: str, **arguments) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def tools(*functions: str, call_format: str = "hermes", max_turns: int = 4, timeout_s: float = 10.0) -> Tools:
    made = Tools(functions=functions, call_format=call_format, max_turns=max_turns, timeout_s=timeout_s)
    made.reset({}, 0)
    return made


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("1+1", "2"),
        (" 7 - 10 ", "-3"),
        ("2*(3+4)", "14"),
        ("1/3", "0.3333333333333333"),
        ("0.1+0.2", "0.3"),  # exactly, and then written
        ("6/3", "2"),
        ("7//2", "3"),
        ("-7 % 3", "2"),
        ("2**10", "1024"),
        ("2**-2", "0.25"),
        ("--3", "3"),
    ],
)
def test_the_calculator_is_exact(expression, value):
    assert calculator(expression) == value


@pytest.mark.parametrize(
    "expression",
    [
        *("", "one", "__import__('os')", "1 if 1 else 2", "True", "'a'*9", "[1]", "x:=3", "1;2", "f(1)", "1j"),
        *("2**100000", "9**9**9", "10**400**2", "2**0.5", "1+" * 600 + "1", "(" * 300 + "1"),
    ],
)
def test_the_calculator_takes_nothing_else(expression):
    with pytest.raises(ValueError, match=r"not an arithmetic|too large|longer than"):
        calculator(expression)


def test_dividing_by_zero_is_told_to_the_policy():
    assert tools("calculator").step(call("calculator", expression="1/0")) == Step("error: ZeroDivisionError: Fraction(1, 0)")


def test_python_runs_in_the_sandbox_and_says_what_went_wrong():
    assert python("print(6*7)") == "42"
    assert python("print('a')\n1/0").splitlines() == ["a", "error: ZeroDivisionError: division by zero"]
    assert "error" in python("import socket; socket.create_connection(('127.0.0.1', 9))")
    assert not Path("/tmp/left").exists()
    assert python("open('/tmp/left', 'w').write('x')") == ""
    assert not Path("/tmp/left").exists()


def test_a_turn_without_a_call_is_the_answer():
    assert tools("calculator").step("It is 4.") == Step("", done=True)


def test_all_calls_of_a_turn_are_answered_in_order():
    said = "First " + call("calculator", expression="1+1") + " then " + call("calculator", expression="2*3")
    assert tools("calculator").step(said) == Step("2\n6")


@pytest.mark.parametrize(
    ("said", "answer"),
    [
        ("<tool_call>calculator(1+1)</tool_call>", 'error: a call is {"name": tool, "arguments": {name: value}} in JSON'),
        ("<tool_call>[1]</tool_call>", 'error: a call is {"name": tool, "arguments": {name: value}} in JSON'),
        ('<tool_call>{"name": "calculator"}</tool_call>', 'error: a call is {"name": tool, "arguments": {name: value}} in JSON'),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", 'error: a call is {"name": tool, "arguments": {name: value}} in JSON'),
        (call("search", query="x"), "error: there is no tool search; there are calculator"),
        (call("calculator", text="1"), "error: calculator has no argument text; it has expression"),
        (call("calculator", expression=3), "error: expression must be of type string"),
        (call("calculator"), "error: calculator needs the argument expression"),
        (call("calculator", expression="one"), "error: ValueError: not an arithmetic expression"),
    ],
)
def test_a_wrong_call_is_answered_with_what_is_wrong(said, answer):
    assert tools("calculator").step(said) == Step(answer)


def test_a_bare_turn_is_the_argument_and_the_last_or_an_empty_one_ends():
    bare = tools("calculator", call_format="bare", max_turns=3)
    assert bare.step("1+1") == Step(" = 2:")
    assert bare.step("1+") == Step(" = error: ValueError: not an arithmetic expression:")
    assert bare.step("3") == Step("", done=True)
    bare.reset({}, 0)
    assert bare.step("  ") == Step("", done=True)
    assert bare.tools == []


def test_calls_that_take_long_leave_no_time_for_others_and_are_no_failure(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("slow.py").write_text('import time\ndef nap(s: float) -> str:\n    """Sleeps."""\n    time.sleep(s)\n    return "slept"\n')
    said = call("nap", s=0.2) + call("nap", s=0.2)
    assert tools("slow.py:nap", timeout_s=0.3).step(said) == Step("slept\nerror: the calls before it took too long")
    assert tools("slow.py:nap").step(said) == Step("slept\nslept")


TOOLS = '''
from rlkit.data.environments import Unavailable

def search(query: str, limit: int = 3, exact: bool = False, weights: list[float] = ()) -> list:
    """Finds pages.

    Best first."""
    if query == "down": raise Unavailable("the index is down")
    return [query] * limit

def untold(query: str): return query
def untyped(query):
    """Finds pages."""
def nothing():
    """Waits."""
def many(*queries: str):
    """Finds pages."""
'''


def test_a_function_of_ones_own_is_described_by_its_signature(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(TOOLS)
    made = tools("mine.py:search", "calculator")
    [search, _] = made.tools
    assert search == {
        "type": "function",
        "function": {
            "name": "search",
            "description": "Finds pages.\n\nBest first.",
            "parameters": {
                "type": "object",
                "properties": {
                    "query": {"type": "string"},
                    "limit": {"type": "integer"},
                    "exact": {"type": "boolean"},
                    "weights": {"type": "array"},
                },
                "required": ["query"],
            },
        },
    }
    assert made.step(call("search", query="a", limit=2)) == Step("['a', 'a']")
    assert made.step(call("search", query="a", limit=True)) == Step("error: limit must be of type integer")
    with pytest.raises(Unavailable, match="the index is down"):  # which is not the policy's doing
        made.step(call("search", query="down"))


@pytest.mark.parametrize(
    ("functions", "message"),
    [
        (["abacus"], "environment.tools: abacus: write calculator, python, or file.py:function"),
        (["mine.py:gone"], "there is no gone in it. It has many, nothing, search, untold, untyped"),
        (["mine.py:untold"], "untold has no docstring"),
        (["mine.py:untyped"], r"untyped\(query\): .* Annotate it with one of str, int, float, bool, list, dict"),
        (["mine.py:nothing"], r"nothing\(\) takes no argument"),
        (["mine.py:many"], r"many\(\*queries: str\)"),
        (["calculator", "calculator"], "two of them have one name"),
    ],
)
def test_what_cannot_be_a_tool_is_refused(tmp_path, monkeypatch, functions, message):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(TOOLS)
    with pytest.raises(ConfigError, match=message):
        tools(*functions)


def test_the_docstring_of_a_built_in_tool_is_what_the_policy_reads():
    assert schema(python)["function"]["parameters"]["properties"] == {"code": {"type": "string"}}
    assert "without network" in schema(python)["function"]["description"]
