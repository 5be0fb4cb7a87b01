"""The rules of moving references on single numbers and small tensors, and the mixtures of frozen ones by enumeration."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlkit.core.logprobs import token_statistics
from rlkit.core.references import (
    BEMAReference,
    EMAReference,
    GeometricMixture,
    MovingReference,
    Refresh,
    SoftRefresh,
    Soup,
    Weights,
    average,
    side_by_side,
)
from rlkit.errors import ConfigError


def number(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def follow(rule: MovingReference, policies: dict[int, float], *, initial: float = 0.0) -> Weights:
    """The reference's one number after the policy's at these steps."""
    weights = rule.start(number(initial))
    for step, policy in policies.items():
        weights = rule.update(weights, policy=number(policy), initial=number(initial), step=step)
    return weights


def test_soft_refresh_goes_its_share_of_the_way():
    assert follow(SoftRefresh(), {512: 1.0}).ref.item() == pytest.approx(0.6)
    assert follow(SoftRefresh(), {512: 1.0, 1024: 1.0}).ref.item() == pytest.approx(0.84)
    # n times towards a policy that stays: 1 - (1 - alpha)^n
    assert follow(SoftRefresh(alpha=0.3), dict.fromkeys(range(1, 8), 1.0)).ref.item() == pytest.approx(1 - 0.7**7)


def test_soft_refresh_by_all_of_the_way_is_refresh_to_the_last_bit():
    policy, ref = torch.randn(50), torch.randn(50)
    whole = SoftRefresh(alpha=1.0).update(Weights(ref), policy=policy, initial=None, step=1)
    assert torch.equal(whole.ref, policy)
    assert torch.equal(Refresh().update(Weights(ref), policy=policy, initial=None, step=1).ref, policy)


def test_ema_is_the_weighted_sum_of_all_policies_so_far():
    policies = [0.3, -1.0, 2.0, 0.7]
    expected = 0.9**4 * 5.0 + sum(0.1 * 0.9 ** (3 - index) * policy for index, policy in enumerate(policies))
    found = follow(EMAReference(decay=0.9), dict(enumerate(policies, start=1)), initial=5.0)
    assert found.ref.item() == pytest.approx(expected)
    assert found.average is None


def test_bema_by_its_formulas():
    rule = BEMAReference()
    assert rule.rates(90) == (pytest.approx(0.398107, abs=1e-6), pytest.approx(0.1))
    # one update at step 90 from 0 to 1: average .1, reference .1 + .398107 * 1
    first = follow(rule, {90: 1.0})
    assert first.average is not None
    assert first.average.item() == pytest.approx(0.1)
    assert first.ref.item() == pytest.approx(0.498107, abs=1e-6)
    # a second at step 390, rho + t = 400: b = .05, a = 400^-.2 = .301709; the average goes on from .1, not from the reference
    second = follow(rule, {90: 1.0, 390: 3.0})
    assert second.average is not None
    assert second.average.item() == pytest.approx(0.95 * 0.1 + 0.05 * 3)
    assert second.ref.item() == pytest.approx(0.245 + 0.301709 * 3, abs=1e-5)


def test_bema_of_a_policy_that_never_moved_is_the_initial_model():
    assert follow(BEMAReference(), {400: 2.5, 800: 2.5}, initial=2.5).ref.item() == pytest.approx(2.5)


def test_bema_without_a_correction_is_an_average_alone():
    found = follow(BEMAReference(eta=100.0), {90: 1.0, 390: 3.0})  # a = 100^-100
    assert found.average is not None
    assert found.ref.item() == pytest.approx(found.average.item())


@pytest.mark.parametrize("rule", [Refresh(), SoftRefresh(), EMAReference(), BEMAReference()])
def test_an_update_changes_none_of_its_inputs(rule: MovingReference):
    initial, policy = torch.randn(4), torch.randn(4)
    given = rule.start(initial.clone()), policy.clone(), initial.clone()
    before = [each.clone() for each in (given[0].ref, *given[1:])]
    after = rule.update(given[0], policy=given[1], initial=given[2], step=3)
    for kept, was in zip((given[0].ref, *given[1:]), before, strict=True):
        assert torch.equal(kept, was)
    if given[0].average is not None:
        assert torch.equal(given[0].average, initial)
    assert after.ref.shape == initial.shape


def test_when_they_are_due():
    assert [step for step in range(9) if Refresh(every=4).due(step)] == [4, 8]
    assert [step for step in range(9) if BEMAReference(every=3).due(step)] == [3, 6]
    assert [step for step in range(4) if EMAReference().due(step)] == [1, 2, 3]
    assert BEMAReference().every == 400
    assert SoftRefresh().every == 512


def test_a_soup_is_the_average_of_its_models():
    assert average([number(0.2), number(0.6)], [0.25, 0.75]).item() == pytest.approx(0.5)
    same = torch.randn(30)
    assert torch.equal(average([same, same], Soup(paths=["a", "a"]).shares), same)  # halves are exact
    assert torch.equal(average([same, torch.randn(30)], [1.0, 0.0]), same)  # and so is one model alone
    three = Soup(paths=["a", "b", "c"])
    assert three.shares == pytest.approx([1 / 3] * 3)
    assert average([number(1), number(2), number(6)], three.shares).item() == pytest.approx(3)


def test_a_soup_of_bfloat16_models_is_averaged_in_float32():
    one, other = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0078125], dtype=torch.bfloat16)  # neighbours
    assert average([one, other], [0.5, 0.5]).item() == 1.00390625  # between them, where bfloat16 has no number


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_geometric_mixture_is_that_of_whole_distributions(temperature: float):
    torch.manual_seed(0)
    first, second = torch.randn(7, 5, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
    heads = torch.randn(11, 5, dtype=torch.float64), torch.randn(11, 3, dtype=torch.float64)
    share, targets = 0.3, torch.arange(7)
    a, b = ((hidden @ head.T / temperature).log_softmax(-1) for hidden, head in zip((first, second), heads, strict=True))
    expected = ((1 - share) * a + share * b).log_softmax(-1)
    found = token_statistics(
        side_by_side(first, second, share=share), torch.cat(heads, 1), targets, temperature=temperature, chunk_tokens=2
    )
    torch.testing.assert_close(found.logprobs, expected.gather(1, targets.unsqueeze(1)).squeeze(1))


@pytest.mark.parametrize(
    ("build", "sentence"),
    [
        (lambda: Refresh(every=0), "reference.every=0: write 1"),
        (lambda: SoftRefresh(alpha=0.0), "reference.alpha=0.0: not a share of the way to the policy."),
        (lambda: EMAReference(decay=1.0), r"reference.decay=1.0: write a number in \[0, 1\), or reference=initial"),
        (lambda: BEMAReference(kappa=-1.0), "reference.kappa=-1.0: write 0 or more"),
        (lambda: BEMAReference(rho=0.5), "reference.rho=0.5: the first steps would go beyond the policy."),
        (lambda: Soup(paths=["a"]), r"reference.paths=\[a\]: an average needs two models."),
        (lambda: Soup(paths=["a", "b"], weights=[1.0]), r"reference.weights=\[1.0\]: 1 shares for the 2 models"),
        (lambda: Soup(paths=["a", "b"], weights=[0.5, 0.6]), r"reference.weights=\[0.5, 0.6\]: not shares of one model."),
        (lambda: Soup(paths=["a", "b"], weights=[1.5, -0.5]), "not shares of one model."),
        (lambda: GeometricMixture(path="a", share=1.0), "reference.share=1.0: one model alone."),
    ],
)
def test_what_is_refused(build, sentence: str):
    with pytest.raises(ConfigError, match=sentence):
        build()
