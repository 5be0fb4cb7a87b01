import json
import math
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from rlkit.core.entropy import EntropyBonus, EntropyState, Epo, EpoState, NoEntropy, Penalty, Phase, Siren, SirenState
from rlkit.core.logprobs import Crossing, Nucleus, token_statistics
from rlkit.core.reduce import Aggregation, Denominators, reduce
from rlkit.core.selectors import Scope, entropy_score
from rlkit.errors import ConfigError

NAN, INF = float("nan"), float("inf")


def value_of(loss, mask, *, aggregation=Aggregation.token_mean, denominators=None):
    return reduce(loss, mask, aggregation=aggregation, denominators=denominators or Denominators.count(mask, max_response_tokens=4))


def statistics_of(logits, **asked) -> Any:
    """Statistics of one position per row of logits [n, V]; the n-th token of the vocabulary is sampled at the n-th position."""
    identity, targets = torch.eye(logits.shape[-1], dtype=logits.dtype), torch.arange(len(logits)) % logits.shape[-1]
    return token_statistics(logits, identity, targets, temperature=1.0, chunk_tokens=3, **asked)


# --- how a step in the logits changes the entropy ---------------------------------------------------------------------------

P, A = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.6, -0.9, -2.4], dtype=torch.float64)  # A is centred


def change(logits, delta):
    """The exact change of the entropy when logits [V] move by delta."""
    before, after = (torch.distributions.Categorical(logits=z).entropy() for z in (logits, logits + delta))
    return (after - before).item()


def scores_of(logits):
    """S of every token of the vocabulary, and its expectation, as the library computes them."""
    stats = statistics_of(logits.expand(len(logits), -1), with_entropy=True, with_expected_score=True)
    return entropy_score(stats.logprobs, stats.entropy), stats.expected_score[0]


def policy_covariance(probs, x, y):
    mean = (probs * x).sum()
    return (probs * (x - mean) * y).sum().item()


def test_a_policy_gradient_step_lowers_the_entropy_by_a_covariance():
    # Vanilla: delta = step p A; natural: delta = step A.
    for delta, exact, first_order in ((0.01 * P * A, -0.00196116, -0.00195965), (0.01 * A, -0.00693008, -0.00692516)):
        assert change(P.log(), delta) == pytest.approx(exact, abs=1e-8)
        assert -policy_covariance(P, P.log(), delta) == pytest.approx(first_order, abs=1e-8)


def test_a_single_tokens_step_changes_the_entropy_by_its_score_less_the_expected_one():
    scores, expected = scores_of(P.log())
    vectors = [(-0.00140899, -0.00140793), (0.00331430, 0.00332332), (0.00320976, 0.00320885)]
    for token, (exact, first_order) in enumerate(vectors):
        delta = 0.01 * (torch.eye(3, dtype=torch.float64)[token] - P)  # the gradient of .01 log p
        assert change(P.log(), delta) == pytest.approx(exact, abs=1e-8)
        assert -0.01 * (scores[token] - expected).item() == pytest.approx(first_order, abs=1e-8)
    alone = 0.01 * torch.eye(3, dtype=torch.float64)[0]  # the likeliest token's logit alone
    assert change(P.log(), alone) == pytest.approx(-0.00312023, abs=1e-8)
    assert -0.01 * scores[0].item() == pytest.approx(-0.00311601, abs=1e-8)


def test_the_laws_hold_for_random_policies():
    generator, step, compared = torch.Generator().manual_seed(0), 1e-4, 0
    for _ in range(50):
        logits, advantages = torch.randn(2, 7, generator=generator, dtype=torch.float64)
        logprobs = logits.log_softmax(-1)
        probs = logprobs.exp()
        advantages = advantages - (probs * advantages).sum()
        scores, expected = scores_of(logits)
        assert scores.sum().item() == pytest.approx(0.0, abs=1e-12)
        assert (probs * (scores - expected)).sum().item() == pytest.approx(0.0, abs=1e-12)
        one_hot = torch.eye(7, dtype=torch.float64)
        laws = [
            (step * advantages, -(scores * step * advantages).sum().item()),
            (step * probs * advantages, -policy_covariance(probs, logprobs, step * probs * advantages)),
            (step * advantages, -policy_covariance(probs, logprobs, step * advantages)),
            *((step * one_hot[k], -step * scores[k].item()) for k in range(7)),
            *((step * (one_hot[k] - probs), -step * (scores[k] - expected).item()) for k in range(7)),
        ]
        for delta, law in laws:
            exact = change(logits, delta)
            if abs(exact) > 3e-6:
                compared += 1
                assert law == pytest.approx(exact, rel=1e-2)
    assert compared > 300


