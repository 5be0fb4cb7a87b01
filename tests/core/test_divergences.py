"""Every divergence against numbers worked out by hand, its own generator, and the optimum that it must lead to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from rlkit.config import penalties
from rlkit.core.divergences import (
    Alpha,
    CauchySchwarz,
    ChiSquaredPolicyRef,
    ChiSquaredRefPolicy,
    Cost,
    FDivergence,
    ForwardKL,
    GeneralizedJensenShannon,
    Head,
    Jeffreys,
    JensenShannon,
    Renyi,
    ReverseKL,
    Sinkhorn,
    SquaredHellinger,
    TotalVariation,
    head_and_tail,
)
from rlkit.core.estimators import Estimator, Place
from rlkit.core.ledger import combinations
from rlkit.errors import ConfigError

POLICY, REF = (torch.tensor(p, dtype=torch.float64) for p in ([0.5, 0.3, 0.2], [0.2, 0.5, 0.3]))
VECTORS = [  # D, f'(u), dD/dlogits; u = (2.5, .6, .666667)
    (ReverseKL(), 0.223805, (0.916291, -0.510826, -0.405465), (0.346243, -0.220389, -0.125854)),
    (ForwardKL(), 0.193794, (0.6, -0.666667, -0.5), (0.3, -0.2, -0.1)),
    (JensenShannon(), 0.050875, (0.178337, -0.143841, -0.111572), (0.077318, -0.050263, -0.027055)),
    (GeneralizedJensenShannon(b=0.1), 0.017563, (0.055688, -0.058085, -0.043911), (0.027026, -0.017916, -0.009109)),
    (GeneralizedJensenShannon(b=0.9), 0.019661, (0.077653, -0.047000, -0.037156), (0.030179, -0.019289, -0.010890)),
    (Alpha(a=0.2), 0.215995, (0.837234, -0.537832, -0.422359), (0.332219, -0.213188, -0.119031)),
    (Alpha(a=0.5), 0.206100, (0.735089, -0.581989, -0.449490), (0.316020, -0.205512, -0.110508)),
    (Alpha(a=0.8), 0.198141, (0.649438, -0.631001, -0.478952), (0.304905, -0.201189, -0.103716)),
    (TotalVariation(), 0.3, (0.5, -0.5, -0.5), (0.25, -0.15, -0.1)),
    (ChiSquaredPolicyRef(), 0.563333, (3, -0.8, -0.666667), (0.936667, -0.578, -0.358667)),
    (ChiSquaredRefPolicy(), 0.363333, (0.84, -1.777778, -1.25), (0.601667, -0.424333, -0.177333)),
    (SquaredHellinger(), 0.051525, (0.183772, -0.145497, -0.112372), (0.079005, -0.051378, -0.027627)),
    (Jeffreys(), 0.417599, (1.516291, -1.177492, -0.905465), (0.646243, -0.420389, -0.225854)),
    (Renyi(a=2), 0.446820, None, (0.599147, -0.369723, -0.229424)),
    (Renyi(a=0.5), 0.105800, None, None),
    (CauchySchwarz(), 0.407198, None, (0.670628, -0.494058, -0.176570)),
]
F_DIVERGENCES = [divergence for divergence, *_ in VECTORS if isinstance(divergence, FDivergence)]
OTHERS = [Alpha(a=0), Alpha(a=1), Alpha(a=-1), Alpha(a=2), JensenShannon(scale=2), GeneralizedJensenShannon(b=0.3, normalize=True)]


def name(divergence):
    settings = {key: getattr(divergence, key) for key in ("a", "b", "scale") if hasattr(divergence, key)}
    return f"{divergence.name}{''.join(f'-{value}' for value in settings.values())}"


@pytest.mark.parametrize(("divergence", "value", "slopes", "gradient"), VECTORS, ids=[name(d) for d, *_ in VECTORS])
def test_value_slope_and_gradient_over_three_tokens(divergence, value, slopes, gradient):
    logits = POLICY.log().requires_grad_()
    found = divergence.exact(logits.log_softmax(-1)[None], REF.log()[None])
    assert found.shape == (1,)
    assert found.item() == pytest.approx(value, abs=1e-6)
    if gradient is not None:
        torch.testing.assert_close(
            torch.autograd.grad(found.sum(), logits)[0], torch.tensor(gradient, dtype=torch.float64), rtol=0, atol=1e-6
        )
    if slopes is not None:
        torch.testing.assert_close(
            divergence.slope((POLICY / REF).log()), torch.tensor(slopes, dtype=torch.float64), rtol=0, atol=1e-6
        )


@pytest.mark.parametrize("divergence", [*F_DIVERGENCES, *OTHERS], ids=name)
def test_every_form_follows_from_the_generator(divergence):
    log_ratio = torch.linspace(-4, 4, 40, dtype=torch.float64)
    as_written = FDivergence.slope(divergence, log_ratio)
    torch.testing.assert_close(divergence.slope(log_ratio), as_written, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(divergence.value(log_ratio), FDivergence.value(divergence, log_ratio), rtol=1e-6, atol=1e-8)
    assert divergence.generator(log_ratio).ge(0).all()
    assert divergence.slope(torch.zeros(1)).item() == pytest.approx(0, abs=1e-6)  # a policy at its reference is not moved
    tables = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(3), dtype=torch.float64).log_softmax(-1)
    torch.testing.assert_close(divergence.exact(*tables), FDivergence.exact(divergence, *tables), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("cls", penalties().values(), ids=penalties())
def test_no_divergence_is_negative_and_equal_distributions_have_none(cls):
    tables = torch.randn(2, 50, 7, generator=torch.Generator().manual_seed(5), dtype=torch.float64).log_softmax(-1)
    assert cls().exact(*tables).gt(0).all()
    torch.testing.assert_close(cls().exact(tables[0], tables[0]), torch.zeros(50, dtype=torch.float64), rtol=0, atol=1e-9)


def test_the_conjugates_at_one_point():
    expected = [
        (ReverseKL(), -0.259182),
        (ForwardKL(), -0.262364),
        (JensenShannon(), -0.186191),
        (GeneralizedJensenShannon(b=0.3), -0.178546),
        (Alpha(a=0.4), -0.260549),
        (ChiSquaredPolicyRef(), -0.2775),
        (ChiSquaredRefPolicy(), -0.280350),
        (SquaredHellinger(), -0.1875),
        (Jeffreys(), -0.279078),
    ]
    for divergence, value in expected:
        assert divergence.conjugate(torch.tensor(-0.3, dtype=torch.float64)).item() == pytest.approx(value, abs=1e-6), divergence


@pytest.mark.parametrize("divergence", [*F_DIVERGENCES, *OTHERS], ids=name)
def test_the_conjugate_is_the_best_line_under_the_generator(divergence):
    log_u = torch.linspace(-19, 12, 400_001, dtype=torch.float64)
    for t in (-2.5, -0.4, -0.1, 0.1, 0.3, 0.9):
        found = divergence.conjugate(torch.tensor(t, dtype=torch.float64)).item()
        by_search = (t * log_u.exp() - divergence.generator(log_u)).max().item()
        if math.isinf(found):
            assert by_search > 100  # grows with the range that is searched
        else:
            assert found == pytest.approx(by_search, abs=1e-4)


def test_relations_between_divergences():
    tables = torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(7), dtype=torch.float64).log_softmax(-1)

    def exact(divergence):
        return divergence.exact(*tables)

    def close(x, y, **tolerance):
        torch.testing.assert_close(exact(x), y, **tolerance)

    close(Alpha(a=1e-6), exact(ReverseKL()), rtol=0, atol=1e-4)
    close(Alpha(a=2e-4), exact(ReverseKL()), rtol=0, atol=1e-3)  # outside of the branch that takes the limit
    close(Alpha(a=1 - 1e-6), exact(ForwardKL()), rtol=0, atol=1e-4)
    close(Alpha(a=1 - 2e-4), exact(ForwardKL()), rtol=0, atol=1e-3)
    close(Alpha(a=0.5), 4 * exact(SquaredHellinger()))
    close(Alpha(a=-1), exact(ChiSquaredPolicyRef()) / 2)
    close(Alpha(a=2), exact(ChiSquaredRefPolicy()) / 2)
    close(GeneralizedJensenShannon(b=0.5), exact(JensenShannon()))
    close(JensenShannon(scale=2), 2 * exact(JensenShannon()))
    close(GeneralizedJensenShannon(b=1e-5, normalize=True), exact(ForwardKL()), rtol=1e-3, atol=0)
    close(GeneralizedJensenShannon(b=1 - 1e-5, normalize=True), exact(ReverseKL()), rtol=1e-3, atol=0)
    close(Jeffreys(), exact(ReverseKL()) + exact(ForwardKL()))
    close(Renyi(a=1.001), exact(ReverseKL()), rtol=5e-3, atol=0)
    a = 1.7
    close(Renyi(a=a), (1 + a * (a - 1) * exact(Alpha(a=1 - a))).log() / (a - 1))


@pytest.mark.parametrize("divergence", [*F_DIVERGENCES, Renyi(a=2)], ids=name)
def test_one_bucket_for_the_tail_never_adds_divergence(divergence):
    tables = (2 * torch.randn(2, 30, 12, generator=torch.Generator().manual_seed(9), dtype=torch.float64)).log_softmax(-1)
    whole = divergence.exact(*tables)
    for k in (1, 3, 11):
        coarse = divergence.exact(*head_and_tail(*tables, top_k=k, head=divergence.head))
        assert coarse.ge(-1e-12).all()
        assert coarse.le(whole + 1e-9).all()
    same = head_and_tail(tables[0], tables[0], top_k=3, head=divergence.head)
    torch.testing.assert_close(divergence.exact(*same), torch.zeros(30, dtype=torch.float64), rtol=0, atol=1e-12)
    settings = type(divergence)(estimator=Estimator.exact, top_k=12)
    torch.testing.assert_close(settings.between(*tables, torch.zeros(12, 2)), type(divergence)().exact(*tables))


@pytest.mark.parametrize("divergence", [*F_DIVERGENCES, *OTHERS], ids=name)
def test_the_form_that_keeps_one_buffer_has_autograds_value_and_gradient(divergence):
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(6), dtype=torch.float64).requires_grad_()
    ref = torch.randn(5, 9, generator=torch.Generator().manual_seed(8), dtype=torch.float64).log_softmax(-1)
    weights = torch.arange(1, 6, dtype=torch.float64)
    lean = divergence.between(logits.log_softmax(-1), ref, torch.zeros(9, 1))
    plain = divergence.exact(logits.log_softmax(-1), ref)
    torch.testing.assert_close(lean, plain)
    (found,), (wanted,) = (torch.autograd.grad((weights * value).sum(), logits) for value in (lean, plain))
    torch.testing.assert_close(found, wanted)


def test_head_and_tail_worked_out_by_hand():
    policy = torch.tensor([[0.5, 0.3, 0.15, 0.05]], dtype=torch.float64).log()
    ref = torch.tensor([[0.2, 0.5, 0.1, 0.2]], dtype=torch.float64).log()
    assert ReverseKL(estimator=Estimator.exact, top_k=2).between(policy, ref, torch.zeros(4, 1)).item() == pytest.approx(
        0.223805, abs=1e-6
    )
    assert ReverseKL().exact(policy, ref).item() == pytest.approx(0.296403, abs=1e-6)
    by_ref, _ = head_and_tail(policy, ref, top_k=1, head=Head.ref)
    torch.testing.assert_close(by_ref.exp(), torch.tensor([[0.3, 0.7]], dtype=torch.float64))


def test_the_tails_gradient_is_that_of_its_tokens_together():
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    ref = torch.randn(1, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64).log_softmax(-1)
    divergence = ForwardKL(estimator=Estimator.exact, top_k=3)
    assert torch.autograd.gradcheck(lambda z: divergence.between(z.log_softmax(-1), ref, torch.zeros(8, 1)), (logits,))


def test_absurd_ratios_leave_value_and_gradient_finite():
    for divergence in (*F_DIVERGENCES, Renyi(a=2), CauchySchwarz(), Sinkhorn(top_k=2)):
        logits = torch.tensor([[80.0, 0.0, -80.0]], requires_grad=True)
        found = divergence.exact(logits.log_softmax(-1), torch.tensor([[-80.0, 0.0, 80.0]]).log_softmax(-1))
        (gradient,) = torch.autograd.grad(found.sum(), logits)
        assert found.isfinite().all(), divergence
        assert gradient.isfinite().all(), divergence


# --- Sinkhorn -------------------------------------------------------------------------------------------------------------


LINE = (torch.arange(3.0)[:, None] - torch.arange(3.0)[None]).abs()[None].double()
ONES = (1 - torch.eye(3, dtype=torch.float64))[None]


@pytest.mark.parametrize(("costs", "epsilon", "expected"), [(ONES, 0.1, 0.300025), (ONES, 0.02, 0.3), (LINE, 0.02, 0.4)])
def test_the_plan_costs_what_was_worked_out(costs, epsilon, expected):
    """Total variation at a cost of 1; along a line the earth mover's |F_p - F_q| over the gaps, .3 + .1."""
    divergence = Sinkhorn(epsilon=epsilon, iterations=400)
    f, g = divergence._potentials(POLICY.log()[None], REF.log()[None], costs)
    plan = ((f[:, :, None] + g[:, None] - costs) / epsilon).exp() * POLICY[:, None] * REF[None]
    torch.testing.assert_close(plan[0].sum(-1), POLICY, rtol=0, atol=1e-4)
    torch.testing.assert_close(plan[0].sum(-2), REF, rtol=0, atol=1e-4)
    assert (plan * costs).sum().item() == pytest.approx(expected, abs=1e-5)


