import json
import re
import signal
import threading
import time
from fractions import Fraction
from pathlib import Path

import pytest

from rlkit.cli import command_reward
from rlkit.compose import compose
from rlkit.data.rewards.functions import load, locate
from rlkit.data.rewards.numbers import last_number
from rlkit.data.rewards.pool import RewardItem, RewardPool
from rlkit.data.rewards.signatures import read_signature
from rlkit.data.rewards.trial import HOSTILE
from rlkit.resources import reward_fns_dir
from rlkit.settings import Reward


def score(name: str, completion: str, **row) -> float | None:
    function, signature = load(locate(name, Path.cwd()))
    assert not signature.group_wise
    [value] = function(prompts=["p"], completions=[completion], **{column: [cell] for column, cell in row.items()})
    assert value is None or isinstance(value, float)
    return value


@pytest.mark.parametrize(
    ("text", "form", "accuracy"),
    [("7+5-3-2", 1, 1), ("7+5+3-2", 1, 0), ("7+5-3", 0, 0), ("9+5-3-4", 0, 0), ("7+5-3-2 ", 0, 0), ("", 0, 0)],
)
def test_expression_parts(text, form, accuracy):
    function, _ = load(locate("expression_parts", Path.cwd()))
    assert function(prompts=["p"], completions=[text], digits=["3572"], target=[7]) == [{"form": form, "accuracy": accuracy}]
    assert score("expression_form", text, digits="3572", target=7) == form
    assert score("expressions", text, digits="3572", target=7) == accuracy


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("Paris", "Paris", 1),
        (" Paris\n", "Paris ", 1),
        ("paris", "Paris", 0),
        ("It is Paris", "Paris", 0),
        ("4", 4, 1),
        ("", "x", 0),
    ],
)
def test_exact_match(completion, answer, reward):
    assert score("exact_match", completion, answer=answer) == reward


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("42", 42),
        ("the answer is 42.", 42),
        ("1, 2, 3", 3),
        ("1,234", 1234),
        ("1{,}234", 1234),
        ("$1,234,567.50", 1234567.5),
        ("12,3456", 3456),  # not thousands: a list
        ("1,2", 2),
        ("-5", -5),
        ("\N{MINUS SIGN}5", -5),
        ("= -5", -5),
        ("(-5)", -5),
        ("$-5$", -5),
        ("-$5", -5),
        ("5-3", None),  # part of a calculation
        ("5 - 3", None),
        ("5 -3", None),
        ("5*-3", None),
        ("x-3", None),
        ("10\N{EN DASH}20", None),
        ("2^{10}", None),
        (r"\sqrt{2}", None),
        (r"\frac{x}{2}", None),
        ("5 - 3 = 2", 2),
        ("step-3", 3),
        ("- 3", -3),
        ("x = - 3", -3),
        ("The answer is - 3", -3),
        ("The answer - 3", 3),
        ("So:\n- 3", 3),  # an item of a list
        ("3 1/2", 3.5),
        ("-3 1/2", -3.5),
        (r"3\frac12", 3.5),
        ("2½", 2.5),
        (r"\frac{-1}{2}", -0.5),
        (r"\frac12", 0.5),
        (r"1\,234\,567", 1234567),
        ("10^{-3}", Fraction(1, 1000)),
        (r"1.2 \times 10^{3}", 1200),
        ("2×10³", 2000),
        ("12 m^2", 12),
        ("12 m²", 12),
        ("+7", 7),
        ("3/4", 0.75),
        ("-3/4", -0.75),
        ("3\N{FRACTION SLASH}4", 0.75),
        (r"\frac{3}{4}", 0.75),
        (r"-\dfrac{3}{4}", -0.75),
        ("1/0", None),
        ("50%", 50),
        (r"50\%", 50),
        ("0.5", 0.5),
        (".5", 0.5),
        ("5.", 5),
        ("1e-3", Fraction(1, 1000)),
        ("2E3", 2000),
        ("2em", 2),
        ("007", 7),
        ("v1.2.3", 3),
        ("none", None),
        ("", None),
        ("\N{ARABIC-INDIC DIGIT THREE}", None),
        ("9" * 5000, None),
        ("1e999999999", 999999999),  # no exponent of that length is read
    ],
)
def test_the_last_number_of_a_text(text, value):
    assert last_number(text) == value


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("So it is 1,000.", "1000", 1),
        ("half: 1/2", 0.5, 1),
        ("50%", "50", 1),
        ("50%", "0.5", 0),
        ("0.33", "1/3", 0),
        ("42 apples, not 41", "42", 0),
        ("none", "42", 0),
        ("3", "three", None),
        ("3", None, None),
        ("0.1", 0.1, 1),
        ("\N{MINUS SIGN}2", -2, 1),
    ],
)
def test_numeric_match(completion, answer, reward):
    assert score("numeric_match", completion, answer=answer) == reward


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("3 + 4 = 7\n#### 7", "It takes 3 + 4.\n#### 7", 1),
        ("#### 7", 7, 1),
        ("#### $1,200", "#### 1200", 1),
        ("#### 7 dollars", "#### 7", 1),
        ("The answer is 7.", "#### 7", 1),
        ("7\n####", "#### 7", 0),
        ("#### 7\n#### 8", "#### 7", 0),
        ("#### 8", "7 and 7\n#### 7", 0),
        ("", "#### 7", 0),
        ("#### 42 dollars, from 7 people", "#### 42", 1),
        ("#### 7", "no number", None),
        ("#### 7", None, None),
    ],
)
def test_gsm8k(completion, answer, reward):
    assert score("gsm8k", completion, answer=answer) == reward


