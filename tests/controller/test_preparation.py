import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from rlkit.compose import compose
from rlkit.controller.preparation import (
    choose,
    correct,
    divergence_part,
    filtered,
    joined,
    narrow,
    reward_components,
    shaped_rewards,
    sharpened,
    weigh,
    with_advantages,
    with_effective_sample_size,
)
from rlkit.core.aepo import Aepo, TemperingState
from rlkit.core.loss import Strategy
from rlkit.core.ratios import IcePop, NoCorrection, Rejection, TruncatedIS
from rlkit.data.collate import collate
from rlkit.errors import ConfigError, DataError
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


# --- which tokens train, and how much -----------------------------------------------------------------------------------------


def with_old_policy(batch):
    """With what a pass of the policy before the update says."""
    entropy = torch.linspace(0.1, 2.0, batch.response_mask.numel()).view_as(batch.rollout_logprobs)
    return replace(batch, old_entropy=entropy, old_expected_score=0.3 * entropy)


def test_dropped_tokens_leave_every_term_after_the_correction_looked_at_all(batch):
    batch = with_old_policy(batch)
    config = compose(["token_filter=clip_b", "token_filter.mu=0.5", "mask_truncated=true", "correction=rejection"])
    truncated = torch.tensor([False, True, False, False, False, False])
    kept, metrics = filtered(config, batch, truncated)
    assert kept.train_mask is not None
    expected = config.token_filter(
        old_logprobs=batch.old_logprobs,
        rollout_logprobs=batch.rollout_logprobs,
        advantages=batch.advantages,
        response_mask=batch.response_mask,
        entropy=batch.old_entropy,
    )
    assert not torch.equal(expected, batch.response_mask)
    expected = expected & ~truncated.unsqueeze(-1)
    assert torch.equal(kept.train_mask, expected)
    dropped = float((batch.response_mask & ~expected).sum() / batch.response_mask.sum())
    assert metrics == {"filter/dropped_fraction": pytest.approx(dropped)}
    assert torch.equal(kept.advantages, batch.advantages)
    corrected, found = correct(config.correction, kept)
    assert values(found) == values(correct(config.correction, batch)[1])
    narrowed = narrow(corrected)
    assert corrected.policy_mask is not None
    assert narrowed.policy_mask is not None
    assert torch.equal(narrowed.response_mask, expected)
    assert torch.equal(narrowed.policy_mask, expected & corrected.policy_mask)
    masks = config.strategy.masks(response_mask=narrowed.response_mask, keep=narrowed.policy_mask)
    assert torch.equal(masks["entropy"], expected)


def test_without_a_filter_a_batch_stays_as_it_is(batch):
    assert filtered(compose([]), batch, torch.ones(6, dtype=torch.bool)) == (batch, {})
    assert narrow(batch) is batch


def test_a_weight_over_the_whole_step_multiplies_the_corrections(batch):
    batch = with_old_policy(batch)
    weight = compose(["token_weight=steer"]).token_weight
    plain, metrics = weigh(weight, batch)
    assert plain.policy_weight is not None
    assert plain.policy_mask is batch.response_mask
    found = plain.policy_weight[batch.response_mask]
    assert 0.8 <= found.min() < found.max() <= 1.2
    assert values(metrics)["token_weight/mean"] == pytest.approx(float(found.mean()))
    corrected, _ = correct(Rejection(floor=0.5, cap=2.0), batch)
    both, _ = weigh(weight, corrected)
    assert both.policy_weight is not None
    assert corrected.policy_weight is not None
    assert both.policy_mask is corrected.policy_mask
    assert torch.equal(both.policy_weight, plain.policy_weight * corrected.policy_weight)
    within = compose(["token_weight=steer", "token_weight.scope=micro"]).token_weight
    assert weigh(within, batch) == (batch, {})


def test_advantages_come_with_weights_and_a_second_one(make_rollout):
    rewards, lengths, texts = [1.0, 0.0, 0.0, 0.0], [2, 4, 2, 2], ["a", "b", "c", "c "]
    rollouts = [make_rollout(index, [5], [6] * length) for index, length in enumerate(lengths)]
    for index, (rollout, reward, text) in enumerate(zip(rollouts, rewards, texts, strict=True)):
        rollouts[index] = replace(rollout, group_id=f"group {index // 2}", reward=reward, text=text)
        rollout.token_rewards[-1] = reward
    batch = collate(rollouts)
    plain, nothing = with_advantages(compose(["advantage=dr_grpo"]), batch, rollouts)
    assert nothing == {}
    assert plain.advantages[:, 0].tolist() == [0.5, -0.5, 0.0, 0.0]
    overrides = ["advantage_weights=stcr", "advantage_weights.base=2.0", "divergence=reverse_kl", "divergence_weights=dads"]
    made, metrics = with_advantages(compose(["advantage=dr_grpo", "prompt_advantage=copo", *overrides]), batch, rollouts)
    torch.testing.assert_close(made.advantages[:, 0], torch.tensor([0.5, -0.5 * 1.75, 0.0, 0.0]))  # 2 tokens longer: 2 - 2^-2
    assert made.divergence_weight is not None
    torch.testing.assert_close(made.divergence_weight, torch.tensor([0.743119, 1.0, 1.0, 1.0]), atol=1e-6, rtol=0)
    assert made.local_weight is not None
    assert made.prompt_advantages is not None
    sigmoids = [1 / (1 + math.exp(-5 * (bits - 1))) for bits in (1.0, 1.0, 0.0, 0.0)]
    torch.testing.assert_close(made.local_weight, torch.tensor(sigmoids), atol=1e-6, rtol=0)
    torch.testing.assert_close(made.prompt_advantages[:, 0], torch.tensor([1.0, 1.0, -1.0, -1.0]) * 0.5**0.5, atol=1e-5, rtol=0)
    assert metrics["copo/h_mean"] == 0.5