# --- bonus ------------------------------------------------------------------------------------------------------------------


def test_the_bonus_is_the_negative_entropy_and_leaves_the_coefficient_to_its_term(f1):
    loss = EntropyBonus(coef=0.01).loss(entropy=f1.entropy)
    torch.testing.assert_close(loss, -f1.entropy, equal_nan=True)
    assert 0.01 * value_of(loss, f1.response_mask).item() == pytest.approx(-0.0109)


def test_descending_the_bonus_raises_the_entropy_with_its_exact_gradient():
    logits = P.expand(2, 3).log().requires_grad_()
    stats = statistics_of(logits, with_entropy=True)
    mask = torch.tensor([[True, False]])
    denominators = Denominators(num_tokens=10, num_sequences=4, max_response_tokens=4)
    loss = value_of(EntropyBonus().loss(entropy=stats.entropy[None]), mask, denominators=denominators)
    (gradient,) = torch.autograd.grad(0.01 * loss, logits)
    # -(coef / N) dH/dz, dH/dz = -p (log p + H); nothing for the masked position
    expected = torch.tensor([[-0.311601, 0.161524, 0.150077], [0.0, 0.0, 0.0]], dtype=torch.float64) * -0.01 / 10
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9)
    assert change(P.log(), -expected[0]) > 0


