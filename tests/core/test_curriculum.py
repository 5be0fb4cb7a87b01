import json
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pytest

from rlkit.core.curriculum import Curriculum, CurriculumState, NoCurriculum, PassRate, Picked
from rlkit.errors import ConfigError

SOLVED, FAILED = [1.0] * 4, [0.0] * 4


def visited(rule: PassRate, *rewards: list[float], state: CurriculumState | None = None, name: str = "a") -> CurriculumState:
    state = rule.initial() if state is None else state
    for found in rewards:
        state = rule.update(state, [(name, found)])
    return state


def places(
    rule: Curriculum, state: CurriculumState, *, id_at: Callable[[int], str] = str, start=0, count=10, skipped=0, seed=0
) -> Picked:
    return rule.pick(state, id_at, start=start, count=count, skipped=skipped, seed=seed)


def test_the_pass_rate_is_an_exponential_mean_over_visits():
    rule = PassRate(smoothing=0.75, right_from=0.5)
    state = visited(rule, [1.0, 0.5, 0.4, 0.0])
    assert state.pass_rates == {"a": 0.5}
    state = visited(rule, SOLVED, state=state)
    assert state.pass_rates == {"a": 0.75 * 0.5 + 0.25}
    assert visited(rule, [], state=state) == state  # no response had a reward
    twice = rule.update(state, [("a", FAILED), ("b", [1.0, 0.0]), ("a", FAILED)])
    assert twice.pass_rates == {"a": 0.75 * 0.75 * 0.625, "b": 0.5}
    assert state.pass_rates == {"a": 0.625}  # the state before is as it was


def test_the_probability_of_a_draw_falls_with_the_distance_from_the_target():
    rule = PassRate(target=0.25, min_accept=0.1)
    found = [rule.accept(rate) for rate in (None, 0.25, 0.0, 0.625, 0.95, 1.0)]
    assert found == pytest.approx([1.0, 1.0, 1 - 0.25 / 0.75, 0.5, 0.1, 0.1])
    assert PassRate(min_accept=1).accept(0.0) == 1.0


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.75])
def test_places_are_drawn_as_often_as_that(rate):
    rule = PassRate()
    known = CurriculumState(pass_rates={"p": rate})
    picked = places(rule, known, id_at=lambda place: "p", count=2000)
    assert 2000 / picked.num_places == pytest.approx(rule.accept(rate), abs=0.03)
    assert picked.num_difficulty == picked.num_places - 2000
    assert picked.state == known


def test_a_draw_is_a_function_of_seed_place_and_state():
    rule, known = PassRate(), CurriculumState(pass_rates={str(place): place % 11 / 10 for place in range(500)})
    whole = places(rule, known, count=60)
    assert places(rule, known, count=60) == whole
    first = places(rule, known, count=25)
    rest = places(rule, known, start=first.num_places, count=35)
    assert first.places + rest.places == whole.places
    assert first.num_places + rest.num_places == whole.num_places
    assert places(rule, known, count=60, seed=1).places != whole.places


def test_prompts_that_were_never_visited_are_always_drawn():
    assert places(PassRate(), CurriculumState(), start=7).places == [*range(7, 17)]


def test_a_prompt_that_was_solved_often_enough_in_a_row_retires_and_a_forgotten_one_is_back():
    rule = PassRate(retire_after=2, retire_from=0.9, smoothing=0.5)
    once = visited(rule, SOLVED)
    assert not rule.is_retired(once, "a")
    assert not rule.is_retired(visited(rule, SOLVED, FAILED, SOLVED), "a")
    twice = visited(rule, SOLVED, state=once)
    assert rule.is_retired(twice, "a")
    assert rule.is_retired(visited(rule, SOLVED, state=twice), "a")
    assert not rule.is_retired(visited(rule, [1.0, 1.0, 1.0, 0.0], state=twice), "a")  # 0.875
    assert not rule.is_retired(visited(PassRate(retire_from=1.1), *[SOLVED] * 9), "a")