@pytest.mark.parametrize(
    ("completion", "answer", "reward"),
    [
        ("0.5", r"\frac{1}{2}", 1),
        (r"The answer is \boxed{1/2}.", r"\frac{1}{2}", 1),
        (r"First $4$, no: \boxed{5}, not $6$.", "5", 1),
        (r"\boxed{3}, no, \boxed{5}", "5", 0),
        (r"\boxed{3} and \boxed{5}", r"\{5, 3\}", 1),
        ("$x^2+2x+1$", "(x+1)^2", 1),
        ("$x^2+2x$", "(x+1)^2", 0),
        (r"$\boxed{(0,1]}$", "(0,1]", 1),
        (r"$\boxed{(0,1)}$", "(0,1]", 0),
        (r"$\sqrt{8}$", r"$2\sqrt{2}$", 1),
        (r"\boxed{x=5}", "5", 1),
        (r"\boxed{5 \text{ cm}}", "5", 1),
        ("I do not know", "3", 0),
        ("", "3", 0),
        (r"$\int_{$", "3", 0),
        ("3", 3, 1),
        ("0.5", 0.5, 1),
        ("3", "", None),
        ("3", "$$", None),
    ],
)
def test_math_equivalence(completion, answer, reward):
    assert score("math_equivalence", completion, answer=answer) == reward


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("<think>a\nb</think><answer>c</answer>", 1),
        (" <think>a</think>\n\n<answer>c</answer>\n", 1),
        ("<think>a</think>", 0),
        ("<think></think><answer>c</answer>", 0),
        ("<think>a</think><answer></answer>", 0),
        ("<answer>c</answer><think>a</think>", 0),
        ("<think>a</think><answer>c</answer>!", 0),
        ("<think>a</think>so<answer>c</answer>", 0),
        ("<think>a<think>b</think><answer>c</answer>", 0),
        ("<think>a</think><answer>c</answer><answer>d</answer>", 0),
        ("<think>" * 20000, 0),
    ],
)
def test_format_with_tags(completion, reward):
    assert score("format", completion) == reward
    assert score("format", completion, pattern=None) == reward


