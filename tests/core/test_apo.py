import math
from dataclasses import replace

import pytest
import torch

from rlkit.core.advantages import GroupNormalized
from rlkit.core.apo import DifficultyAdaptiveDivergence, NoResponseWeights, TrajectoryComplexity, difficulty
from rlkit.core.divergences import Estimator, ReverseKL
from rlkit.core.reduce import Aggregation, Denominators, reduce
from rlkit.errors import ConfigError

NAN, INF = float("nan"), float("inf")
DADS, STCR = DifficultyAdaptiveDivergence(), TrajectoryComplexity()


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def rows(lengths):
    return torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]


def weigh(weights, *, advantages, lengths, correct, group_ids=None):
    mask = rows(lengths)
    return weights(
        advantages=tensor(advantages)[:, None].expand(mask.shape).masked_fill(~mask, NAN),
        response_mask=mask,
        rewards=torch.tensor(correct, dtype=torch.float32),
        group_ids=torch.zeros(len(lengths), dtype=torch.int64) if group_ids is None else torch.tensor(group_ids),
    )


def test_the_divergence_is_relaxed_by_the_share_of_right_responses():
    expected = [1, 0.288077, 0.493165, 0.639173, 0.743119, 0.817120, 0.869804, 0.907310, 1]
    for num_correct in range(9):
        correct = [1] * num_correct + [0] * (8 - num_correct)
        found = weigh(DADS, advantages=[1.0] * 8, lengths=[2] * 8, correct=correct)
        torch.testing.assert_close(found, tensor([expected[num_correct]] * 8), atol=5e-7, rtol=0)


def test_only_responses_with_a_positive_advantage_get_room():
    found = weigh(DADS, advantages=[0.3, 0.0, -0.3, 1e-9], lengths=[1, 2, 3, 4], correct=[1, 0, 0, 0])
    room = 1 - math.exp(-math.e / 4)
    torch.testing.assert_close(found, tensor([room, 1.0, 1.0, room]), atol=1e-15, rtol=0)


@pytest.mark.parametrize(("excess", "weight"), [(0, 1.0), (100, 1.0009995), (1000, 1.0099501), (4096, 1.0401323), (-100, 1.0)])
def test_a_wrong_response_weighs_more_the_longer_it_is_than_the_right_ones(excess, weight):
    found = weigh(STCR, advantages=[1.0, -1.0], lengths=[200, 200 + excess], correct=[1, 0])
    torch.testing.assert_close(found, tensor([1.0, weight]), atol=5e-8, rtol=0)


def test_both_weights_of_a_worked_group():
    rewards, lengths, correct = tensor([1.5, 1.0, 0.5, 0.0]), [100, 300, 500, 150], [1, 1, 0, 0]
    mask = rows(lengths)
    token_rewards = torch.zeros(mask.shape, dtype=torch.float64)
    token_rewards[:, 0] = rewards
    group_ids = torch.zeros(4, dtype=torch.int64)
    estimate = GroupNormalized(std_eps=1e-9)(token_rewards=token_rewards, response_mask=mask, group_ids=group_ids)
    advantages = estimate.advantages[:, 0]
    torch.testing.assert_close(advantages, tensor([1.161895, 0.387298, -0.387298, -1.161895]), atol=5e-7, rtol=0)
    stcr = weigh(STCR, advantages=advantages.tolist(), lengths=lengths, correct=correct)
    torch.testing.assert_close(stcr, tensor([1.0, 1.0, 1.0029955, 1.0]), atol=5e-8, rtol=0)  # 500 against a mean of 200
    assert (stcr * advantages)[2].item() == pytest.approx(-0.388458, abs=6e-7)
    dads = weigh(DADS, advantages=(stcr * advantages).tolist(), lengths=lengths, correct=correct)
    torch.testing.assert_close(dads, tensor([0.743119, 0.743119, 1.0, 1.0]), atol=5e-7, rtol=0)


def test_a_long_wrong_response_with_a_positive_advantage_is_not_encouraged():
    settings = {"advantages": [1.0, 0.5, -1.0], "lengths": [100, 1100, 1100], "correct": [1, 0, 0]}
    torch.testing.assert_close(weigh(STCR, **settings), tensor([1.0, 1.0, 1.0099501]), atol=5e-8, rtol=0)
    as_published = weigh(replace(STCR, only_negative=False), **settings)
    torch.testing.assert_close(as_published, tensor([1.0, 1.0099501, 1.0099501]), atol=5e-8, rtol=0)


def test_without_a_right_response_there_is_no_length_to_compare_with():
    found = weigh(STCR, advantages=[-1.0, -1.0], lengths=[10, 4000], correct=[0, 0])
    assert found.tolist() == [1.0, 1.0]
    assert weigh(replace(STCR, base=1.0), advantages=[1.0, -1.0], lengths=[1, 900], correct=[1, 0]).tolist() == [1.0, 1.0]


