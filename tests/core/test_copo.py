import math
from typing import Any

import pytest
import torch

from rlkit.core.advantages import GroupNormalized
from rlkit.core.copo import COPO, Blend, BlendMode, NoPromptAdvantage, answer_entropy
from rlkit.core.objectives import ClippedSurrogate, Surrogate
from rlkit.core.reduce import Aggregation, Denominators, reduce
from rlkit.errors import ConfigError

NAN, INF = float("nan"), float("inf")
OBJECTIVE = ClippedSurrogate(dual_clip=3.0)


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def group_advantages(batch, group_ids):
    """GRPO's, with NaN off the mask."""
    token_rewards = torch.zeros_like(batch.old_logprobs)
    token_rewards[:, 0] = batch.rewards
    estimate = GroupNormalized()(token_rewards=token_rewards, response_mask=batch.response_mask, group_ids=group_ids)
    return estimate.advantages.masked_fill(~batch.response_mask, NAN)


def blended_loss(batch, copo, *, group_ids, entropy, logprobs, aggregation=Aggregation.seq_mean_token_mean):
    """The loss of both advantages, and what it was made of."""
    advantages = group_advantages(batch, group_ids)
    blend = copo(
        advantages=advantages,
        rewards=batch.rewards,
        entropy=entropy,
        response_mask=batch.response_mask,
        group_ids=group_ids,
    )
    fields = {"logprobs": logprobs, "old_logprobs": batch.old_logprobs, "response_mask": batch.response_mask}
    surrogate = blend(OBJECTIVE(advantages=advantages, **fields), OBJECTIVE(advantages=blend.advantages, **fields))
    denominators = Denominators.count(batch.response_mask, max_response_tokens=4)
    return reduce(surrogate.loss, batch.response_mask, aggregation=aggregation, denominators=denominators), surrogate, blend


def test_answers_that_agree_have_no_entropy_and_a_failure_to_parse_is_an_answer():
    answers = ["a", "a", "b", "c", "x", "x", "x", "x", None, "7", None, "8", "only"]
    group_ids = torch.tensor([5, 5, 5, 5, 1, 1, 1, 1, 3, 3, 3, 3, 9])
    expected = [1.5] * 4 + [0.0] * 4 + [1.5] * 4 + [0.0]
    assert answer_entropy(answers, group_ids).tolist() == expected
    assert answer_entropy(["a", "b", "c", "d"], torch.zeros(4, dtype=torch.int64)).tolist() == [2.0] * 4  # log2 of 4
    assert answer_entropy(["None", None], torch.tensor([0, 0])).tolist() == [1.0, 1.0]  # the word is not the failure
    mixed = answer_entropy(["a", "b", "a", "a"], torch.tensor([0, 1, 1, 0]))  # rows of a prompt need not be neighbours
    assert mixed.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_prompts_are_ranked_by_their_mean_reward():
    # Three prompts of four: a,a,b,c half right; a,a,a,a all wrong; all right.
    group_ids = torch.arange(3).repeat_interleave(4)
    rewards = tensor([1, 1, 0, 0] + [0] * 4 + [1] * 4)
    entropy = tensor([1.5] * 4 + [0.0] * 8)
    copo = COPO()
    found = copo.of_prompts(rewards, entropy, group_ids)[::4]
    torch.testing.assert_close(found, tensor([0.0, -0.999998, 0.999998]), atol=5e-9, rtol=1e-7)
    weight = copo.weight(entropy, rewards != 0, torch.ones(12, dtype=torch.bool))[::4]
    torch.testing.assert_close(weight, tensor([0.924142, 0.006693, 0.006693]), atol=5e-7, rtol=0)
    # Discounted, the first counts .5 * (1 - 1.5 * .75 / 2) = .21875, and the standard deviation of (.21875, 0, 1) is .524621.
    found = COPO(discounted=True).of_prompts(rewards, entropy, group_ids)[::4]
    mean, std = 1.21875 / 3, tensor([0.21875, 0.0, 1.0]).std().item()
    torch.testing.assert_close(found, (tensor([0.21875, 0.0, 1.0]) - mean) / (std + 1e-6), atol=1e-12, rtol=0)