def test_the_debiased_value_goes_to_the_plans_cost_as_the_blur_goes():
    found = [
        Sinkhorn(epsilon=epsilon, iterations=600).exact(POLICY.log()[None], REF.log()[None]).item() for epsilon in (0.02, 0.004)
    ]
    assert abs(found[1] - 0.3) < 0.3 * abs(found[0] - 0.3)
    assert found[1] == pytest.approx(0.3, abs=6e-3)


def test_transports_gradient_is_that_of_its_value():
    costs = torch.rand(1, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    costs = (costs + costs.mT) / 2 * (1 - torch.eye(4, dtype=torch.float64))
    divergence = Sinkhorn(epsilon=0.3, iterations=500)
    ref = torch.randn(1, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64).log_softmax(-1)
    logits = torch.randn(1, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()

    def value(z):
        return divergence.transport(z.log_softmax(-1), ref, costs)

    (gradient,) = torch.autograd.grad(value(logits).sum(), logits)
    for index in range(4):
        step = torch.zeros(1, 4, dtype=torch.float64)
        step[0, index] = 1e-5
        difference = (value(logits.detach() + step) - value(logits.detach() - step)) / 2e-5
        assert gradient[0, index].item() == pytest.approx(difference.item(), abs=1e-6)


def test_moving_mass_to_a_like_token_is_cheap():
    embeddings = torch.tensor([[1.0, 0.0], [0.99, 0.1], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    ref = torch.tensor([[0.94, 0.02, 0.02, 0.02]], dtype=torch.float64).log()
    near = torch.tensor([[0.02, 0.94, 0.02, 0.02]], dtype=torch.float64).log()
    far = torch.tensor([[0.02, 0.02, 0.02, 0.94]], dtype=torch.float64).log()
    divergence = Sinkhorn(top_k=3, epsilon=0.02, iterations=300)
    assert divergence.between(near, ref, embeddings).item() < 0.05 * divergence.between(far, ref, embeddings).item()
    flat = Sinkhorn(top_k=3, cost=Cost.zero_one, epsilon=0.02, iterations=300)
    assert flat.between(near, ref, embeddings).item() == pytest.approx(flat.between(far, ref, embeddings).item(), rel=1e-3)


# --- what a divergence leads to -----------------------------------------------------------------------------------------------

REWARDS = torch.tensor([1.0, 0.2, 0.6, 0.0, 0.4], dtype=torch.float64)
PRIOR = torch.tensor([0.15, 0.35, 0.2, 0.2, 0.1], dtype=torch.float64)
COEF = 0.7
# Bounded divergences cannot hold rewards of this size apart at that: their optimum would be a corner, which takes for ever.
COEFS = {"jensen_shannon": 3.0, "generalized_js": 3.0, "squared_hellinger": 3.0}


def coef_of(divergence):
    return COEFS.get(divergence.name, COEF)


def optimum(divergence):
    """The policy that maximizes E[r] - coef D, from the conjugate: ref (f*)'((r - lambda) / coef), lambda so that it sums to 1."""

    def policy(shift):
        t = ((REWARDS - shift) / coef_of(divergence)).requires_grad_()
        values = divergence.conjugate(t)
        (u,) = torch.autograd.grad(values.sum(), t)
        return PRIOR * torch.where(values.isinf(), 1e9, u)  # no u has so steep a slope

    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if policy(middle).sum() > 1 else (low, middle)
    return policy(high)


def objective(divergence, policy):
    return float((policy * REWARDS).sum() - coef_of(divergence) * divergence.exact(policy.log()[None], PRIOR.log()[None]))


@pytest.mark.parametrize(
    "divergence",
    [d for d in combinations(penalties()) if d.verdict.is_right and not isinstance(d, TotalVariation)],
    ids=lambda d: f"{d.name}-{d.place.name}-{d.estimator.name}",
)
def test_every_right_combination_reaches_the_optimum(divergence):
    """Expected gradients on one state, with the functions that training calls; samples come from the policy itself."""
    if isinstance(divergence, Sinkhorn):
        divergence.iterations = 30
    logits, coef = PRIOR.log().clone().requires_grad_(), coef_of(divergence)
    optimizer = torch.optim.Adam([logits], lr=0.2)
    n, ones = len(PRIOR), torch.ones(len(PRIOR), 1, dtype=torch.bool)
    for step in range(250):
        optimizer.param_groups[0]["lr"] = 0.2 * 0.97**step
        table = logits.log_softmax(-1)
        logprobs, ref = table[:, None], PRIOR.log()[:, None]
        log_ratio = (logprobs - ref).detach()
        penalty = divergence.penalty(log_ratio=log_ratio, response_mask=ones, group_ids=torch.arange(n))
        advantages = REWARDS[:, None] - (0 if penalty is None else coef * penalty)
        loss = -advantages * logprobs
        exact = divergence.exact(table[None], PRIOR.log()[None]).expand(n)[:, None]
        term = divergence.loss(
            logprobs=logprobs, behaviour_logprobs=logprobs.detach(), ref_logprobs=ref, response_mask=ones, exact_values=exact
        )
        loss = loss if term is None else loss + coef * term
        optimizer.zero_grad()
        (table.detach().exp()[:, None] * loss).sum().backward()
        optimizer.step()
    found = logits.detach().softmax(-1)
    if isinstance(divergence, FDivergence):
        torch.testing.assert_close(found, optimum(divergence), rtol=0, atol=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):  # nothing near it is better
        other = (found.log() + 0.05 * torch.randn(n, generator=generator, dtype=torch.float64)).softmax(-1)
        assert objective(divergence, other) < objective(divergence, found) + (1e-3 if isinstance(divergence, Sinkhorn) else 1e-6)


def test_total_variation_goes_to_the_corner_that_its_optimum_is():
    """Its slope is a sign, so the optimum moves mass from the worst token to the best while that pays: r_max - r_min > coef."""
    best, worst = REWARDS.argmax(), REWARDS.argmin()
    moved = PRIOR.clone()
    moved[best], moved[worst] = PRIOR[best] + PRIOR[worst], 1e-12
    also = moved.clone()
    token = 1  # of reward .2: 1 - .2 > .7
    also[best], also[token] = also[best] + also[token], 1e-12
    values = [objective(TotalVariation(), p) for p in (PRIOR, moved, also)]
    assert values == sorted(values)
    logits = PRIOR.log().clone().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(400):
        table = logits.log_softmax(-1)
        loss = -(table.exp() * REWARDS).sum() + COEF * TotalVariation().exact(table[None], PRIOR.log()[None]).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert objective(TotalVariation(), logits.detach().softmax(-1)) == pytest.approx(values[-1], abs=5e-3)


# --- settings -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ForwardKL(estimator=Estimator.k2), ["divergence.estimator=k2", "forward_kl", "reference_weighted"]),
        (lambda: ForwardKL(estimator=Estimator.naive), ["descends", "allow_biased=true"]),
        (lambda: ReverseKL(estimator=Estimator.k1), ["nothing", "allow_biased=true"]),
        (lambda: ReverseKL(estimator=Estimator.k3, place=Place.token_reward), ["reverse_kl - forward_kl", "allow_biased=true"]),
        (lambda: ReverseKL(estimator=Estimator.exact, place=Place.token_reward), ["has no meaning", "k1"]),
        (lambda: ReverseKL(allow_biased=True), ["needs no leave"]),
        (lambda: ReverseKL(top_k=5), ["divergence.top_k=5", "estimator=exact"]),
        (lambda: Renyi(place=Place.sequence_reward), ["divergence.place=loss"]),
        (lambda: Renyi(a=1), ["reverse_kl"]),
        (lambda: GeneralizedJensenShannon(b=0), ["forward_kl"]),
        (lambda: JensenShannon(scale=0), ["divergence.scale=0"]),
        (lambda: Alpha(a=math.nan), ["divergence.a"]),
        (lambda: Sinkhorn(epsilon=0), ["epsilon=0"]),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_reason(make, words):
    with pytest.raises(ConfigError) as refused:
        make()
    for word in words:
        assert word in str(refused.value)


@dataclass(kw_only=True, slots=True)
class LeCam(FDivergence):
    """A user's own: sum (policy - ref)^2 / (2 (policy + ref))."""

    name: ClassVar[str] = "le_cam"

    def generator(self, log_ratio):
        u = log_ratio.exp()
        return (u - 1) ** 2 / (2 * (u + 1))


def test_a_generator_alone_is_a_divergence():
    logits = POLICY.log().requires_grad_()
    by_hand = ((logits.softmax(-1) - REF) ** 2 / (2 * (logits.softmax(-1) + REF))).sum()
    found = LeCam().exact(logits.log_softmax(-1)[None], REF.log()[None]).sum()
    torch.testing.assert_close(found, by_hand)
    torch.testing.assert_close(torch.autograd.grad(found, logits), torch.autograd.grad(by_hand, logits))
    slope = LeCam().slope((POLICY / REF).log())
    u = POLICY / REF
    torch.testing.assert_close(slope, ((u - 1) * (u + 3)) / (2 * (u + 1) ** 2))


def test_a_generator_that_is_no_divergences_is_refused():
    @dataclass(kw_only=True, slots=True)
    class Tilted(LeCam):
        def generator(self, log_ratio):
            return LeCam.generator(self, log_ratio) + log_ratio.exp() - 1

    @dataclass(kw_only=True, slots=True)
    class Concave(LeCam):
        def generator(self, log_ratio):
            return -LeCam.generator(self, log_ratio)

    with pytest.raises(ConfigError, match=r"f'\(1\)=1"):
        Tilted()
    with pytest.raises(ConfigError, match="convex"):
        Concave()
