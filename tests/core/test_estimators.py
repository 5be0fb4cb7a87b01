import pytest
import torch

from rlkit.core.divergences import ForwardKL, NoDivergence, ReverseKL
from rlkit.core.estimators import OF_REVERSE_KL, Estimator, Place, verdict
from rlkit.core.reduce import Aggregation, Denominators, reduce
from rlkit.errors import ConfigError

NAN, INF = float("nan"), float("inf")

# A vocabulary of three: log(policy / ref) = (.916291, -.510826, -.405465).
POLICY, REF, OTHER = (torch.tensor(p, dtype=torch.float64) for p in ([0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.4, 0.4, 0.2]))
REVERSE_KL, FORWARD_KL = 0.223805, 0.193794
REVERSE_GRADIENT = torch.tensor([0.346243, -0.220389, -0.125854], dtype=torch.float64)  # p_v (l_v - KL)
FORWARD_GRADIENT = torch.tensor([0.3, -0.2, -0.1], dtype=torch.float64)  # policy - ref


SAMPLED = sorted(OF_REVERSE_KL - {Estimator.exact}, key=list(Estimator).index)


def loss_of(divergence, **tensors):
    loss = divergence.loss(**tensors)
    assert loss is not None
    return loss


def reverse_kl(estimator):
    found = verdict(Place.loss, estimator)
    assert found is not None
    return ReverseKL(estimator=estimator, allow_biased=not found.is_right and not found.is_named)


def expectation(divergence, *, behaviour=None, policy=POLICY, ref=REF):
    """E over tokens that `behaviour` samples (the policy itself if None) of the loss, and its gradient in the policy's logits."""
    logits = policy.log().requires_grad_()
    logprobs = logits.log_softmax(-1)
    ref_logprobs = ref.log()
    behaviour_logprobs = logprobs.detach() if behaviour is None else behaviour.log()
    n = len(policy)
    loss = loss_of(
        divergence,
        logprobs=logprobs[:, None],
        behaviour_logprobs=behaviour_logprobs[:, None],
        ref_logprobs=ref_logprobs[:, None],
        response_mask=torch.ones(n, 1, dtype=torch.bool),
        exact_values=divergence.exact(logprobs, ref_logprobs).expand(n)[:, None]
        if divergence.estimator is Estimator.exact
        else None,
    )
    assert loss.shape == (n, 1)
    value = (behaviour_logprobs.exp()[:, None] * loss).sum()
    (gradient,) = torch.autograd.grad(value, logits)
    return value.item(), gradient


@pytest.mark.parametrize("estimator", [Estimator.score, Estimator.k2, Estimator.k3_weighted, Estimator.exact], ids=lambda e: e.name)
def test_on_policy_the_expected_gradient_is_reverse_kls(estimator):
    _, gradient = expectation(ReverseKL(estimator=estimator))
    torch.testing.assert_close(gradient, REVERSE_GRADIENT, rtol=0, atol=1e-6)


@pytest.mark.parametrize("estimator", [Estimator.score, Estimator.k3_weighted, Estimator.exact], ids=lambda e: e.name)
def test_off_policy_the_expected_gradient_is_reverse_kls_too(estimator):
    divergence = ReverseKL(estimator=estimator)
    _, gradient = expectation(divergence, behaviour=OTHER)
    torch.testing.assert_close(gradient, REVERSE_GRADIENT, rtol=0, atol=1e-6)
    assert not divergence.verdict.on_policy


@pytest.mark.parametrize("estimator", [Estimator.score, Estimator.k3_weighted, Estimator.exact], ids=lambda e: e.name)
@pytest.mark.parametrize("seed", range(3))
def test_the_gradient_is_unbiased_for_random_policies_references_and_samplers(estimator, seed):
    generator = torch.Generator().manual_seed(seed)
    policy, ref, behaviour = torch.randn(3, 7, generator=generator, dtype=torch.float64).softmax(-1)
    logits = policy.log().requires_grad_()
    exact = (logits.softmax(-1) * (logits.log_softmax(-1) - ref.log())).sum()
    (expected,) = torch.autograd.grad(exact, logits)
    _, gradient = expectation(ReverseKL(estimator=estimator), behaviour=behaviour, policy=policy, ref=ref)
    torch.testing.assert_close(gradient, expected)