def test_the_sampled_entropy_has_no_gradient_to_give_but_its_score_form_has():
    # By enumeration: E[grad(-log p)] = 0, while E[grad(-sg(log p) log p)] is the entropy's own gradient.
    logits = P.log().requires_grad_()
    logprobs = logits.log_softmax(-1)
    sampled, score_form = -(P * logprobs).sum(), -(P * logprobs.detach() * logprobs).sum()
    exact = torch.distributions.Categorical(logits=logits).entropy()
    gradients = [torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (sampled, score_form, exact)]
    torch.testing.assert_close(gradients[0], torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(gradients[1], gradients[2])


def test_a_term_without_memory_keeps_its_state(f1):
    for term in (NoEntropy(), EntropyBonus()):
        state = term.initial()
        assert state == EntropyState()
        assert term.update(state, response_mask=f1.response_mask) is state
        assert term.measure(nucleus_entropy=None, response_mask=f1.response_mask) is None
        assert (term.aggregation, term.nucleus, term.metrics(state)) == (None, None, {})
    assert NoEntropy().loss(entropy=f1.entropy) is None


def test_coefficients_have_published_defaults_and_terms_say_what_they_need():
    assert [term().coef for term in (EntropyBonus, Siren, Epo)] == [0.01, 0.005, 0.001]
    assert NoEntropy().needs == frozenset()
    assert EntropyBonus().needs == {"entropy"}
    assert Siren().needs == {"nucleus_entropy", "old_nucleus_entropy"}
    assert Epo().needs == {"entropy", "old_entropy", "turns"}


# --- SIREN ------------------------------------------------------------------------------------------------------------------


def siren_loss(siren, batch, *, anchor, rows: Any = slice(None), measured=None, denominators=None, entropy=None):
    """The loss of these rows and its gradient in their nucleus entropies."""
    entropy = (batch.entropy if entropy is None else entropy)[rows].detach().requires_grad_()
    mask = batch.response_mask[rows]
    loss = siren.loss(entropy=None, nucleus_entropy=entropy, response_mask=mask, state=SirenState(anchor=anchor), measured=measured)
    value = value_of(loss, mask, aggregation=siren.aggregation, denominators=denominators)
    (gradient,) = torch.autograd.grad(value, entropy)
    return value.item(), gradient


@pytest.mark.parametrize(("quantile", "level"), [(0.8, 1.35), (0.5, 1.1875)])
def test_sirens_level_worked_out_by_hand(f1, quantile, level):
    # .8-quantiles 1.72, 1.56, 1.02, 2.0: peaks (0, 2), (1, 0), (2, 1), and the row of a single token has none.
    siren = Siren(quantile=quantile)
    peaks = siren.peaks(f1.entropy, f1.response_mask).nonzero().tolist()
    assert peaks == ([[0, 2], [1, 0], [2, 1]] if quantile == 0.8 else [[0, 1], [0, 2], [1, 0], [2, 1]])
    assert siren.measure(nucleus_entropy=f1.entropy, response_mask=f1.response_mask) == pytest.approx(level)


def test_sirens_square_and_its_slope_worked_out_by_hand(f1):
    # (1.1875 - 1.5)^2 = .09765625; times .005: 4.8828125e-4, slope -.003125.
    micro, mini = Siren(quantile=0.5, scope=Scope.micro), Siren(quantile=0.5)
    for siren, measured in ((micro, None), (mini, 1.1875)):
        value, gradient = siren_loss(siren, f1, anchor=1.5, measured=measured)
        assert siren.coef * value == pytest.approx(4.8828125e-4)
        # dH~/dH = 1 / (4 rows * peaks of the row)
        expected = torch.zeros(4, 4, dtype=torch.float64)
        expected[0, 1] = expected[0, 2] = -0.003125 / 8
        expected[1, 0] = expected[2, 1] = -0.003125 / 4
        torch.testing.assert_close(siren.coef * gradient, expected, rtol=0, atol=1e-12)


def test_siren_at_its_anchor_has_neither_loss_nor_gradient(f1):
    for siren, measured in ((Siren(scope=Scope.micro), None), (Siren(), 1.35)):
        value, gradient = siren_loss(siren, f1, anchor=1.35, measured=measured)
        assert value == pytest.approx(0.0, abs=1e-15)
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-15)


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 3, 1], [5, 1]], ids=str)
def test_sirens_square_over_the_whole_step_does_not_depend_on_how_it_is_split(ragged, sizes):
    siren = Siren(quantile=0.5)
    measured = siren.measure(nucleus_entropy=ragged.entropy, response_mask=ragged.response_mask)
    assert measured is not None
    denominators = Denominators.count(ragged.response_mask, max_response_tokens=9)
    one, gradient = siren_loss(Siren(quantile=0.5, scope=Scope.micro), ragged, anchor=0.4)  # one microbatch: the square itself
    whole = siren_loss(siren, ragged, anchor=0.4, measured=measured)
    assert whole[0] == pytest.approx(one, abs=1e-12)
    torch.testing.assert_close(whole[1], gradient, rtol=0, atol=1e-12)
    parts = [
        siren_loss(siren, ragged, anchor=0.4, measured=measured, rows=rows, denominators=denominators)
        for rows in torch.arange(6).split(sizes)
    ]
    assert sum(part[0] for part in parts) == pytest.approx(one, abs=1e-10)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient, rtol=0, atol=1e-10)


def test_sirens_square_within_a_microbatch_does(f1):
    siren = Siren(scope=Scope.micro)
    denominators = Denominators.count(f1.response_mask, max_response_tokens=4)
    halves = [siren_loss(siren, f1, anchor=1.5, rows=rows, denominators=denominators) for rows in (slice(0, 2), slice(2, 4))]
    # H~ of the halves: 2.15 and .55
    assert sum(value for value, _ in halves) == pytest.approx((0.65**2 + 0.95**2) / 2)
    assert siren_loss(siren, f1, anchor=1.5)[0] == pytest.approx(0.15**2)


def test_siren_weighs_rows_alike_and_rows_without_a_token_not_at_all(ragged):
    siren = Siren(quantile=0.5)
    level = siren.measure(nucleus_entropy=ragged.entropy, response_mask=ragged.response_mask)
    means = []
    for values, mask in zip(ragged.entropy, ragged.response_mask, strict=True):
        if mask.any():
            peaks = values[mask][values[mask] > values[mask].quantile(0.5)]
            means.append(peaks.mean().item() if len(peaks) else 0.0)
    assert len(means) == 5
    assert level == pytest.approx(sum(means) / 5)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    assert siren.measure(nucleus_entropy=ragged.entropy[order], response_mask=ragged.response_mask[order]) == pytest.approx(level)


