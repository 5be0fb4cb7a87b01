import json
import math
import random
from dataclasses import asdict, replace

import pytest

from rlkit.core.control import Fixed
from rlkit.core.feedback import (
    PID,
    AntiWindup,
    Doubling,
    DualAscent,
    LogDualAscent,
    LogPID,
    PIDState,
    Proportional,
    Skywork,
)
from rlkit.errors import ConfigError

NAN, INF = float("nan"), float("inf")
PLAIN = {"smoothing": 0.0, "slope_smoothing": 0.0, "warmup_updates": 0}
ENTROPY = PID(target=0.5, **PLAIN)
KL = LogPID(target=0.05, low=1e-3, **PLAIN)
KL_MEASURED = [0.05, 0.10, 0.20, 0.06, 0.02, 0.02]

# Every controller with a start and the sign of a term that suits it.
CONTROLS = {
    "proportional": (Proportional(target=0.1), 0.05, -1),
    "doubling": (Doubling(target=0.1), 0.05, -1),
    "skywork": (Skywork(target=0.3), 0.0, 1),
    "pid": (PID(target=0.3), 0.004, 1),
    "pid back calculation": (PID(target=0.3, anti_windup=AntiWindup.back_calculation), 0.004, 1),
    "pid_log": (LogPID(target=0.1), 0.05, -1),
    "dual": (DualAscent(target=0.1, learning_rate=0.05), 0.05, -1),
    "dual_log": (LogDualAscent(target=0.1, learning_rate=2.0), 0.05, -1),
}
every_control = pytest.mark.parametrize(("control", "start", "sign"), list(CONTROLS.values()), ids=list(CONTROLS))


def walk(control, measured, *, start, sign, num_sequences=64):
    """The state after each measurement."""
    state, states = control.initial(start, sign=sign), []
    for value in measured:
        state = control.update(state, value, num_sequences)
        states.append(state)
    return states


def coefs(states):
    return [state.coef for state in states]


def noise(seed, n, scale=1.0):
    """Measurements of every size around 0.1 to 0.3, some of them far out."""
    generator = random.Random(seed)
    return [scale * generator.choice([0.1, 0.1, 0.3, 3.0, -1.0]) * generator.lognormvariate(0.0, 1.0) for _ in range(n)]


def test_proportional_gives_the_worked_numbers():
    control = Proportional(target=6.0)
    states = walk(control, [12.0, 6.0, 3.0, 5.4], start=0.2, sign=-1, num_sequences=256)
    # Errors .2 (clipped from 1), 0, -.2 (from -.5), -.1; factor 1 + error * .0256.
    assert coefs(states) == pytest.approx([0.201024, 0.201024, 0.19999476, 0.19948277], abs=5e-9)
    assert coefs(states)[1] == coefs(states)[0]
    assert control.metrics(states[2]) == {
        "coef": states[2].coef,
        "action": states[2].coef - states[1].coef,
        "saturated": 0,
        "nonfinite": 0,
        "setpoint": 6.0,
        "measured": 3.0,
        "error": -0.2,
    }


@pytest.mark.parametrize(
    ("start", "measured", "target", "num_sequences", "expected"),
    [
        (0.2, 7.2, 6.0, 256, 0.201024),  # the error, .2, is just at its bound
        (0.2, 6.3, 6.0, 256, 0.200256),  # .05
        (0.001, 0.05, 0.1, 1024, 0.00097952),  # -.5, clipped to -.2; a target per token
    ],
)
def test_proportional_gives_the_same_for_targets_of_a_response_and_of_a_token(start, measured, target, num_sequences, expected):
    (state,) = walk(Proportional(target=target), [measured], start=start, sign=-1, num_sequences=num_sequences)
    assert state.coef == pytest.approx(expected, rel=1e-12)


def test_proportional_refuses_a_step_that_could_end_the_coefficient_for_good():
    control = Proportional(target=6.0, horizon=1000.0)
    control.check(coef=0.2, num_sequences=4999)  # 0.2 * 4999 < 1000
    with pytest.raises(ConfigError, match=r"horizon=1000.0: one step over 5000 responses .* write more than 1000"):
        control.check(coef=0.2, num_sequences=5000)
    with pytest.raises(ConfigError, match="one step over 5000 responses"):
        control.update(control.initial(0.2, sign=-1), 0.0, 5000)
    with pytest.raises(ConfigError, match=r"^coef=0.0: is where it starts, and it moves by factors; start above 0"):
        control.check(coef=0.0, num_sequences=1)
    assert min(coefs(walk(control, [0.0] * 40, start=0.2, sign=-1, num_sequences=4999))) > 0


