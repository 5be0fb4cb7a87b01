"""What the controller remembers between steps: here, the numbers that controllers move."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rlkit.compose import compose
from rlkit.config import RunConfig
from rlkit.controller.progress import Coefficients, Progress
from rlkit.core.divergences import FDivergence
from rlkit.core.feedback import PID, LogDualAscent
from rlkit.metrics import Mean, Metric

KL = ["divergence=reverse_kl", "divergence.coef=0.04"]
CONTROLLED = [
    *("entropy=bonus", "entropy.coef=0.01", "control=pid", "control.target=0.5", "control.warmup_updates=0"),
    *(*KL, "divergence_control=dual_log", "divergence_control.target=0.1", "divergence_control.smoothing=0.9"),
    *("threshold_control=pid", "threshold_control.target=0.4", "threshold_control.warmup_updates=0"),
    *("threshold_control.low=0.1", "threshold_control.high=0.5", "optimizer_steps_per_batch=2"),
]


def measured(entropy: float, kl: float) -> dict[str, Metric]:
    return {"entropy/mean": Mean(4 * entropy, 4.0), "kl/ref_token_mean": Mean(8 * kl, 8.0)}


def numbers(coefficients: Coefficients, config: RunConfig) -> dict[str, float | None]:
    return {term: coefficients.of(term, config) for term in ("entropy", "divergence", "threshold")}


def test_each_number_is_moved_by_a_controller_of_its_own():
    config = compose(CONTROLLED)
    start = Coefficients.start(config)
    assert numbers(start, config) == {"entropy": 0.01, "divergence": 0.04, "threshold": 0.2}
    moved = numbers(start.update(config, measured(entropy=0.45, kl=0.3), 8), config)
    # One update each. Entropy is .05 below the bonus's target and .05 above the threshold's; the KL is .2 over its budget.
    assert moved["entropy"] == pytest.approx(0.01 + (0.02 + 0.005) * 0.05)
    assert moved["threshold"] == pytest.approx(0.2 - (0.02 + 0.005) * 0.05)
    assert moved["divergence"] == pytest.approx(0.04 * 1.0202013)  # exp(.1 * .2)
    within = numbers(start.update(config, measured(entropy=0.5, kl=0.1), 8), config)
    assert within["entropy"] == 0.01
    assert within["divergence"] == 0.04
    assert moved["threshold"] != within["threshold"]


def test_what_they_did_is_logged_on_the_same_axes():
    config = compose(CONTROLLED)
    report = Coefficients.start(config).update(config, measured(entropy=0.45, kl=0.3), 8).metrics(config)
    for term, setpoint, error in (("entropy", 0.5, 0.05), ("divergence", 0.1, 0.2), ("threshold", 0.4, -0.05)):
        mine = {name.removeprefix(f"ctrl/{term}/"): value for name, value in report.items() if f"/{term}/" in name}
        assert mine["setpoint"] == setpoint
        assert mine["error"] == pytest.approx(error)
        assert mine["action"] * error > 0  # each raises what it moves where the error is above 0
        assert (mine["saturated"], mine["nonfinite"]) == (0, 0)
        assert mine.keys() >= {"coef", "measured", "measured_ema"}


def test_what_is_fixed_stays_at_its_setting_and_is_neither_measured_nor_logged_nor_remembered():
    config = compose(KL)
    coefficients = Coefficients.start(config).update(config, {}, 8)
    assert numbers(coefficients, config) == {"entropy": None, "divergence": 0.04, "threshold": 0.2}
    assert coefficients.metrics(config) == {}
    assert Progress.start(config).to_json("")["coefficients"] == {}
    assert numbers(coefficients, compose(["objective=reinforce"])) == dict.fromkeys(("entropy", "divergence", "threshold"))
    assert isinstance(config.divergence, FDivergence)
    resumed = replace(config, divergence=replace(config.divergence, coef=0.5))  # a setting that a resumed run was given
    progress = Progress.from_json(json.loads(json.dumps(Progress.start(config).to_json("f"))), resumed, "f")
    assert progress.divergence_coef(resumed) == 0.5


def test_all_of_them_go_on_from_a_checkpoint_bit_for_bit():
    config = compose(CONTROLLED)
    progress, seen = Progress.start(config), [(0.45, 0.3), (0.7, 0.0), (0.1, float("nan")), (0.3, 0.15), (0.31, 0.11)]
    for entropy, kl in seen[:3]:
        progress.coefficients = progress.coefficients.update(config, measured(entropy, kl), 8)
    again = Progress.from_json(json.loads(json.dumps(progress.to_json("f"))), config, "f")
    assert again.coefficients == progress.coefficients != Progress.start(config).coefficients
    for entropy, kl in seen[3:]:
        progress.coefficients, again.coefficients = (
            each.coefficients.update(config, measured(entropy, kl), 8) for each in (progress, again)
        )
        assert again.coefficients == progress.coefficients
    assert progress.coefficients.states["divergence"].num_nonfinite == 1


def test_what_is_known_of_the_prompts_goes_on_too_and_a_checkpoint_without_it_is_read():
    config = compose(["curriculum=pass_rate", "curriculum.smoothing=0.3"])
    progress = Progress.start(config)
    for rewards in ([1.0, 0.0, 0.0], [1.0, 1.0, 0.0]):
        progress.curriculum = config.curriculum.update(progress.curriculum, [("a", rewards), ("b", [1.0])])
    stored = json.loads(json.dumps(progress.to_json("f")))
    assert Progress.from_json(stored, config, "f").curriculum == progress.curriculum
    assert progress.curriculum.pass_rates["a"] == 0.3 * (1 / 3) + 0.7 * (2 / 3)
    del stored["curriculum"]
    assert Progress.from_json(stored, config, "f").curriculum == config.curriculum.initial()


def test_a_controllers_group_says_what_it_moves():
    config = compose(CONTROLLED)
    assert isinstance(config.controlled["entropy"].control, PID)
    assert isinstance(config.controlled["divergence"].control, LogDualAscent)
    for moved in config.controlled.values():
        assert getattr(config, moved.group) is moved.control
        group, _, name = moved.key.partition(".")
        assert getattr(getattr(config, group), name) == moved.start


def test_a_step_that_trained_on_no_token_moves_nothing():
    config = compose(CONTROLLED)
    start = Coefficients.start(config)
    after = start.update(config, {}, 8)
    assert numbers(after, config) == numbers(start, config)
    assert after.metrics(config)["ctrl/entropy/nonfinite"] == 1
