from dataclasses import replace

import pytest
import torch

from rlkit.core.advantages import (
    GAE,
    AlphaMode,
    Baseline,
    ComponentNormalized,
    DecoupledGAE,
    GroupCentered,
    GroupNormalized,
    GroupPolicyGradient,
    LeaveOneOut,
    LengthAdaptiveGAE,
    Reinforce,
    ReinforcePlusPlus,
    ReinforcePlusPlusBaseline,
    RewardComponent,
)
from rlkit.core.reduce import Aggregation, Denominators, reduce
from rlkit.errors import ConfigError

NAN, INF = float("nan"), float("inf")
VERL = GroupPolicyGradient(alpha_mode=AlphaMode.verl)
ESTIMATORS = [GroupNormalized(), GroupCentered(), LeaveOneOut(), GroupPolicyGradient()]
CRITIC_BASED = [GAE(lam=0.9, gamma=0.97), DecoupledGAE(lam_actor=0.8), LengthAdaptiveGAE(alpha=0.5, whiten=False)]
ALL = [*ESTIMATORS, VERL, Reinforce(gamma=0.9), ReinforcePlusPlus(), ReinforcePlusPlusBaseline(ddof=0), *CRITIC_BASED]
each = pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda estimator: type(estimator).__name__)
each_of_all = pytest.mark.parametrize("estimator", ALL, ids=str)


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


def test_gpg_weighs_up_for_the_responses_without_a_signal():
    solved, mixed = [1, 0, 0, 0, 1, 1, 1, 1], [1, 0, 0, 1, 1, 1, 0, 0]
    ids = [0] * 4 + [1] * 4
    for estimator, rewards, alpha in [
        (GroupPolicyGradient(), solved, 1 / (0.5 + 1e-5)),  # half of the responses are in a group whose rewards differ
        (GroupPolicyGradient(), mixed, 1 / (1 + 1e-5)),
        (VERL, solved, 8 / 5),  # five rewards are not 0
        (VERL, mixed, 2.0),
        (VERL, [-r for r in mixed], 2.0),
    ]:
        centred = advantages(GroupCentered(), rewards, ids)
        torch.testing.assert_close(advantages(estimator, rewards, ids), alpha * centred)


@pytest.mark.parametrize("estimator", [GroupPolicyGradient(), VERL], ids=str)
def test_gpg_without_any_signal_is_exactly_zero(estimator):
    for rewards in ([0.0] * 4, [0.1] * 4):
        assert advantages(estimator, rewards, [0, 0, 1, 1]).eq(0).all()


def test_gpg_counts_neither_rows_without_a_token_nor_lone_rows_as_a_signal():
    mask = torch.tensor([[True], [True], [True], [False]])
    token_rewards = torch.tensor([[1.0], [0.0], [5.0], [NAN]], dtype=torch.float64)
    got = GroupPolicyGradient()(token_rewards=token_rewards, response_mask=mask, group_ids=torch.tensor([0, 0, 1, 0])).advantages
    expected = torch.tensor([[0.5], [-0.5], [0.0], [0.0]], dtype=torch.float64) / (2 / 3 + 1e-5)
    torch.testing.assert_close(got, expected)


def by_component(parts, group_ids, *, weights=(), mask=None, **settings):
    """[B]: GDPO's advantage of each row's first token. parts: the rows' values of each part."""
    weights = weights or [1.0] * len(parts)
    components = {
        str(number): RewardComponent(rewards=torch.as_tensor(part, dtype=torch.float64), weight=weight)
        for number, (part, weight) in enumerate(zip(parts, weights, strict=True))
    }
    mask = torch.ones(len(group_ids), 3, dtype=torch.bool) if mask is None else mask
    estimate = ComponentNormalized(**settings)(
        token_rewards=torch.full(mask.shape, NAN, dtype=torch.float64),  # not looked at
        response_mask=mask,
        group_ids=torch.as_tensor(group_ids),
        reward_components=components,
    )
    assert torch.equal(estimate.advantages, (estimate.advantages[:, :1] * mask))
    return estimate.advantages[:, 0]