def test_a_retired_prompt_is_revisited_at_every_so_manieth_time_that_the_order_reaches_it():
    rule = PassRate(revisit_every=3)
    state = visited(rule, SOLVED, SOLVED, name="0")
    drawn = []
    for epoch in range(7):  # two prompts; the other one was never visited
        picked = places(rule, state, id_at=lambda place: str(place % 2), start=2 * epoch, count=1)
        drawn.append(picked.places == [2 * epoch])
        assert picked.num_retired == 1 - drawn[-1]
        state = rule.update(picked.state, [("0", SOLVED)] if drawn[-1] else [])
    assert drawn == [False, False, True, False, False, True, False]
    assert state.passed_over == {"0": 1}
    never = places(PassRate(revisit_every=0), visited(rule, SOLVED, SOLVED, name="0"), id_at=lambda place: str(place % 2), count=9)
    assert never.places == [*range(1, 18, 2)]


def test_the_search_ends_at_its_budget():
    rule = PassRate(max_skipped=20, revisit_every=0)
    state = visited(rule, SOLVED, SOLVED)
    assert places(rule, state, id_at=lambda place: "a").num_places == 20
    assert places(rule, state, id_at=lambda place: "a", skipped=15).num_retired == 5


def test_what_is_known_survives_a_checkpoint_bit_for_bit():
    rule = PassRate(smoothing=1 / 3)
    state = visited(rule, SOLVED, SOLVED, state=visited(rule, [1.0, 0.0, 0.0], name="b"))
    state = places(rule, state, id_at=lambda place: "a", count=1).state
    again = CurriculumState(**json.loads(json.dumps(asdict(state))))
    assert again == state
    assert places(rule, again) == places(rule, state)


def test_without_a_curriculum_places_follow_each_other_and_nobody_is_asked_for_an_id():
    def nobody(place):
        raise AssertionError

    picked = places(NoCurriculum(), CurriculumState(), id_at=nobody, start=5, count=3)
    assert (picked.places, picked.num_places) == ([5, 6, 7], 3)
    assert NoCurriculum().update(CurriculumState(), [("a", SOLVED)]) == CurriculumState()
    assert NoCurriculum().metrics(CurriculumState()) == {}


def test_on_a_toy_problem_moderate_prompts_are_drawn_most_and_solved_ones_retire():
    """30 prompts in an order that repeats: ten are never solved, ten half of the time, ten always, each in 8 responses."""
    rng, rule, state = np.random.default_rng(0), PassRate(), CurriculumState()
    skills, drawn, place = {str(i): (0.0, 0.5, 1.0)[i % 3] for i in range(30)}, {0.0: 0, 0.5: 0, 1.0: 0}, 0
    for _ in range(100):
        picked = places(rule, state, id_at=lambda place: str(place % 30), start=place, count=6)
        place += picked.num_places
        names = [str(each % 30) for each in picked.places]
        for name in names:
            drawn[skills[name]] += 1
        state = rule.update(picked.state, [(name, (rng.random(8) < skills[name]).astype(float).tolist()) for name in names])
    assert drawn[0.5] > 3 * drawn[0.0] > 0
    assert drawn[0.5] > 3 * drawn[1.0] > 0
    assert {name for name in skills if rule.is_retired(state, name)} == {name for name, skill in skills.items() if skill == 1.0}
    assert rule.metrics(state)["retired"] == 10
    assert rule.metrics(state)["visited"] == 30
    skills |= dict.fromkeys(skills, 0.0)  # all is forgotten: retired prompts are found out when they are revisited
    for _ in range(200):
        picked = places(rule, state, id_at=lambda place: str(place % 30), start=place, count=6)
        place += picked.num_places
        state = rule.update(picked.state, [(str(each % 30), [0.0] * 8) for each in picked.places])
    assert rule.metrics(state)["retired"] == 0


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"target": 1.5}, "write a number in"),
        ({"smoothing": -0.1}, "write a number in"),
        ({"smoothing": 1.0}, "Write less"),
        ({"min_accept": 0.0}, "never measured again. Write"),
        ({"retire_from": 0.0}, "Write a number above 0"),
        ({"retire_after": 0}, "write 1 or more"),
        ({"revisit_every": -1}, "write 0 or more"),
        ({"max_skipped": 0}, "write 1 or more"),
    ],
    ids=str,
)
def test_an_impossible_setting_is_refused_by_name(settings, fix):
    with pytest.raises(ConfigError, match=rf"^curriculum\.{next(iter(settings))}=.*{fix}"):
        PassRate(**settings)