def test_doubling_acts_only_beyond_its_tolerance():
    # Halved below 6 / 1.5 = 4, doubled above 9, left alone at both.
    states = walk(Doubling(target=6.0), [3.9, 4.0, 6.0, 9.0, 9.1, 20.0], start=0.2, sign=-1)
    assert coefs(states) == [0.1, 0.1, 0.1, 0.1, 0.2, 0.4]
    states = walk(Doubling(target=6.0), [3.9, 9.1, 9.1], start=0.2, sign=1)  # a bonus: too little is answered by more
    assert coefs(states) == [0.4, 0.2, 0.1]


def test_skywork_gives_the_worked_numbers_and_is_off_while_entropy_is_high():
    states = walk(Skywork(target=0.2), [0.15, 0.18, 0.25, 0.21, 0.19], start=0.0, sign=1)
    assert [state.held for state in states] == pytest.approx([1e-4, 2e-4, 1e-4, 0.0, 1e-4], abs=1e-18)
    assert coefs(states) == pytest.approx([1e-4, 2e-4, 0.0, 0.0, 1e-4], abs=1e-18)
    report = Skywork(target=0.2).metrics(states[2])
    assert report["coef"] == 0.0
    assert report["integral"] == pytest.approx(1e-4)
    assert report["saturated"] == 0
    assert Skywork(target=0.2).metrics(states[3])["saturated"] == -1


def test_skywork_is_off_at_the_target_itself_and_for_good_at_a_target_of_zero():
    (state,) = walk(Skywork(target=0.25, step=0.001), [0.25], start=0.002, sign=1)  # the gate is strict
    assert (state.held, state.coef) == (0.001, 0.0)
    assert set(coefs(walk(Skywork(target=0.0), [0.3, 0.0, 1e-9, 2.0], start=0.0, sign=1))) == {0.0}
    assert set(coefs(walk(Skywork(target=9.0, step=0.0), [0.3, 0.1], start=0.0, sign=1))) == {0.0}


def test_pid_gives_the_worked_numbers_for_entropy():
    states = walk(ENTROPY, [0.5, 0.4, 0.1, 0.0, 0.0, 0.6, 0.8, 0.5], start=0.0, sign=1)
    # In the sixth and seventh step p + i + d is below 0 and the error too: the integral stays where it was.
    assert coefs(states) == pytest.approx([0, 0.0035, 0.0135, 0.016, 0.0175, 0, 0, 0.0105], abs=1e-15)
    assert [state.integral for state in states] == pytest.approx([0, 0.1, 0.5, 1.0, 1.5, 1.5, 1.5, 1.5], abs=1e-15)
    report = ENTROPY.metrics(states[2])
    assert report == pytest.approx(
        {
            "coef": 0.0135,
            "action": 0.01,
            "nonfinite": 0,
            "setpoint": 0.5,
            "measured": 0.1,
            "measured_ema": 0.1,
            "error": 0.4,
            "p": 0.008,
            "i": 0.0025,
            "d": 0.003,
            "integral": 0.5,
            "saturated": 0,
        }
    )
    assert [state.saturated for state in states] == [0, 0, 0, 0, 0, -1, -1, 0]


def test_pid_does_not_wind_up_at_its_upper_bound():
    measured = [0.5, 0.4, 0.1, 0.0, 0.0, 0.0, 0.6, 0.8]
    states = walk(PID(target=0.5, kd=0.0, high=0.012, **PLAIN), measured, start=0.0, sign=1)
    assert coefs(states) == pytest.approx([0, 0.0025, 0.0105, 0.012, 0.012, 0.012, 0, 0], abs=1e-15)
    assert [state.integral for state in states] == pytest.approx([0, 0.1, 0.5, 0.5, 0.5, 0.5, 0.4, 0.4], abs=1e-15)
    # The plain sum of the errors would be 2.0 at the sixth step.
    free = walk(PID(target=0.5, kd=0.0, high=1.0, **PLAIN), measured, start=0.0, sign=1)
    assert free[5].integral == pytest.approx(2.0)


