"""Properties of the parser of numbers; its examples are in tests/test_reward_fns.py."""

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from rlkit.data.rewards.numbers import last_number, whole_number

digits = st.integers(0, 10**12)
signs = st.sampled_from(["", "-", "+", "\N{MINUS SIGN}"])
around = st.text(
    st.characters(exclude_categories=["Cs", "N"], exclude_characters="+-./,\\{}$%\N{MINUS SIGN}\N{FRACTION SLASH}"), max_size=8
)


def signed(sign: str, value: Fraction) -> Fraction:
    return -value if sign in ("-", "\N{MINUS SIGN}") else value


@given(signs, digits)
def test_thousands_separators_change_nothing(sign, number):
    for text in (f"{sign}{number}", f"{sign}{number:,}", f"{sign}{number:,}".replace(",", "{,}"), f"${sign}{number:,}$"):
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
    assert last_number(f"{sign}{number}e{exponent}") == signed(sign, number * Fraction(10) ** exponent)


@given(around, digits, around)
def test_what_stands_around_a_number_does_not_change_it(before, number, after):
    text = f"{before} {number} {after}"
    assert last_number(text) == number
    assert (whole_number(text) == number) or (text.strip() != str(number))


@given(digits, digits)
def test_the_last_of_several_counts(first, second):
    assert last_number(f"{first}, {second}") == second
    assert whole_number(f"{first}; {second}") is None


@settings(max_examples=500)
@given(st.text(max_size=300))
def test_any_text_has_a_number_or_none_and_soon(text):
    found = last_number(text)
    assert found is None or isinstance(found, Fraction)
    assert whole_number(text) in (None, found)
