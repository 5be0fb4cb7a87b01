import numpy as np
import pytest
import torch

from rlkit.core.advantages import GroupCentered
from rlkit.core.reduce import Aggregation, Denominators, reduce
from rlkit.core.shaping import DynamicSampling, NoPromptFilter, NoShaping, OverlongPenalty, without_truncated
from rlkit.errors import ConfigError


def test_the_penalty_grows_over_the_last_tokens_of_the_budget():
    # Budget 20480, of which the last 4096: none up to 16384, half at 18432, all at the budget and, should it be passed, beyond.
    lengths = torch.tensor([0, 10000, 16384, 17408, 18432, 20480, 30000])
    penalty = OverlongPenalty()(lengths=lengths, max_response_tokens=20480)
    torch.testing.assert_close(penalty, torch.tensor([0.0, 0.0, 0.0, -0.25, -0.5, -1.0, -1.0]), rtol=0, atol=0)
    scaled = OverlongPenalty(buffer_fraction=0.2, factor=0.5)(lengths=lengths, max_response_tokens=20480)
    torch.testing.assert_close(scaled, penalty / 2, rtol=0, atol=0)


def test_within_the_budget_the_penalty_is_dapos_formula():
    lengths = torch.arange(513)
    expected = torch.minimum(-(lengths - (512 - 100)) / 100 * 0.7, torch.zeros(()))
    got = OverlongPenalty(buffer_fraction=100 / 512, factor=0.7)(lengths=lengths, max_response_tokens=512)
    torch.testing.assert_close(got, expected)
    assert got[412] == 0
    assert got[413] < 0


def test_without_shaping_rewards_stay():
    assert NoShaping()(lengths=torch.tensor([1, 2]), max_response_tokens=2) is None


def test_a_prompt_whose_responses_all_scored_alike_is_dropped():
    scores = torch.tensor([1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    ids = torch.tensor([7, 7, -3, 7, -3, 5, 7, 5, -3, 9])  # 7: all right; -3: right and wrong; 5: all wrong; 9: one response
    expected = {7: False, -3: True, 5: False, 9: True}
    got = DynamicSampling().keep(scores=scores, group_ids=ids)
    assert got.tolist() == [expected[i] for i in ids.tolist()]
    assert NoPromptFilter().keep(scores=scores, group_ids=ids).all()
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    assert torch.equal(DynamicSampling().keep(scores=scores[order], group_ids=ids[order]), got[order])


def test_equal_decimals_are_alike_though_their_standard_deviation_is_not_zero():
    scores = torch.full((3,), 0.1, dtype=torch.float64)
    assert np.std(scores.numpy()) > 0
    assert not DynamicSampling().keep(scores=scores, group_ids=torch.zeros(3, dtype=torch.int64)).any()
    scores[1] += 1e-15
    assert DynamicSampling().keep(scores=scores, group_ids=torch.zeros(3, dtype=torch.int64)).all()


def test_truncated_rows_leave_the_loss_and_its_denominator_and_stay_in_their_groups_mean():
    response_mask = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])
    rewards = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.5]], dtype=torch.float64)
    mask = without_truncated(response_mask, torch.tensor([True, False, False]))
    assert mask.tolist() == [[False] * 3, [True, True, False], [True] * 3]
    estimate = GroupCentered()(token_rewards=rewards, response_mask=response_mask, group_ids=torch.zeros(3, dtype=torch.int64))
    denominators = Denominators.count(mask, max_response_tokens=3)
    loss = reduce(-estimate.advantages, mask, aggregation=Aggregation.token_mean, denominators=denominators)
    assert loss.item() == pytest.approx(-(2 * 0.5 + 3 * 0.0) / 5)  # mean 0.5 over all three rows, five tokens


@pytest.mark.parametrize(
    ("kind", "settings", "key"),
    [
        (OverlongPenalty, {"buffer_fraction": 0}, r"shaping\.buffer_fraction"),
        (OverlongPenalty, {"factor": -1.0}, r"shaping\.factor"),
        (DynamicSampling, {"max_batches": -1}, r"prompt_filter\.max_batches"),
    ],
)
def test_an_impossible_setting_is_refused_by_name(kind, settings, key):
    with pytest.raises(ConfigError, match=rf"{key}=.*: write"):
        kind(**settings)
