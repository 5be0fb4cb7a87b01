"""Reward 1 for a Python program that passes all tests of its row, 0 otherwise. It runs in a sandbox, and is judged outside."""

import ast
import builtins
import json
import re
from dataclasses import dataclass
from typing import Any

from rlkit.data.rewards import unparsable, wrong
from rlkit.data.rewards.verdicts import Verdict
from rlkit.data.sandbox import Case, Program, open_sandbox

SANDBOX = open_sandbox()  # here, so that a run without one stops before it starts
TAGGED = re.compile(r"```(?:python3?|py3?)\b[^\n]*\n(.*?)```", re.DOTALL | re.IGNORECASE)
BARE = re.compile(r"```[ \t]*\n(.*?)```", re.DOTALL)
# Put behind the program. What is expected is in neither: a program that reads its own source finds nothing to forge.
METHOD = """

def _rlkit_entry(*given):
    found = globals().get({name!r})
    return (getattr(globals()[{owner!r}](), {name!r}) if found is None else found)(*given)
"""
EXPRESSIONS = """

def _rlkit_entry(number):
    value = [{lambdas}][number]()
    return {{"set": sorted(value, key=repr)}} if isinstance(value, (set, frozenset)) else {{"value": value}}
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Test:
    """One test of a row, in whichever form it was written."""

    case: Case
    wanted: Any  # the returned value, or the printed text
    tolerance: float = 0.0
    may_be_wrapped: bool = False  # a list of one value stands for the value


class NoTests(Exception):
    """The row has none that can be run: a fault of the data, and not of the program."""


def reward(prompts, completions, tests, entry_point=None, **columns) -> list[float | None]:
    """The column `tests` is a list of `{"input": text, "output": text}`, for a program that reads standard input and prints, or of
    `{"call": [arguments], "returns": value}`, for one with a function of the name in the column `entry_point` (`add`, or
    `Solution.add` of a class that is made without arguments). Also `{"inputs": [...], "outputs": [...]}`, of calls where the
    row has an entry point; a list of `assert f(1) == 2`, whose right side is a literal; and any of them as JSON.

    The program is the last ```python block of the completion, or the last unmarked one, or all of it where there is none. What it
    prints is compared line by line, without white space at the ends; what it returns as JSON has it (a tuple equals a list),
    numbers with the test's `tolerance` if it has one. None where a row has no tests that can be run, or calls and no entry point.
    """
    return [
        wrong(0.0, share.message) if isinstance(share, Verdict) and share.status == "wrong" else share
        for share in fraction(prompts, completions, tests, entry_point)
    ]


def fraction(prompts, completions, tests, entry_point=None, **columns) -> list[float | None]:
    """As `reward`, but the share of the tests that it passes."""
    names = [None] * len(completions) if entry_point is None else entry_point
    return [_passed(text, own, name) for text, own, name in zip(completions, tests, names, strict=True)]


def _passed(text, written, name) -> float | None:
    name = name if isinstance(name, str) else ""
    try:
        tests, name, appended = _read(json.loads(written) if isinstance(written, str) else written, name)
    except (NoTests, ValueError, RecursionError):
        return None
    blocks = TAGGED.findall(text) or BARE.findall(text)
    code = blocks[-1] if blocks else text
    if not code.strip():
        return unparsable()
    if name and not appended and ("." in name or re.search(r"^class\s+Solution\b", code, re.MULTILINE)):
        owner, _, method = name.rpartition(".")
        appended = METHOD.format(name=method, owner=owner or "Solution")
    entry = "_rlkit_entry" if appended else name
    outcomes = SANDBOX.run(Program(code=code + appended, entry_point=entry), [test.case for test in tests])
    passed = [_is_right(outcome, test) for outcome, test in zip(outcomes, tests, strict=True)]
    share = sum(passed) / len(passed)
    first = next((outcome for outcome, right in zip(outcomes, passed, strict=True) if not right), None)
    if first is None:
        return share
    said = first.stderr.strip().splitlines()
    return wrong(share, f"{first.status}: {said[-1][:100]}" if said else first.status)


def _read(written, name) -> tuple[list[Test], str, str]:
    """The tests, the entry point, and what is put behind the program."""
    if isinstance(written, dict):
        name = name or written.get("fn_name") or ""
        inputs, outputs = written.get("inputs"), written.get("outputs")
        if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
            raise NoTests
        tests = [_of_pair(given, wanted, name) for given, wanted in zip(inputs, outputs, strict=True)]
    elif isinstance(written, list) and all(isinstance(each, str) for each in written):
        return *_of_asserts(written), EXPRESSIONS.format(lambdas=_lambdas(written))
    elif isinstance(written, list) and all(isinstance(each, dict) for each in written):
        tests = [_of_dict(each) for each in written]
    else:
        raise NoTests
    if not tests or (any(test.case.arguments is not None for test in tests) and not name):
        raise NoTests
    return tests, name, ""


def _of_dict(test) -> Test:
    if isinstance(test.get("call"), list) and "returns" in test:
        return Test(case=Case(arguments=test["call"]), wanted=test["returns"], tolerance=_number(test.get("tolerance")))
    if isinstance(test.get("input"), str) and isinstance(test.get("output"), str):
        return Test(case=Case(stdin=test["input"]), wanted=test["output"])
    raise NoTests


def _number(tolerance) -> float:
    return tolerance if isinstance(tolerance, int | float) else 0.0


def _of_pair(given, wanted, name) -> Test:
    """As in APPS, TACO and LiveCodeBench: arguments as a list or one JSON value a line, printed text whole or in lines."""
    if name and isinstance(given, list):
        return Test(case=Case(arguments=given), wanted=wanted, may_be_wrapped=True)
    if name and isinstance(given, str):
        arguments = [json.loads(line) for line in given.splitlines() if line.strip()]
        return Test(case=Case(arguments=arguments), wanted=json.loads(wanted) if isinstance(wanted, str) else wanted)
    given, wanted = ("\n".join(map(str, each)) if isinstance(each, list) else each for each in (given, wanted))
    if not isinstance(given, str) or not isinstance(wanted, str):
        raise NoTests
    return Test(case=Case(stdin=given), wanted=wanted)


def _of_asserts(lines) -> tuple[list[Test], str]:
    if not lines:
        raise NoTests
    found = [_sides(line)[1] for line in lines]
    return [Test(case=Case(arguments=[number]), wanted=wanted) for number, wanted in enumerate(found)], "_rlkit_entry"


def _lambdas(lines) -> str:
    return ", ".join(f"lambda: {ast.unparse(_sides(line)[0])}" for line in lines)


def _sides(line) -> tuple[ast.expr, Any]:
    """The side of `assert f(1) == 2` that is run, and the value it is compared with. A bare `assert f(1)` asks for what is true."""
    try:
        [statement] = ast.parse(line.strip()).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise NoTests from None
    if not isinstance(statement, ast.Assert):
        raise NoTests
    match statement.test:
        case ast.Compare(left=left, ops=[ast.Eq() | ast.Is()], comparators=[right]):
            pairs = [(left, right), (right, left)]
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            pairs = [(_truth_of(operand), ast.Constant(False))]
        case expression:
            pairs = [(_truth_of(expression), ast.Constant(True))]
    for run, literal in pairs:
        called = {id(each.func) for each in ast.walk(run) if isinstance(each, ast.Call)}
        names = [each for each in ast.walk(run) if isinstance(each, ast.Name)]
        if all(hasattr(builtins, each.id) for each in names) or any(
            id(each) not in called and not hasattr(builtins, each.id) for each in names
        ):
            continue  # it asks for a module, such as math, that the program need not have
        try:
            value = ast.literal_eval(literal)
            wanted = {"set": sorted(value, key=repr)} if isinstance(value, set) else {"value": value}
            return run, json.loads(json.dumps(wanted))  # as it comes back: a tuple is a list, keys are texts
        except (ValueError, TypeError, RecursionError):
            continue
    raise NoTests


def _truth_of(expression: ast.expr) -> ast.expr:
    return ast.Call(func=ast.Name(id="bool"), args=[expression], keywords=[])


def _is_right(outcome, test) -> bool:
    if outcome.status != "ok":
        return False
    if test.case.arguments is None:
        return _lines(outcome.stdout) == _lines(test.wanted)
    if test.may_be_wrapped and isinstance(test.wanted, list) and len(test.wanted) == 1 and not isinstance(outcome.value, list):
        return _equal(outcome.value, test.wanted[0], test.tolerance)
    return _equal(outcome.value, test.wanted, test.tolerance)


def _close(found, wanted, tolerance) -> bool:
    try:
        return abs(found - wanted) <= tolerance
    except OverflowError:  # an integer that no float holds is close to none
        return False


def _lines(text) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]


def _equal(found, wanted, tolerance) -> bool:
    if isinstance(wanted, bool) or isinstance(found, bool) or wanted is None:
        return found is wanted
    if isinstance(wanted, int | float):
        return isinstance(found, int | float) and (found == wanted or _close(found, wanted, tolerance))
    if isinstance(wanted, list):
        same = isinstance(found, list) and len(found) == len(wanted)
        return same and all(_equal(a, b, tolerance) for a, b in zip(found, wanted, strict=True))
    if isinstance(wanted, dict):
        return (
            isinstance(found, dict)
            and found.keys() == wanted.keys()
            and all(_equal(found[k], wanted[k], tolerance) for k in wanted)
        )
    return found == wanted
