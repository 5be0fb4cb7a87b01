import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from rlkit.core.aepo import Aepo, NoTempering, TemperedUse, TemperingState
from rlkit.core.reduce import Denominators, reduce
from rlkit.errors import ConfigError

NAN, INF = float("nan"), float("inf")
LOW, HIGH = TemperingState(entropy=0.45), TemperingState(entropy=0.9)


def value_of(term, denominators=None):
    denominators = denominators or Denominators.count(term.mask, max_response_tokens=9)
    return reduce(term.loss, term.mask, aggregation=term.aggregation, denominators=denominators)


def test_the_temperature_is_high_up_to_the_target_and_low_above_it():
    aepo = Aepo(target=0.5)
    assert aepo.temperature(aepo.initial()) == 1.2  # nothing measured yet counts as low
    assert [aepo.temperature(TemperingState(entropy=entropy)) for entropy in (0.3, 0.5, 0.50001, 2.0)] == [1.2, 1.2, 0.8, 0.8]
    assert NoTempering().temperature(HIGH) == 1.0
    assert NoTempering().needs == frozenset()


def test_the_state_is_the_newest_finite_entropy_and_survives_json():
    aepo = Aepo()
    state = aepo.update(aepo.initial(), 0.1 + 0.2)
    assert state.entropy == 0.1 + 0.2
    for broken in (NAN, INF, -INF):
        assert aepo.update(state, broken) is state
    assert replace(aepo.initial(), **json.loads(json.dumps(asdict(state)))) == state


def test_a_quarter_of_the_prompts_is_sampled_once_more_unless_nothing_is():
    assert [Aepo().num_prompts(prompts) for prompts in (512, 7, 3)] == [128, 1, 0]
    assert Aepo(use=TemperedUse.dcpo).num_prompts(512) == 0
    assert Aepo().needs == {"tempered_rollouts"}
    assert Aepo(use=TemperedUse.replace).needs == {"tempered_rollouts", "old_pass"}
    assert Aepo(use=TemperedUse.dcpo).needs == {"tempered_old_logprobs", "old_pass"}


@pytest.mark.parametrize(("state", "count"), [(LOW, 60), (HIGH, 30)], ids=["low", "high"])
def test_good_tempered_samples_take_the_place_of_the_batchs_first(state, count):
    advantages = torch.full((130,), -0.5)
    advantages[5:125:2] = 0.7  # 60 good ones, the first at 5 ...
    advantages[[0, 1, 2, 3, *range(6, 78, 2)]] = 0.06  # ... and 40 more
    advantages[4] = 0.05  # not above the bound
    good = (advantages > 0.05).nonzero().squeeze(-1)
    assert len(good) == 100
    joined = Aepo(use=TemperedUse.replace).join(advantages, num_main=2560, state=state)
    assert torch.equal(joined.tempered, good[:count])
    assert torch.equal(joined.main, torch.arange(count, 2560))


def test_as_many_rows_are_trained_on_whatever_is_replaced():
    aepo = Aepo(use=TemperedUse.replace)
    for good, state, count in ((0, LOW, 0), (1, HIGH, 0), (7, LOW, 7), (7, HIGH, 3)):
        advantages = torch.cat([torch.ones(good), -torch.ones(9)])
        joined = aepo.join(advantages, num_main=10, state=state)
        assert (len(joined.tempered), len(joined.main)) == (count, 10 - count)
    joined = aepo.join(torch.ones(40), num_main=10, state=LOW)
    assert (len(joined.tempered), len(joined.main)) == (10, 0)
    assert len(Aepo(use=TemperedUse.replace, max_samples=0).join(torch.ones(40), num_main=10, state=LOW).tempered) == 0


def test_every_good_tempered_sample_joins_a_whole_batch_in_the_additive_form():
    joined = Aepo().join(torch.tensor([0.7, -0.7, 0.05, 0.06]), num_main=3, state=HIGH)
    assert joined.tempered.tolist() == [0, 3]
    assert joined.main.tolist() == [0, 1, 2]


