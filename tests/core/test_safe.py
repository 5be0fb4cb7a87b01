import json
import random
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from rlkit.core.divergences import ReverseKL
from rlkit.core.reduce import Aggregation, Denominators, reduce
from rlkit.core.safe import WINDOW, Asymmetric, EntropyGated, KLMode, NoSafeguard, Phase, phase_of
from rlkit.errors import ConfigError

NAN, INF = float("nan"), float("inf")
STILL: dict[str, Any] = {"kp": 0.0, "ki": 0.0, "kd": 0.0}  # the reward does not move the threshold
GUARDS = {"entropy_gated": EntropyGated(), "asymmetric": Asymmetric(threshold=0.1)}
every_guard = pytest.mark.parametrize("guard", list(GUARDS.values()), ids=list(GUARDS))


def walk(guard, kls, *, entropy=1.0, rewards=None):
    """The state after each batch."""
    state, states = guard.initial(), []
    for k, kl in enumerate(kls):
        state = guard.update(state, kl=kl, entropy=entropy, reward=0.5 if rewards is None else rewards[k])
        states.append(state)
    return states


def noise(seed, n):
    """Batches of (kl, entropy, reward)."""
    generator = random.Random(seed)
    return [(generator.gauss(0.3, 0.5), generator.uniform(0.05, 3.0), generator.random()) for _ in range(n)]


def test_the_threshold_gains_what_the_rewards_velocity_says():
    guard = EntropyGated()
    states = walk(guard, [0.0] * 4, rewards=[0.5, 0.6, 0.6, 0.4])
    # Second batch: running mean .5 -> .505, error .005 - .001, so .3 * .004 + .01 * .004 + .05 * .004.
    assert [state.pid for state in states] == pytest.approx([0, 0.00144, 0.00119, -0.0024455], abs=1e-12)
    assert [state.velocity for state in states] == pytest.approx([0, 0.005, 0.00475, -0.0054875], abs=1e-12)
    assert [state.threshold for state in states] == pytest.approx([1.5 * (0.3 + state.pid) for state in states])


def test_the_penalty_waits_until_the_average_kl_is_above_the_threshold():
    states = walk(EntropyGated(**STILL), [1.0] * 8)
    assert [state.penalty for state in states[:5]] == [0.0] * 5
    assert states[4].kl == pytest.approx(0.40951)  # 1 - .9^5, below 1.5 * .3
    assert [state.kl for state in states[5:]] == pytest.approx([0.468559, 0.521703, 0.569533], abs=5e-7)
    assert [state.penalty for state in states[5:]] == pytest.approx([6.26248e-5, 9.34788e-4, 2.597834e-3], rel=1e-6)
    report = EntropyGated(**STILL).metrics(states[7])
    assert report["active_frac"] == 3 / 8
    assert report["threshold"] == pytest.approx(0.45)
    assert report["gate"] == pytest.approx(1.818182, abs=5e-7)
    assert report["kl_long"] == pytest.approx(1 - 0.99**8)
    assert report["coef"] == pytest.approx(0.043466, abs=5e-7)


@pytest.mark.parametrize(("entropy", "gate"), [(0.1, 10.0), (1.0, 1.818182), (1.9, 1.0), (3.9, 0.5), (8.0, 0.5)])
def test_the_gate_opens_as_entropy_falls(entropy, gate):
    (state,) = walk(EntropyGated(), [0.0], entropy=entropy)
    assert state.gate == pytest.approx(gate, abs=5e-7)


