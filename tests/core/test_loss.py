from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from rlkit.core.copo import Blend
from rlkit.core.divergences import Estimator, NoDivergence, ReverseKL
from rlkit.core.entropy import EntropyBonus, NoEntropy
from rlkit.core.loss import Knobs, Strategy
from rlkit.core.objectives import CISPO, GMPO, GSPO, ClippedSurrogate, Surrogate
from rlkit.core.ratios import Bypass, Correction, NoCorrection, Weights
from rlkit.core.reduce import Aggregation, Denominators, reduce
from rlkit.core.selectors import NoSelector, Scope, Selector
from rlkit.core.weights import HighEntropy

NAN = float("nan")


@dataclass(kw_only=True, slots=True)
class Truncated(Correction):
    """min(old / rollout, 2) per token; the mask stays."""

    needs: ClassVar[frozenset[str]] = frozenset({"rollout_logprobs"})

    def __call__(self, *, old_logprobs, rollout_logprobs, response_mask):
        log_ratio = torch.where(response_mask, old_logprobs - rollout_logprobs, 0.0)
        return Weights(weight=log_ratio.exp().clamp(max=2.0), keep=response_mask)


@dataclass(kw_only=True, slots=True)
class DropLastRow(Correction):
    """Weight one everywhere, but the last response does not train."""

    def __call__(self, *, old_logprobs, rollout_logprobs, response_mask):
        keep = response_mask.clone()
        keep[-1] = False
        return Weights(weight=torch.ones_like(old_logprobs), keep=keep)


@dataclass(kw_only=True, slots=True)
class AddTen(Selector):
    """A selector whose effect shows whether the weights came after it."""

    def choose(self, *, response_mask, **_):
        return response_mask

    def apply(self, surrogate, chosen, **_):
        return Surrogate(loss=surrogate.loss + 10.0, clipped=surrogate.clipped)


PLAIN = Strategy(
    objective=ClippedSurrogate(),
    selector=NoSelector(),
    correction=NoCorrection(),
    divergence=NoDivergence(),
    entropy=NoEntropy(),
    aggregation=Aggregation.token_mean,
)
FULL = replace(PLAIN, correction=Truncated(), divergence=ReverseKL(estimator=Estimator.k2), entropy=EntropyBonus())


def build(strategy, batch, *, rows=slice(None), divergence_coef=None, entropy_coef=None, clip_high=None, **override):
    fields = {
        "logprobs": batch.logprobs,
        "old_logprobs": batch.old_logprobs,
        "rollout_logprobs": batch.rollout_logprobs,
        "advantages": batch.advantages,
        "response_mask": batch.response_mask,
    }
    if not isinstance(strategy.divergence, NoDivergence):
        fields["ref_logprobs"] = batch.ref_logprobs
    if not isinstance(strategy.entropy, NoEntropy):
        fields["entropy"] = batch.entropy
    fields = {name: x[rows] for name, x in (fields | override).items()}
    return strategy.terms(**fields, knobs=Knobs(divergence_coef=divergence_coef, entropy_coef=entropy_coef, clip_high=clip_high))


def denominators_of(term):
    return Denominators.count(term.mask, max_response_tokens=9)


def value_of(term, denominators=None):
    return reduce(term.loss, term.mask, aggregation=term.aggregation, denominators=denominators or denominators_of(term))


def total(terms):
    return torch.stack([term.coef * value_of(term) for term in terms]).sum()


def test_without_options_there_is_the_policy_term_alone(f1):
    step = build(PLAIN, f1)
    (policy,) = step.terms
    assert (policy.name, policy.coef, policy.aggregation) == ("policy", 1.0, Aggregation.token_mean)
    assert torch.equal(policy.mask, f1.response_mask)
    assert torch.equal(step.keep, f1.response_mask)
    assert value_of(policy).item() == pytest.approx(-0.214926, abs=1e-6)
    assert (step.surrogate.clipped & f1.response_mask).nonzero().tolist() == [[0, 1]]


def test_a_token_weight_within_the_microbatch_multiplies_the_policy_term_alone(f1):
    weighted = replace(FULL, token_weight=HighEntropy(fraction=0.2, scope=Scope.micro))
    plain, terms = (build(strategy, f1, divergence_coef=0.05, entropy_coef=0.01).terms for strategy in (FULL, weighted))
    selected = [[0, 2], [3, 0]]
    assert (terms[0].loss != 0).nonzero().tolist() == selected
    assert all(terms[0].loss[row, column] == plain[0].loss[row, column] for row, column in selected)
    assert torch.equal(terms[0].mask, plain[0].mask)
    for mine, theirs in zip(terms[1:], plain[1:], strict=True):
        assert torch.equal(mine.loss[f1.response_mask], theirs.loss[f1.response_mask])


