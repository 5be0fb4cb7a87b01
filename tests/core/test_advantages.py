import pytest
import torch

from rlkit.core.advantages import GroupCentered, GroupNormalized, LeaveOneOut

NAN = float("nan")
ESTIMATORS = [GroupNormalized(), GroupCentered(), LeaveOneOut()]
each = pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda estimator: type(estimator).__name__)


def advantages(estimator, rewards, group_ids, *, width=1, dtype=torch.float64):
    """[B]: the advantage of each row's first token; the reward sits on its only one."""
    token_rewards = torch.zeros(len(rewards), width, dtype=dtype)
    token_rewards[:, -1] = torch.as_tensor(rewards, dtype=dtype)
    mask = torch.ones(len(rewards), width, dtype=torch.bool)
    estimate = estimator(token_rewards=token_rewards, response_mask=mask, group_ids=torch.as_tensor(group_ids))
    assert estimate.advantages.shape == (len(rewards), width)
    return estimate.advantages[:, 0]


@pytest.mark.parametrize(
    ("estimator", "rewards", "expected"),
    [
        # mean 1/2, deviations 1/2, ddof=1: sqrt(4 * 1/4 / 3) = 0.577350; 0.5 / (0.577350 + 1e-6) = 0.866024
        (GroupNormalized(), [1, 0, 0, 1], [0.866024, -0.866024, -0.866024, 0.866024]),
        # mean 1/4, sqrt((9/16 + 3/16) / 3) = 1/2; 0.75 / (0.5 + 1e-6)
        (GroupNormalized(), [1, 0, 0, 0], [1.499997, -0.499999, -0.499999, -0.499999]),
        (GroupNormalized(std_eps=0.5), [1, 0, 0, 0], [0.75, -0.25, -0.25, -0.25]),  # 0.75 / (0.5 + 0.5)
        (GroupCentered(), [1, 0, 0, 1], [0.5, -0.5, -0.5, 0.5]),
        (LeaveOneOut(), [1, 0, 0, 1], [2 / 3, -2 / 3, -2 / 3, 2 / 3]),
        (LeaveOneOut(), [1, 0, 0, 0], [1, -1 / 3, -1 / 3, -1 / 3]),
    ],
)
def test_advantages_worked_out_by_hand(estimator, rewards, expected):
    got = advantages(estimator, rewards, [3] * 4)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6)


def test_leave_one_out_compares_each_row_with_the_mean_of_its_siblings():
    rewards = torch.randn(5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    siblings = torch.stack([rewards[torch.arange(5) != i].mean() for i in range(5)])
    torch.testing.assert_close(advantages(LeaveOneOut(), rewards, [0] * 5), rewards - siblings)
    torch.testing.assert_close(advantages(LeaveOneOut(), rewards, [0] * 5), 5 / 4 * advantages(GroupCentered(), rewards, [0] * 5))


def test_normalised_advantages_divide_by_the_sample_deviation():
    rewards = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = (rewards - rewards.mean()) / (rewards.std() + 1e-6)  # torch's default is ddof=1
    torch.testing.assert_close(advantages(GroupNormalized(), rewards, [0] * 7), expected)


@each
def test_groups_are_found_by_id_wherever_their_rows_stand(estimator):
    rewards = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([7, -1, 7, 16, -1, 7, 16, -1, 7])  # groups of 4, 3 and 2; 16 is 7 modulo the nine rows
    together = advantages(estimator, rewards, ids)
    for group in (7, -1, 16):
        torch.testing.assert_close(
            together[ids == group], advantages(estimator, rewards[ids == group], [0] * int((ids == group).sum()))
        )
    order = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(advantages(estimator, rewards[order], ids[order]), together[order])


@each
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_group_of_equal_rewards_has_advantages_of_exactly_zero(estimator, dtype):
    # Most decimals are no binary fractions: their float mean misses them by an ulp, which a deviation near 0 would blow up.
    for size in range(2, 12):
        for reward in (0.1, 0.2, 0.3, 0.7, 1.1, -0.9, 1 / 3, 1e4 + 0.1, 0.0):
            got = advantages(estimator, [reward] * size, [0] * size, dtype=dtype)
            assert got.eq(0).all(), (size, reward, got)


@each
def test_a_row_without_siblings_gets_zero(estimator):
    torch.testing.assert_close(advantages(estimator, [3.0, 1.0, 0.0], [0, 1, 1])[0].item(), 0.0)


@each
def test_every_group_sums_to_zero(estimator):
    ids = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2])
    rewards = torch.randn(9, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    sums = torch.zeros(3, dtype=torch.float64).index_add_(0, ids, advantages(estimator, rewards, ids))
    torch.testing.assert_close(sums, torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)


@each
def test_a_shift_of_all_rewards_changes_nothing_and_a_scale_does_what_the_estimator_promises(estimator):
    rewards = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    base = advantages(estimator, rewards, [0] * 6)
    torch.testing.assert_close(advantages(estimator, rewards + 4.25, [0] * 6), base)
    scaled = advantages(estimator, 3 * rewards, [0] * 6)
    expected = base if isinstance(estimator, GroupNormalized) else 3 * base
    torch.testing.assert_close(scaled, expected, rtol=1e-5, atol=0)  # std_eps is not scaled


@each
def test_advantages_are_spread_over_the_policys_tokens_and_zero_elsewhere(estimator):
    mask = torch.tensor([[True, False, True, False], [True, True, True, True], [True, False, False, False]])
    token_rewards = torch.full((3, 4), NAN).masked_fill(mask, 0.0)
    token_rewards[0, 2], token_rewards[1, 3], token_rewards[2, 0] = 1.0, 0.5, 0.0
    estimate = estimator(token_rewards=token_rewards, response_mask=mask, group_ids=torch.zeros(3, dtype=torch.int64))
    per_row = advantages(estimator, [1.0, 0.5, 0.0], [0] * 3, dtype=torch.float32)
    expected = per_row[:, None].expand(3, 4) * mask
    torch.testing.assert_close(estimate.advantages, expected)
    assert not estimate.advantages.requires_grad


@each
def test_a_rows_outcome_is_the_sum_of_its_token_rewards(estimator):
    mask = torch.ones(4, 3, dtype=torch.bool)
    split = torch.tensor([[0.25, 0.25, 0.5], [0.0, 0.0, 0.0], [1.0, -1.0, 0.0], [-0.5, 1.0, 0.5]], dtype=torch.float64)
    estimate = estimator(token_rewards=split, response_mask=mask, group_ids=torch.zeros(4, dtype=torch.int64))
    expected = advantages(estimator, [1, 0, 0, 1], [0] * 4)
    torch.testing.assert_close(estimate.advantages, expected[:, None].expand(4, 3))