def test_errors_that_pull_back_from_a_bound_always_count():
    control = PID(target=0.5, kp=0.0, kd=0.2, high=0.012, **PLAIN)
    states = walk(control, [0.1, 1.0, 0.6], start=0.0, sign=1)
    # .002; then .2 * -.9 sends it below 0 with an error of -.5, which is left out; then .2 * .4 sends it above .012 with an
    # error of -.1, which is not.
    assert [state.saturated for state in states] == [0, -1, 1]
    assert [state.integral for state in states] == pytest.approx([0.4, 0.4, 0.3])


def test_the_integral_never_exceeds_what_reaches_a_bound_alone():
    control = PID(target=1.0, kp=0.0, kd=1.0, **PLAIN)  # a rising measurement holds the coefficient down meanwhile
    states = walk(control, [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6], start=0.0, sign=1)
    assert [state.integral for state in states] == pytest.approx([1.0, 1.9, 2.7, 3.4, 4.0, 4.0, 4.0])  # 4 * .005 = .02


def test_back_calculation_takes_back_what_was_cut_off():
    control = PID(target=0.5, kd=0.0, high=0.012, anti_windup=AntiWindup.back_calculation, tracking_updates=2.0, **PLAIN)
    states = walk(control, [0.5, 0.4, 0.1, 0.0], start=0.0, sign=1)
    # Until the third step nothing is cut off. In the fourth I would be 1 and the coefficient .01 + .005 = .015, .003 too much;
    # I becomes .5 + .5 - .003 / (.005 * 2) = .7.
    assert coefs(states) == pytest.approx([0, 0.0025, 0.0105, 0.012], abs=1e-15)
    assert states[3].integral == pytest.approx(0.7, abs=1e-12)
    assert states[3].saturated == 1
    without_bound = replace(control, high=1.0)
    free = walk(without_bound, [0.5, 0.4, 0.1, 0.0], start=0.0, sign=1)
    assert free[2] == states[2]
    assert free[3].integral == 1.0


def test_log_pid_gives_the_worked_numbers_for_a_kl_penalty():
    states = walk(KL, KL_MEASURED, start=0.05, sign=-1)
    assert coefs(states) == pytest.approx([0.05, 0.06107014, 0.06749294, 0.06356246, 0.05525855, 0.05204054], abs=5e-9)
    assert [state.integral for state in states] == pytest.approx([0, 1, 2, 2.2, 1.6, 1.0], abs=1e-14)


def test_log_pid_returns_where_it_came_from_when_the_errors_cancel():
    control = replace(KL, kp=0.0, max_error=0.2)
    states = walk(control, KL_MEASURED, start=0.05, sign=-1)
    assert coefs(states) == pytest.approx([0.05, 0.05101007, 0.05204054, 0.05309183, 0.05204054, 0.05101007], abs=5e-9)
    # The rule that multiplies by 1 + .1 * error, under the same errors 0, .2, .2, .2, -.2, -.2, does not.
    by_factors = walk(Proportional(target=0.05, horizon=10.0), KL_MEASURED, start=0.05, sign=-1, num_sequences=1)
    assert coefs(by_factors) == pytest.approx([0.05, 0.051, 0.05202, 0.0530604, 0.05199919, 0.05095921], abs=5e-9)


@pytest.mark.parametrize(("control", "start", "sign"), [(ENTROPY, 0.004, 1), (KL, 0.05, -1), (LogPID(target=0.1), 0.03, -1)])
def test_pid_keeps_the_coefficient_exactly_while_the_target_is_met(control, start, sign):
    assert set(coefs(walk(control, [control.target] * 20, start=start, sign=sign))) == {start}


@pytest.mark.parametrize("kind", [PID, LogPID, DualAscent, LogDualAscent])
def test_equal_bounds_hold_the_coefficient(kind):
    control = kind(target=0.1, low=0.01, high=0.01)
    assert set(coefs(walk(control, noise(0, 50), start=0.01, sign=1))) == {0.01}