def test_a_second_advantage_is_blended_in_before_anything_looks_at_the_loss(f1):
    """The worked numbers of COPO: row losses .018889, .902817, -.666315, -.842847."""
    strategy = replace(PLAIN, objective=ClippedSurrogate(dual_clip=3.0), aggregation=Aggregation.seq_mean_token_mean)
    local = torch.tensor([0.707106, -0.707106, 0.0, 0.0]).unsqueeze(-1).expand(f1.response_mask.shape)
    second = torch.tensor([-0.707105, -0.707105, 0.707105, 0.707105]).unsqueeze(-1).expand(f1.response_mask.shape)
    blend = Blend(advantages=second, weight=torch.tensor([0.5, 0.5, 0.006693, 0.006693]))
    fields = {"logprobs": f1.logprobs, "old_logprobs": f1.old_logprobs, "rollout_logprobs": f1.rollout_logprobs}
    step = strategy.terms(**fields, advantages=local, response_mask=f1.response_mask, knobs=Knobs(), blend=blend)
    assert value_of(step.terms[0]).item() == pytest.approx(-0.146864, abs=2e-6)


def test_a_response_weight_multiplies_its_divergence_alone(f1):
    weight = torch.tensor([0.5, 1.0, 2.0, 0.0])
    plain = build(FULL, f1, divergence_coef=0.05, entropy_coef=0.01).terms
    fields = {name: getattr(f1, name) for name in ("logprobs", "old_logprobs", "rollout_logprobs", "advantages", "response_mask")}
    fields |= {"ref_logprobs": f1.ref_logprobs, "entropy": f1.entropy, "divergence_weight": weight}
    terms = FULL.terms(**fields, knobs=Knobs(divergence_coef=0.05, entropy_coef=0.01)).terms
    mask = f1.response_mask
    assert torch.equal(terms[1].loss[mask], (plain[1].loss * weight.unsqueeze(-1))[mask])
    assert all(torch.equal(terms[number].loss[mask], plain[number].loss[mask]) for number in (0, 2))


def test_bypass_compares_with_the_engine_and_weighs_nothing(f1):
    """The worked numbers: clipped at 0.2 on both sides, and REINFORCE with a weight of at most 2."""
    of_engine = {"old_logprobs": f1.rollout_logprobs}
    for objective, expected in ((ClippedSurrogate(), -0.029168), (CISPO(clip_high=1.0), 0.056905)):
        (policy,) = build(replace(PLAIN, objective=objective, correction=Bypass()), f1, **of_engine).terms
        assert value_of(policy).item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("objective", [ClippedSurrogate(), GSPO(clip_low=0.2, clip_high=0.4), GMPO(), CISPO(clip_high=0.9)])
def test_a_threshold_from_a_controller_takes_the_place_of_the_objectives_own(f1, objective):
    strategy = replace(PLAIN, objective=objective)
    good = {"advantages": f1.advantages.abs()}  # an upper bound holds them alone
    own = build(replace(PLAIN, objective=replace(objective, clip_high=0.05)), f1, **good)
    given, before = build(strategy, f1, clip_high=0.05, **good), build(strategy, f1, **good)
    assert torch.equal(given.terms[0].loss, own.terms[0].loss)
    assert torch.equal(given.surrogate.clipped, own.surrogate.clipped)
    assert not torch.equal(before.terms[0].loss, given.terms[0].loss)
    assert strategy.objective is objective
    assert objective.clip_high > 0.05  # the setting itself stays


def test_a_higher_threshold_gives_the_worked_number_in_both_halves_of_a_blend(f1):
    """Token (0, 1) held at 1.28, not 1.2: -.222926."""
    assert value_of(build(PLAIN, f1, clip_high=0.28).terms[0]).item() == pytest.approx(-0.222926, abs=1e-6)
    names = ("logprobs", "old_logprobs", "rollout_logprobs", "advantages", "response_mask")
    same = Blend(advantages=f1.advantages, weight=torch.tensor([0.5, 0.1, 0.9, 0.0]))
    step = PLAIN.terms(**{name: getattr(f1, name) for name in names}, knobs=Knobs(clip_high=0.28), blend=same)
    assert value_of(step.terms[0]).item() == pytest.approx(-0.222926, abs=1e-6)


def test_terms_come_in_order_each_with_its_own_coefficient(f1):
    terms = build(FULL, f1, divergence_coef=0.05, entropy_coef=0.01).terms
    assert [(term.name, term.coef) for term in terms] == [("policy", 1.0), ("divergence", 0.05), ("entropy", 0.01)]


