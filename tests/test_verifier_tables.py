"""Verifiers against one table of answers in many notations: what each takes for right that is not, and the other way round.

A wrong verdict is allowed only where it is listed here, with its reason; a verifier that gets better fails the test as well.
"""

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
]
# Wrong verdicts that are known, with the reason.
OF_MATH = {
    ("1e3", "1000"): "in LaTeX it is 1 times e times 3",
    ("+42", "42"): "a sign that stands alone before a number is read as a sum that lacks its first part",
    (r"\boxed{42", "42"): "a response that was cut off inside the box",
    (r"\boxed{0.5}", r"50\%"): "a percent sign in the reference is dropped",
}
A_CALCULATION = "it looks for the last number and calculates nothing"
OF_NUMBERS = {
    (r"$1.2 \times 10^{3}$", "1200"): A_CALCULATION,
    (r"\boxed{10^{-3}}", "0.001"): A_CALCULATION,
    (r"\boxed{2^{10}}", "1024"): A_CALCULATION,
    (r"\boxed{\binom{5}{2}}", "10"): A_CALCULATION,
    (r"\boxed{5!}", "120"): A_CALCULATION,
    (r"\boxed{\log_2 8}", "3"): A_CALCULATION,
    (r"\boxed{\sin(\pi/6)}", "0.5"): A_CALCULATION,
    (r"\boxed{1\frac{1}{2}}", "1.5"): A_CALCULATION,
    (r"\boxed{41}, not 42", "42"): "a false positive: the last number is not the boxed one",
}
ANSWERS = {
    "math_equivalence": (TABLE, OF_MATH),
    # Numbers alone are its business: rows whose answer is one.
    "numeric_match": ([row for row in TABLE if row[1].lstrip("-").replace(".", "").isdigit()], OF_NUMBERS),
}


@pytest.mark.parametrize("name", list(ANSWERS))
def test_false_negatives_and_false_positives(name):
    function, _ = load(locate(name, Path.cwd()))
    rows, excused = ANSWERS[name]
    missed, taken = set(), set()
    for completion, answer, is_right in rows:
        [found] = function(prompts=["p"], completions=[completion], answer=[answer])
        assert found in (0.0, 1.0), (completion, answer)
        if found != is_right:
            (missed if is_right else taken).add((completion, answer))
    print(f"{name}: {len(rows)} rows, {len(missed)} false negatives, {len(taken)} false positives")
    assert missed | taken == set(excused)
