import math
from itertools import permutations

import pytest
import torch

from rlkit.core.replay import BufferReplay, NoReplay, ZeroVarianceReplay, draw_distinct, draw_repeatedly, group_scores
from rlkit.errors import ConfigError

AGES = torch.tensor([0, 2, 4])
SCORES = torch.tensor([1.0, 4.0, 0.0])


def test_probabilities_follow_age_and_score():
    def of(**settings) -> list[float]:
        return BufferReplay(**settings).probabilities(ages=AGES, scores=SCORES).tolist()

    assert of() == pytest.approx([1 / 3] * 3)
    assert of(age_half_life=2.0) == pytest.approx([4 / 7, 2 / 7, 1 / 7])
    assert of(score_power=1.0) == pytest.approx([0.2, 0.8, 0.0])
    assert of(score_power=0.5) == pytest.approx([1 / 3, 2 / 3, 0.0])
    assert of(score_power=1.0, age_half_life=2.0) == pytest.approx([1 / 3, 2 / 3, 0.0])
    assert ZeroVarianceReplay().probabilities(ages=AGES, scores=SCORES).tolist() == pytest.approx([0.2, 0.8, 0.0])


def test_where_nothing_weighs_nothing_is_drawn():
    none = ZeroVarianceReplay().probabilities(ages=AGES, scores=torch.zeros(3))
    assert none.tolist() == [0.0, 0.0, 0.0]
    assert draw_distinct(none, torch.tensor([0.5, 0.5, 0.5]), 2) == []
    empty = BufferReplay(score_power=1.0).probabilities(ages=torch.zeros(0), scores=torch.zeros(0))
    assert draw_distinct(empty, torch.zeros(0), 3) == []


def test_a_fraction_of_all_groups_is_replayed_or_one_for_each_without_a_signal():
    assert [BufferReplay().num_groups(num_fresh=fresh, num_flat=3) for fresh in (32, 4, 1)] == [8, 1, 0]
    assert BufferReplay(fraction=0.5).num_groups(num_fresh=32, num_flat=0) == 32
    assert ZeroVarianceReplay().num_groups(num_fresh=32, num_flat=5) == 5


def test_a_groups_score_is_its_advantages_times_the_deviation_of_its_rewards():
    # Group 0: rewards 1, 0, 0: std sqrt(1/3); |A| 1, 0.5, 0.5 -> 2 * 0.57735. Group 1: equal rewards. The last row is empty.
    advantages = torch.tensor([[1.0, 1.0], [-0.5, -0.5], [-0.5, math.nan], [0.0, 0.0], [0.0, 0.0], [math.nan, math.nan]])
    mask = torch.tensor([[True, True], [True, True], [True, False], [True, True], [True, True], [False, False]])
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.3, 0.3, 9.0])
    scores, sizes = group_scores(
        advantages=advantages, response_mask=mask, rewards=rewards, group_ids=torch.tensor([0, 0, 0, 1, 1, 1])
    )
    assert scores[:5].tolist() == pytest.approx([2 / math.sqrt(3)] * 3 + [0.0, 0.0])
    assert sizes[:5].tolist() == pytest.approx([2.0] * 3 + [0.0, 0.0])


def test_draws_without_replacement_have_the_probability_of_drawing_one_after_the_other():
    """Against enumeration: P(i, then j) = p_i * p_j / (1 - p_i)."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    generator, count = torch.Generator().manual_seed(0), 20_000
    seen = dict.fromkeys(permutations(range(3), 2), 0)
    for uniforms in torch.rand(count, 3, generator=generator, dtype=torch.float64).clamp(min=1e-12):
        first, second = draw_distinct(p, uniforms, 2)
        seen[first, second] += 1
    for (i, j), times in seen.items():
        expected = float(p[i] * p[j] / (1 - p[i]))
        assert times / count == pytest.approx(expected, abs=4 * math.sqrt(expected / count))


def test_draws_with_replacement_invert_the_distribution():
    p = torch.tensor([0.25, 0.0, 0.75, 0.0], dtype=torch.float64)
    assert draw_repeatedly(p, torch.tensor([0.1, 0.24, 0.26, 0.9, 1 - 1e-16])) == [0, 0, 2, 2, 2]


def test_fewer_than_wanted_are_drawn_where_fewer_have_a_probability():
    p = torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    assert draw_distinct(p, torch.tensor([0.9, 0.1, 0.9]), 3) == [1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_groups": 0}, r"replay.max_groups=0: nothing is ever replayed. Write 1 or more, or replay=none"),
        ({"max_age": 0}, r"replay.max_age=0: "),
        ({"max_uses": 0}, r"replay.max_uses=0: "),
        ({"age_half_life": 0.0}, r"replay.age_half_life=0.0: write versions above 0, or null"),
        ({"score_power": -1.0}, r"replay.score_power=-1.0: write 0"),
        ({"fraction": 1.0}, r"replay.fraction=1.0: write a share of the batch in \(0, 1\)"),
    ],
)
def test_settings_without_a_meaning_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        BufferReplay(**settings)
    assert NoReplay().needs == frozenset()