def test_parts_are_normalised_in_their_groups_and_their_sum_over_the_batch():
    # In a group of two, 0 and 1 become -+0.5 / sqrt(0.5) = -+0.707107. Both parts move in the first group, one in the second.
    parts, ids = [[0, 1, 0, 1], [0, 1, 1, 1]], [0, 0, 1, 1]
    # Sums -+1.414214 and -+0.707107; their squares make 5, over 3: a deviation of 1.290994
    expected = torch.tensor([-1.095445, 1.095445, -0.547723, 0.547723], dtype=torch.float64)
    torch.testing.assert_close(by_component(parts, ids), expected, rtol=0, atol=3e-6)
    # The second part weighs half: sums -+1.060660 and -+0.707107, squares 3.25, over 3: a deviation of 1.040833
    expected = torch.tensor([-1.019049, 1.019049, -0.679366, 0.679366], dtype=torch.float64)
    torch.testing.assert_close(by_component(parts, ids, weights=[1.0, 0.5]), expected, rtol=0, atol=3e-6)
    # GRPO on the sums of the parts cannot tell the two groups apart.
    torch.testing.assert_close(*advantages(GroupNormalized(), [0, 2, 1, 2], ids).chunk(2), rtol=0, atol=2e-6)


def test_the_range_of_a_part_does_not_matter_and_its_sign_and_weight_do():
    a, b = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(8))
    ids = [0] * 4 + [1] * 4
    plain = by_component([a, b], ids)
    torch.testing.assert_close(by_component([100 * a + 7, b], ids), plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(by_component([a, -b], ids, weights=[1.0, -1.0]), plain, rtol=0, atol=1e-12)
    assert not torch.allclose(by_component([a, b], ids, weights=[1.0, 3.0]), plain, atol=0.1)


@pytest.mark.parametrize("seed", range(5))
def test_with_one_part_it_is_grpo_up_to_the_batchs_normalisation(seed):
    rewards = torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    ids = torch.tensor([0, 1, 2] * 4)
    grpo = advantages(GroupNormalized(), rewards, ids)
    expected = (grpo - grpo.mean()) / (grpo.std() + 1e-6)
    torch.testing.assert_close(by_component([rewards], ids), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(by_component([rewards], ids, weights=[4.0]), expected, rtol=0, atol=3e-6)
    noise = torch.full((12,), 0.1)  # constant in every group
    torch.testing.assert_close(by_component([rewards, noise], ids), expected, rtol=0, atol=1e-12)


def test_parts_that_are_constant_or_cancel_each_other_leave_exactly_nothing():
    ids = [0, 0, 0, 1, 1, 1]
    assert by_component([[0.1] * 3 + [0.7] * 3, [1 / 3] * 6], ids).eq(0).all()
    part = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(by_component([part, -part], ids), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-8)


def test_a_part_that_a_row_has_not_adds_nothing_to_it_and_does_not_count_it():
    a, b = [1.0, 0.0, 1.0, 0.0], [0.0, 1.0, NAN, NAN]
    # a: -+0.5 / 0.577350 = -+0.866025; b in its two rows: -+0.707107. Sums 0.158919, -0.158919, 0.866025, -0.866025
    # with squares of 1.550510, over 3: a deviation of 0.718913
    expected = torch.tensor([0.221054, -0.221054, 1.204632, -1.204632], dtype=torch.float64)
    torch.testing.assert_close(by_component([a, b], [0] * 4), expected, rtol=0, atol=5e-6)
    ids = [0, 0, 0, 0, 0, 1, 1]  # beside a row and a group without any part
    beside = by_component([[*a, NAN, NAN, NAN], [*b, NAN, NAN, NAN]], ids)
    torch.testing.assert_close(beside[:4], expected, rtol=0, atol=5e-6)
    assert beside[4:].eq(0).all()


def test_rows_without_a_token_are_no_part_of_a_group_whatever_their_parts():
    parts, mask = [[1.0, 0.0, 0.5, 50.0]], torch.tensor([[True, True]] * 3 + [[False, False]])
    got = by_component(parts, [0] * 4, mask=mask)
    torch.testing.assert_close(got[:3], by_component([[1.0, 0.0, 0.5]], [0] * 3), rtol=0, atol=1e-12)
    assert got[3] == 0
    assert by_component([[1.0]], [0], mask=torch.ones(1, 2, dtype=torch.bool)).eq(0).all()
    assert len(by_component([[]], torch.zeros(0, dtype=torch.int64), mask=torch.zeros(0, 2, dtype=torch.bool))) == 0


@pytest.mark.parametrize("weights", [[1.0, 0.3, -2.0], [1.0, 1.0, 1.0]])
def test_it_is_trls_normalise_then_sum(weights):
    """As in TRL's GRPOTrainer, with its NaN for a function that has no opinion, written out."""
    generator = torch.Generator().manual_seed(10)
    rewards = torch.randn(6, 4, 3, dtype=torch.float64, generator=generator)  # groups, responses, functions
    rewards[1, :2, 1], rewards[2, 3, 2] = NAN, NAN
    deviation = rewards - rewards.nanmean(1, keepdim=True)
    count = (~rewards.isnan()).sum(1, keepdim=True)
    std = (deviation.square().nansum(1, keepdim=True) / (count - 1)).sqrt()
    total = (deviation / (std + 1e-4) * torch.tensor(weights, dtype=torch.float64)).nansum(-1).flatten()
    expected = (total - total.mean()) / (total.std() + 1e-4)
    ids = torch.arange(6).repeat_interleave(4)
    got = by_component(list(rewards.reshape(24, 3).T), ids, weights=weights, std_eps=1e-4)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


def outcome_on_last_token(batch):
    """[B, T], NaN in masked cells."""
    token_rewards = torch.zeros_like(batch.old_logprobs)
    for row, mask in enumerate(batch.response_mask):
        if mask.any():
            token_rewards[row, mask.nonzero()[-1]] = batch.rewards[row]
    return token_rewards.masked_fill(~batch.response_mask, NAN)


def f1_estimate(f1, estimator, **override):
    fields = {
        "token_rewards": outcome_on_last_token(f1),
        "response_mask": f1.response_mask,
        "group_ids": torch.tensor([0, 0, 1, 1]),
        "values": rows([[0.1, 0.2, 0.4, 0.5], [0.3, 0.1], [0.2, 0.2, 0.6], [0.7]]),
    }
    return estimator(**(fields | override))


def rows(lists, fill=NAN):
    return torch.tensor([row + [fill] * (4 - len(row)) for row in lists], dtype=torch.float64)


def close(got, expected, atol=1e-6):
    torch.testing.assert_close(got, rows(expected, fill=0.0), rtol=0, atol=atol)


def test_reinforce_gives_every_token_the_return_that_follows_it(f1):
    plain = Reinforce(baseline=Baseline.none)
    close(f1_estimate(f1, plain).advantages, [[1.0] * 4, [0.0] * 2, [1.0] * 3, [1.0]], atol=0)
    # With a penalty of 0.1 (old_logprobs - ref_logprobs) in the rewards
    penalised = outcome_on_last_token(f1) - 0.1 * (f1.old_logprobs - f1.ref_logprobs)
    expected = [[0.975, 0.98, 0.97, 1.0], [-0.03, -0.01], [1.01, 0.99, 0.99], [0.96]]
    close(f1_estimate(f1, plain, token_rewards=penalised).advantages, expected, atol=1e-12)
    mean = (0.975 - 0.03 + 1.01 + 0.96) / 4  # of the rows' sums
    close(
        f1_estimate(f1, Reinforce(), token_rewards=penalised).advantages, [[x - mean for x in row] for row in expected], atol=1e-12
    )


def test_reinforce_discounts_by_the_policys_tokens_in_between(f1):
    got = f1_estimate(f1, Reinforce(baseline=Baseline.none, gamma=0.5)).advantages
    close(got, [[0.125, 0.25, 0.5, 1.0], [0.0, 0.0], [0.25, 0.5, 1.0], [1.0]], atol=0)


def test_reinforce_plus_plus_whitens_over_tokens_not_over_rows(f1):
    # Eight tokens of 1 and two of 0: mean 0.8, sum of squared deviations 8 * 0.04 + 2 * 0.64 = 1.6
    close(f1_estimate(f1, ReinforcePlusPlus(ddof=0)).advantages, [[0.5] * 4, [-2.0] * 2, [0.5] * 3, [0.5]])  # sqrt(1.6 / 10) = 0.4
    close(f1_estimate(f1, ReinforcePlusPlus()).advantages, [[0.474342] * 4, [-1.897367] * 2, [0.474342] * 3, [0.474342]])


def test_reinforce_plus_plus_with_baseline_whitens_what_the_groups_left(f1):
    # Deviations 0.5, -0.5, 0, 0 on 4, 2, 3, 1 tokens: mean 0.1, variance (4 * 0.16 + 2 * 0.36 + 4 * 0.01) / 10 = 0.14
    expected = [[0.4] * 4, [-0.6] * 2, [-0.1] * 3, [-0.1]]
    scaled = [[x / 0.14**0.5 for x in row] for row in expected]
    close(f1_estimate(f1, ReinforcePlusPlusBaseline(ddof=0)).advantages, scaled)
    bessel = [[x * 0.9**0.5 for x in row] for row in scaled]
    close(f1_estimate(f1, ReinforcePlusPlusBaseline()).advantages, bessel)


@pytest.mark.parametrize("estimator", [ReinforcePlusPlus(), ReinforcePlusPlusBaseline(), GAE(lam=0.9), DecoupledGAE()], ids=str)
@pytest.mark.parametrize("ddof", [0, 1])
def test_whitened_advantages_have_mean_0_and_variance_1(ragged, estimator, ddof):
    kept = estimate(replace(estimator, ddof=ddof), ragged).advantages[ragged.response_mask]
    torch.testing.assert_close(kept.mean().item(), 0.0, rtol=0, atol=1e-12)
    torch.testing.assert_close(kept.var(correction=ddof).item(), 1.0, rtol=0, atol=1e-6)


def estimate(estimator, batch, **override):
    """Of the ragged fixture: a reward on every token, values, three groups."""
    fields = {
        "token_rewards": batch.advantages,
        "response_mask": batch.response_mask,
        "group_ids": torch.tensor([0, 1, 0, 2, 1, 1]),
        "values": batch.entropy,
    }
    return estimator(**(fields | override))


def test_gae_worked_out_by_hand(f1):
    # Row 2: deltas 0, 0.4, 0.4; 0.4 + 0.95 * 0.4 = 0.78; 0 + 0.95 * 0.78 = 0.741
    got = f1_estimate(f1, GAE(lam=0.95, whiten=False))
    close(got.advantages, [[0.808937, 0.746250, 0.575, 0.5], [-0.295, -0.1], [0.741, 0.78, 0.4], [0.3]])
    assert got.returns is not None
    close(got.returns, [[0.908937, 0.94625, 0.975, 1.0], [0.005, 0.0], [0.941, 0.98, 1.0], [1.0]])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.7), (0.95, 0.0), (0.8, 1.0)])
