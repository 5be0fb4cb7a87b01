"""Verifiers against one table of answers in many notations: what each takes for right that is not, and the other way round.

A wrong verdict is allowed only where it is listed here, with its reason; a verifier that gets better fails the test as well.
"""

import json
from pathlib import Path

import pytest

from rlkit.data.rewards.functions import load, locate

# completion, reference answer, whether it is right
TABLE = [
    ("42", "42", True),
    ("The answer is 42.", "42", True),
    (r"\boxed{42}", "42", True),
    (r"$\boxed{42}$ as required", "42", True),
    ("41", "42", False),
    (r"\boxed{41}, not 42", "42", False),
    ("-42", "42", False),
    ("\N{MINUS SIGN}42", "-42", True),
    (r"\boxed{\N{MINUS SIGN}42}".replace(r"\N{MINUS SIGN}", "\N{MINUS SIGN}"), "-42", True),
    ("+42", "42", True),
    ("42.0", "42", True),
    ("42.5", "42", False),
    ("1,234,567", "1234567", True),
    (r"\boxed{1{,}234}", "1234", True),
    ("1.234", "1234", False),
    ("1/2", "0.5", True),
    (r"\frac{1}{2}", "0.5", True),
    (r"\boxed{\dfrac{1}{2}}", r"\frac{1}{2}", True),
    (r"\boxed{\tfrac12}", r"\frac{1}{2}", True),
    (r"\boxed{2/4}", r"\frac{1}{2}", True),
    (r"\boxed{\frac{1}{3}}", r"\frac{1}{2}", False),
    ("0.33", r"\frac{1}{3}", False),
    (r"\boxed{-\frac{3}{4}}", "-0.75", True),
    (r"\boxed{1\frac{1}{2}}", "1.5", True),
    ("1e3", "1000", True),
    (r"$1.2 \times 10^{3}$", "1200", True),
    (r"\boxed{10^{-3}}", "0.001", True),
    (r"\boxed{2^{10}}", "1024", True),
    ("50%", "50", True),
    (r"\boxed{50\%}", r"50\%", True),
    (r"\boxed{0.5}", r"50\%", True),
    (r"\boxed{\$1,200}", "1200", True),
    (r"\boxed{5 \text{ cm}}", "5", True),
    (r"\boxed{5\,\mathrm{m}}", "5", True),
    (r"\boxed{90^\circ}", "90", True),
    (r"\boxed{\sqrt{8}}", r"2\sqrt{2}", True),
    (r"\boxed{2\sqrt{3}}", r"2\sqrt{2}", False),
    (r"\boxed{\pi}", r"\pi", True),
    (r"\boxed{3.14}", r"\pi", False),
    (r"\boxed{\frac{\pi}{2}}", r"\pi/2", True),
    (r"\boxed{x^2+2x+1}", r"(x+1)^2", True),
    (r"\boxed{x^2+2x}", r"(x+1)^2", False),
    (r"\boxed{x=5}", "5", True),
    (r"\boxed{x=6}", "5", False),
    (r"\boxed{(0,1]}", "(0,1]", True),
    (r"\boxed{[0,1]}", "(0,1]", False),
    (r"\boxed{(1,2)}", "(1,2)", True),
    (r"\boxed{(2,1)}", "(1,2)", False),
    (r"\boxed{\{1,2,3\}}", r"\{3,2,1\}", True),
    (r"\boxed{\{1,2\}}", r"\{1,2,3\}", False),
    (r"\boxed{(-\infty,2)}", r"(-\infty, 2)", True),
    (r"\boxed{x<2}", r"x<2", True),
    (r"\boxed{x>2}", r"x<2", False),
    (r"\boxed{1+2i}", "1+2i", True),
    (r"\boxed{2+i}", "1+2i", False),
    (r"\boxed{\begin{pmatrix}1&2\\3&4\end{pmatrix}}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", True),
    (r"\boxed{\begin{pmatrix}1&2\\3&5\end{pmatrix}}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", False),
    (r"\boxed{\binom{5}{2}}", "10", True),
    (r"\boxed{5!}", "120", True),
    (r"\boxed{\log_2 8}", "3", True),
    (r"\boxed{\sin(\pi/6)}", "0.5", True),
    ("I cannot say", "42", False),
    ("", "42", False),
    (r"\boxed{}", "42", False),
    (r"\boxed{42", "42", True),
    ("42 or 43", "42", False),
    ("#### 42", "42", True),
    ("x" * 2000 + " 42", "42", True),
    ("4 2", "42", False),
    # Percent: a sign on one side alone stands for either value.
    (r"\boxed{50\%}", "50%", True),
    ("50%", "50%", True),
    ("50 percent", "50%", True),
    (r"\boxed{50}", "50%", True),
    (r"\boxed{0.5}", "50%", True),
    (r"\boxed{50\%}", "0.5", True),
    (r"\boxed{50}", "0.5", False),
    (r"\boxed{5\%}", "50%", False),
    (r"\boxed{0.5\%}", "50%", False),
    # Powers of ten and thousands
    (r"\boxed{1000}", "1e3", True),
    (r"\boxed{1e3}", "1000", True),
    (r"\boxed{1.5e-3}", "0.0015", True),
    (r"\boxed{0.0015}", "1.5e-3", True),
    (r"\boxed{1.5 \times 10^{-3}}", "1.5e-3", True),
    (r"\boxed{2×10³}", "2000", True),
    ("The answer is 2×10³.", "2000", True),
    (r"\boxed{1e4}", "1e3", False),
    (r"\boxed{1234567}", "1,234,567", True),
    (r"\boxed{1\,234\,567}", "1234567", True),
    (r"\boxed{1234567}", r"1\,234\,567", True),
    ("1\N{NARROW NO-BREAK SPACE}234", "1234", True),
    (r"\boxed{1,234}", "1.234", False),
    # Characters
    (r"\boxed{½}", r"\frac{1}{2}", True),
    (r"\boxed{2½}", "2.5", True),
    (r"\boxed{2⁄3}", r"\frac{2}{3}", True),
    (r"\boxed{√2}", r"\sqrt{2}", True),
    (r"\boxed{\sqrt{2}}", "√2", True),
    (r"\boxed{∞}", r"\infty", True),
    (r"\boxed{\N{MINUS SIGN}x}".replace(r"\N{MINUS SIGN}", "\N{MINUS SIGN}"), "-x", True),
    (r"\boxed{-3}", "\N{MINUS SIGN}3", True),
    ("The answer is 2π.", r"2\pi", True),
    ("The answer is 2π.", "2", False),
    ("The answer is 2x", "2", False),
    # Mixed numbers and other fractions
    (r"\boxed{2 1/2}", "2.5", True),
    (r"\boxed{2.5}", "2 1/2", True),
    ("-3 1/2", "-3.5", True),
    (r"\boxed{\frac{-1}{2}}", "-0.5", True),
    ("- 3", "-3", True),
    ("5-42", "42", False),
    ("10-20", "20", False),
    # Nothing is rounded
    ("0.333333", "1/3", False),
    (r"\boxed{0.3333333333333333}", r"\frac{1}{3}", False),
    (r"\boxed{\frac{1}{3}}", "0.333333", False),
    (r"\boxed{0.1000001}", "0.1", False),
    (r"\boxed{1.414214}", r"\sqrt{2}", False),
    (r"\boxed{3.141593}", r"\pi", False),
    (r"\boxed{(0.333333, 2)}", r"(\frac{1}{3}, 2)", False),
    # Units
    (r"\boxed{12 \text{ cm}}", "12 cm", True),
    (r"\boxed{12}", "12 cm", True),
    (r"\boxed{12 m}", "12 cm", False),
    (r"\boxed{12\,\mathrm{m}}", r"12 \text{ cm}", False),
    (r"\boxed{12\,\mathrm{cm}}", r"12 \text{ cm}^2", False),
    (r"\boxed{12\,\mathrm{cm}^2}", r"12 \text{ cm}^2", True),
    ("12 m", "12 cm", False),
    ("It is 12 m long.", "12 cm", False),
    (r"\boxed{12 \text{ centimetres}}", "12 cm", True),
    (r"\boxed{5 \text{ oranges}}", "5 apples", False),
    (r"\boxed{5 \text{ apples}}", "5 apples", True),
    (r"\boxed{10 \text{ PM}}", "10 AM", False),
    (r"\boxed{60^\circ}", "60 degrees", True),
    (r"\boxed{7/2 = 3.5}", "3.5", True),
    (r"\boxed{7/2 = 3.5}", "7", False),
    (r"\boxed{x > 2.5}", "x > 5/2", True),
    # Brackets
    (r"\boxed{\{1,2\}}", "(1,2)", False),
    (r"\boxed{(1,2)}", r"\{1,2\}", False),
    (r"\boxed{1,2}", "(1,2)", True),
    (r"\boxed{2,1}", "(1,2)", False),
    (r"\boxed{1} and \boxed{2}", "(1,2)", False),
    (r"\boxed{2,1}", "1,2", True),
    (r"\boxed{[0,1)}", "[0,1)", True),
    (r"\boxed{(0,1)}", "[0,1)", False),
    (r"\boxed{(-\infty,0)\cup(1,\infty)}", r"(-\infty,0)\cup(1,\infty)", True),
    (r"\boxed{(-\infty,0]\cup(1,\infty)}", r"(-\infty,0)\cup(1,\infty)", False),
    (r"\boxed{\left(0,1\right)}", "(0,1)", True),
    # Where the answer stands
    ("<answer>42</answer>", "42", True),
    ("<think>41</think> <answer>The answer is 42.</answer>", "42", True),
    ("<answer>41</answer>, not 42", "42", False),
    ("<answer>x^2+2x+1</answer>", "(x+1)^2", True),
    (r"First \boxed{42}, then \boxed{42}.", "42", True),
]
# Wrong verdicts that are known, with the reason.
OF_MATH = {
    (r"\boxed{42", "42"): "a response that was cut off inside the box: it might have become 420",
    ("It is 12 m long.", "12 cm"): "a false positive: in a sentence, units are not looked for",
    (r"\boxed{12 \text{ centimetres}}", "12 cm"): "units are compared as they are spelled",
}
A_CALCULATION = "it looks for the last number and calculates nothing"
UNITS = "units and signs of percent are ignored"
OF_NUMBERS = {
    (r"\boxed{2^{10}}", "1024"): A_CALCULATION,
    (r"\boxed{\binom{5}{2}}", "10"): A_CALCULATION,
    (r"\boxed{5!}", "120"): A_CALCULATION,
    (r"\boxed{\log_2 8}", "3"): A_CALCULATION,
    (r"\boxed{\sin(\pi/6)}", "0.5"): A_CALCULATION,
    (r"\boxed{50\%}", "0.5"): UNITS,
    (r"\boxed{41}, not 42", "42"): "a false positive: the last number is not the boxed one",
    ("<answer>41</answer>, not 42", "42"): "a false positive: the last number is not the tagged one",
    ("The answer is 2π.", "2"): "a false positive: what stands behind the number may be a unit",
    ("The answer is 2x", "2"): "a false positive: what stands behind the number may be a unit",
}