def test_equal_prompts_and_a_single_one_have_no_second_advantage():
    copo, zero = COPO(), torch.zeros(6, dtype=torch.float64)
    found = copo.of_prompts(tensor([0.1, 0.2, 0.1, 0.2, 0.1, 0.2]), zero, torch.tensor([0, 0, 1, 1, 2, 2]))
    assert found.tolist() == [0.0] * 6
    assert copo.of_prompts(tensor([0.1] * 3), zero[:3], torch.arange(3)).tolist() == [0.0] * 3  # whose mean is not 0.1 in floats
    found = copo.of_prompts(tensor([0.1, 0.7, 0.3, 0.2, 0.1, 0.9]), zero, torch.zeros(6, dtype=torch.int64))
    assert found.tolist() == [0.0] * 6
    single = COPO(discounted=True).of_prompts(tensor([1.0, 0.0]), tensor([0.0, 0.0]), torch.tensor([0, 1]))  # groups of one
    torch.testing.assert_close(single, tensor([1, -1]) * 0.5 / (math.sqrt(0.5) + 1e-6))


def test_the_blend_is_a_weighted_mean_of_two_losses():
    local, of_prompts = (Surrogate(tensor([[value]]), torch.tensor([[False]])) for value in (-0.3, -0.1))
    blend = Blend(advantages=tensor([[0.0]]), weight=tensor([0.924142]))
    assert blend(local, of_prompts).loss.item() == pytest.approx(-0.284828, abs=5e-7)


def test_a_blended_token_is_clipped_where_every_loss_that_counts_is():
    local = Surrogate(torch.zeros(3, 2), torch.tensor([[True, True]] * 3))
    of_prompts = Surrogate(torch.zeros(3, 2), torch.tensor([[True, False]] * 3))
    blend = Blend(advantages=torch.zeros(3, 2), weight=torch.tensor([0.4, 1.0, 0.0]))
    assert blend(local, of_prompts).clipped.tolist() == [[True, False], [True, True], [True, False]]


def test_a_worked_batch_has_the_worked_loss(f1):
    group_ids, entropy = torch.tensor([0, 0, 1, 1]), tensor([1.0, 1.0, 0.0, 0.0])
    advantages = group_advantages(f1, group_ids)
    torch.testing.assert_close(advantages[:, 0], tensor([0.707106, -0.707106, 0, 0]), atol=5e-7, rtol=0)
    loss, surrogate, blend = blended_loss(f1, COPO(), group_ids=group_ids, entropy=entropy, logprobs=f1.logprobs)
    expected = tensor([-0.707105, -0.707105, 0.707105, 0.707105])
    torch.testing.assert_close(blend.advantages[:, 0], expected, atol=6e-7, rtol=0)
    assert (blend.advantages[~f1.response_mask] == 0).all()
    torch.testing.assert_close(blend.weight, tensor([0.5, 0.5, 0.006693, 0.006693]), atol=5e-7, rtol=0)
    row_losses = surrogate.loss.masked_fill(~f1.response_mask, 0.0).sum(-1) / f1.response_mask.sum(-1)
    torch.testing.assert_close(row_losses, tensor([0.018889, 0.902817, -0.666315, -0.842847]), atol=6e-7, rtol=0)
    assert loss.item() == pytest.approx(-0.146864, abs=6e-7)


@pytest.mark.parametrize("mode", BlendMode)
def test_each_mode_weighs_as_its_name_says(mode):
    copo = COPO(mode=mode)
    # Rows: R != 0 and A != 0; R alone; A alone; neither. The entropy is the midpoint: s = 1/2.
    rewarded, differ = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    expected = {
        BlendMode.only_soft: [0.5, 0.5, 0.5, 0.5],
        BlendMode.soft_with_zero: [0.5, 0.5, 0.0, 0.0],
        BlendMode.soft_with_forced: [0.5, 0.0, 0.5, 0.0],
        BlendMode.only_forced: [1.0, 0.0, 1.0, 0.0],
        BlendMode.only_zero: [1.0, 1.0, 0.0, 0.0],
        BlendMode.only_global: [0.0, 0.0, 0.0, 0.0],
        BlendMode.no_global: [1.0, 1.0, 1.0, 1.0],
    }
    assert copo.weight(torch.ones(4, dtype=torch.float64), rewarded, differ).tolist() == expected[mode]