TEMPERED = torch.tensor([False, True, False, True, True, False])  # the fifth row of `ragged` is empty


def test_the_additive_term_is_the_mean_negative_logprob_of_the_tempered_rows_tokens(ragged):
    term = Aepo(coef=0.07).term(logprobs=ragged.logprobs, mask=ragged.response_mask & TEMPERED.unsqueeze(-1))
    assert (term.name, term.coef) == ("aepo", 0.07)
    mask = ragged.response_mask & TEMPERED[:, None]
    assert torch.equal(term.mask, mask)
    assert value_of(term).item() == pytest.approx(-ragged.logprobs[mask].mean().item())
    (gradient,) = torch.autograd.grad(value_of(term), ragged.logprobs)
    torch.testing.assert_close(gradient, -mask.double() / mask.sum(), rtol=0, atol=1e-12)


def test_the_additive_term_without_tempered_rows_is_zero_and_attached(ragged):
    term = Aepo().term(logprobs=ragged.logprobs, mask=torch.zeros_like(ragged.response_mask))
    (gradient,) = torch.autograd.grad(value_of(term), ragged.logprobs)
    assert value_of(term).item() == 0
    assert gradient.eq(0).all()


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 3, 1], [5, 1]], ids=str)
def test_the_additive_term_does_not_depend_on_how_the_step_is_split(ragged, sizes):
    whole = Aepo().term(logprobs=ragged.logprobs, mask=ragged.response_mask & TEMPERED.unsqueeze(-1))
    denominators = Denominators.count(whole.mask, max_response_tokens=9)
    parts = zip(*(x.split(sizes) for x in (ragged.logprobs, ragged.response_mask, TEMPERED)), strict=True)
    values = [value_of(Aepo().term(logprobs=a, mask=b & c.unsqueeze(-1)), denominators) for a, b, c in parts]
    assert torch.stack(values).sum().item() == pytest.approx(value_of(whole).item(), abs=1e-12)


@pytest.mark.parametrize(
    ("temperature", "expected"), [(1.2, 0.00127726), (0.8, -0.00166665), (1.0, 0.0)], ids=["hotter", "colder", "as it is"]
)
def test_imitating_tempered_samples_moves_the_entropy_to_the_side_of_their_temperature(temperature, expected):
    # By enumeration: the term's expected gradient in the logits under samples at that temperature, and a step of .05 down it.
    logits = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64).log().requires_grad_()
    ones = torch.ones(1, 3, dtype=torch.bool)
    term = Aepo().term(logprobs=logits.log_softmax(-1)[None], mask=ones)
    (gradient,) = torch.autograd.grad(((logits.detach() / temperature).softmax(-1) * term.loss[0]).sum(), logits)
    before, after = (torch.distributions.Categorical(logits=z).entropy() for z in (logits, logits - 0.05 * gradient))
    assert (after - before).item() == pytest.approx(expected, abs=1e-8)


def blend(aepo, batch, *, state, rewards=None, tempered=None, rows: Any = slice(None), **override: Any):
    fields = {
        "advantages": batch.advantages,
        "old_logprobs": batch.old_logprobs,
        "tempered_old_logprobs": batch.rollout_logprobs if tempered is None else tempered,
        "rewards": batch.rewards if rewards is None else rewards,
        "response_mask": batch.response_mask,
    } | override
    return aepo.blend(**{name: x[rows] for name, x in fields.items()}, state=state)