def test_the_first_batch_with_a_token_sets_sirens_anchor_for_good(f1):
    siren = Siren()
    state = siren.initial()
    nothing = torch.zeros_like(f1.response_mask)
    assert siren.update(state, response_mask=nothing, nucleus_entropy=f1.entropy) == SirenState(anchor=None)
    assert siren.update(state, response_mask=f1.response_mask, nucleus_entropy=f1.entropy * INF) == SirenState(anchor=None)
    state = siren.update(state, response_mask=f1.response_mask, nucleus_entropy=f1.entropy)
    assert state.anchor == pytest.approx(1.35)
    assert siren.update(state, response_mask=f1.response_mask, nucleus_entropy=2 * f1.entropy) is state
    assert siren.metrics(state) == {"siren/H_anchor": state.anchor}
    assert replace(siren.initial(), **json.loads(json.dumps(asdict(state)))) == state


def test_siren_asks_for_the_nucleus_of_its_settings_and_averages_by_rows():
    siren = Siren(top_p=0.7, top_k=50, crossing=Crossing.excluded)
    assert siren.nucleus == Nucleus(top_p=0.7, top_k=50, crossing=Crossing.excluded)
    assert siren.aggregation is Aggregation.seq_mean_token_mean
    assert Siren(scope=Scope.micro).measure(nucleus_entropy=None, response_mask=torch.ones(1, 1, dtype=torch.bool)) is None