@pytest.mark.parametrize(("mode", "second"), [(BlendMode.no_global, False), (BlendMode.only_global, True)])
def test_a_weight_of_one_or_zero_is_the_one_loss_bit_for_bit(ragged, mode, second):
    group_ids, entropy = torch.tensor([0, 0, 1, 1, 2, 2]), tensor([1.0, 1.0, 0.0, 0.0, 0.5, 0.5])
    loss, surrogate, blend = blended_loss(ragged, COPO(mode=mode), group_ids=group_ids, entropy=entropy, logprobs=ragged.logprobs)
    (gradient,) = torch.autograd.grad(loss, ragged.logprobs)
    alone = OBJECTIVE(
        logprobs=ragged.logprobs,
        old_logprobs=ragged.old_logprobs,
        advantages=blend.advantages if second else group_advantages(ragged, group_ids),
        response_mask=ragged.response_mask,
    )
    denominators = Denominators.count(ragged.response_mask, max_response_tokens=4)
    expected = reduce(alone.loss, ragged.response_mask, aggregation=Aggregation.seq_mean_token_mean, denominators=denominators)
    assert torch.equal(loss, expected)
    assert torch.equal(surrogate.clipped, alone.clipped)
    assert torch.equal(gradient, torch.autograd.grad(expected, ragged.logprobs)[0])


def test_the_gradient_matches_finite_differences_and_is_the_blend_of_both(ragged):
    group_ids, entropy = torch.tensor([0, 0, 1, 1, 2, 2]), tensor([1.0, 1.0, 0.6, 0.6, 0.5, 0.5])
    clean = ragged.logprobs.detach().masked_fill(~ragged.response_mask, -1.0).requires_grad_()
    settings: dict[str, Any] = {"group_ids": group_ids, "entropy": entropy}
    assert torch.autograd.gradcheck(lambda x: blended_loss(ragged, COPO(), logprobs=x, **settings)[0], (clean,))
    gradients = {}
    for mode in (BlendMode.only_soft, BlendMode.no_global, BlendMode.only_global):
        loss, _, blend = blended_loss(ragged, COPO(mode=mode), logprobs=ragged.logprobs, **settings)
        gradients[mode] = torch.autograd.grad(loss, ragged.logprobs)[0]
        assert not blend.weight.requires_grad
        assert not blend.advantages.requires_grad
    weight = COPO().weight(entropy, entropy > 0, entropy > 0).unsqueeze(-1)
    expected = weight * gradients[BlendMode.no_global] + (1 - weight) * gradients[BlendMode.only_global]
    torch.testing.assert_close(gradients[BlendMode.only_soft], expected, atol=1e-15, rtol=1e-12)
    assert (gradients[BlendMode.only_soft][~ragged.response_mask] == 0).all()


@pytest.mark.parametrize("fill", [0.0, NAN, INF, -INF])
def test_what_masked_cells_hold_does_not_matter(ragged, fill):
    group_ids, entropy = torch.tensor([0, 0, 1, 1, 2, 2]), tensor([1.0, 1.0, 0.6, 0.6, 0.5, 0.5])
    advantages = group_advantages(ragged, group_ids)
    fields = {"rewards": ragged.rewards, "entropy": entropy, "response_mask": ragged.response_mask, "group_ids": group_ids}
    copo = COPO(mode=BlendMode.soft_with_forced)
    expected = copo(advantages=advantages, **fields)
    filled = copo(advantages=advantages.masked_fill(~ragged.response_mask, fill), **fields)
    assert torch.equal(filled.advantages, expected.advantages)
    assert torch.equal(filled.weight, expected.weight)
    order = torch.tensor([3, 5, 0, 4, 2, 1])
    permuted = copo(advantages=advantages[order], **{key: value[order] for key, value in fields.items()})
    torch.testing.assert_close(permuted.advantages, expected.advantages[order])
    torch.testing.assert_close(permuted.weight, expected.weight[order])


def test_no_prompt_advantage_is_none(f1):
    fields = {"rewards": f1.rewards, "entropy": f1.rewards, "response_mask": f1.response_mask}
    assert NoPromptAdvantage()(advantages=f1.advantages, group_ids=torch.tensor([0, 0, 1, 1]), **fields) is None


@pytest.mark.parametrize("key", ["sharpness", "midpoint"])
def test_settings_that_make_no_sense_say_what_to_write(key):
    settings: dict[str, Any] = {key: NAN}
    with pytest.raises(ConfigError, match=f"prompt_advantage.{key}=nan: write a finite number; sharpness=5"):
        COPO(**settings)