@pytest.mark.parametrize(("entropy", "share"), [(0.45, 1 / 6), (0.3, 2 / 7), (0.9, 2 / 7), (0.5, 0.0)])
def test_dcpos_share_grows_with_the_distance_from_the_target_up_to_a_tenth(f1, entropy, share):
    # One response in four is good: a0 = min(|.5 - entropy|, .1) / .25.
    rewards, aepo = torch.tensor([0.0, 0.0, 0.05, 1.0], dtype=torch.float64), Aepo(use=TemperedUse.dcpo)
    blended = blend(aepo, f1, state=TemperingState(entropy=entropy), rewards=rewards)
    factor = (f1.rollout_logprobs - f1.old_logprobs).exp()
    expected = (1 - share) * f1.advantages + share * rewards.gt(0.5)[:, None] * factor
    torch.testing.assert_close(blended, expected.masked_fill(~f1.response_mask, 0.0))


def test_dcpo_at_the_sampling_temperature_adds_the_same_to_every_token_of_a_good_response(f1):
    aepo = Aepo(use=TemperedUse.dcpo)
    blended = blend(aepo, f1, state=LOW, tempered=f1.old_logprobs)
    share = (0.05 / 0.75) / (1 + 0.05 / 0.75)  # three of four are good
    expected = (1 - share) * f1.advantages + share * torch.tensor([[1.0], [0.0], [1.0], [1.0]])
    torch.testing.assert_close(blended, expected.masked_fill(~f1.response_mask, 0.0))


def test_dcpo_without_a_good_response_leaves_the_advantages_as_they_are(f1):
    blended = blend(Aepo(use=TemperedUse.dcpo), f1, state=HIGH, rewards=torch.zeros(4))
    assert torch.equal(blended, f1.advantages.masked_fill(~f1.response_mask, 0.0))


def test_blended_advantages_follow_their_rows_and_ignore_garbage_and_empty_rows(ragged):
    aepo, mask = Aepo(use=TemperedUse.dcpo), ragged.response_mask
    given = {"state": HIGH, "rewards": torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0], dtype=torch.float64)}  # row 4 is empty
    blended = blend(aepo, ragged, **given)
    assert blended[~mask].eq(0).all()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(blend(aepo, ragged, **given, rows=order), blended[order])
    torch.testing.assert_close(blend(aepo, ragged, **given, rows=[0, 1, 2, 3, 5]), blended[[0, 1, 2, 3, 5]])
    names = ("advantages", "old_logprobs")
    for garbage in (0.0, INF, -INF):
        dirty = {name: getattr(ragged, name).masked_fill(~mask, garbage) for name in names}
        assert torch.equal(blend(aepo, ragged, **given, **dirty), blended)


def test_no_gradient_reaches_the_blended_advantages(f1):
    leaves = {name: getattr(f1, name).clone().requires_grad_() for name in ("advantages", "old_logprobs")}
    assert not blend(Aepo(use=TemperedUse.dcpo), f1, state=HIGH, **leaves).requires_grad


def test_garbage_in_masked_cells_of_the_additive_term_reaches_nothing(ragged):
    mask = ragged.response_mask & TEMPERED[:, None]
    results = []
    for garbage in (0.0, NAN, INF, -INF):
        logprobs = ragged.logprobs.detach().masked_fill(~mask, garbage).requires_grad_()
        value = value_of(Aepo().term(logprobs=logprobs, mask=ragged.response_mask & TEMPERED.unsqueeze(-1)))
        (gradient,) = torch.autograd.grad(value, logprobs)
        assert gradient[~mask].eq(0).all()
        results.append((value.item(), gradient))
    assert all(value == results[0][0] and torch.equal(gradient, results[0][1]) for value, gradient in results)


@pytest.mark.parametrize(
    "settings",
    [
        {"target": -0.1},
        {"coef": -1.0},
        {"max_samples": -1},
        {"high_temperature": 0.9},
        {"low_temperature": 0.0},
        {"low_temperature": 1.1},
        {"prompt_fraction": 0.0},
    ],
    ids=str,
)
def test_impossible_settings_are_refused_by_name(settings):
    ((name, value),) = settings.items()
    with pytest.raises(ConfigError, match=rf"tempering\.{name}={value}: write"):
        Aepo(**settings)