# completion, the row's column answer, whether it is right
OF_GSM8K_TABLE = [
    ("3 + 4 = 7\n#### 7", "It takes 3 + 4.\n#### 7", True),
    ("#### 42 dollars, from 7 people", "#### 42", True),
    ("#### 42 dollars, from 7 people", "#### 7", False),
    ("#### $1,200.00", "#### 1200", True),
    ("#### **18**", "#### 18", True),
    ("####18", "#### 18", True),
    ("#### The answer is 18.", "#### 18", True),
    ("#### -5", "#### -5", True),
    ("#### \N{MINUS SIGN}5", "#### -5", True),
    ("#### 5-42", "#### 42", False),
    ("#### 5-42", "#### 5", False),
    ("#### 3 + 4", "#### 3", False),
    ("#### 3 + 4 = 7", "#### 7", True),
    ("#### 7\n#### 8", "#### 7", False),
    ("#### 7\n#### 8", "#### 8", True),
    ("#### 50%", "#### 50", True),
    ("#### 1/2", "#### 0.5", True),
    ("#### seven", "#### 7", False),
    ("So it is 7.", "#### 7", True),
    ("7 of 9", "#### 7", False),
    (r"\boxed{7}", "7", True),
    ("7\n####", "#### 7", False),
    ("", "#### 7", False),
]
OF_GSM8K = {("#### 3 + 4 = 7", "#### 7"): "the first number is part of a calculation, and no other is looked for"}