def with_parts(make_rollout, parts):
    """Two groups of two, or less, each of a source of its own, whose rewards are sums of these parts."""
    return [
        replace(
            make_rollout(row, [5], [6]),
            group_id=str(row // 2),
            source=str(row // 2),
            reward=sum(found.values()),
            reward_components=found,
        )
        for row, found in enumerate(parts)
    ]


WEIGHTED = ["advantage=gdpo", "reward=weighted", "reward.fns={right:expressions,form:expression_form}"]
WEIGHTED += ["reward.weights={form:-0.5}"]


def test_parts_of_a_reward_come_with_their_weights_apart(make_rollout):
    rollouts = with_parts(make_rollout, [{"right": 0.0, "form": 0.0}, {"right": 1.0, "form": -0.5}, {"form": 0.0}, {"form": -0.5}])
    found = reward_components(compose(WEIGHTED), rollouts)
    assert list(found) == ["right", "form"]
    assert (found["right"].weight, found["form"].weight) == (1.0, -0.5)
    assert found["form"].rewards.tolist() == [0.0, 1.0, 0.0, 1.0]
    assert found["right"].rewards[:2].tolist() == [0.0, 1.0]
    assert found["right"].rewards[2:].isnan().all()
    one = reward_components(compose(["advantage=gdpo", "reward.fn=expression_parts"]), rollouts)
    assert one["form"].weight == 1.0
    assert one["form"].rewards.tolist() == [0.0, -0.5, 0.0, -0.5]


def test_gdpo_learns_from_the_parts(make_rollout):
    rollouts = with_parts(make_rollout, [{"right": 0.0, "form": 0.0}, {"right": 1.0, "form": -0.5}, {"form": 0.0}, {"form": -0.5}])
    made, _ = with_advantages(compose(WEIGHTED), collate(rollouts), rollouts)
    # -+0.707107 for each part: sums -+0.353553 in both groups; squares 0.5, over 3: a deviation of 0.408248
    expected = torch.tensor([-0.866025, 0.866025, 0.866025, -0.866025])
    torch.testing.assert_close(made.advantages[:, 0], expected, rtol=0, atol=5e-6)


def test_gdpo_takes_no_reward_whose_parts_are_not_known(make_rollout):
    rollouts = with_parts(make_rollout, [{"right": 1.0, "form": 0.5}, {"right": 1.0, "form": 0.0}])
    rollouts[1] = replace(rollouts[1], reward=-1.0, reward_components={})
    with pytest.raises(DataError, match=r"^advantage=gdpo: sample .* has a reward of -1 without a part right, which others"):
        reward_components(compose(["advantage=gdpo"]), rollouts)


def test_gdpo_without_parts_says_what_to_write(make_rollout):
    rollouts = with_parts(make_rollout, [{}, {}])
    with pytest.raises(ConfigError, match=r"^advantage=gdpo: it learns from the parts .* Write reward=weighted with reward\.fns="):
        with_advantages(compose(["advantage=gdpo"]), collate(rollouts), rollouts)


def test_a_pattern_says_what_the_answer_is():
    copo = compose(["prompt_advantage=copo", r"prompt_advantage.answer_pattern='#### (\S+)'"]).prompt_advantage
    assert copo.answers(["x #### 3 or #### 4 ", "nothing", "#### 5"]) == ["4", None, "5"]


# --- tempered samples -----------------------------------------------------------------------------------------------------------


def aepo(*overrides: str) -> Aepo:
    tempering = compose(["tempering=aepo", *overrides]).tempering
    assert isinstance(tempering, Aepo)
    return tempering


def test_good_tempered_samples_have_a_term_of_their_own(batch):
    """Rows 4 and 5 are tempered, and row 5 is good."""
    advantages = torch.tensor([0.5, -0.5, 0.0, 0.2, 0.0, 1.0]).unsqueeze(-1) * batch.response_mask
    batch = replace(batch, advantages=advantages)
    taken, metrics = joined(aepo(), batch, 4, TemperingState(entropy=0.1))
    assert taken.sample_ids == tuple(batch.sample_ids[row] for row in (5, 0, 1, 2, 3))
    assert metrics == {"aepo/num_samples": 1.0, "aepo/frac_replaced": 0.0}
    assert taken.tempered_mask is not None
    assert taken.tempered_mask.any(-1).tolist() == [True, False, False, False, False]
    assert taken.response_mask.any(-1).tolist() == [False, True, True, True, True]
    strategy = compose(["tempering=aepo"]).strategy
    masks = strategy.masks(response_mask=taken.response_mask, tempered_mask=taken.tempered_mask)
    assert not (masks["policy"] & masks["aepo"]).any()


def test_good_tempered_samples_take_the_place_of_the_first(batch):
    advantages = torch.tensor([0.5, -0.5, 0.0, 0.2, 0.8, 1.0]).unsqueeze(-1) * batch.response_mask
    batch = replace(batch, advantages=advantages)
    taken, metrics = joined(aepo("tempering.use=replace"), batch, 4, TemperingState(entropy=0.1))
    assert taken.sample_ids == tuple(batch.sample_ids[row] for row in (4, 5, 2, 3))
    assert metrics == {"aepo/num_samples": 2.0, "aepo/frac_replaced": 0.5}
    assert taken.tempered_mask is None
    assert taken.old_logprobs is not None
    assert torch.equal(taken.advantages[:2], taken.response_mask[:2].float())
    assert torch.equal(taken.rollout_logprobs[:2], taken.old_logprobs[:2])
    width = taken.response_mask.shape[1]
    assert torch.equal(taken.advantages[2:], batch.advantages[2:4, :width])
    assert torch.equal(taken.rollout_logprobs[2:], batch.rollout_logprobs[2:4, :width])
    above, _ = joined(aepo("tempering.use=replace"), batch, 4, TemperingState(entropy=0.9))
    assert above.sample_ids == tuple(batch.sample_ids[row] for row in (4, 1, 2, 3))


# --- a divergence in the advantages -------------------------------------------------------------------------------------------


@pytest.fixture
def compared(batch):
    """With a reference that is a quarter of a nat off on every token."""
    return replace(batch, ref_logprobs=batch.old_logprobs - 0.25, rewards=torch.arange(6.0))


@pytest.fixture
def rollouts(make_rollout, compared):
    """Rows of `compared` as rollouts of two groups."""
    rows = []
    for row, length in enumerate(compared.response_lengths.tolist()):
        made = make_rollout(row, [3, 4], compared.sequences.response(row).tolist())
        assert len(made.response_ids) == length
        rows.append(replace(made, group_id=str(row // 3)))
    return rows


def test_a_kl_in_the_token_reward_is_what_is_still_to_come_times_the_coefficient(compared, rollouts):
    config = compose(["divergence=reverse_kl", "divergence.place=token_reward", "divergence.estimator=k1", "advantage=dr_grpo"])
    part = divergence_part(config, compared, rollouts, 2.0)
    assert part is not None
    for row, length in enumerate(compared.response_lengths.tolist()):
        left = torch.arange(length, 0, -1)
        torch.testing.assert_close(part.penalty[row, :length], 2.0 * 0.25 * left)
        assert part.penalty[row, length:].eq(0).all()
    plain, _ = with_advantages(config, compared, rollouts)
    less, metrics = with_advantages(config, compared, rollouts, divergence=part)
    torch.testing.assert_close(less.advantages, plain.advantages - part.penalty)
    assert metrics["divergence/penalty_mean"] > 0


def test_a_targets_penalty_takes_the_advantages_place(compared, rollouts):
    config = compose(["divergence=forward_kl", "divergence.place=target", "divergence.coef=0.5"])
    part = divergence_part(config, compared, rollouts, 0.5)
    assert part is not None
    found, metrics = with_advantages(config, compared, rollouts, divergence=part)
    torch.testing.assert_close(found.advantages, -part.penalty)
    assert "target/gap" in metrics


def test_a_divergence_in_the_loss_leaves_advantages_alone(compared, rollouts):
    assert divergence_part(compose(["divergence=reverse_kl"]), compared, rollouts, 1.0) is None
    assert divergence_part(compose([]), compared, rollouts, None) is None


def test_rapo_flattens_the_reference_of_what_was_not_rewarded(compared):
    from rlkit.core.divergences import RAPO

    hidden = torch.randn(*compared.response_mask.shape, 4)
    given = replace(compared, ref_hidden=hidden, rewards=torch.tensor([0.0, 1.0, 0.5, -1.0, 2.0, 0.25]))
    found = sharpened(compose(["divergence=rapo"]), given)
    assert found.ref_hidden is not None
    phi = torch.tensor([0.2, 1.0, 0.6, 0.2, 1.0, 0.4])
    torch.testing.assert_close(found.ref_hidden, hidden * phi[:, None, None])
    ref = torch.tensor([0.2, 0.5, 0.3]).log()
    torch.testing.assert_close((0.5 * ref).softmax(-1), torch.tensor([0.262751, 0.415446, 0.321803]), rtol=0, atol=1e-6)
    assert RAPO(phi_min=1.0).sharpness(torch.tensor([0.0])).item() == 1.0
    assert sharpened(compose(["divergence=forward_kl"]), given) is given