def test_a_new_target_moves_the_coefficient_through_p_and_i_alone():
    before = walk(ENTROPY, [0.5, 0.45, 0.47], start=0.002, sign=1)[-1]
    moved = replace(ENTROPY, target=0.6)
    same, other = (control.update(before, 0.46, 1) for control in (ENTROPY, moved))
    assert isinstance(same, PIDState)
    assert isinstance(other, PIDState)
    assert other.slope == same.slope != 0.0
    assert other.coef - same.coef == pytest.approx((ENTROPY.kp + ENTROPY.ki) * 0.1, abs=1e-15)


def test_pid_smooths_the_measurement_and_its_slope():
    control = PID(target=1.0, warmup_updates=0)  # both halves
    states = walk(control, [1.0, 0.6, 0.6], start=0.01, sign=1)
    assert [state.smoothed for state in states] == pytest.approx([1.0, 0.8, 0.7])
    assert [state.slope for state in states] == pytest.approx([0.0, 0.1, 0.1])  # 0 + .2 / 2, then .1 / 2 + .1 / 2
    # p = .02 * .2, i = .005 * .2, d = .01 * .1 in the second step
    assert states[1].coef == pytest.approx(0.01 + 0.004 + 0.001 + 0.001)


def test_pid_only_watches_while_it_warms_up():
    control = PID(target=0.5, warmup_updates=3)
    states = walk(control, [0.1, 0.2, 0.1, 0.2], start=0.007, sign=1)
    assert coefs(states)[:3] == [0.007] * 3
    assert states[2].integral == 0.0
    assert states[2].smoothed == pytest.approx(0.125)  # .1, .15, .125
    assert states[3].coef > 0.007
    assert states[3].integral == pytest.approx(0.5 - 0.1625)


def test_pid_without_an_integral_gain_has_no_integral():
    for anti_windup in AntiWindup:
        control = PID(target=0.5, ki=0.0, kd=0.0, anti_windup=anti_windup, **PLAIN)
        states = walk(control, [0.4, 0.4, -9.0], start=0.001, sign=1)
        assert coefs(states) == pytest.approx([0.003, 0.003, 0.02])
        assert [state.integral for state in states] == [0.0] * 3


def test_dual_ascent_adds_the_violation_and_stops_at_its_bounds():
    control = DualAscent(target=0.1, learning_rate=0.5)
    states = walk(control, [0.3, 0.1, 0.0, 0.0, 0.0, 9.0], start=0.0, sign=-1)
    assert coefs(states) == pytest.approx([0.1, 0.1, 0.05, 0.0, 0.0, 1.0], abs=1e-15)
    assert [control.metrics(state)["saturated"] for state in states] == [0, 0, 0, -1, -1, 1]


def test_log_dual_ascent_multiplies_by_the_violations_exponential():
    control = LogDualAscent(target=0.1, learning_rate=0.5)
    states = walk(control, [0.3, 0.1, -0.1, 1e6, -1e6], start=0.02, sign=-1)
    up = 0.02 * math.exp(0.1)
    assert coefs(states) == pytest.approx([up, up, 0.02, 1.0, 1e-6], rel=1e-14)  # 1e6 overflows nothing
    assert coefs(states)[3:] == [1.0, 1e-6]


def test_dual_ascent_on_a_running_mean_watches_first():
    control = LogDualAscent(target=0.05, learning_rate=0.01, high=10.0, smoothing=0.9, warmup_updates=2)
    states = walk(control, [0.05, 0.25, 0.45, 0.05], start=0.2, sign=-1)
    # Means .05, .07, .9 * .07 + .045 = .108, .1022: the first two are only followed.
    assert [state.smoothed for state in states] == pytest.approx([0.05, 0.07, 0.108, 0.1022])
    assert coefs(states)[:2] == [0.2, 0.2]
    assert coefs(states)[2:] == pytest.approx([0.2 * math.exp(0.00058), 0.2 * math.exp(0.00058 + 0.000522)], rel=1e-12)
    report = control.metrics(states[3])
    assert report["measured"] == 0.05
    assert report["measured_ema"] == pytest.approx(0.1022)
    assert report["error"] == pytest.approx(0.0522)  # of the mean: above 0, the penalty is too small
    assert report["action"] == coefs(states)[3] - coefs(states)[2] > 0