def test_format_with_the_rows_own_pattern():
    assert score("format", "yes\nno", pattern="yes.no") == 1
    assert score("format", "yes\nno!", pattern="yes.no") == 0


def test_expressions():
    assert score("expressions", "7+5-3-2", digits="3572", target=7) == 1
    assert score("expressions", "7+5-3-2 ", digits="3572", target=7) == 0


def test_reasoning_gym_score_accepts_every_right_answer():
    gym = pytest.importorskip("reasoning_gym")
    entry = json.loads(json.dumps(gym.create_dataset("countdown", size=1, seed=1)[0]))
    row = {"prompt": entry["question"], "answer": entry["answer"], "metadata": entry["metadata"]}
    target = entry["metadata"]["target"]
    for completion in (entry["answer"], f"<think>hm</think> <answer>{entry['answer']}</answer>\n"):
        assert score("reasoning_gym_score", completion, **row) == 1
    other = " + ".join(reversed(str(entry["answer"]).split(" + ")))
    assert score("reasoning_gym_score", other, **row) == 1
    assert score("reasoning_gym_score", str(target + 1), **row) < 1  # pyright: ignore[reportOptionalOperand]


def test_a_comparison_that_never_ends_is_a_wrong_answer_and_no_timeout(tmp_path):
    texts = [r"\boxed{10^{10^{10}}}", "9**9**9**9", r"\boxed{3}"]
    items = [RewardItem(sample_id=t, group_id="g", prompt="", completion=t, columns={"answer": "3"}) for t in texts]
    settings = Reward(fn="math_equivalence", num_workers=1)
    with RewardPool(settings.fn, settings, base_dir=tmp_path) as pool:
        assert [result.status.value for result in pool.score(items)] == ["wrong", "wrong", "ok"]


def test_math_equivalence_leaves_somebody_elses_alarm_as_it_was():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.3)
        assert score("math_equivalence", r"\boxed{10^{10^{10}}}", answer="3") == 0
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0 or rung
        time.sleep(0.05)
        assert rung
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_math_equivalence_works_beside_the_main_thread():
    found = []
    thread = threading.Thread(target=lambda: found.append(score("math_equivalence", r"\boxed{1/2}", answer="0.5")))
    thread.start()
    thread.join()
    assert found == [1.0]


@pytest.mark.parametrize(
    ("text", "answer", "reward"),
    [
        ("The answer is (B).", "B", 1),
        ("The answer is B", "b", 1),
        (r"so \boxed{C}", "C", 1),
        (r"\boxed{\text{(C)}}", "C", 1),
        ("<answer>D</answer>", "(D)", 1),
        ("B", "B", 1),
        ("A", "A", 1),
        ("I", "I", 1),
        ("It is A. No: the answer is B", "B", 1),
        ("Option A is wrong, so answer: C", "C", 1),
        ("The answer is A", "B", 0),
        ("I think B", "B", 1),
        ("A dog is C", "C", 1),
        ("B or C", "B", 0),
        ("Banana", "B", 0),
        ("", "B", 0),
        ("the answer is Berlin", "B", 0),
    ],
)
def test_multiple_choice(text, answer, reward):
    assert score("multiple_choice", text, answer=answer) == reward