OF_CHOICE_TABLE = [
    ("The answer is (B).", "B", True),
    ("the answer is (b)", "B", True),
    ("the answer is b.", "B", True),
    (r"\boxed{\textbf{(A)}}", "A", True),
    (r"\boxed{\mathrm{A}}", "A", True),
    (r"\boxed{A: Paris}", "A", True),
    (r"\boxed{b}", "B", True),
    ("**Answer:** B", "B", True),
    ("<answer>\nB) Paris\n</answer>", "B", True),
    ("It is A. No: the answer is B", "B", True),
    ("Option A is wrong, so answer: C", "C", True),
    ("Let's consider answer A. It fails. So B is right", "B", True),
    ("I'd go with D because it fits.", "D", True),
    ("A dog is C", "C", True),
    ("I think B", "B", True),
    ("I think A", "A", True),
    ("We get 12, which is option C.", "C", True),
    ("The answer is A or B", "A", False),
    ("answer: A or B", "A", False),
    ("The answer is B, C", "B", False),
    ("The answer is (A) Paris or (B) Rome", "A", False),
    ("The answer is A+B", "B", False),
    ("Is the answer A?", "A", False),
    ("Either A or B is right", "B", False),
    (r"\boxed{A} or \boxed{B}", "B", False),
    (r"\boxed{A, B}", "A", False),
    ("A and B", "B", False),
    ("Answer A is wrong; B", "A", False),
    ("Let's consider answer A. It fails. So B is right", "A", False),
    ("The answer is not A", "A", False),
    ("A is wrong", "A", False),
    ("I would not choose C", "C", False),
    ("If the answer is A, it rains.", "A", False),
    ("The answer is A. Wait, no, B.", "A", False),
    ("The answer is A positive number, so C", "A", False),
    ("The answer is C++", "C", False),
    ("A man walks into a bar", "A", False),
    ("I am not sure", "I", False),
    ("A) 12\nB) 13\nC) 14", "A", False),
    ("<answer>A</answer>", "B", False),
    ("Paris", "A", False),
    ("", "A", False),
    ("The answer is A. Wait, no, B.", "B", True),
    ("Answer A is wrong; B", "B", True),
    ("the second one", "B", True),
]
OF_CHOICE = {
    ("The answer is A. Wait, no, B.", "B"): "a second thought takes the mark away, and sets none",
    ("Answer A is wrong; B", "B"): "elimination: two letters and no mark",
    ("the second one", "B"): "it looks for letters",
}

OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
OF_SCHEMA_TABLE = [
    ('{"a": 1}', OBJECT, True),
    (' {"a": 1}\n', OBJECT, True),
    ('```json\n{"a": 1}\n```', OBJECT, True),
    ('```JSON\n{"a": 1}\n```', OBJECT, True),
    ('```\n{"a": 1}\n```\n', OBJECT, True),
    ('{"a": 1.0}', OBJECT, True),
    ('{"a": 1, "b": null}', OBJECT, True),
    ("null", True, True),
    ('{"a": "1"}', OBJECT, False),
    ('{"a": 1.5}', OBJECT, False),
    ('{"a": true}', OBJECT, False),
    ("{'a': 1}", OBJECT, False),
    ('{"a": 1,}', OBJECT, False),
    ('{"a": 1} {"a": 1}', OBJECT, False),
    ('Here: {"a": 1}', OBJECT, False),
    ('```json\n{"a": 1}\n```\nDone.', OBJECT, False),
    ("NaN", {"type": "number"}, False),
    ("[Infinity]", {}, False),
    ("9" * 5000, {"type": "integer"}, False),
    ("9" * 4000, {"multipleOf": 0.5}, False),
    ("[" * 900 + "]" * 900, {"items": {"$ref": "#"}, "type": "array"}, True),
    ("1", False, False),
    ("", {}, False),
]
OF_SCHEMA = {(OF_SCHEMA_TABLE[-3][0], str(OF_SCHEMA_TABLE[-3][1])): "as deep as Python reads, and deeper than the validator goes"}