def test_dual_ascent_finds_the_multiplier_of_a_constrained_optimum():
    # Maximise x - x^2 / 2 with x <= 1/4: the optimum under the penalty coef * x is x = 1 - coef, and the multiplier is 3/4.
    for control in (DualAscent(target=0.25, learning_rate=0.2), LogDualAscent(target=0.25, learning_rate=0.5)):
        state = control.initial(0.1, sign=-1)
        for _ in range(200):
            state = control.update(state, 1.0 - state.coef, 1)
        assert state.coef == pytest.approx(0.75, abs=1e-9)


@every_control
def test_the_action_is_how_far_the_last_update_moved_the_coefficient(control, start, sign):
    states = walk(control, noise(4, 30), start=start, sign=sign)
    before = [start, *coefs(states)[:-1]]
    reports = [control.metrics(state) for state in states]
    assert [report["action"] for report in reports] == [now - then for now, then in zip(coefs(states), before, strict=True)]
    assert any(report["action"] for report in reports)
    assert {"coef", "setpoint", "measured", "error", "action", "saturated", "nonfinite"} <= reports[0].keys()


@pytest.mark.parametrize("direction", [1, -1])
@every_control
def test_too_little_of_what_the_coefficient_raises_is_answered_by_more_of_it(control, start, sign, direction):
    """And the other way round for a term that lowers it: one interface for bonuses, penalties and thresholds."""
    start = start or 0.002
    low, high = ([value] * 12 for value in (control.target * 0.3, control.target * 2))
    needs_more, needs_less = (low, high) if direction == 1 else (high, low)
    assert walk(control, needs_more, start=start, sign=direction)[-1].coef > start
    assert walk(control, needs_less, start=start, sign=direction)[-1].coef < start


@every_control
def test_a_run_resumed_at_any_step_goes_on_bit_for_bit(control, start, sign):
    measured = [*noise(1, 20), NAN, *noise(2, 20)]
    whole = walk(control, measured, start=start, sign=sign)
    for k in (1, 4, 13, 21, 30):
        state = replace(control.initial(start, sign=sign), **json.loads(json.dumps(asdict(whole[k - 1]))))
        assert state == whole[k - 1]
        for value, expected in zip(measured[k:], whole[k:], strict=True):
            state = control.update(state, value, 64)
            assert state == expected


@every_control
def test_a_measurement_that_is_not_finite_changes_nothing_but_its_count(control, start, sign):
    values = noise(3, 15)
    clean = walk(control, values, start=start, sign=sign)[-1]
    broken = [NAN, *values[:1], INF, -INF, *values[1:9], NAN, *values[9:]]
    state = walk(control, broken, start=start, sign=sign)[-1]
    assert state == replace(clean, num_nonfinite=4)
    assert control.metrics(state) == control.metrics(clean) | {"nonfinite": 4}
    before = control.metrics(control.update(control.initial(start, sign=sign), NAN, 64))
    assert "measured" not in before
    assert before["coef"] == start


@pytest.mark.parametrize("name", [name for name in CONTROLS if name != "proportional"])
def test_a_coefficient_never_leaves_its_bounds(name):
    control, start, sign = CONTROLS[name]
    for seed in range(200):
        states = walk(control, noise(seed, 40, scale=10.0 ** (seed % 5 - 1)), start=start, sign=sign)
        assert all(control.low <= state.coef <= control.high for state in states)
        assert all(control.lowest(start) <= state.coef for state in states)


def test_the_lowest_coefficient_is_what_the_controller_comes_down_to():
    """0 for one that switches off, whatever its bounds; above 0, without a bound, for one that multiplies."""
    assert PID(target=0.3, low=0.25, high=0.5).lowest(0.3) == 0.25
    skywork = Skywork(target=0.3, low=0.001)
    (off,) = walk(skywork, [0.9], start=0.002, sign=1)
    assert off.coef == skywork.lowest(0.002) == 0.0
    proportional = Proportional(target=0.1, horizon=13.0)  # by a factor of almost 0 in every step
    assert 0 < proportional.lowest(0.05) < walk(proportional, [0.0] * 20, start=0.05, sign=-1)[-1].coef < 1e-30


