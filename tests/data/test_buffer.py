import json
from dataclasses import replace

import numpy as np
import pytest

from rlkit.core.replay import BufferReplay, StoredReplay, ZeroVarianceReplay
from rlkit.data.buffer import ReplayBuffer


@pytest.fixture
def group(make_rollout):
    """A function (number, version, size) -> the rollouts of a group."""

    def build(number: int, *, version: int = 0, size: int = 2):
        made = [make_rollout(index, [5, 6], [7, 8, 9]) for index in range(size)]
        return [
            replace(each, sample_id=f"{number}/{i}", group_id=str(number), policy_version=np.full(3, version))
            for i, each in enumerate(made)
        ]

    return build


def buffer_of(settings: StoredReplay, groups, scores=None) -> ReplayBuffer:
    buffer = ReplayBuffer(settings=settings, seed=3, uses_per_batch=1)
    for index, members in enumerate(groups):
        buffer.add(members, [1.0 if scores is None else scores[index]] * len(members))
    return buffer


def names(rollouts) -> list[str]:
    return list(dict.fromkeys(rollout.group_id for rollout in rollouts))


def stored(buffer: ReplayBuffer) -> list[str]:
    return [group.rollouts[0].group_id for group in buffer.groups]


def test_whole_groups_are_drawn_each_once_and_the_same_again(group):
    groups = [group(number, size=2 + number % 2) for number in range(8)]
    drawn = [buffer_of(BufferReplay(), groups).draw(3, step=5, version=1) for _ in range(2)]
    assert [each.sample_id for each in drawn[0]] == [each.sample_id for each in drawn[1]]
    assert len(names(drawn[0])) == 3
    for name in names(drawn[0]):
        assert [each.sample_id for each in drawn[0] if each.group_id == name] == [r.sample_id for r in groups[int(name)]]
    others = [names(buffer_of(BufferReplay(), groups).draw(3, step=step, version=1)) for step in range(20)]
    assert {name for found in others for name in found} == {str(number) for number in range(8)}


def test_a_group_goes_when_its_oldest_token_is_too_old(group):
    buffer = buffer_of(BufferReplay(max_age=2), [group(0, version=0), group(1, version=1), group(2, version=2)])
    late = replace(buffer.groups[2].rollouts[0], policy_version=np.array([0, 2, 2]))
    buffer.groups[2] = replace(buffer.groups[2], rollouts=(late, *buffer.groups[2].rollouts[1:]))
    buffer.drop(2)
    assert stored(buffer) == ["0", "1", "2"]
    assert buffer.ages(2).tolist() == [2, 1, 2]
    buffer.drop(3)
    assert stored(buffer) == ["1"]


def test_a_group_goes_when_it_was_used_up(group):
    buffer = ReplayBuffer(settings=BufferReplay(max_uses=5), seed=0, uses_per_batch=2)  # fresh 2, replayed once: 4
    buffer.add(group(0), [1.0, 1.0])
    assert [each.num_uses for each in buffer.groups[0].rollouts] == [2, 2]
    assert names(buffer.draw(1, step=1, version=0)) == ["0"]
    assert buffer.groups[0].num_uses == 4
    assert buffer.draw(1, step=2, version=0) == []
    assert buffer.groups == []


def test_a_full_buffer_gives_up_the_oldest_or_the_lowest_score(group):
    groups = [group(number) for number in range(5)]
    scores = [3.0, 1.0, 2.0, 1.0, 2.0]
    assert stored(buffer_of(BufferReplay(max_groups=3), groups, scores)) == ["2", "3", "4"]
    assert stored(buffer_of(ZeroVarianceReplay(max_groups=3), groups, scores)) == ["0", "2", "4"]
    assert stored(buffer_of(ZeroVarianceReplay(max_groups=2), groups, [1.0] * 5)) == ["3", "4"]  # equal scores compare no rollouts


def test_where_fewer_are_stored_than_wanted_a_group_comes_again_under_another_name(group):
    once = buffer_of(BufferReplay(), [group(0), group(1)]).draw(5, step=1, version=0)
    assert sorted(names(once)) == ["0", "1"]
    buffer = buffer_of(ZeroVarianceReplay(), [group(0), group(1)], [3.0, 1.0])
    again = buffer.draw(9, step=1, version=0)
    assert len(names(again)) == 9
    assert len({each.sample_id for each in again}) == len(again) == 18
    assert {name.split("/")[0] for name in names(again)} <= {"0", "1"}
    assert sum(each.num_uses - 1 for each in buffer.groups) == 9
    assert len(names(buffer_of(ZeroVarianceReplay(), [group(0), group(1)], [3.0, 0.0]).draw(2, step=1, version=0))) == 2


def test_a_group_of_score_0_is_never_drawn_by_score(group):
    buffer = buffer_of(BufferReplay(score_power=1.0), [group(0), group(1)], [0.0, 2.0])
    assert names(buffer.draw(2, step=1, version=0)) == ["1"]


def test_what_is_saved_goes_on_as_if_nothing_had_happened(group):
    buffer = buffer_of(ZeroVarianceReplay(max_groups=4), [group(number) for number in range(6)], [0.1, 0.5, 0.3, 0.3, 0.3, 0.7])
    buffer.draw(2, step=1, version=1)
    rollouts, beside = buffer.state()
    again = ReplayBuffer(settings=buffer.settings, seed=3, uses_per_batch=1)
    again.restore(rollouts, json.loads(json.dumps(beside)))
    assert again.state()[1] == beside
    for each in (buffer, again):
        each.add(group(9), [0.3, 0.3])
    first, second = (names(each.draw(3, step=2, version=1)) for each in (buffer, again))
    assert first == second
    assert stored(buffer) == stored(again)
    empty = ReplayBuffer(settings=buffer.settings, seed=3, uses_per_batch=1)
    empty.restore(*empty.state())
    assert empty.groups == []
    assert empty.draw(3, step=1, version=0) == []