def test_gae_is_the_discounted_sum_of_one_step_errors_over_the_policys_tokens(ragged, gamma, lam):
    got = estimate(GAE(gamma=gamma, lam=lam, whiten=False), ragged)
    assert got.returns is not None
    for row, mask in enumerate(ragged.response_mask):
        rewards, values = ragged.advantages[row][mask].tolist(), ragged.entropy[row][mask].tolist()  # the gap is gone
        deltas = [r + gamma * later - v for r, v, later in zip(rewards, values, [*values[1:], 0.0][: len(values)], strict=True)]
        expected = [sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:])) for t in range(len(deltas))]
        torch.testing.assert_close(got.advantages[row][mask].tolist(), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(
            got.returns[row][mask].tolist(), [a + v for a, v in zip(expected, values, strict=True)], rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gae_with_lam_1_is_exactly_the_outcome_minus_the_value(ragged, dtype):
    token_rewards, values = outcome_on_last_token(ragged).to(dtype), ragged.entropy.to(dtype)
    got = estimate(GAE(whiten=False), ragged, token_rewards=token_rewards, values=values)
    outcome = ragged.rewards.to(dtype)[:, None].expand(values.shape)
    mask = ragged.response_mask
    assert got.returns is not None
    assert torch.equal(got.returns, outcome.masked_fill(~mask, 0.0))
    assert torch.equal(got.advantages, (outcome - values).masked_fill(~mask, 0.0))


def test_a_perfect_critic_leaves_no_advantage():
    # V = the rewards to come, which are certain
    rewards = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    mask, ids = torch.ones(3, 5, dtype=torch.bool), torch.zeros(3, dtype=torch.int64)
    values = rewards.flip(-1).cumsum(-1).flip(-1)
    for lam in (0.0, 0.5, 1.0):
        got = GAE(lam=lam, whiten=False)(token_rewards=rewards, response_mask=mask, group_ids=ids, values=values)
        torch.testing.assert_close(got.advantages, torch.zeros_like(rewards), rtol=0, atol=1e-14)


def test_the_critics_targets_have_their_own_lam(f1):
    both = f1_estimate(f1, DecoupledGAE(lam_actor=0.95, whiten=False))
    close(both.advantages, [[0.808937, 0.746250, 0.575, 0.5], [-0.295, -0.1], [0.741, 0.78, 0.4], [0.3]])
    close(both.returns, [[1.0] * 4, [0.0] * 2, [1.0] * 3, [1.0]], atol=0)


def test_with_equal_lams_decoupled_gae_is_gae(ragged):
    one, other = estimate(DecoupledGAE(lam_actor=0.7, lam_critic=0.7), ragged), estimate(GAE(lam=0.7), ragged)
    same(one, other)


def test_the_longer_a_response_the_larger_its_lam(f1):
    lam = LengthAdaptiveGAE(alpha=1.0).lams(f1.response_mask)[0]
    torch.testing.assert_close(lam, torch.tensor([0.75, 0.5, 2 / 3, 0.0], dtype=torch.float64))
    thousand = torch.ones(1, 1000, dtype=torch.bool)
    assert LengthAdaptiveGAE().lams(thousand)[0].item() == pytest.approx(0.98)  # 1 - 1 / (0.05 * 1000)
    assert LengthAdaptiveGAE().lams(thousand[:, :20])[0].item() == 0  # 1 / alpha tokens
    assert LengthAdaptiveGAE().lams(~thousand)[0].item() == 0
    got = f1_estimate(f1, LengthAdaptiveGAE(alpha=1.0, whiten=False))
    # Row 2: 0.4 + 2/3 * 0.4 = 0.666667; 0 + 2/3 * 0.666667 = 0.444444. Rows 1 and 3: -0.2 + 0.5 * -0.1; 1 - 0.7.
    close(got.advantages, [[0.517187, 0.55625, 0.475, 0.5], [-0.25, -0.1], [0.444444, 0.666667, 0.4], [0.3]])
    close(got.returns, [[1.0] * 4, [0.0] * 2, [1.0] * 3, [1.0]], atol=0)


@pytest.mark.parametrize("estimator", CRITIC_BASED, ids=str)
def test_whitening_changes_advantages_and_never_returns(ragged, estimator):
    white, raw = (estimate(replace(estimator, whiten=whiten), ragged) for whiten in (True, False))
    assert white.returns is not None
    assert raw.returns is not None
    assert torch.equal(white.returns, raw.returns)
    kept = raw.advantages[ragged.response_mask]
    expected = (kept - kept.mean()) / kept.std()
    torch.testing.assert_close(white.advantages[ragged.response_mask], expected, rtol=1e-6, atol=1e-6)


@each_of_all
def test_garbage_in_masked_cells_changes_nothing(ragged, estimator):
    off = ~ragged.response_mask
    clean = estimate(
        estimator, ragged, token_rewards=ragged.advantages.masked_fill(off, 0.0), values=ragged.entropy.masked_fill(off, 0.0)
    )
    assert clean.advantages[off].eq(0).all()
    for garbage in (NAN, INF, -INF):
        dirty = {"token_rewards": ragged.advantages.masked_fill(off, garbage), "values": ragged.entropy.masked_fill(off, garbage)}
        same(estimate(estimator, ragged, **dirty), clean)


@each_of_all
def test_nothing_carries_a_gradient(ragged, estimator):
    got = estimate(
        estimator, ragged, token_rewards=ragged.advantages.clone().requires_grad_(), values=ragged.entropy.clone().requires_grad_()
    )
    assert not got.advantages.requires_grad
    assert got.returns is None or not got.returns.requires_grad


def same(got, expected, **tolerance):
    tolerance = tolerance or {"rtol": 0, "atol": 0}
    torch.testing.assert_close(got.advantages, expected.advantages, **tolerance)
    assert (got.returns is None) == (expected.returns is None)
    if got.returns is not None:
        torch.testing.assert_close(got.returns, expected.returns, **tolerance)


def picked(got, index):
    """The same cells of both tensors."""
    return type(got)(advantages=got.advantages[index], returns=None if got.returns is None else got.returns[index])


@each_of_all
def test_a_masked_column_between_two_tokens_changes_no_other_cell(ragged, estimator):
    before = estimate(estimator, ragged)
    for at in range(10):
        columns = torch.cat([torch.arange(at), torch.tensor([9]), torch.arange(at, 9)])

        def widened(x, columns=columns):
            return torch.cat([x, torch.full_like(x[:, :1], NAN if x.is_floating_point() else False)], -1)[:, columns]

        after = estimate(
            estimator,
            ragged,
            token_rewards=widened(ragged.advantages),
            values=widened(ragged.entropy),
            response_mask=widened(ragged.response_mask),
        )
        # Not bit for bit: sums over a row or a batch may be split otherwise.
        same(picked(after, (slice(None), columns != 9)), before, rtol=0, atol=1e-12)
        assert after.advantages[:, at].eq(0).all()


@each_of_all
def test_the_order_of_rows_does_not_matter_nor_do_rows_without_a_token(ragged, estimator):
    before = estimate(estimator, ragged)
    order = torch.tensor([4, 2, 5, 0, 3, 1])
    ids = torch.tensor([0, 1, 0, 2, 1, 1])
    fields = {"token_rewards": ragged.advantages, "response_mask": ragged.response_mask, "values": ragged.entropy, "group_ids": ids}
    shuffled = estimator(**{name: x[order] for name, x in fields.items()})
    same(shuffled, picked(before, order), rtol=0, atol=1e-12)
    has_token = ragged.response_mask.any(-1)
    assert not has_token.all()
    without = estimator(**{name: x[has_token] for name, x in fields.items()})
    same(without, picked(before, has_token), rtol=0, atol=1e-12)


@each_of_all
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_batch_with_one_token_or_none_is_finite(estimator, dtype):
    for mask in (
        torch.tensor([[True, False], [False, False]]),
        torch.zeros(2, 2, dtype=torch.bool),
        torch.zeros(2, 0, dtype=torch.bool),
    ):
        values = torch.ones(mask.shape, dtype=dtype)
        got = estimator(token_rewards=3 * values, response_mask=mask, group_ids=torch.zeros(2, dtype=torch.int64), values=values)
        assert got.advantages.dtype == dtype
        assert got.advantages.isfinite().all()
        assert got.advantages[~mask].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "estimator", [Reinforce(), ReinforcePlusPlus(), ReinforcePlusPlus(ddof=0), ReinforcePlusPlusBaseline()], ids=str
)
def test_equal_rewards_have_advantages_of_exactly_zero_with_a_batchs_statistics_too(ragged, estimator, dtype):
    for reward in (0.1, 0.3, 1.1, -0.9, 1 / 3, 1e4 + 0.1, 0.0):
        batch = replace(ragged, rewards=torch.full((6,), reward, dtype=torch.float64))
        got = estimate(estimator, batch, token_rewards=outcome_on_last_token(batch).to(dtype))
        assert got.advantages.eq(0).all(), reward


# Two tokens over a vocabulary of three: nine responses, whose expectations are sums.
FIRST = torch.tensor([0.4, -0.3, 0.1], dtype=torch.float64)
SECOND = torch.tensor([[0.2, 0.9, -0.5], [0.0, -1.0, 0.6], [1.2, 0.3, -0.2]], dtype=torch.float64)
REWARDS = torch.tensor(
    [[0.3, 1.0], [0.3, -0.5], [0.3, 2.0], [-1.0, 0.0], [-1.0, 0.7], [-1.0, 1.1], [0.2, 0.4], [0.2, -2.0], [0.2, 0.9]]
)
REWARDS = REWARDS.double()  # [9, 2], of each response's two tokens; the first depends on the first token alone


def policy():
    """The two layers' logits, and the log-probabilities [9, 2] of the nine responses' tokens."""
    first, second = FIRST.clone().requires_grad_(), SECOND.clone().requires_grad_()
    logprobs = torch.stack([first.log_softmax(-1).repeat_interleave(3), second.log_softmax(-1).flatten()], -1)
    return (first, second), logprobs


def exact_gradient():
    logits, logprobs = policy()
    return torch.autograd.grad(-(logprobs.sum(-1).exp() * REWARDS.sum(-1)).sum(), logits)


def expected_gradient(estimator, *, group_size, values=None):
    """Of REINFORCE's loss -A * logprobs, over all groups of responses."""
    logits, logprobs = policy()
    mask, total = torch.ones(group_size, 2, dtype=torch.bool), torch.zeros((), dtype=torch.float64)
    for picks in torch.cartesian_prod(*[torch.arange(9)] * group_size).reshape(-1, group_size):
        got = estimator(
            token_rewards=REWARDS[picks],
            response_mask=mask,
            group_ids=torch.zeros(group_size, dtype=torch.int64),
            values=None if values is None else values[picks],
        )
        loss = reduce(
            -got.advantages * logprobs[picks],
            mask,
            aggregation=Aggregation.seq_mean_token_sum,
            denominators=Denominators.count(mask, max_response_tokens=2),
        )
        total = total + logprobs[picks].sum().exp().detach() * loss
    return torch.autograd.grad(total, logits)


@pytest.mark.parametrize(
    ("estimator", "group_size", "factor"),
    [
        (LeaveOneOut(), 2, 1.0),
        (LeaveOneOut(), 3, 1.0),
        (Reinforce(baseline=Baseline.none), 1, 1.0),
        (Reinforce(baseline=Baseline.none), 2, 1.0),
        (Reinforce(), 2, 1 / 2),  # the mean holds the row's own reward: (B - 1) / B
        (Reinforce(), 3, 2 / 3),
        (GroupCentered(), 3, 2 / 3),
    ],
    ids=str,
)
def test_the_expected_gradient_is_that_of_the_expected_reward_times_a_known_factor(estimator, group_size, factor):
    for got, exact in zip(expected_gradient(estimator, group_size=group_size), exact_gradient(), strict=True):
        torch.testing.assert_close(got, factor * exact, rtol=0, atol=1e-12)


def true_values():
    """[9, 2]: the expected rewards to come before the first and the second token."""
    _, logprobs = policy()
    logprobs = logprobs.detach()
    before_second = (logprobs[:, 1].exp() * REWARDS[:, 1]).reshape(3, 3).sum(-1).repeat_interleave(3)
    before_first = (logprobs.sum(-1).exp() * REWARDS.sum(-1)).sum().expand(9)
    return torch.stack([before_first, before_second], -1)


def test_gae_has_the_exact_expected_gradient_with_lam_1_or_with_true_values():
    wrong = true_values() + torch.tensor([[1.7, 0.4]] * 3 + [[1.7, -0.8]] * 3 + [[1.7, 0.1]] * 3, dtype=torch.float64)
    for lam, values, is_exact in [(1.0, wrong, True), (0.3, true_values(), True), (0.0, true_values(), True), (0.3, wrong, False)]:
        got = expected_gradient(GAE(lam=lam, whiten=False), group_size=1, values=values)
        error = max((a - b).abs().max().item() for a, b in zip(got, exact_gradient(), strict=True))
        assert (error < 1e-12) == is_exact, (lam, error)


def test_only_estimators_with_a_critic_ask_for_values():
    assert all(estimator.needs == {"values"} for estimator in CRITIC_BASED)
    assert all(estimator.needs == set() for estimator in ALL if estimator not in CRITIC_BASED)


def test_without_parts_an_estimator_that_needs_them_says_so(ragged):
    assert ComponentNormalized.needs == {"reward_components"}
    with pytest.raises(AssertionError, match="needs reward_components"):
        estimate(ComponentNormalized(), ragged)


@pytest.mark.parametrize("estimator", CRITIC_BASED, ids=str)
def test_without_values_an_estimator_with_a_critic_says_what_it_lacks(ragged, estimator):
    with pytest.raises(AssertionError, match="needs values"):
        estimate(estimator, ragged, values=None)


@pytest.mark.parametrize(
    ("estimator", "settings"),
    [
        (GroupNormalized, {"std_eps": 0.0}),
        (ComponentNormalized, {"std_eps": 0.0}),
        (Reinforce, {"gamma": 0.0}),
        (Reinforce, {"gamma": 1.1}),
        (ReinforcePlusPlus, {"gamma": -1.0}),
        (ReinforcePlusPlus, {"ddof": 2}),
        (ReinforcePlusPlusBaseline, {"ddof": -1}),
        (GAE, {"ddof": 2}),
        (GAE, {"gamma": 2.0}),
        (GAE, {"lam": 1.5}),
        (DecoupledGAE, {"lam_actor": -0.1}),
        (DecoupledGAE, {"lam_critic": 1.1}),
        (LengthAdaptiveGAE, {"alpha": 0.0}),
        (LengthAdaptiveGAE, {"lam_critic": -1.0}),
    ],
    ids=str,
)
def test_an_impossible_setting_is_refused_by_name(estimator, settings):
    with pytest.raises(ConfigError, match=rf"advantage\.{next(iter(settings))}=.*: write"):
        estimator(**settings)
