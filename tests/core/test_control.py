import json
import math
from dataclasses import asdict, is_dataclass

import pytest

from rlkit.core.control import Fixed, Schedule, Shape
from rlkit.errors import ConfigError

NAN, INF = float("nan"), float("inf")


def follow(control, coef, num_updates):
    """The coefficients of the first steps, the start among them."""
    state = control.initial(coef, sign=-1)
    coefs = [state.coef]
    for _ in range(num_updates):
        state = control.update(state, NAN, 8)  # nobody looks at what was measured
        coefs.append(state.coef)
    return coefs


def test_a_fixed_coefficient_stays_where_it_was_set_whatever_is_measured():
    control = Fixed()
    state = control.initial(0.3, sign=1)
    for measured in (0.0, 1e9, -5.0, NAN, INF):
        state = control.update(state, measured=measured, num_sequences=8)
        assert state.coef == 0.3
    assert state == control.initial(0.3, sign=1)
    assert control.metrics(state) == {"coef": 0.3, "action": 0.0, "saturated": 0, "nonfinite": 0}
    assert control.lowest(0.3) == 0.3


def test_the_state_survives_json_bit_for_bit():
    schedule = Schedule(updates=[7], coefs=[0.7])
    for state in (Fixed().initial(0.1 + 0.2, sign=1), schedule.update(schedule.initial(0.1 + 0.2, sign=1), 0.0, 1)):
        assert is_dataclass(state)
        assert type(state)(**json.loads(json.dumps(asdict(state)))) == state


def test_a_linear_schedule_goes_straight_from_the_terms_own_coefficient_through_its_points():
    control = Schedule(updates=[2, 4, 8], coefs=[1.0, 1.0, 0.0])
    assert follow(control, 0.0, 10) == [0.0, 0.5, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0, 0.0, 0.0]


def test_a_constant_schedule_jumps_at_its_points_and_says_by_how_much():
    control = Schedule(updates=[2, 5], coefs=[0.5, 0.0], shape=Shape.constant)
    assert follow(control, 0.25, 6) == [0.25, 0.25, 0.5, 0.5, 0.5, 0.0, 0.0]
    state, actions = control.initial(0.25, sign=1), []
    for _ in range(6):
        state = control.update(state, NAN, 8)
        actions.append(control.metrics(state)["action"])
    assert actions == [0.0, 0.25, 0.0, 0.0, -0.5, 0.0]


def test_a_cosine_schedule_is_half_a_wave_between_two_points():
    coefs = follow(Schedule(updates=[6], coefs=[1.0], shape=Shape.cosine), 3.0, 8)
    assert coefs == pytest.approx([2 + math.cos(math.pi * k / 6) for k in range(7)] + [1.0, 1.0], abs=1e-15)
    assert coefs[0] == 3.0
    assert coefs[6] == 1.0


@pytest.mark.parametrize("shape", Shape)
def test_every_schedule_meets_its_points_exactly_and_never_leaves_the_range_between_two(shape):
    points = {3: 0.1, 4: 0.7, 9: 0.7, 20: 1e-3}
    coefs = follow(Schedule(updates=list(points), coefs=list(points.values()), shape=shape), 0.3, 25)
    assert [coefs[k] for k in points] == list(points.values())
    for (begin, left), (end, right) in zip([(0, 0.3), *points.items()], points.items(), strict=False):
        assert all(min(left, right) <= coef <= max(left, right) for coef in coefs[begin : end + 1])
    assert coefs[20:] == [1e-3] * 6
    assert min(coefs) == Schedule(updates=list(points), coefs=list(points.values()), shape=shape).lowest(0.3) == 1e-3


def test_a_schedule_resumed_anywhere_goes_on_as_if_uninterrupted():
    control = Schedule(updates=[3, 11], coefs=[0.7, 0.1], shape=Shape.cosine)
    whole = follow(control, 0.3, 15)
    state = control.initial(0.3, sign=1)
    for k in range(15):
        stored = json.loads(json.dumps(asdict(state)))
        state = control.update(type(state)(**stored), INF, 4)
        assert state.coef == whole[k + 1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"updates": [], "coefs": []}, r"updates=\[\]: has 0 points"),
        ({"updates": [1, 2], "coefs": [0.1]}, r"has 2 points where coefs=\[0.1\] has 1; write as many of each"),
        ({"updates": [5, 5], "coefs": [0.1, 0.2]}, r"updates=\[5, 5\]: write whole numbers that ascend from 1"),
        ({"updates": [0, 5], "coefs": [0.1, 0.2]}, r"updates=\[0, 5\]: write whole numbers that ascend from 1"),
        ({"updates": [5], "coefs": [INF]}, r"coefs=\[inf\]: .* not finite; write numbers"),
    ],
)
def test_a_schedule_that_makes_no_sense_says_what_to_write(settings, message):
    with pytest.raises(ConfigError, match=message):
        Schedule(**settings)


def test_a_term_cannot_start_at_a_coefficient_that_is_not_finite():
    Fixed().check(coef=0.3, num_sequences=8)
    for coef in (NAN, INF):
        with pytest.raises(ConfigError, match=f"^coef={coef}: .* write a finite number"):
            Fixed().check(coef=coef, num_sequences=8)