OF_FORMAT_TABLE = [
    ("<think>a\nb</think><answer>c</answer>", None, True),
    (" <think>a</think>\n\n<answer>c</answer>\n", None, True),
    ("<think>1 < 2</think><answer>c</answer>", None, True),
    ("<think> </think><answer>c</answer>", None, False),
    ("<think></think><answer>c</answer>", None, False),
    ("<think>a</think><answer>c", None, False),
    ("<think>a</think><answer>c</answer>!", None, False),
    ("<answer>c</answer><think>a</think>", None, False),
    ("<think>a<think>b</think></think><answer>c</answer>", None, False),
    ("<Think>a</Think><answer>c</answer>", None, False),
    ("yes\nno", "yes.no", True),
    ("yes\nno!", "yes.no", False),
    ("42", r"\d+", True),
    ("42 ", r"\d+", False),
    ("", r"\d*", True),
]
OF_FORMAT: dict[tuple[str, str], str] = {}

TABLE_OF_T = "create table t (a, b); insert into t values (1, 'x'), (2, 'y'), (2, 'z');"
OF_SQL_TABLE = [
    ("select a from t", "select a from t", True),
    ("```sql\nselect a from t\n```", "select a from t", True),
    ("```SQL\nselect a from t;\n```", "select a from t", True),
    ("Use\n```sql\nselect 1\n```\nor rather\n```sql\nselect a from t\n```", "select a from t", True),
    ("select t.a as n from t where true", "select a from t", True),
    ("select a from t order by a desc", "select a from t", True),
    ("-- all\nselect a from t", "select a from t", True),
    ("select count(*) from t where a = 2", "select 2", True),
    ("select 2.0", "select 2", True),
    ("select a from t order by a desc", "select a from t order by a", False),
    ("select distinct a from t", "select a from t", False),
    ("select a, b from t", "select a from t", False),
    ("select b, a from t", "select a, b from t", False),
    ("select '2'", "select 2", False),
    ("select a from t limit 2", "select a from t", False),
    ("select null", "select 0", False),
    ("delete from t", "select a from t", False),
    ("select a from t; select a from t", "select a from t", False),
    ("The query is: select a from t", "select a from t", False),
    ("", "select a from t", False),
    ("select round(2.0000001, 3)", "select 2", True),
    ("select 2.0000001", "select 2", False),
    ("select a from t where 1 = 0", "select a from t where a = 3", True),
]
OF_SQL: dict[tuple[str, str], str] = {}

