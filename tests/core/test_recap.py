import json
import math
from dataclasses import asdict, replace

import pytest

from rlkit.core.recap import NoObjectiveWeights, ObjectivesState, Recap, RecapCode, Reweighting, weight_entropy
from rlkit.errors import ConfigError

LOSSES = ObjectivesState(losses={"acc": [1.0, 0.8, 0.9, 0.7], "fmt": [0.5, 0.1, 0.05, 0.05]})
REWARDS = ObjectivesState(rewards={"acc": [0.2, 0.4, 0.3, 0.5], "fmt": [0.5, 0.9, 0.95, 0.95]})


def weights_of(settings: Reweighting, state: ObjectivesState, *, done: float = 0.0) -> list[float]:
    return [judged.weight for judged in settings.judge(state, done=done).values()]


@pytest.mark.parametrize(("temperature", "weights"), [(5.0, [1.077946, 0.922054]), (1.0, [1.371811, 0.628189])])
def test_the_papers_form_has_the_specs_numbers(temperature, weights):
    judged = Recap(window=2, temperature=temperature).judge(LOSSES, done=0.0)
    assert [each.convergence for each in judged.values()] == pytest.approx([0.888889, 0.166667], abs=1e-6)
    assert [each.instability for each in judged.values()] == pytest.approx([0.058824, 0.0], abs=1e-6)
    assert [each.weight for each in judged.values()] == pytest.approx(weights, abs=1e-6)


@pytest.mark.parametrize(("temperature", "weights"), [(5.0, [1.005191, 0.994809]), (1.0, [1.025938, 0.974062])])
def test_the_codes_form_has_the_specs_numbers(temperature, weights):
    judged = RecapCode(window=2, temperature=temperature).judge(REWARDS, done=0.0)
    assert [each.convergence for each in judged.values()] == pytest.approx([0.75, 0.736842], abs=1e-6)
    assert [each.instability for each in judged.values()] == pytest.approx([0.319438, 0.228783], abs=1e-6)
    assert [each.weight for each in judged.values()] == pytest.approx(weights, abs=1e-6)


def test_in_the_papers_form_a_reward_is_the_loss_it_leaves():
    as_losses = ObjectivesState(losses={name: [1 - x for x in values] for name, values in REWARDS.rewards.items()})
    assert weights_of(Recap(window=2), REWARDS) == pytest.approx(weights_of(Recap(window=2), as_losses))
    wider = ObjectivesState(rewards={name: [4 * x - 1 for x in values] for name, values in REWARDS.rewards.items()})
    scaled = Recap(window=2, reward_low=-1.0, reward_high=3.0)
    assert weights_of(scaled, wider) == pytest.approx(weights_of(Recap(window=2), REWARDS))


def test_in_the_codes_form_a_falling_loss_and_a_rising_reward_both_improve():
    settings = RecapCode(window=1)
    falls = settings.judge(ObjectivesState(losses={"x": [2.0, 1.0]}), done=0.0)["x"]
    rises = settings.judge(ObjectivesState(rewards={"x": [1.0, 2.0]}), done=0.0)["x"]
    assert falls.convergence == pytest.approx(0.5)
    assert rises.convergence == pytest.approx(0.5)


@pytest.mark.parametrize("settings", [Recap(window=3), RecapCode(window=3), RecapCode(window=3, alpha=None)], ids=str)
def test_weights_sum_to_the_number_of_objectives_and_equal_histories_weigh_1(settings):
    state = ObjectivesState(rewards={"a": [0.1, 0.7, 0.2], "b": [0.5]}, losses={"c": [3.0, 1.0, 2.0, 2.5]})
    assert sum(weights_of(settings, state, done=0.3)) == pytest.approx(3)
    equal = ObjectivesState(rewards={"a": [0.1, 0.7, 0.2, 0.3], "b": [0.1, 0.7, 0.2, 0.3]})
    assert weights_of(settings, equal) == pytest.approx([1.0, 1.0])
    warm = replace(settings, temperature=1e9)
    assert weights_of(warm, state) == pytest.approx([1.0] * 3, abs=1e-6)