FORMS = r"""
{}
({})
{}.
{}) 12
{}: Paris
{}. Paris
**{}**
**{}.** Paris
I choose {}
I pick {} because it fits
I'd go with {}.
I think {}
I think it is {}. Yes
Hence ({}).
Therefore, {}!
It must be option {}
My choice: {}
The answer is {}
The answer is ({}).
The answer is {} because
The answer is {}, since
Answer: {}
answer is **{}**
**Answer: {}**
The correct option is {}, since
Final answer: ${}$
So {} is right
{} is correct.
<answer>{}</answer>
<answer>({}) x</answer>
\boxed{{{}}}
\boxed{{\text{{{}}}}}
\boxed{{\textbf{{({})}}}}
\boxed{{\mathrm{{{}}}}}
\boxed{{{}: Paris}}
"""
SMALL = r"""
({})
answer is ({})
The answer is {}.
answer: {}
\boxed{{{}}}
<answer>{}</answer>
"""
HEDGED = r"""
{} and {}
{} or {}
{}/{}
{}, {}
The answer is {} or {}
answer: {} or {}
The answer is ({}) or ({})
Either {} or {} is right
I choose {} and {}
Answer {} is wrong; {}
{}) 12 {}) 13
answer: **{}** or **{}**
The answer is {}. Wait, no, {}.
<answer>{} or {}</answer>
\boxed{{{} or {}}}
\boxed{{{}, {}}}
\boxed{{{}}} or \boxed{{{}}}
"""
DENIED = """
The answer is not {}
{} is wrong
({}) is wrong
{} is not right
({}) cannot be right
I would not choose {}
If the answer is {}, then it rains
The answer is {}erlin
The answer is {}++
Can it be that the answer isn't {}?
{}anana
the answer is {}'s
"""
REVISED = r"""
Let's consider answer {}. It fails. So {} is right
The answer is {}. No: the answer is {}
<answer>{}</answer> <answer>{}</answer>
Option {} is wrong, so answer: {}
\boxed{{{}}} was early; now \boxed{{{}}}
{} is wrong. The answer is {}
"""


def forms(lines: str) -> list[str]:
    return lines.strip().splitlines()


@pytest.mark.parametrize("choices", [None, ["v", "w", "x", "y", "z"]])
def test_every_letter_is_read_alike(choices):
    function, _ = load(locate("multiple_choice", Path.cwd()))

    def reads(text: str, letter: str) -> bool:
        [found] = function(prompts=["p"], completions=[text], answer=[letter], choices=[choices])
        return found == 1

    for letter in "ABCDE":
        assert [form for form in forms(FORMS) if not reads(form.format(letter), letter)] == [], letter
        assert [form for form in forms(SMALL) if not reads(form.format(letter.lower()), letter)] == [], letter
        assert [form for form in forms(DENIED) if reads(form.format(letter), letter)] == [], letter
        for other in set("ABCDE") - {letter}:
            both = [(form, each) for form in forms(HEDGED) for each in (letter, other) if reads(form.format(letter, other), each)]
            assert both == [], (letter, other)
            assert [form for form in forms(REVISED) if not reads(form.format(other, letter), letter)] == [], (letter, other)


def test_multiple_choice_reads_no_letters_but_the_rows():
    assert score("multiple_choice", "X is 5, so B", answer="B", choices=["x", "y"]) == 1
    assert score("multiple_choice", "X is 5, so B", answer="B") == 0
    assert score("multiple_choice", "C", answer="C", choices=["x", "y"]) is None


def test_multiple_choice_by_number():
    assert score("multiple_choice", "The answer is A", answer="0", choices=["x", "y"]) == 1
    assert score("multiple_choice", "The answer is B", answer=1.0, choices=["x", "y"]) == 1
    assert score("multiple_choice", "The answer is B", answer="0") is None
    assert score("multiple_choice", "The answer is B", answer=True, choices=["x", "y"]) is None
    assert score("multiple_choice", "The answer is B", answer=1, choices=["x", "y"]) == 1
    assert score("multiple_choice", "The answer is B", answer=7, choices=["x", "y"]) is None
    assert score("multiple_choice", "The answer is B", answer="both") is None