ADD = "def add(a, b):\n    return a + b\n"
METHOD = "class Solution:\n    def add(self, a, b):\n        return a + b\n"
CALLS = [{"call": [1, 2], "returns": 3}, {"call": [2, 2], "returns": 4}]
PAIRS = {"inputs": [[1, 2], [2, 2]], "outputs": [3, 4]}
ASSERTS = ["assert add(1, 2) == 3", "assert add((1,), (2,)) == (1, 2)", "assert not add(0, 0)"]
PRINTED = [{"input": "2\n", "output": "4\n"}, {"input": "3", "output": "6"}]
OF_CODE_TABLE = [
    (ADD, (CALLS, "add"), True),
    (f"```python\n{ADD}```", (CALLS, "add"), True),
    (f"```python3\n{ADD}```", (CALLS, "add"), True),
    (f"```PYTHON\n{ADD}```", (CALLS, "add"), True),
    (f"```Py\n{ADD}```\nIt prints\n```\n3\n```", (CALLS, "add"), True),
    (METHOD, (CALLS, "add"), True),
    (METHOD, (CALLS, "Solution.add"), True),
    (METHOD, (CALLS, "other"), False),
    (ADD, (CALLS, "Solution.add"), True),
    (ADD, (json.dumps(CALLS), "add"), True),
    (ADD, (PAIRS, "add"), True),
    (METHOD, (json.dumps(PAIRS), "add"), True),
    (ADD, ({"inputs": ["1\n2"], "outputs": ["3"]}, "add"), True),
    (ADD, ({"inputs": [[1, 2]], "outputs": [[3]], "fn_name": "add"}, None), True),
    (ADD, ({"inputs": [[1, 2]], "outputs": [4]}, "add"), False),
    (ADD, (ASSERTS, None), True),
    (ADD, (json.dumps(ASSERTS), None), True),
    (ADD, (["assert add(1, 2) == 4"], None), False),
    (ADD, (["assert set(add([1], [2])) == {2, 1}"], None), True),
    ("def add(a, b): return {3}", (["assert add(1, 2) == [3]"], None), False),
    ("def add(a, b):\n    class Yes:\n        __eq__ = lambda *_: True\n    return Yes()", (ASSERTS, None), False),
    ("raise SystemExit(0)", (ASSERTS, None), False),
    ("def add(a, b): return a - b", (CALLS, "add"), False),
    ("def add(a, b): return 3", (CALLS, "add"), False),
    ("def add(a, b): print(a + b)", (CALLS, "add"), False),
    ("def add(a, b): return str(a + b)", (CALLS, "add"), False),
    ("print(2 * int(input()))", (PRINTED, None), True),
    ("print(2 * int(input()))", ({"inputs": ["2", ["3"]], "outputs": ["4", ["6"]]}, None), True),
    ("print(2 * int(input()), end=' ')", (PRINTED, None), True),
    ("print('Result:', 2 * int(input()))", (PRINTED, None), False),
    ("print(2.0 * int(input()))", (PRINTED, None), False),
    ("import math\nprint(math.floor(2 * int(input())))", (PRINTED, None), True),
    ("I would add them.", (CALLS, "add"), False),
    (f"```python\n{ADD}", (CALLS, "add"), True),
]
OF_CODE = {(OF_CODE_TABLE[-1][0], str(OF_CODE_TABLE[-1][1])): "a block that was cut off"}

# name, the columns that a row's second cell stands for, its rows, its known wrong verdicts
TABLES = [
    ("math_equivalence", ("answer",), TABLE, OF_MATH),
    # Numbers alone are its business: rows whose answer is one.
    ("numeric_match", ("answer",), [row for row in TABLE if row[1].lstrip("-").replace(".", "").isdigit()], OF_NUMBERS),
    ("gsm8k", ("answer",), OF_GSM8K_TABLE, OF_GSM8K),
    ("multiple_choice", ("answer",), OF_CHOICE_TABLE, OF_CHOICE),
    ("json_schema", ("schema",), OF_SCHEMA_TABLE, OF_SCHEMA),
    ("format", ("pattern",), OF_FORMAT_TABLE, OF_FORMAT),
    ("sql_result", ("answer",), OF_SQL_TABLE, OF_SQL),
    ("code_tests", ("tests", "entry_point"), OF_CODE_TABLE, OF_CODE),
]


@pytest.mark.parametrize(("name", "columns", "rows", "excused"), TABLES, ids=[table[0] for table in TABLES])
def test_false_negatives_and_false_positives(name, columns, rows, excused):
    function, _ = load(locate(name, Path.cwd()))
    missed, taken = set(), set()
    for completion, cells, is_right in rows:
        row = {column: [cell] for column, cell in zip(columns, cells if len(columns) > 1 else [cells], strict=True)}
        [found] = function(
            prompts=["p"], completions=[completion], **row | ({"schema": [TABLE_OF_T]} if name == "sql_result" else {})
        )
        assert found in (0.0, 1.0), (completion, cells)
        if found != is_right:
            (missed if is_right else taken).add((completion, str(cells)))
    print(f"{name}: {len(rows)} rows, {len(missed)} false negatives, {len(taken)} false positives")
    assert missed | taken == set(excused)