@pytest.mark.parametrize("settings", [Recap(window=2), RecapCode(window=2)], ids=str)
def test_scaling_a_loss_changes_nothing(settings):
    scaled = ObjectivesState(losses={"acc": LOSSES.losses["acc"], "fmt": [100 * x for x in LOSSES.losses["fmt"]]})
    assert weights_of(settings, scaled) == pytest.approx(weights_of(settings, LOSSES))


def test_a_single_value_stands_still_and_a_few_are_cut_in_shorter_halves():
    for settings in (Recap(window=10), RecapCode(window=10)):
        one = settings.judge(ObjectivesState(rewards={"x": [0.3]}), done=0.0)["x"]
        assert (one.convergence, one.instability) == (1.0, 0.0)
    three = Recap(window=10).judge(ObjectivesState(losses={"x": [9.0, 0.8, 0.4]}), done=0.0)["x"]
    assert (three.convergence, three.instability) == (pytest.approx(0.5), 0.0)


def test_what_would_be_infinite_is_held_to_a_bound():
    never = ObjectivesState(rewards={"never": [0.5, 0.5, 0.0, 0.0], "other": [0.5, 0.5, 0.5, 0.5]})
    assert RecapCode(window=2).judge(never, done=0.0)["never"].convergence == 10.0
    solved = ObjectivesState(losses={"solved": [0.0] * 4, "lost": [0.0, 0.0, 1.0, 1.0]})
    judged = Recap(window=2).judge(solved, done=0.0)
    assert (judged["solved"].convergence, judged["solved"].instability) == (1.0, 0.0)
    assert judged["lost"].convergence == 10.0


def test_an_annealed_share_goes_from_convergence_to_instability():
    annealed, fixed = RecapCode(window=2, alpha=None), [RecapCode(window=2, alpha=alpha) for alpha in (1.0, 0.25, 0.0)]
    for done, same in zip((0.0, 0.75, 1.0), fixed, strict=True):
        assert weights_of(annealed, REWARDS, done=done) == weights_of(same, REWARDS)


def test_the_state_keeps_the_newest_values_of_what_was_there_and_survives_json():
    settings, state = Recap(window=1), Recap(window=1).initial()
    assert settings.judge(state, done=0.0) == {}
    for number in range(4):
        rewards = {"a": 0.1 * number} | ({"b": 0.5} if number == 1 else {})
        state = settings.update(state, rewards=rewards, losses={"s": math.nan if number == 3 else float(number)})
    assert state == ObjectivesState(rewards={"a": [0.2, 0.1 * 3], "b": [0.5]}, losses={"s": [1.0, 2.0]})
    assert replace(settings.initial(), **json.loads(json.dumps(asdict(state)))) == state


def test_without_a_choice_nothing_is_weighed_or_remembered():
    none = NoObjectiveWeights()
    state = none.update(none.initial(), rewards={"a": 1.0}, losses={})
    assert state == none.initial()
    assert none.judge(state, done=0.5) == {}


def test_the_entropy_of_weights_is_largest_where_all_are_1():
    assert weight_entropy([1.0, 1.0, 1.0]) == pytest.approx(math.log(3))
    assert weight_entropy([2.0, 0.0]) == 0.0


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (Recap, {"window": 0}, "objective_weights.window=0: nothing is compared. Write 1 or more; 10 is usual."),
        (RecapCode, {"temperature": 0.0}, "objective_weights.temperature=0.0: write a number above 0; 5 is usual."),
        (Recap, {"reward_high": 0.0}, "objective_weights.reward_high=0.0: not above objective_weights.reward_low=0.0"),
        (RecapCode, {"alpha": -1.0}, "objective_weights.alpha=-1.0: write a share in .0, 1., or null to anneal"),
    ],
)
def test_settings_without_a_meaning_are_refused(cls, settings, message):
    with pytest.raises(ConfigError, match=message):
        cls(**settings)