@pytest.mark.parametrize(
    ("text", "reward", "status"),
    [
        ('{"a": 1}', 1, "ok"),
        ('```json\n{"a": 1}\n```', 1, "ok"),
        ('{"a": "1"}', 0, "wrong"),
        ("[]", 0, "wrong"),
        ('Here: {"a": 1}', 0, "unparsable"),
        ("[" * 100_000, 0, "unparsable"),
        ("", 0, "unparsable"),
    ],
)
def test_json_schema(text, reward, status):
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    for written in (schema, json.dumps(schema)):
        found = score("json_schema", text, schema=written)
        assert found == reward
        assert getattr(found, "status", "ok") == status
    none = [{"type": "nonsense"}, None, 3, [], "{", {"$ref": "#/gone"}, {"$ref": "http://localhost/gone"}, {"$ref": "#"}]
    for schema in [*none, {"properties": {"far": {"$ref": "#/gone"}}}]:
        assert score("json_schema", "{}", schema=schema) is None
        assert score("json_schema", "no JSON", schema=schema) is None or schema == {"$ref": "#"}
    assert score("json_schema", "1", schema={"$ref": "#/$defs/n", "$defs": {"n": {"type": "integer"}}}) == 1


def test_shaping():
    assert score("repetition", "a b c d e f") == 0
    assert score("repetition", "a b c d a b c d") == pytest.approx(-1 / 5)
    assert score("repetition", "a " * 100) == pytest.approx(-96 / 97)
    assert score("repetition", "") == 0
    assert [score("length", "w " * n, num_words=4) for n in (0, 2, 4, 6, 9)] == [0, 0.5, 1, 0.5, 0]
    assert score("length", "w", num_words=None) is None
    assert score("length", "w", num_words=True) is None


@pytest.mark.parametrize(
    ("name", "text", "status"),
    [
        ("exact_match", "", "unparsable"),
        ("exact_match", "5", "wrong"),
        ("numeric_match", "none", "unparsable"),
        ("numeric_match", "5", "wrong"),
        ("gsm8k", "#### x", "unparsable"),
        ("gsm8k", "#### 5", "wrong"),
        ("math_equivalence", "no idea", "unparsable"),
        ("math_equivalence", r"\boxed{5}", "wrong"),
    ],
)
def test_a_verifier_says_whether_it_found_an_answer(name, text, status):
    found = score(name, text, answer="4")
    assert (found, getattr(found, "status", "ok")) == (0, status)


def test_what_math_verify_gets_wrong_about_numbers_is_logged(caplog, monkeypatch):
    function, _ = load(locate("math_equivalence", Path.cwd()))
    monkeypatch.setitem(function.__globals__, "verify", lambda *_, **__: False)
    assert function(prompts=["p"], completions=[r"\boxed{0.5}"], answer=[r"\frac{1}{2}"]) == [1.0]
    assert "is True as numbers, and math-verify says otherwise" in caplog.text


ADD = "def add(a, b):\n    return a + b\n"


