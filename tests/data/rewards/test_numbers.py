"""Properties of the parser of numbers; its examples are in tests/test_reward_fns.py."""

import itertools
import time
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.data.rewards.numbers import Late, first_number, last_number, reference_text, whole_number, within

digits = st.integers(0, 10**12)
signs = st.sampled_from(["", "-", "+", "\N{MINUS SIGN}"])
around = st.text(
    st.characters(exclude_categories=["Cs", "N"], exclude_characters="+-./,\\{}$%\N{MINUS SIGN}\N{FRACTION SLASH}"), max_size=8
)


def signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign in ("-", "\N{MINUS SIGN}") else value


@given(signs, digits)
def test_thousands_separators_change_nothing(sign, number):
    plain = f"{sign}{number:,}"
    written = [
        plain.replace(",", mark) for mark in ("", ",", "{,}", r"\,", r"\!", "\N{NO-BREAK SPACE}", "\N{NARROW NO-BREAK SPACE}")
    ]
    for text in (*written, f"${plain}$"):
        assert last_number(text) == signed(sign, Fraction(number)), text


@given(signs, digits, st.integers(0, 10**6))
def test_decimals_are_exact(sign, whole, part):
    text = f"{sign}{whole}.{part:07d}"
    assert last_number(text) == signed(sign, Fraction(whole) + Fraction(part, 10**7))


@given(signs, digits, st.integers(1, 10**9))
def test_fractions_in_every_notation_are_one_value(sign, top, bottom):
    value = signed(sign, Fraction(top, bottom))
    for text in (f"{sign}{top}/{bottom}", f"{sign}{top}\N{FRACTION SLASH}{bottom}", f"{sign}\\frac{{{top}}}{{{bottom}}}"):
        assert last_number(text) == value, text
        assert whole_number(text) == value, text


@given(signs, digits, st.integers(-300, 300))
def test_powers_of_ten_are_exact(sign, number, exponent):
    value = signed(sign, number * Fraction(10) ** exponent)
    times = [f"{sign}{number}{by}10^{{{exponent}}}" for by in (r" \times ", r"\cdot", "*", "\N{MULTIPLICATION SIGN}")]
    for text in (f"{sign}{number}e{exponent}", *times):
        assert last_number(text) == value, text
        assert whole_number(text) == value, text


@given(signs, digits, st.integers(1, 8))
def test_mixed_numbers_are_a_whole_and_a_part(sign, whole, top):
    value = signed(sign, whole + Fraction(top, 9))
    for text in (f"{sign}{whole} {top}/9", f"{sign}{whole}\\frac{{{top}}}{{9}}", f"{sign}{whole} \\frac{top}9"):
        assert last_number(text) == value, text
        assert whole_number(text) == value, text


@given(digits, st.sampled_from("-+*/^\N{EN DASH}\N{MULTIPLICATION SIGN}\N{MINUS SIGN}"), digits)
def test_what_is_left_to_calculate_is_no_number(first, operator, second):
    for text in (f"{first}{operator}{second}", f"{first} {operator} {second}"):
        if "/" not in text and f"{first}{operator}" != "10^":
            assert (last_number(text), first_number(text), whole_number(text)) == (None, None, None), text


@given(around, digits, around)
def test_what_stands_around_a_number_does_not_change_it(before, number, after):
    text = f"{before} {number} {after}"
    assert last_number(text) == number
    assert (whole_number(text) == number) or (text.strip() != str(number))


@given(digits, digits)
def test_the_last_of_several_counts(first, second):
    assert last_number(f"{first}, {second}") == second
    assert first_number(f"{first}, {second}") == first
    assert whole_number(f"{first}; {second}") is None


@settings(max_examples=500)
@given(st.text(max_size=300))
def test_any_text_has_a_number_or_none_and_soon(text):
    found = last_number(text)
    assert found is None or isinstance(found, Fraction)
    assert whole_number(text) in (None, found)
    assert first_number(text) is None or found is None or isinstance(first_number(text), Fraction)


def test_what_is_no_answer_has_no_text():
    assert [reference_text(each) for each in (None, True, False, [], {}, [4], "", " \n", float("nan"), float("inf"))] == [None] * 10
    assert [reference_text(each) for each in (0, 0.5, " x ", -3, 10**20)] == ["0", "0.5", "x", "-3", "1" + "0" * 20]
    assert reference_text(10**5000) is None


def test_within_stops_what_does_not_end_and_nothing_later():
    with pytest.raises(Late), within(0.05):
        sum(1 for _ in itertools.count())
    with within(0.05):
        pass
    time.sleep(0.1)