def test_k2_without_the_ratio_is_right_only_on_policy_and_says_so():
    divergence = ReverseKL(estimator=Estimator.k2)
    assert divergence.verdict.on_policy
    _, gradient = expectation(divergence, behaviour=OTHER)
    assert (gradient - REVERSE_GRADIENT).abs().max() > 0.01
    # What it does descend: E_b[l grad log p] = b_v l_v - p_v sum_w b_w l_w
    log_ratio = (POLICY / REF).log()
    torch.testing.assert_close(gradient, OTHER * log_ratio - POLICY * (OTHER * log_ratio).sum())


def test_k3_in_the_loss_descends_the_forward_kl_and_says_so():
    divergence = ReverseKL(estimator=Estimator.k3)
    value, gradient = expectation(divergence)
    assert value == pytest.approx(REVERSE_KL, abs=1e-6)  # its value is the reverse KL's ...
    torch.testing.assert_close(gradient, FORWARD_GRADIENT, rtol=0, atol=1e-6)  # ... and its gradient is not
    assert divergence.verdict.of == "forward_kl"


@pytest.mark.parametrize("behaviour", [None, OTHER], ids=["on-policy", "off-policy"])
def test_the_weighted_k3_and_the_exact_form_are_also_worth_the_kl(behaviour):
    for estimator in (Estimator.k3_weighted, Estimator.exact):
        value, _ = expectation(ReverseKL(estimator=estimator), behaviour=behaviour)
        assert value == pytest.approx(REVERSE_KL, abs=1e-6)


def test_k2_is_half_the_squared_log_ratio():
    value, _ = expectation(ReverseKL(estimator=Estimator.k2))
    assert value == pytest.approx(0.265479, abs=1e-6)  # .5 * .419794 + .3 * .130471 + .2 * .082201: not the KL