@pytest.mark.parametrize(
    ("text", "tests", "entry_point", "share"),
    [
        (ADD, [{"call": [1, 2], "returns": 3}, {"call": ["a", "b"], "returns": "ab"}], "add", 1),
        (f"Here:\n```python\n{ADD}```\nDone.", [{"call": [1, 2], "returns": 3}], "add", 1),
        (f"```python\nwrong\n```\n```python\n{ADD}```", [{"call": [1, 2], "returns": 3}], "add", 1),
        (ADD, [{"call": [1, 2], "returns": 3}, {"call": [1, 2], "returns": 4}], "add", 0.5),
        (ADD, [{"call": [0.1, 0.2], "returns": 0.3}], "add", 0),
        (ADD, [{"call": [0.1, 0.2], "returns": 0.3, "tolerance": 1e-9}], "add", 1),
        ("def f(): return True", [{"call": [], "returns": 1}], "f", 0),
        ("def f(): return (1, {'a': None})", [{"call": [], "returns": [1, {"a": None}]}], "f", 1),
        ("def f(): return float('nan')", [{"call": [], "returns": 1}], "f", 0),
        ("print(int(input()) * 2)", [{"input": "2", "output": "4"}, {"input": "-3\n", "output": "-6\n\n"}], None, 1),
        ("print('4 ')", [{"input": "", "output": "4"}], None, 1),
        ("print('4\\n4')", [{"input": "", "output": "4"}], None, 0),
        ("while True: pass", [{"input": "", "output": ""}] * 3, None, 0),  # wrong, and not late
        ("def f(): return 10**400", [{"call": [], "returns": 1.5}], "f", 0),
        (f"```python\n{ADD}```\nIt prints\n```\n3\n```", [{"call": [1, 2], "returns": 3}], "add", 1),
        (f"```\n{ADD}```", [{"call": [1, 2], "returns": 3}], "add", 1),
        ("import os; os._exit(0)", [{"call": [], "returns": None}], "f", 0),
        ("print('4'); raise SystemExit(1)", [{"input": "", "output": "4"}], None, 0),
        ("", [{"input": "", "output": ""}], None, 0),
        ("print(4)", [], None, None),
        ("print(4)", None, None, None),
        (ADD, [{"call": [1, 2], "returns": 3}], None, None),  # nobody says what to call
        (ADD, [{"call": [1, 2]}], "add", None),
        (ADD, "no JSON", "add", None),
        (ADD, {"inputs": [[1, 2]], "outputs": []}, "add", None),
        (ADD, ["assert math.floor(add(1, 2)) == 3"], None, None),  # of a module that the program need not have
        (ADD, ["assert add(1, 2) == float('inf')"], None, None),
        (ADD, ["add(1, 2)"], None, None),
        (ADD, ["assert add(1, 2) == 3", "assert add(1, 2) == 4"], None, 0.5),
    ],
)
def test_code_tests(text, tests, entry_point, share):
    row = {"tests": tests} | ({} if entry_point is None else {"entry_point": entry_point})
    assert score("code_tests", text, **row) == (share if share in (1, None) else 0)
    assert score(f"{reward_fns_dir() / 'code_tests.py'}:fraction", text, **row) == share


def test_code_that_fails_says_how():
    found = score("code_tests", "1 / 0", tests=[{"input": "", "output": ""}])
    assert (found, getattr(found, "status", ""), getattr(found, "message", "")) == (
        0,
        "wrong",
        "error: ZeroDivisionError: division by zero",
    )


SCHEMA = "create table t (a, b); insert into t values (1, 'x'), (2, 'y'), (2, 'z');"


@pytest.mark.parametrize(
    ("query", "reference", "reward"),
    [
        ("select a from t", "select a from t", 1),
        ("```sql\nselect a from t\n```", "select a from t", 1),
        ("select a from t order by a desc", "select a from t", 1),
        ("select a from t order by a desc", "select a from t order by a", 0),
        ("select distinct a from t", "select a from t", 0),
        ("select count(*) from t where a = 2", "select 2", 1),
        (
            "with recursive n(i) as (select 1 union all select i + 1 from n where i < 3) select i from n",
            "select 1 union select 2 union select 3",
            1,
        ),
        ("with recursive n(i) as (select 1 union all select i + 1 from n) select max(i) from n", "select 1", 0),
        ("select * from t a, t b, t c, t d, t e, t f, t g, t h, t i, t j, t k, t l, t m", "select 1", 0),
        ("with recursive c(x) as (select 1 union all select x + 1 from c) select printf('%1000d', x) from c", "select 1", 0),
        (
            "with recursive c(x, y) as (select 1, '' union select x + 1, printf('%900000d', x) from c) select max(x) from c",
            "select 1",
            0,
        ),
        ("select length(hex(printf('%99999999d', 1)))", "select 1", 0),
        ("select a from t order by a desc", "select a from (select a from t order by a)", 1),
        ("select 3 union all select 1 union all select 2", "select row_number() over (order by a) from t", 1),
        ("select a from t order by a desc", "select a from t where ')' = ')' order by a", 0),
        ("delete from t", "select 1", 0),
        ("select 1; drop table t", "select 1", 0),
        ("attach database '/tmp/planted.db' as p", "select 1", 0),
        ("select load_extension('x')", "select 1", 0),
        ("pragma writable_schema = 1", "select 1", 0),
        ("vacuum into '/tmp/planted.db'", "select 1", 0),
        ("create table p as select 1", "select 1", 0),
        ("nonsense", "select 1", 0),
        ("", "select 1", 0),
        ("select 1", "select nothing", None),
        ("select 1", None, None),
        ("select 1", ["select 1"], None),
    ],
)
def test_sql_result(query, reference, reward):
    assert score("sql_result", query, schema=SCHEMA, answer=reference) == reward
    assert not Path("/tmp/planted.db").exists()