def test_descending_sirens_loss_moves_the_nucleus_entropy_towards_the_anchor():
    logits = torch.randn(4, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    mask, siren = torch.ones(1, 4, dtype=torch.bool), Siren(top_p=0.9, quantile=0.4)

    def level(logits) -> Any:
        return siren.measure(nucleus_entropy=statistics_of(logits, nucleus=siren.nucleus).nucleus_entropy[None], response_mask=mask)

    start = level(logits)
    for anchor in (start - 0.2, start + 0.2):
        leaf = logits.clone().requires_grad_()
        entropy = statistics_of(leaf, nucleus=siren.nucleus).nucleus_entropy[None]
        loss = siren.loss(
            entropy=None, nucleus_entropy=entropy, response_mask=mask, state=SirenState(anchor=anchor), measured=start
        )
        (gradient,) = torch.autograd.grad(value_of(loss, mask, aggregation=siren.aggregation), leaf)
        assert abs(level(logits - 0.05 * gradient) - anchor) < abs(start - anchor) - 1e-4


@pytest.mark.parametrize("scope", list(Scope), ids=lambda scope: scope.name)
def test_sirens_gradient_through_the_logits_agrees_with_finite_differences(scope):
    siren, mask = Siren(top_p=0.9, quantile=0.5, scope=scope), torch.tensor([[True, True, True, False], [True, True, False, False]])
    logits = torch.randn(8, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64).requires_grad_()

    def loss(logits):
        entropy = statistics_of(logits, nucleus=siren.nucleus).nucleus_entropy.view(2, 4)
        per_token = siren.loss(
            entropy=None, nucleus_entropy=entropy, response_mask=mask, state=SirenState(anchor=0.3), measured=0.9
        )
        return value_of(per_token, mask, aggregation=siren.aggregation)

    assert torch.autograd.gradcheck(loss, (logits,))


# --- EPO --------------------------------------------------------------------------------------------------------------------

ROW_TURNS = torch.tensor([[0], [1], [0], [1]])
BAND: dict[str, Any] = {"low": 0.45, "high": 1.6}  # (.36, 1.28) around .8, (.45, 1.6) around 1.0
PAST = EpoState(sums=(0.8, 1.0), counts=(1, 1), num_batches=1, last_turn=1)


def epo_loss(epo, batch, *, turns=None, state=PAST, rows: Any = slice(None), entropy=None, denominators=None):
    """The token mean of the loss and its gradient in the entropies."""
    mask = batch.response_mask[rows]
    entropy = (batch.entropy if entropy is None else entropy)[rows].detach().requires_grad_()
    turns = ROW_TURNS.expand_as(batch.response_mask) if turns is None else turns
    loss = epo.loss(entropy=entropy, response_mask=mask, turns=turns[rows], state=state)
    value = value_of(loss, mask, denominators=denominators)
    (gradient,) = torch.autograd.grad(value, entropy)
    return value.item(), gradient


@pytest.mark.parametrize(
    ("penalty", "alpha", "expected"), [(Penalty.literal, 0.1, 0.05), (Penalty.hinge, 1.0, 0.214), (Penalty.hinge_sq, 1.0, 0.17596)]
)
def test_epos_penalty_worked_out_by_hand(f1, penalty, alpha, expected):
    epo = Epo(penalty=penalty, alpha=alpha, phase=Phase.constant, **BAND)
    penalties = epo.penalties(f1.entropy, ROW_TURNS.expand(4, 4), f1.response_mask, PAST)
    assert value_of(penalties, f1.response_mask).item() == pytest.approx(expected)
    outside = [[0, 0], [0, 2], [0, 3], [1, 0], [3, 0]]
    assert penalties.nonzero().tolist() == outside
    assert epo_loss(epo, f1)[0] == pytest.approx(-1.09 + expected)  # the bonus and the penalty
    assert epo_loss(replace(epo, smoothing=2.0), f1)[0] == pytest.approx(-1.09 + 2 * expected)


def test_the_literal_penalty_has_no_gradient_and_the_hinges_pull_into_the_band(f1):
    plain = epo_loss(Epo(smoothing=0.0), f1)[1]
    torch.testing.assert_close(plain[f1.response_mask], torch.full((10,), -0.1, dtype=torch.float64))
    assert torch.equal(epo_loss(Epo(penalty=Penalty.literal, **BAND), f1)[1], plain)
    pull = epo_loss(Epo(alpha=1.0, **BAND), f1)[1] - plain
    # entropies .3, 2.5, .1 of turn 0 and 1.8, 2.0 of turn 1: up where below the band, down where above
    expected = torch.zeros(4, 4, dtype=torch.float64)
    expected[0, 0] = expected[0, 3] = -0.1
    expected[0, 2] = expected[1, 0] = expected[3, 0] = 0.1
    torch.testing.assert_close(pull, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", [{"smoothing": 0.0}, {"alpha": 0.0}, {"low": 0.0, "high": INF}], ids=str)
def test_epo_without_a_penalty_is_the_plain_bonus(f1, settings: Any):
    (value, gradient), plain = epo_loss(Epo(**settings), f1), EntropyBonus().loss(entropy=f1.entropy)
    assert value == value_of(plain, f1.response_mask).item()
    assert gradient[f1.response_mask].eq(-0.1).all()
    assert gradient[~f1.response_mask].eq(0).all()


def test_epos_phase_weights_worked_out_by_hand():
    official = Epo()
    vectors = {0: 1.0, 37: 0.874563, 75: 0.827067, 76: 0.768632, 100: 0.294304, 150: 0.039830}
    assert {step: official.phase_weight(step) for step in vectors} == pytest.approx(vectors, abs=1e-6)
    increasing = Epo(phase=Phase.increasing)
    assert [increasing.phase_weight(step) for step in (0, 150, 400)] == pytest.approx([0.2, 1.0, 1.0])
    assert increasing.phase_weight(75) == pytest.approx(0.2 + 0.8 / (1 + math.exp(-1)))  # (1 - 1/e) / (1 - 1/e^2)
    assert Epo(phase=Phase.constant).phase_weight(99) == 1.0


def test_the_first_batch_is_weighted_as_step_zero(f1):
    epo = Epo(penalty=Penalty.literal, alpha=1.0, **BAND)
    for batches, weight in ((1, 1.0), (38, 0.874563), (77, 0.768632)):
        value, _ = epo_loss(epo, f1, state=replace(PAST, num_batches=batches))
        assert value == pytest.approx(-1.09 + 0.5 * weight, abs=1e-6)


def test_epos_history_is_the_mean_over_batches_of_each_turns_mean_entropy(f1):
    epo, turns = Epo(), ROW_TURNS.expand(4, 4)
    given = {"response_mask": f1.response_mask, "turns": turns}
    first = epo.update(epo.initial(), **given, entropy=f1.entropy)
    # Turn 0: rows 0 and 2, (4.1 + 2.4) / 7; turn 1: rows 1 and 3, (2.4 + 2.0) / 3.
    assert first.means == pytest.approx([6.5 / 7, 4.4 / 3])
    assert (first.num_batches, first.last_turn, first.counts) == (1, 1, (1, 1))
    # A batch that ends after turn 0, then one with a turn 3 but none between: neither moves another turn's history.
    one = f1.response_mask & (turns == 0)
    second = epo.update(first, response_mask=one, turns=turns, entropy=2 * f1.entropy)
    assert second.means == pytest.approx([(6.5 / 7 + 13 / 7) / 2, 4.4 / 3])
    third = epo.update(second, response_mask=f1.response_mask, turns=3 * turns, entropy=f1.entropy)
    assert third.counts == (3, 1, 0, 1)
    assert third.means[3] == pytest.approx(4.4 / 3)
    assert math.isnan(third.means[2])
    assert (third.num_batches, third.last_turn) == (3, 3)
    nothing = epo.update(third, response_mask=torch.zeros_like(one), turns=turns, entropy=f1.entropy)
    assert (nothing.sums, nothing.counts, nothing.num_batches, nothing.last_turn) == (third.sums, third.counts, 4, -1)
    assert epo.update(third, **given, entropy=f1.entropy * INF).means[:2] == third.means[:2]  # not finite: ignored
    assert epo.metrics(second) == pytest.approx(
        {
            "epo/phase_weight": epo.phase_weight(1),
            "epo/hist_entropy_turn_0": (6.5 / 7 + 13 / 7) / 2,
            "epo/hist_entropy_turn_1": 4.4 / 3,
        }
    )


def test_epos_state_survives_json_to_the_last_bit(f1):
    epo = Epo()
    state = epo.initial()
    for factor in (1.0, 0.3, 1 / 7):
        state = epo.update(state, response_mask=f1.response_mask, turns=ROW_TURNS.expand(4, 4), entropy=factor * f1.entropy)
    assert replace(epo.initial(), **json.loads(json.dumps(asdict(state)))) == state


def test_a_turn_without_a_past_is_not_penalised(f1):
    epo = Epo(penalty=Penalty.literal, low=0.0, high=1e-6)
    turns = torch.tensor([[0, 1, 2, 7]]).expand(4, 4)
    state = EpoState(sums=(1.0, 0.0, 1.0), counts=(1, 0, 1), num_batches=1, last_turn=7)
    penalties = epo.penalties(f1.entropy, turns, f1.response_mask, state)
    assert penalties.nonzero()[:, 1].unique().tolist() == [0, 2]
    assert epo.penalties(f1.entropy, turns, f1.response_mask, epo.initial()).eq(0).all()


def test_a_batch_is_penalised_only_if_a_late_turn_occurs_in_it(f1):
    epo = Epo(penalty=Penalty.literal, min_turn=2, **BAND)
    assert epo_loss(epo, f1)[0] == pytest.approx(-1.09)
    assert epo_loss(epo, f1, state=replace(PAST, last_turn=2))[0] == pytest.approx(-1.09 + 0.05)


EPOS = {penalty.name: Epo(penalty=penalty, alpha=1.0) for penalty in Penalty}


def turns_of(ragged):
    return (torch.arange(9) // 3).expand(6, 9)


def past_of(epo, ragged):
    return epo.update(epo.initial(), response_mask=ragged.response_mask, turns=turns_of(ragged), entropy=ragged.entropy)


@pytest.mark.parametrize("sizes", [[1] * 6, [2, 3, 1], [5, 1]], ids=str)
@pytest.mark.parametrize("name", EPOS)
def test_epos_loss_does_not_depend_on_how_the_step_is_split(ragged, name, sizes):
    epo, turns = EPOS[name], turns_of(ragged)
    state = past_of(epo, ragged)
    whole, gradient = epo_loss(epo, ragged, turns=turns, state=state)
    denominators = Denominators.count(ragged.response_mask, max_response_tokens=9)
    parts = [
        epo_loss(epo, ragged, turns=turns, state=state, rows=rows, denominators=denominators)
        for rows in torch.arange(6).split(sizes)
    ]
    assert sum(part[0] for part in parts) == pytest.approx(whole, abs=1e-10)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", EPOS)
def test_epos_gradient_agrees_with_finite_differences(ragged, name):
    epo, turns, mask = EPOS[name], turns_of(ragged), ragged.response_mask
    state = past_of(epo, ragged)
    past = torch.tensor(state.means, dtype=torch.float64)[turns][mask]
    values = ragged.entropy[mask]
    for edge in (epo.low * past, epo.high * past):
        values = torch.where((values - edge).abs() < 1e-2, edge + 0.05, values)

    def loss(values):
        entropy = torch.full(mask.shape, NAN, dtype=torch.float64).masked_scatter(mask, values)
        return epo.loss(entropy=entropy, response_mask=mask, turns=turns, state=state)[mask]

    assert torch.autograd.gradcheck(loss, (values.requires_grad_(),))


TERMS = {
    "siren mini": (Siren(quantile=0.5), siren_loss, {"anchor": 0.4, "measured": 0.9}),
    "siren micro": (Siren(quantile=0.5, scope=Scope.micro), siren_loss, {"anchor": 0.4}),
    **{f"epo {name}": (epo, epo_loss, {}) for name, epo in EPOS.items()},
}


@pytest.mark.parametrize("name", TERMS)
def test_garbage_in_masked_cells_changes_neither_loss_nor_gradient_nor_memory(ragged, name):
    term, loss_of, given = TERMS[name]
    mask, turns = ragged.response_mask, turns_of(ragged)
    if isinstance(term, Epo):
        given = given | {"turns": turns, "state": past_of(term, ragged)}

    def remembered(entropy, turns):
        return term.update(term.initial(), response_mask=mask, entropy=entropy, nucleus_entropy=entropy, turns=turns)

    value, gradient = loss_of(term, ragged, **given)
    state = remembered(ragged.entropy, turns)
    for garbage in (0.0, INF, -INF, NAN):
        entropy = ragged.entropy.masked_fill(~mask, garbage)
        if isinstance(term, Epo):
            given = given | {"turns": turns.masked_fill(~mask, -5)}
        assert loss_of(term, ragged, **given, entropy=entropy)[0] == value
        assert torch.equal(loss_of(term, ragged, **given, entropy=entropy)[1], gradient)
        assert remembered(entropy, turns.masked_fill(~mask, 10**9)) == state
    assert gradient[~mask].eq(0).all()


@pytest.mark.parametrize("name", TERMS)
def test_an_empty_microbatch_adds_nothing_that_backward_does_not_accept(name):
    term = TERMS[name][0]
    state = SirenState(anchor=0.4) if isinstance(term, Siren) else PAST
    for shape in ((2, 3), (0, 0)):
        entropy, mask = torch.full(shape, NAN).requires_grad_(), torch.zeros(shape, dtype=torch.bool)
        turns = torch.zeros(shape, dtype=torch.int64)
        loss = term.loss(entropy=entropy, nucleus_entropy=entropy, response_mask=mask, turns=turns, state=state, measured=0.9)
        value = value_of(loss, mask, aggregation=term.aggregation or Aggregation.token_mean)
        value.backward()
        assert value.item() == 0
        assert entropy.grad is not None
        assert entropy.grad.eq(0).all()


@pytest.mark.parametrize(
    ("choice", "settings"),
    [
        *((choice, {"coef": -0.1}) for choice in (EntropyBonus, Siren, Epo)),
        (Siren, {"top_p": 0.0}),
        (Siren, {"top_k": 0}),
        (Siren, {"quantile": 1.0}),
        (Epo, {"alpha": -1.0}),
        (Epo, {"smoothing": -1.0}),
        (Epo, {"low": -1.0}),
        (Epo, {"high": 0.5}),
        (Epo, {"phase_steps": 1}),
        (Epo, {"min_turn": -1}),
    ],
    ids=str,
)
def test_impossible_settings_are_refused_by_name(choice, settings):
    ((name, value),) = settings.items()
    with pytest.raises(ConfigError, match=rf"entropy\.{name}={value}: "):
        choice(**settings)