def test_phases_follow_the_rewards():
    low, high = (0.5,) * WINDOW, (0.9,) * WINDOW
    assert phase_of(low[1:]) is Phase.warmup
    assert phase_of(low) is Phase.plateau
    assert phase_of(high) is Phase.converged
    assert phase_of((*low, *high[1:])) is Phase.plateau  # 99: no older window yet, and the rewards vary too much
    assert phase_of((*low, *high)) is Phase.climbing
    assert phase_of((*high, *low)) is Phase.plateau
    assert phase_of((*high, *high)) is Phase.converged
    assert phase_of((*high, *(0.95, 0.85) * (WINDOW // 2))) is Phase.plateau  # a standard deviation of .05
    assert phase_of((*high, *(0.915, 0.905) * (WINDOW // 2))) is Phase.converged  # no more than .01 above: .91


def test_a_phase_moves_the_threshold():
    states = walk(EntropyGated(**STILL), [0.0] * 250, rewards=[0.5] * 60 + [0.9] * 190)
    assert states[48].threshold == pytest.approx(1.5 * 0.3)
    assert states[49].threshold == pytest.approx(0.8 * 0.3)  # a plateau at .5
    assert states[105].threshold == pytest.approx(1.2 * 0.3)
    assert states[249].threshold == pytest.approx(0.3)  # converged
    assert [state.phase for state in (states[48], states[49], states[105], states[249])] == [0, 2, 1, 3]
    assert len(states[-1].rewards) == 2 * WINDOW


def test_the_threshold_stays_within_its_bounds_whatever_the_rewards_do():
    generator = random.Random(0)
    states = walk(EntropyGated(), [0.0] * 300, rewards=[generator.gauss(0.0, 100.0) for _ in range(300)])
    thresholds = {state.threshold for state in states}
    assert min(thresholds) == 0.1
    assert max(thresholds) == 0.6
    assert all(-1.0 <= state.integral <= 1.0 for state in states)


def test_the_asymmetric_penalty_is_about_the_level_and_about_a_climb():
    guard = Asymmetric()
    states = walk(guard, [0.1] * 49 + [0.6, 0.1])
    assert [state.penalty for state in states[:49]] == [0.0] * 49
    # .1 * (.6 - .3)^2 + 5 * ((.6 - .1) / 50)^2
    assert states[49].penalty == pytest.approx(0.009 + 0.0005)
    assert states[50].penalty == 0.0
    assert guard.coef(states[49]) == pytest.approx(0.2 * 0.3 + 2 * 5 * 0.01 / 50)
    early = walk(guard, [0.1] * 48 + [0.6])[-1]  # 49 batches: no trend yet
    assert early.penalty == pytest.approx(0.009)
    falling = walk(guard, [0.29] * 49 + [0.1])[-1]
    assert falling.penalty == 0.0
    assert guard.metrics(falling)["kl_trend"] == pytest.approx(-0.19 / 50)


@every_guard
def test_the_linear_coefficient_is_the_penaltys_slope_at_the_measured_kl(guard):
    found = []
    for seed in range(5):
        state = guard.initial()
        for kl, entropy, reward in noise(seed, 70):
            state = guard.update(state, kl=kl + 0.4, entropy=entropy, reward=reward)
            at = torch.tensor(state.kl, dtype=torch.float64, requires_grad=True)
            (slope,) = torch.autograd.grad(guard.penalty(state, at), at)
            assert guard.coef(state) == pytest.approx(slope.item(), rel=1e-9, abs=1e-15)
            found.append(slope.item())
    assert min(found) == 0.0 < max(found)


def kl_of(batch, logprobs):
    """The differentiable KL of the whole batch: k3's value with the gradient of k2, mean over tokens."""
    log_ratio = (logprobs - batch.ref_logprobs).masked_fill(~batch.response_mask, 0.0)
    k2, k3 = log_ratio.square() / 2, ReverseKL().value(log_ratio)
    denominators = Denominators.count(batch.response_mask, max_response_tokens=4)
    loss = (k2 + (k3 - k2).detach()).masked_fill(~batch.response_mask, NAN)
    return reduce(loss, batch.response_mask, aggregation=Aggregation.token_mean, denominators=denominators)


def test_linearised_adds_a_multiple_of_the_kl_and_nothing_below_the_threshold(f1):
    guard = EntropyGated(**STILL)
    states = walk(guard, [1.0] * 8)
    kl = kl_of(f1, f1.logprobs)
    loss = guard.loss(states[7], kl)
    assert kl.item() == pytest.approx(0.052110, abs=5e-7)
    assert loss.item() == pytest.approx(0.043466 * 0.052110, abs=1e-7)
    (gradient,) = torch.autograd.grad(loss, f1.logprobs)
    # k2's gradient in a log-probability is the log-ratio to the reference: d + kref, over ten tokens.
    log_ratio = (f1.logprobs - f1.ref_logprobs).detach().masked_fill(~f1.response_mask, 0.0)
    torch.testing.assert_close(gradient, guard.coef(states[7]) * log_ratio / 10, atol=1e-15, rtol=1e-12)
    assert (gradient[~f1.response_mask] == 0).all()
    quiet = guard.loss(states[4], kl_of(f1, f1.logprobs))
    assert quiet.item() == 0.0
    assert guard.coef(states[4]) == 0.0
    assert (torch.autograd.grad(quiet, f1.logprobs)[0] == 0).all()


@every_guard
def test_direct_penalises_the_present_kl_and_its_gradient_matches_finite_differences(guard):
    guard = replace(guard, kl_mode=KLMode.direct)
    state = walk(guard, [0.2] * 60)[-1]
    kl = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: guard.loss(state, x), (kl,))
    assert guard.coef(state) == 0.0
    low = torch.tensor(0.05, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.grad(guard.loss(state, low), low)[0] == 0.0


def test_direct_and_linearised_agree_at_the_kl_that_was_measured():
    guard = EntropyGated(**STILL)
    state = walk(guard, [1.0] * 8)[-1]
    at = torch.tensor(state.kl, dtype=torch.float64, requires_grad=True)
    slopes = [
        torch.autograd.grad(replace(guard, kl_mode=mode).loss(state, at), at)[0] for mode in (KLMode.direct, KLMode.linearised)
    ]
    torch.testing.assert_close(*slopes)
    assert replace(guard, kl_mode=KLMode.direct).loss(state, at).item() == pytest.approx(state.penalty)


def test_literal_shifts_the_loss_without_a_gradient():
    guard = EntropyGated(kl_mode=KLMode.literal, **STILL)
    state = walk(guard, [1.0] * 8)[-1]
    kl = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    loss = guard.loss(state, kl)
    assert loss.item() == pytest.approx(2.597834e-3, rel=1e-6)
    assert not loss.requires_grad
    assert guard.coef(state) == 0.0


@every_guard
def test_a_run_resumed_at_any_batch_goes_on_bit_for_bit(guard):
    batches = noise(7, 130)
    state, whole = guard.initial(), []
    for kl, entropy, reward in batches:
        state = guard.update(state, kl=kl, entropy=entropy, reward=reward)
        whole.append(state)
    for k in (1, 30, 51, 101):
        state = type(state)(**json.loads(json.dumps(asdict(whole[k - 1]))))
        assert state == whole[k - 1]
        state = replace(guard.initial(), **json.loads(json.dumps(asdict(whole[k - 1]))))
        for (kl, entropy, reward), expected in zip(batches[k:], whole[k:], strict=True):
            state = guard.update(state, kl=kl, entropy=entropy, reward=reward)
            assert state == expected


@every_guard
@pytest.mark.parametrize("broken", ["kl", "entropy", "reward"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_measurement_that_is_not_finite_changes_nothing_but_its_count(guard, broken, value):
    state = walk(guard, [0.5] * 60)[-1]
    measured = {"kl": 0.5, "entropy": 1.0, "reward": 0.5} | {broken: value}
    assert guard.update(state, **measured) == replace(state, num_nonfinite=1)
    assert guard.metrics(replace(state, num_nonfinite=1)) == guard.metrics(state) | {"nonfinite": 1}


def test_no_safeguard_adds_nothing():
    guard = NoSafeguard()
    state = guard.initial()
    assert guard.update(state, kl=9.0, entropy=0.0, reward=NAN) == state
    assert guard.loss(state, torch.tensor(9.0)) is None
    assert guard.coef(state) == 0.0
    assert guard.metrics(state) == {}
    assert not guard.needs


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (EntropyGated, {"penalty_coef": -1.0}, "safeguard.penalty_coef=-1.0: write a finite value, 0 or more"),
        (EntropyGated, {"kp": INF}, "safeguard.kp=inf: write a finite value, 0 or more"),
        (EntropyGated, {"low": 0.7}, "safeguard.low=0.7, safeguard.high=0.6: write bounds above 0, the lower one first"),
        (EntropyGated, {"base_threshold": NAN}, "safeguard.base_threshold=nan: write a finite number"),
        (Asymmetric, {"trend_coef": -1.0}, "safeguard.trend_coef=-1.0: write a finite value, 0 or more"),
    ],
)
def test_settings_that_make_no_sense_say_what_to_write(kind, settings, message):
    with pytest.raises(ConfigError, match=message):
        kind(**settings)