@pytest.mark.parametrize("fault", [None, [], {}, True, "", float("nan")])
@pytest.mark.parametrize("name", ["exact_match", "numeric_match", "gsm8k", "math_equivalence", "multiple_choice", "sql_result"])
def test_a_row_without_an_answer_is_skipped(name, fault):
    for text in ("1", "A", "True", "", "select 1"):
        assert score(name, text, answer=fault, schema=SCHEMA) is None


def test_rows_that_lack_other_columns_are_skipped():
    assert score("expressions", "7+5-3-2", digits=None, target=7) is None
    assert score("expressions", "7+5-3-2", digits="3572", target=None) is None
    assert score("expression_form", "7+5-3-2", digits=None) is None
    assert score("format", "x", pattern="(") is None
    assert score("format", "x", pattern=3) is None
    assert score("sql_result", "select 1", schema=None, answer="select 1") is None
    assert score("code_tests", ADD, tests=True, entry_point="add") is None


DOCS = (Path(__file__).parent.parent / "docs" / "rewards.md").read_text(encoding="utf-8")


def table_in_docs() -> dict[str, dict[str, str]]:
    [table] = re.findall(r"^\| `reward\.fn` \|.*?(?=\n\n)", DOCS, re.DOTALL | re.MULTILINE)
    head, _, *lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    assert all(len(cells) == len(head) for cells in lines)
    return {cells[0].strip("`"): dict(zip(head, cells, strict=True)) for cells in lines}


TABLE_IN_DOCS = table_in_docs()

# Rows for every verifier that needs no server; whatever a policy writes is right or wrong there.
ROWS = {
    "code_tests": {"tests": [{"input": "", "output": "4"}]},
    "exact_match": {"answer": "4"},
    "expression_form": {"digits": "3572", "target": 7},
    "expression_parts": {"digits": "3572", "target": 7},
    "expressions": {"digits": "3572", "target": 7},
    "format": {},
    "gsm8k": {"answer": "#### 4"},
    "json_schema": {"schema": {"type": "integer", "multipleOf": 0.5, "$defs": {"a": {"items": {"$ref": "#"}}}}},
    "length": {"num_words": 4},
    "math_equivalence": {"answer": "4"},
    "multiple_choice": {"answer": "A", "choices": ["x", "y"]},
    "numeric_match": {"answer": "4"},
    "repetition": {},
    "sql_result": {"schema": SCHEMA, "answer": "select a from t"},
}
ASK_SERVERS = {"judge", "remote"}
WORSE = {
    "number in JSON": "9" * 5_000,
    "digits": "9" * 20_000,
    "digits in a box": r"\boxed{" + "9" * 20_000 + "}",
    "tower": "9**9**9**9",
    "tower in a box": r"\boxed{9^{9^{9^9}}}",
    "factorial": r"\boxed{99999999!}",
    "brackets in a box": r"\boxed{" + "(" * 900 + "1" + ")" * 900 + "}",
    "other digits": "\U0001d7d9",
    "other digits in a box": "\\boxed{\U0001d7d9}",
    "no number": r"\boxed{\frac{0}{0}}",
    "dollars": "$" * 5_000,
    "answers": "answer: $" * 2_000,
    "letters": "A or B, " * 5_000,
    "powers": "2^" * 5_000,
    "tags without end": "<answer>" * 20_000,
    "ends without tags": "</answer>" * 20_000,
    "spaces behind a mark": ("the answer is" + " " * 2_000) * 20,
    "many marks": "the answer is b " * 5_000,
    "separators": "1,234" + ",567" * 5_000 + ",",
}


