import numpy as np
import pytest
import torch

from rlkit.compose import compose
from rlkit.controller.preparation import choose, correct, shaped_rewards, with_effective_sample_size
from rlkit.core.loss import Strategy
from rlkit.core.ratios import IcePop, NoCorrection, Rejection, TruncatedIS
from rlkit.metrics import merge, values


@pytest.fixture
def batch(make_batch):
    """Engine and learner disagree by -1, 0 or 1 nats on every token."""
    made = make_batch()
    old_logprobs = made.rollout_logprobs + (torch.arange(made.rollout_logprobs.numel()).view_as(made.rollout_logprobs) % 3 - 1)
    return made.__class__(**{name: getattr(made, name) for name in made.__slots__} | {"old_logprobs": old_logprobs})


def test_a_batch_carries_its_corrections_weights_whatever_part_of_it_is_taken(batch):
    corrected, metrics = correct(TruncatedIS(cap=2.0), batch)
    assert corrected.policy_weight is not None
    mask = batch.response_mask
    rho = (batch.old_logprobs - batch.rollout_logprobs).exp()
    torch.testing.assert_close(corrected.policy_weight[mask], rho.clamp(max=2.0)[mask])
    part = corrected.select([3, 1])
    width = part.response_mask.shape[1]
    assert part.policy_weight is not None
    assert torch.equal(part.policy_weight, corrected.policy_weight[[3, 1], :width])
    weights = rho.clamp(max=2.0)[mask].double()
    found = with_effective_sample_size(values(metrics))
    assert found["is/ess"] == pytest.approx(float(weights.sum() ** 2 / (len(weights) * weights.square().sum())))
    assert "is/square_mean" not in found


def test_what_is_rejected_leaves_the_policy_terms_denominators_and_no_other(batch):
    corrected, _ = correct(Rejection(floor=0.5, cap=2.0), batch)
    assert corrected.policy_mask is not None
    kept = batch.response_mask & ((batch.old_logprobs - batch.rollout_logprobs).abs() < 0.5)
    assert torch.equal(corrected.policy_mask, kept)
    strategy: Strategy = compose(["correction=rejection"]).strategy
    masks = strategy.masks(response_mask=corrected.response_mask, keep=corrected.policy_mask, rewards=corrected.rewards)
    assert torch.equal(masks["policy"], kept)
    assert torch.equal(masks["divergence"], batch.response_mask)
    assert torch.equal(masks["entropy"], batch.response_mask)


def test_without_a_correction_a_batch_stays_as_it_is(batch):
    assert correct(NoCorrection(), batch) == (batch, {})


def test_metrics_of_parts_merge_into_those_of_the_whole(batch):
    _, whole = correct(IcePop(), batch)
    parts = [correct(IcePop(), batch.select(rows))[1] for rows in ([0, 1], [2], [3, 4, 5])]
    assert values(merge(parts)) == pytest.approx(values(whole))


def test_a_long_response_loses_reward_on_its_last_token_only(make_rollout):
    rollouts = [make_rollout(0, [5, 6], [7] * 10), make_rollout(1, [5, 6], [7] * 4), make_rollout(2, [5], [7] * 9)]
    for rollout in rollouts:
        rollout.token_rewards[-1] = 1.0
    config = compose(["shaping=overlong", "max_response_tokens=10"])  # the last 2 of 10 tokens
    rewards = shaped_rewards(config, rollouts)
    np.testing.assert_allclose(rewards.sum(-1), [0.0, 1.0, 0.5], atol=1e-6)
    assert rewards[0, -1] == 0.0
    assert rewards[1, 3] == 1.0
    plain = shaped_rewards(compose([]), rollouts)
    assert plain.sum(-1).tolist() == [1.0, 1.0, 1.0]


def test_a_selector_picks_among_all_tokens_of_the_step_and_the_same_ones_again(batch):
    selector = compose(
        ["selector=clip_cov", "selector.token_fraction=0.5", "selector.cov_low=-100", "selector.cov_high=100"]
    ).selector
    picked, metrics = choose(selector, batch, seed=3)
    assert picked.chosen is not None
    num_tokens = int(batch.response_mask.sum())
    assert int(picked.chosen.sum()) == num_tokens // 2
    assert not picked.chosen[~batch.response_mask].any()
    assert values(metrics)["selector/fraction"] == pytest.approx((num_tokens // 2) / num_tokens)
    again, other = (choose(selector, batch, seed=seed)[0].chosen for seed in (3, 4))
    assert again is not None
    assert other is not None
    assert torch.equal(picked.chosen, again)
    assert not torch.equal(picked.chosen, other)
    part = picked.select([2, 0])
    assert part.chosen is not None
    assert torch.equal(part.chosen, picked.chosen[[2, 0], : part.response_mask.shape[1]])


def test_a_selector_within_microbatches_picks_nothing_beforehand(batch):
    for overrides in (["selector=none"], ["selector=clip_cov", "selector.scope=micro"]):
        assert choose(compose(overrides).selector, batch, seed=0) == (batch, {})