def test_the_whole_loss_of_ten_tokens_worked_out_by_hand(f1):
    # Weights min(old / rollout, 2) = [[1, 1.221403, .406570, 1], [2, .951229], [1, 2, .818731], [.135335]] on the clipped losses:
    # -.140256; k2 is worth .057770, the entropy 1.09.
    terms = build(FULL, f1, divergence_coef=0.05, entropy_coef=0.01).terms
    assert [value_of(term).item() for term in terms] == pytest.approx([-0.140256, 0.057770, -1.09], abs=1e-6)
    assert total(terms).item() == pytest.approx(-0.140256 + 0.05 * 0.057770 - 0.01 * 1.09, abs=1e-6)


def test_the_entropy_bonus_is_added_to_the_unweighted_loss(f1):
    terms = build(replace(PLAIN, entropy=EntropyBonus()), f1, entropy_coef=0.01).terms
    assert total(terms).item() == pytest.approx(-0.225826, abs=1e-6)  # -.214926 - .01 * 1.09


def test_off_policy_weights_touch_the_policy_term_only(f1):
    weighted = build(FULL, f1, divergence_coef=0.05, entropy_coef=0.01).terms
    bare = build(replace(FULL, correction=NoCorrection()), f1, divergence_coef=0.05, entropy_coef=0.01).terms
    mask = f1.response_mask
    weight = (f1.old_logprobs - f1.rollout_logprobs).exp().clamp(max=2.0)
    torch.testing.assert_close(weighted[0].loss[mask], (weight * bare[0].loss)[mask])
    for with_weight, without in zip(weighted[1:], bare[1:], strict=True):
        torch.testing.assert_close(with_weight.loss[mask], without.loss[mask], rtol=0, atol=0)


def test_weights_multiply_after_the_selector_has_acted(f1):
    # Selection first (it changes the loss), then weights: w * (L + 10), not w * L + 10.
    mask = f1.response_mask
    weight = (f1.old_logprobs - f1.rollout_logprobs).exp().clamp(max=2.0)
    plain = build(PLAIN, f1).terms[0].loss
    both = build(replace(PLAIN, selector=AddTen(), correction=Truncated()), f1).terms[0].loss
    torch.testing.assert_close(both[mask], (weight * (plain + 10.0))[mask])


def test_what_the_selector_did_shows_in_the_step(f1):
    step = build(replace(PLAIN, selector=AddTen()), f1)
    torch.testing.assert_close(step.terms[0].loss[f1.response_mask], build(PLAIN, f1).terms[0].loss[f1.response_mask] + 10.0)


def test_a_row_that_the_correction_drops_leaves_the_policy_term_and_its_denominator_only(f1):
    strategy = replace(FULL, correction=DropLastRow())
    step = build(strategy, f1, divergence_coef=0.05, entropy_coef=0.01)
    policy, divergence, entropy = step.terms
    kept = f1.response_mask.clone()
    kept[3] = False
    assert torch.equal(policy.mask, kept)
    assert torch.equal(step.keep, kept)
    assert torch.equal(divergence.mask, f1.response_mask)
    assert torch.equal(entropy.mask, f1.response_mask)
    # Row 3 held one token of loss .5 * 1.221403: (-2.14925589 - .61070138) / 9
    assert value_of(policy).item() == pytest.approx((-2.14925589 - 0.61070138) / 9, abs=1e-6)
    assert value_of(entropy).item() == pytest.approx(-1.09)


def test_a_token_pushes_the_policy_as_hard_as_its_weight_says(f1):
    weighted = torch.autograd.grad(value_of(build(replace(PLAIN, correction=Truncated()), f1).terms[0]), f1.logprobs)[0]
    bare = torch.autograd.grad(value_of(build(PLAIN, f1).terms[0]), f1.logprobs)[0]
    weight = torch.where(f1.response_mask, f1.old_logprobs - f1.rollout_logprobs, 0.0).exp().clamp(max=2.0)
    torch.testing.assert_close(weighted, weight * bare)


def test_garbage_in_masked_cells_of_the_weights_stays_there(f1):
    @dataclass(kw_only=True, slots=True)
    class Dirty(Correction):
        def __call__(self, *, old_logprobs, rollout_logprobs, response_mask):
            return Weights(weight=(old_logprobs - rollout_logprobs).exp().clamp(max=2.0), keep=response_mask)  # NaN off the mask

    dirty, clean = (build(replace(PLAIN, correction=correction), f1).terms for correction in (Dirty(), Truncated()))
    assert dirty[0].loss.isfinite().all()
    losses = [total(dirty), total(clean)]
    assert losses[0].item() == losses[1].item()
    assert torch.equal(*(torch.autograd.grad(loss, f1.logprobs)[0] for loss in losses))