def test_value_slope_and_exact_of_three_tokens():
    log_ratio = (POLICY / REF).log()
    torch.testing.assert_close(
        ReverseKL().value(log_ratio), torch.tensor([0.316291, 0.155841, 0.094535], dtype=torch.float64), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(
        ReverseKL().slope(log_ratio), torch.tensor([0.916291, -0.510826, -0.405465], dtype=torch.float64), rtol=0, atol=1e-6
    )
    assert ReverseKL().exact(POLICY.log(), REF.log()).item() == pytest.approx(REVERSE_KL, abs=1e-6)
    assert ReverseKL().exact(REF.log(), POLICY.log()).item() == pytest.approx(FORWARD_KL, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_value_is_an_unbiased_and_nonnegative_estimate(seed):
    policy, ref = torch.randn(2, 9, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).softmax(-1)
    values = ReverseKL().value((policy / ref).log())
    assert values.ge(0).all()
    torch.testing.assert_close((policy * values).sum(), (policy * (policy / ref).log()).sum())


NOISY = {Estimator.k1, Estimator.k1_weighted}  # their gradients vanish on average only


@pytest.mark.parametrize("estimator", [*(e for e in SAMPLED if e not in NOISY), Estimator.exact], ids=lambda e: e.name)
@pytest.mark.parametrize("behaviour", [None, OTHER], ids=["on-policy", "off-policy"])
def test_a_policy_equal_to_its_reference_is_not_moved(estimator, behaviour):
    logprobs = POLICY.log()[:, None].requires_grad_()
    sampler = POLICY if behaviour is None else behaviour
    divergence = reverse_kl(estimator)
    exact_values = None
    if estimator is Estimator.exact:
        exact_values = divergence.exact(logprobs[:, 0], POLICY.log()).expand(3)[:, None]
    loss = loss_of(
        divergence,
        logprobs=logprobs,
        behaviour_logprobs=sampler.log()[:, None],
        ref_logprobs=POLICY.log()[:, None],
        response_mask=torch.ones(3, 1, dtype=torch.bool),
        exact_values=exact_values,
    )
    torch.testing.assert_close(loss, torch.zeros_like(loss), rtol=0, atol=1e-12)  # of every token, not only on average
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    if estimator is Estimator.exact:  # in unconstrained log-probs d/dlogp sum p (logp - logq) = p at equality: a constant in logits
        gradient = gradient[:, 0] - POLICY * gradient.sum()
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize("estimator", SAMPLED, ids=lambda e: e.name)
def test_garbage_in_masked_cells_changes_neither_loss_nor_gradient(ragged, estimator):
    mask = ragged.response_mask
    denominators = Denominators.count(mask, max_response_tokens=9)
    names = {"logprobs": ragged.logprobs, "behaviour_logprobs": ragged.old_logprobs, "ref_logprobs": ragged.ref_logprobs}

    def run(garbage, poisoned=None):
        fields = {n: x.detach().masked_fill(~mask, garbage if poisoned in (n, None) else 0.0) for n, x in names.items()}
        fields["logprobs"].requires_grad_()
        loss = loss_of(reverse_kl(estimator), **fields, response_mask=mask, exact_values=None)
        assert loss[~mask].eq(0).all()
        value = reduce(loss, mask, aggregation=Aggregation.token_mean, denominators=denominators)
        return value, torch.autograd.grad(value, fields["logprobs"])[0]

    clean = run(0.0)
    assert clean[1][~mask].eq(0).all()
    for garbage in (NAN, INF, -INF):
        for poisoned in (*names, None):
            torch.testing.assert_close(run(garbage, poisoned), clean, rtol=0, atol=0)


def test_garbage_in_masked_cells_of_the_exact_values_changes_nothing(ragged):
    mask = ragged.response_mask
    exact_values = ragged.entropy.clone().requires_grad_()  # any [B, T] with NaN in its padding
    loss = loss_of(
        ReverseKL(estimator=Estimator.exact),
        logprobs=ragged.logprobs,
        behaviour_logprobs=ragged.old_logprobs,
        ref_logprobs=ragged.ref_logprobs,
        response_mask=mask,
        exact_values=exact_values,
    )
    value = reduce(loss, mask, aggregation=Aggregation.token_mean, denominators=Denominators.count(mask, max_response_tokens=9))
    (gradient,) = torch.autograd.grad(value, exact_values)
    torch.testing.assert_close(gradient, mask.double() / mask.sum(), rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [(Estimator.k2, 0.057770), (Estimator.k3, 0.052110)],  # the mean over F1's ten tokens; k1 would be 0.112
)
def test_the_value_on_ten_tokens_worked_out_by_hand(f1, estimator, expected):
    loss = loss_of(
        reverse_kl(estimator),
        logprobs=f1.logprobs,
        behaviour_logprobs=f1.old_logprobs,
        ref_logprobs=f1.ref_logprobs,
        response_mask=f1.response_mask,
    )
    denominators = Denominators.count(f1.response_mask, max_response_tokens=4)
    value = reduce(loss, f1.response_mask, aggregation=Aggregation.token_mean, denominators=denominators)
    assert value.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("estimator", [Estimator.k2, Estimator.k3, Estimator.k3_weighted], ids=lambda e: e.name)
def test_differentiated_estimators_agree_with_finite_differences(ragged, estimator):
    mask = ragged.response_mask
    logprobs = ragged.logprobs.detach()[mask].requires_grad_()

    def loss(values):
        return loss_of(
            reverse_kl(estimator),
            logprobs=torch.full(mask.shape, NAN, dtype=torch.float64).masked_scatter(mask, values),
            behaviour_logprobs=ragged.rollout_logprobs,
            ref_logprobs=ragged.ref_logprobs,
            response_mask=mask,
        )[mask]

    assert torch.autograd.gradcheck(loss, (logprobs,))


def test_the_score_estimators_gradient_is_the_weighted_slope(ragged):
    mask = ragged.response_mask
    loss = loss_of(
        ReverseKL(estimator=Estimator.score),
        logprobs=ragged.logprobs,
        behaviour_logprobs=ragged.rollout_logprobs,
        ref_logprobs=ragged.ref_logprobs,
        response_mask=mask,
    )
    (gradient,) = torch.autograd.grad(loss[mask].sum(), ragged.logprobs)
    with torch.no_grad():
        expected = (ragged.logprobs - ragged.rollout_logprobs).exp() * (ragged.logprobs - ragged.ref_logprobs)
    torch.testing.assert_close(gradient[mask], expected[mask])


def test_token_by_token_the_right_estimators_have_one_and_the_same_gradient():
    # (rho k3)' = rho (l - 1 + exp(-l)) + rho (1 - exp(-l)) = rho l, which is the score form's; k2' = l is that with rho = 1.
    log_ratio = torch.tensor([[-15.0, -3.0, -0.5, 0.0, 1e-3, 0.7, 4.0, 15.0]], dtype=torch.float64)
    logprobs = torch.full_like(log_ratio, -1.0).requires_grad_()
    mask, off = torch.ones_like(log_ratio, dtype=torch.bool), torch.linspace(-2, 2, 8, dtype=torch.float64)[None]

    def gradient(estimator, behaviour_logprobs):
        loss = loss_of(
            reverse_kl(estimator),
            logprobs=logprobs,
            behaviour_logprobs=behaviour_logprobs,
            ref_logprobs=logprobs.detach() - log_ratio,
            response_mask=mask,
        )
        return torch.autograd.grad(loss.sum(), logprobs)[0]

    sampler = logprobs.detach() - off
    torch.testing.assert_close(gradient(Estimator.score, sampler), off.exp() * log_ratio)
    torch.testing.assert_close(gradient(Estimator.k3_weighted, sampler), off.exp() * log_ratio)
    torch.testing.assert_close(gradient(Estimator.k2, logprobs.detach()), log_ratio)
    torch.testing.assert_close(gradient(Estimator.k3, logprobs.detach()), 1 - (-log_ratio).exp())


def test_summed_over_tokens_the_gradient_is_greedy_in_the_state():
    # Two binary tokens. First (.6, .4); second (.9, .1) after a 0, (.5, .5) after a 1; the reference is uniform. What the first
    # choice does to the second token's divergence is not in the sum of token losses: its logits get .097312, not the whole
    # sequence's .185647.
    first = torch.tensor([0.6, 0.4], dtype=torch.float64).log().requires_grad_()
    second = torch.tensor([[0.9, 0.1], [0.5, 0.5]], dtype=torch.float64).log()
    pairs = [(a, b) for a in (0, 1) for b in (0, 1)]
    logprobs = torch.stack([torch.stack([first.log_softmax(-1)[a], second.log_softmax(-1)[a, b]]) for a, b in pairs])
    for estimator in (Estimator.score, Estimator.k2, Estimator.k3_weighted):
        loss = loss_of(
            reverse_kl(estimator),
            logprobs=logprobs,
            behaviour_logprobs=logprobs.detach(),
            ref_logprobs=torch.full((4, 2), 0.5, dtype=torch.float64).log(),
            response_mask=torch.ones(4, 2, dtype=torch.bool),
        )
        expected = (logprobs.detach().sum(-1).exp() * loss.sum(-1)).sum()
        (gradient,) = torch.autograd.grad(expected, first, retain_graph=True)
        torch.testing.assert_close(gradient, torch.tensor([0.097312, -0.097312], dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize("estimator", SAMPLED, ids=lambda e: e.name)
@pytest.mark.parametrize(("to_ref", "to_behaviour"), [(-100.0, 0.0), (100.0, 0.0), (0.0, 100.0), (-100.0, 100.0), (100.0, -100.0)])
def test_absurd_ratios_leave_loss_and_gradient_finite(estimator, to_ref, to_behaviour):
    logprobs = torch.tensor([[-300.0]], requires_grad=True)
    loss = loss_of(
        reverse_kl(estimator),
        logprobs=logprobs,
        behaviour_logprobs=logprobs.detach() - to_behaviour,
        ref_logprobs=logprobs.detach() - to_ref,
        response_mask=torch.ones(1, 1, dtype=torch.bool),
    )
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("estimator", SAMPLED, ids=lambda e: e.name)
def test_only_the_policy_gets_a_gradient(f1, estimator):
    inputs = {
        "logprobs": f1.logprobs,
        "behaviour_logprobs": f1.old_logprobs.clone().requires_grad_(),
        "ref_logprobs": f1.ref_logprobs.clone().requires_grad_(),
    }
    loss = loss_of(reverse_kl(estimator), **inputs, response_mask=f1.response_mask)[f1.response_mask].sum()
    to_policy, to_behaviour, to_ref = torch.autograd.grad(loss, list(inputs.values()), allow_unused=True)
    assert to_policy.ne(0).any()
    assert all(gradient is None or gradient.eq(0).all() for gradient in (to_behaviour, to_ref))


def test_each_estimator_asks_for_what_it_uses():
    for estimator in OF_REVERSE_KL:
        needs = reverse_kl(estimator).needs
        assert "ref_logprobs" in needs
        assert ("ref_hidden" in needs) == (estimator is Estimator.exact)
    assert NoDivergence().needs == frozenset()


def test_the_default_estimates_the_gradient_of_the_divergence_it_is_named_after():
    assert ReverseKL().estimator is Estimator.score
    assert ReverseKL().verdict.is_right
    assert ReverseKL().coef == 0.05


def test_a_negative_coefficient_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"divergence\.coef"):
        ReverseKL(coef=-0.1)


def test_off_has_no_settings():
    with pytest.raises(TypeError):
        NoDivergence(coef=1.0)  # type: ignore[call-arg]


def test_a_token_that_the_reference_all_but_excludes_keeps_the_right_gradient():
    """Past the clamp on exponents the ratio-weighted k3 still pushes with rho * l, and k3 does not change its sign."""
    for log_ratio in (-19.0, -21.0, -60.0, 21.0, 60.0):
        gradients = {}
        for estimator in (Estimator.score, Estimator.k3_weighted, Estimator.k3):
            logprobs = torch.tensor([[-70.0]], dtype=torch.float64, requires_grad=True)
            ref = logprobs.detach() - log_ratio
            mask = torch.ones(1, 1, dtype=torch.bool)
            loss = loss_of(
                reverse_kl(estimator), logprobs=logprobs, behaviour_logprobs=logprobs.detach(), ref_logprobs=ref, response_mask=mask
            )
            gradients[estimator] = float(torch.autograd.grad(loss.sum(), logprobs)[0])
        assert gradients[Estimator.k3_weighted] == gradients[Estimator.score] == pytest.approx(log_ratio)
        assert gradients[Estimator.k3] * log_ratio >= 0


# --- an explicit target ---------------------------------------------------------------------------------------------------------


def test_the_target_of_the_reverse_kl_is_kl_penalised_rl():
    """Advantages of -(L - r / coef) less the mean over the others: those of RLOO on r - coef L, divided by coef."""
    generator = torch.Generator().manual_seed(0)
    log_ratio = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    mask, groups = torch.ones(8, 3, dtype=torch.bool), torch.arange(8) // 4
    rewards, coef = torch.rand(8, generator=generator, dtype=torch.float64), 0.3
    found = ReverseKL(place=Place.target).target(
        log_ratio=log_ratio, response_mask=mask, group_ids=groups, rewards=rewards, coef=coef
    )
    assert found is not None
    score = (rewards - coef * log_ratio.sum(-1)) / coef
    total = score.reshape(2, 4).sum(-1, keepdim=True)
    loo = score - ((total - score.reshape(2, 4)) / 3).flatten()
    # Each Z is that of the others, so log Z differs between the responses of a group: it is taken out on both sides.
    own = found.log_partition.reshape(2, 4)
    shift = own - (own.sum(-1, keepdim=True) - own) / 3
    torch.testing.assert_close(-found.penalty[:, 0], loo - shift.flatten())
    torch.testing.assert_close(found.gap, found.log_partition - score)


def test_kl_regularised_rl_is_inference_of_its_posterior():
    """prior (.2, .5, .3), rewards (1, 0, .5), coef .5: Z = 2.793296; E[r]/coef - KL = log Z - KL(policy || posterior) = .488098."""
    prior, policy = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    rewards, coef = torch.tensor([1.0, 0.0, 0.5], dtype=torch.float64), 0.5
    posterior = prior * (rewards / coef).exp()
    assert posterior.sum().item() == pytest.approx(2.793296, abs=1e-6)
    # A group that holds every outcome as often as the policy draws it: ten responses, whose weights then average to Z.
    outcomes = torch.tensor([0] * 5 + [1] * 3 + [2] * 2)
    log_ratio = (policy / prior).log()[outcomes].repeat(400)[:, None]
    many = outcomes.repeat(400)
    found = ReverseKL(place=Place.target).target(
        log_ratio=log_ratio,
        response_mask=torch.ones_like(log_ratio, dtype=torch.bool),
        group_ids=torch.zeros(len(many), dtype=torch.int64),
        rewards=rewards[many],
        coef=coef,
    )
    assert found is not None
    assert found.log_partition.mean().item() == pytest.approx(1.027222, abs=1e-4)
    kl_to_posterior = float((policy * (policy / (posterior / posterior.sum())).log()).sum())
    assert found.gap.mean().item() == pytest.approx(kl_to_posterior, abs=1e-3)
    identity = float((policy * rewards).sum() / coef - (policy * (policy / prior).log()).sum())
    assert coef * identity == pytest.approx(coef * (1.027222 - kl_to_posterior), abs=1e-6)


@pytest.mark.parametrize("divergence", [ReverseKL(place=Place.target), ForwardKL(place=Place.target)], ids=lambda d: d.name)
def test_the_expected_gradient_is_that_of_the_distance_from_the_target(divergence):
    """With a group that is large and as often each outcome as the policy draws it, Z is exact and so is the gradient."""
    prior, rewards, coef = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), torch.tensor([1.0, 0.0, 0.5]).double(), 0.5
    logits = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log().requires_grad_()
    logprobs = logits.log_softmax(-1)
    outcomes = torch.tensor([0] * 5 + [1] * 3 + [2] * 2).repeat(200)
    found = divergence.target(
        log_ratio=(logprobs.detach() - prior.log())[outcomes][:, None],
        response_mask=torch.ones(len(outcomes), 1, dtype=torch.bool),
        group_ids=torch.zeros(len(outcomes), dtype=torch.int64),
        rewards=rewards[outcomes],
        coef=coef,
    )
    (gradient,) = torch.autograd.grad((found.penalty[:, 0] * logprobs[outcomes]).mean(), logits, retain_graph=True)
    posterior = (prior.log() + rewards / coef).log_softmax(-1)
    (exact,) = torch.autograd.grad(divergence.exact(logprobs[None], posterior[None]).sum(), logits)
    torch.testing.assert_close(gradient, exact, rtol=0, atol=2e-3)


def test_a_prompt_with_one_response_has_its_own_partition():
    one = torch.ones(1)
    found = ReverseKL(place=Place.target).target(
        log_ratio=one[:, None] / 2, response_mask=one[:, None].bool(), group_ids=one, rewards=one, coef=1.0
    )
    assert found is not None
    assert found.gap.item() == 0
