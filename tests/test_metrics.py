"""Measurements that merge without a bias."""

import math

import pytest

from rlkit.metrics import Last, Max, Mean, Min, Sum, merge, values


def test_a_mean_of_unequal_parts_is_the_mean_of_the_whole():
    parts = [{"x": Mean(1.0 * 3, 3)}, {"x": Mean(5.0, 1)}]
    assert values(merge(parts)) == {"x": 2.0}  # (1 + 1 + 1 + 5) / 4, not (1 + 5) / 2
    assert merge(parts) == merge(reversed(parts))


def test_each_kind_merges_in_its_own_way():
    first = {"sum": Sum(1), "max": Max(1), "min": Min(1), "last": Last(1)}
    second = {"sum": Sum(2), "max": Max(2), "min": Min(2), "last": Last(2), "only here": Sum(7)}
    assert values(merge([first, second])) == {"sum": 3, "max": 2, "min": 1, "last": 2, "only here": 7}


def test_a_mean_of_nothing_is_not_a_number():
    assert math.isnan(Mean(0.0, 0.0).value)


def test_one_name_with_two_kinds_is_our_bug_and_loud():
    with pytest.raises(TypeError, match="metric x is a Sum in one part and a Max in another"):
        merge([{"x": Sum(1)}, {"x": Max(1)}])