def lagging_entropy(control, *, start, num_steps):
    """A plant: entropy goes a tenth of the way to .2 + 20 * coef in each step, from .2."""
    state, entropy = control.initial(start, sign=1), 0.2
    seen = []
    for _ in range(num_steps):
        entropy = 0.9 * entropy + 0.1 * (0.2 + 20 * state.coef)
        state = control.update(state, entropy, 64)
        seen.append(entropy)
    return seen


def test_pid_settles_at_its_target_where_a_fixed_coefficient_does_not():
    seen = lagging_entropy(PID(target=0.4, warmup_updates=0), start=0.0, num_steps=400)
    assert abs(seen[-1] - 0.4) < 0.01  # the gains as they come
    assert all(abs(entropy - 0.4) < 0.04 for entropy in seen[200:])  # within 10 % and staying there
    assert max(seen) < 0.6  # no wild overshoot on the way
    fixed = lagging_entropy(Fixed(), start=0.005, num_steps=400)
    assert abs(fixed[-1] - 0.3) < 1e-6  # a coefficient of half the right size ends half way, 25 % off


def test_log_pid_holds_a_kl_at_its_budget_while_the_policy_is_pushed_away():
    # KL drifts up by a push and is pulled back in proportion to the coefficient: it rests where .01 = coef * KL.
    state, kl, seen = LogPID(target=0.1).initial(0.02, sign=-1), 0.0, []
    for _ in range(300):
        kl += 0.01 - state.coef * kl
        state = LogPID(target=0.1).update(state, kl, 64)
        seen.append(kl)
    assert all(abs(kl - 0.1) < 0.01 for kl in seen[150:])
    assert state.coef == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (PID, {"target": NAN}, "target=nan: .* write a finite number"),
        (PID, {"kp": -0.1}, "kp=-0.1: a gain is finite, 0 or more"),
        (PID, {"smoothing": 1.0}, r"smoothing=1.0: is the share of the old value; write a value in \[0, 1\)"),
        (PID, {"max_error": 0.0}, "max_error=0.0: write a value above 0"),
        (PID, {"target": 0.0, "scale": None}, "scale=null: the error would be divided by 0.0; write a finite value above 0"),
        (PID, {"warmup_updates": -1}, "warmup_updates=-1: write a number of updates, or 0"),
        (PID, {"low": 0.1}, "low=0.1, high=0.02: write finite bounds, the lower one first"),
        (LogPID, {"low": 0.0}, "low=0.0: the coefficient moves by factors, and 0 would hold it; write more than 0"),
        (LogDualAscent, {"low": 0.0}, "low=0.0: the coefficient moves by factors"),
        (DualAscent, {"smoothing": -0.1}, r"smoothing=-0.1: is the share of the old value; write a value in \[0, 1\)"),
        (LogDualAscent, {"warmup_updates": -2}, "warmup_updates=-2: write a number of updates, or 0"),
        (DualAscent, {"learning_rate": -1.0}, "learning_rate=-1.0: write a finite value, 0 or more"),
        (Skywork, {"step": -1.0}, "step=-1.0: write 0 or more"),
        (Proportional, {"target": 0.0}, "target=0.0: the measurement is divided by it; write a finite value above 0"),
        (Proportional, {"horizon": 0.0}, "horizon=0.0: write a finite value above 0"),
        (Doubling, {"target": -1.0}, "target=-1.0: the measurement is divided by it"),
        (Doubling, {"tolerance": 0.5}, "tolerance=0.5: is a factor around the target, write 1 or more"),
    ],
)
def test_settings_that_make_no_sense_say_what_to_write(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        kind(**{"target": 0.1} | settings)


@pytest.mark.parametrize("kind", [PID, LogPID, Skywork, Doubling, DualAscent, LogDualAscent])
def test_a_term_that_starts_outside_the_bounds_is_refused(kind):
    control = kind(target=0.1)
    control.check(coef=control.high, num_sequences=64)
    with pytest.raises(ConfigError, match=r"^coef=200.0: a start outside of low=.* and high=.*; move the start or a bound"):
        control.check(coef=200.0, num_sequences=64)