def test_prompts_do_not_see_each_other_and_empty_rows_do_not_count():
    # Two groups, interleaved; the last row is empty and marked right: neither its length nor its mark may count.
    settings = {
        "advantages": [1.0, 1.0, -1.0, -1.0, 1.0],
        "lengths": [100, 40, 1100, 30, 0],
        "correct": [1, 0, 0, 0, 1],
        "group_ids": [7, 3, 7, 3, 3],
    }
    found = weigh(STCR, **settings)
    torch.testing.assert_close(found, tensor([1.0, 1.0, 1.0099501, 1.0, 1.0]), atol=5e-8, rtol=0)
    found = weigh(DADS, **settings)
    torch.testing.assert_close(found, tensor([1 - math.exp(-math.e / 2), 1.0, 1.0, 1.0, 1.0]), atol=1e-15, rtol=0)
    mask, correct = rows(settings["lengths"]), torch.tensor(settings["correct"], dtype=torch.bool)
    found = difficulty(correct, mask, torch.tensor(settings["group_ids"]))
    assert found.tolist() == [0.5, 1.0, 0.5, 1.0, 0.0]


def test_the_advantage_looked_at_is_that_of_the_first_response_token():
    mask = torch.tensor([[False, True, True], [True, True, False]])
    advantages = tensor([[NAN, 0.5, -9.0], [-0.5, 9.0, INF]])
    rewards, group_ids = torch.tensor([1.0, 0.0]), torch.zeros(2, dtype=torch.int64)
    found = DADS(advantages=advantages, response_mask=mask, rewards=rewards, group_ids=group_ids)
    torch.testing.assert_close(found, tensor([1 - math.exp(-math.e / 2), 1.0]), atol=1e-15, rtol=0)


def divergence_loss(batch, weights, logprobs):
    """The k3 penalty, weighed per response, mean over rows of their means."""
    loss = ReverseKL(estimator=Estimator.k3).loss(
        logprobs=logprobs,
        behaviour_logprobs=batch.old_logprobs,
        ref_logprobs=batch.ref_logprobs,
        response_mask=batch.response_mask,
    )
    assert loss is not None
    weighed = loss if weights is None else loss * weights.unsqueeze(-1)
    denominators = Denominators.count(batch.response_mask, max_response_tokens=4)
    return reduce(weighed, batch.response_mask, aggregation=Aggregation.seq_mean_token_mean, denominators=denominators)


def test_the_weighed_divergence_has_the_worked_value_and_the_weighed_gradient(f1):
    fields = {
        "advantages": f1.advantages.clone().requires_grad_(),
        "response_mask": f1.response_mask,
        "rewards": f1.rewards,
        "group_ids": torch.tensor([0, 0, 1, 1]),
    }
    weights = DADS(**fields)
    assert not weights.requires_grad
    assert not STCR(**fields).requires_grad
    torch.testing.assert_close(weights, tensor([0.743119, 1.0, 1.0, 1.0]), atol=5e-7, rtol=0)
    assert divergence_loss(f1, weights, f1.logprobs).item() == pytest.approx(0.0757796, abs=5e-8)
    assert NoResponseWeights()(**fields) is None
    assert divergence_loss(f1, None, f1.logprobs).item() == pytest.approx(0.0760574, abs=5e-8)
    weighed, plain = (torch.autograd.grad(divergence_loss(f1, chosen, f1.logprobs), f1.logprobs)[0] for chosen in (weights, None))
    torch.testing.assert_close(weighed, weights.unsqueeze(-1) * plain, atol=1e-15, rtol=1e-12)
    assert (weighed[~f1.response_mask] == 0).all()
    clean = f1.logprobs.detach().masked_fill(~f1.response_mask, -1.0).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: divergence_loss(f1, weights, x), (clean,))


@pytest.mark.parametrize("fill", [0.0, NAN, INF, -INF])
@pytest.mark.parametrize("weights", [DADS, STCR, replace(STCR, only_negative=False, base=1.1)])
def test_masked_cells_and_the_order_of_rows_do_not_matter(ragged, weights, fill):
    fields = {
        "advantages": ragged.advantages,
        "response_mask": ragged.response_mask,
        "rewards": torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0]),
        "group_ids": torch.tensor([0, 0, 1, 1, 0, 1]),
    }
    expected = weights(**fields)
    filled = weights(**fields | {"advantages": ragged.advantages.masked_fill(~ragged.response_mask, fill)})
    assert torch.equal(filled, expected)
    assert expected.isfinite().all()
    order = torch.tensor([3, 5, 0, 4, 2, 1])
    torch.testing.assert_close(weights(**{key: value[order] for key, value in fields.items()}), expected[order])


def test_a_base_that_makes_no_sense_says_what_to_write():
    for base in (0.99, NAN, INF):
        with pytest.raises(ConfigError, match=rf"advantage_weights.base={base}: write 1 \(no weights\) or a little more"):
            TrajectoryComplexity(base=base)