def test_every_verifier_meets_what_a_policy_comes_up_with():
    shipped = {path.stem for path in reward_fns_dir().glob("*.py")}
    assert shipped - ASK_SERVERS - {"reasoning_gym_score"} == set(ROWS)


SLOW = {"code_tests", "math_equivalence", "reasoning_gym_score"}  # which run until they are stopped


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in (*ROWS, "reasoning_gym_score")]
)
def test_nothing_that_a_policy_writes_is_an_error_or_too_late(name, tmp_path):
    """Such samples are masked: junk would cost the policy nothing, and many of them stop the run."""
    row = ROWS.get(name)
    if row is None:
        gym = pytest.importorskip("reasoning_gym")
        entry = json.loads(json.dumps(gym.create_dataset("countdown", size=1, seed=1)[0]))
        row = {"prompt": entry["question"], "answer": entry["answer"], "metadata": entry["metadata"]}
    items = [
        RewardItem(sample_id=case, group_id=case, prompt="p", completion=text, columns=row)
        for case, text in {**HOSTILE, **{f"worse {case}": text for case, text in WORSE.items()}}.items()
    ]
    settings = Reward(fn=name, num_workers=1)
    with RewardPool(name, settings, base_dir=tmp_path) as pool:
        found = pool.score(items)
    failed = {item.sample_id: result.message for item, result in zip(items, found, strict=True) if result.reward is None}
    assert failed == {}
    assert {result.status.value for result in found} <= set(TABLE_IN_DOCS[name]["statuses"].split(", ")) - {"skipped"}


def test_the_documentations_table_has_what_is_shipped():
    assert sorted(TABLE_IN_DOCS) == sorted(path.stem for path in reward_fns_dir().glob("*.py"))
    for name in set(TABLE_IN_DOCS) - ASK_SERVERS:
        _, signature = load(locate(name, Path.cwd()))
        named = re.findall(r"`(\w+)`", TABLE_IN_DOCS[name]["columns"])
        assert set(signature.columns) <= set(named), name
        assert set(signature.optional_columns) - {"choices", "entry_point"} <= set(named), name


def test_the_documentations_forms_of_tests_run():
    forms = [json.loads(text) for text in re.findall(r"^\| `([\[{].*?)`[ ,]", DOCS, re.MULTILINE)]
    assert len(forms) == 4
    for tests in forms:
        is_script = isinstance(tests, list) and "input" in tests[0]
        program, entry_point = ("print(2 * int(input()))", None) if is_script else (ADD, "add")
        assert score("code_tests", program, tests=tests, entry_point=entry_point) == 1, tests
        assert score("code_tests", "pass", tests=tests, entry_point=entry_point) == 0, tests


def test_the_documentations_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    [program], [row] = (re.findall(rf"```{language}\n(.*?)```", DOCS, re.DOTALL) for language in ("python", "json"))
    [commands] = re.findall(r"```bash\n(.*?)```", DOCS, re.DOTALL)
    Path("my_rewards.py").write_text(program)
    Path("rows.jsonl").write_text(row)
    test, train = (line.split() for line in commands.strip().splitlines())
    assert command_reward(test[2:]) == 0
    assert "nothing wrong was found" in capsys.readouterr().out
    assert compose(train[2:]).reward.functions == {"": "my_rewards.py:yes_or_no"}
    space = {}
    exec(program, space)
    found = space["yes_or_no"](prompts=["p"] * 4, completions=["Yes.", "no", "maybe", "yes"], answer=["yes", "yes", "yes", None])
    assert [getattr(each, "status", each) for each in found] == [1.0, "wrong", "unparsable", None]
    assert space["shortest"](prompts=["p"] * 3, completions=["aa", "a", "b"]) == [0, 1, 1]
    assert read_signature("shortest", space["shortest"]).group_wise