def test_coefficients_of_zero_give_the_bare_loss_and_gradient_bit_for_bit(f1):
    strategy = replace(PLAIN, divergence=ReverseKL(), entropy=EntropyBonus())
    with_zeros = total(build(strategy, f1, divergence_coef=0.0, entropy_coef=0.0).terms)
    bare = total(build(PLAIN, f1).terms)
    assert with_zeros.item() == bare.item()
    gradients = [torch.autograd.grad(loss, f1.logprobs)[0] for loss in (with_zeros, bare)]
    assert torch.equal(*gradients)


def test_rollouts_that_match_give_the_uncorrected_loss_bit_for_bit(f1):
    corrected = total(build(replace(PLAIN, correction=Truncated()), f1, rollout_logprobs=f1.old_logprobs).terms)
    bare = total(build(PLAIN, f1).terms)
    assert corrected.item() == bare.item()
    assert torch.equal(*(torch.autograd.grad(loss, f1.logprobs)[0] for loss in (corrected, bare)))


def test_the_divergence_weighs_by_the_old_policy_unless_told_who_sampled(f1):
    strategy = replace(PLAIN, divergence=ReverseKL(estimator=Estimator.k3_weighted))
    mask = f1.response_mask
    log_ratio = (f1.logprobs - f1.ref_logprobs).detach()
    k3 = log_ratio.neg().exp() - 1 + log_ratio
    for given, sampler in (({}, f1.old_logprobs), ({"behaviour_logprobs": f1.rollout_logprobs}, f1.rollout_logprobs)):
        divergence = build(strategy, f1, divergence_coef=1.0, **given).terms[1]
        torch.testing.assert_close(divergence.loss[mask].detach(), ((f1.logprobs.detach() - sampler).exp() * k3)[mask])


def test_an_exact_divergence_is_taken_as_it_was_computed(f1):
    strategy = replace(PLAIN, divergence=ReverseKL(estimator=Estimator.exact))
    step = build(strategy, f1, divergence_coef=1.0, exact_divergence=f1.entropy)
    assert value_of(step.terms[1]).item() == pytest.approx(1.09)


@pytest.mark.parametrize("aggregation", list(Aggregation), ids=lambda aggregation: aggregation.name)
def test_every_term_is_reduced_the_way_the_run_says(f1, aggregation):
    terms = build(replace(FULL, aggregation=aggregation), f1, divergence_coef=0.05, entropy_coef=0.01).terms
    assert all(term.aggregation is aggregation for term in terms)


@pytest.mark.parametrize("aggregation", list(Aggregation), ids=lambda aggregation: aggregation.name)
@pytest.mark.parametrize("sizes", [[1] * 6, [2, 3, 1]], ids=str)
@pytest.mark.parametrize("correction", [Truncated(), NoCorrection()], ids=lambda c: type(c).__name__)
def test_microbatches_add_up_to_the_whole_step(ragged, aggregation, sizes, correction):
    strategy = replace(FULL, correction=correction, aggregation=aggregation, divergence=ReverseKL(estimator=Estimator.k3_weighted))
    whole = build(strategy, ragged, divergence_coef=0.3, entropy_coef=0.2).terms
    (gradient,) = torch.autograd.grad(total(whole), ragged.logprobs)
    summed, start = torch.zeros_like(gradient), 0
    for size in sizes:
        part = build(strategy, ragged, rows=slice(start, start + size), divergence_coef=0.3, entropy_coef=0.2).terms
        shares = [mine.coef * value_of(mine, denominators_of(all_)) for mine, all_ in zip(part, whole, strict=True)]
        summed += torch.autograd.grad(torch.stack(shares).sum(), ragged.logprobs)[0]
        start += size
    torch.testing.assert_close(summed, gradient, rtol=0, atol=1e-10)
    assert gradient[~ragged.response_mask].eq(0).all()


def test_what_a_strategy_needs_is_what_its_parts_need(f1):
    assert PLAIN.needs == ClippedSurrogate().needs
    assert FULL.needs == {"old_logprobs", "rollout_logprobs", "ref_logprobs", "entropy"}
    exact = replace(PLAIN, divergence=ReverseKL(estimator=Estimator.exact))
    assert {"ref_logprobs", "ref_hidden"} <= exact.needs


def test_a_microbatch_without_policy_tokens_is_zero_and_can_still_be_differentiated(ragged):
    step = build(FULL, ragged, rows=slice(4, 5), divergence_coef=0.3, entropy_coef=0.2)
    denominators = Denominators.count(ragged.response_mask, max_response_tokens=9)
    loss = torch.stack([term.coef * value_of(term, denominators) for term in step.terms]).sum()
    (gradient,) = torch.autograd.grad(loss, ragged.logprobs)
    assert loss.item() == 0.0
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=0)
