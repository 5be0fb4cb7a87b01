"""The ledger is the proof of `core/estimators.py`: what is called right has no bias, what is called wrong has one.

python tests/core/test_ledger.py      writes docs/divergences.md anew
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlkit.config import penalties
from rlkit.core.divergences import ForwardKL, JensenShannon, ReverseKL, TotalVariation
from rlkit.core.estimators import Estimator, Place
from rlkit.core.ledger import (
    World,
    as_markdown,
    combinations,
    exact_gradient,
    ledger,
    refusals,
    relative,
    sequence_gradients,
    worth,
)

DOCUMENT = Path(__file__).parent.parent.parent / "docs" / "divergences.md"
ROUNDING = 1e-9
WORLDS = [World.random(seed) for seed in range(3)]


def document() -> str:
    meaningless: dict[tuple[str, str], list[str]] = {}
    for name, place, estimator, why in refusals(penalties()):
        if "has no meaning" in why:
            meaningless.setdefault((name, place.name), []).append(f"`{estimator.name}`")
    refused = [f"- `{name}` has no {', '.join(names)} in `{place}`" for (name, place), names in meaningless.items()]
    refused += [f"- {why}" for _, _, _, why in refusals(penalties()) if "has no meaning" not in why]
    return f"""# What every divergence, estimator and place descends

Printed by `rlkit divergences`, from an enumeration of all responses of two tokens over a vocabulary of three, with the functions
that training calls. Biases are relative to the exact gradient, spreads are of one response's gradient; 0 is right. `off-policy` is
the bias under samples of another policy. What descends something else than it is named after is trained with only under
`divergence.allow_biased=true`, but for `k3` in the loss, which is asked for by its name.

{as_markdown(ledger(penalties()))}

## What is refused, and why

{chr(10).join(refused)}
"""


@pytest.mark.parametrize("divergence", list(combinations(penalties())), ids=lambda d: f"{d.name}-{d.place.name}-{d.estimator.name}")
def test_a_gradient_is_right_exactly_where_it_is_said_to_be(divergence):
    lines = [worth(world, divergence) for world in WORLDS]
    found = divergence.verdict
    if found.is_right:
        assert all(line.gradient_bias < ROUNDING for line in lines)
    else:
        assert all(line.gradient_bias > 0.01 for line in lines)
    if divergence.place is Place.loss:
        is_right_anywhere = found.is_right and not found.on_policy
        assert all(line.off_policy_bias is not None and (line.off_policy_bias < ROUNDING) == is_right_anywhere for line in lines)


def expected(world, divergence):
    probabilities, _, gradients = sequence_gradients(world, divergence)
    return (probabilities[:, None, None] * gradients).sum(0)


@pytest.mark.parametrize("world", WORLDS, ids=range(3))
def test_the_wrong_ones_descend_what_is_said_of_them(world):
    def biased(estimator, place=Place.loss):
        return expected(
            world,
            ReverseKL(estimator=estimator, place=place, allow_biased=estimator is not Estimator.k3 or place is not Place.loss),
        )

    def exact(divergence):
        return exact_gradient(world, divergence)[1]

    assert relative(biased(Estimator.k3), exact(ForwardKL(estimator=Estimator.exact))) < ROUNDING
    assert relative(biased(Estimator.absolute), 2 * exact(TotalVariation(estimator=Estimator.exact))) < ROUNDING
    assert float(biased(Estimator.k1).abs().max()) < ROUNDING


def test_k3_in_a_sequence_reward_descends_the_difference_of_the_two_kls():
    world, place = WORLDS[0], Place.sequence_reward
    found = expected(world, ReverseKL(estimator=Estimator.k3, place=place, allow_biased=True))
    wanted = exact_gradient(world, ReverseKL(place=place))[1] - exact_gradient(world, ForwardKL(place=place))[1]
    assert relative(found, wanted) < ROUNDING


@pytest.mark.parametrize("world", WORLDS, ids=range(3))
def test_any_function_of_the_log_ratio_in_the_loss_descends_the_divergence_with_that_slope(world):
    """The rule behind the verdicts: h(l) under the policy's samples has the gradient of f with f'(u) = h'(log u)."""
    coefficients = torch.randn(4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = world.logits.clone().requires_grad_()
    table = logits.log_softmax(-1)
    log_ratio = world.of_tokens(table) - world.of_tokens(world.ref_logprobs)
    powers = torch.arange(1, 5)
    probabilities = world.of_tokens(table).detach().sum(-1).exp()
    h = (coefficients * log_ratio.unsqueeze(-1) ** powers).sum(-1)
    (found,) = torch.autograd.grad((probabilities * h.sum(-1)).sum(), logits)
    slope = (coefficients * powers * (table - world.ref_logprobs).detach().unsqueeze(-1) ** (powers - 1)).sum(-1)
    reached = torch.cat([torch.ones(1, dtype=torch.float64), table[0].detach().exp()])
    policy = table.detach().exp()
    wanted = reached.unsqueeze(-1) * policy * (slope - (policy * slope).sum(-1, keepdim=True))
    torch.testing.assert_close(found, wanted)


def test_two_binary_tokens_worked_out_by_hand():
    """First (.6, .4), second (.9, .1) after a 0 and (.5, .5) after a 1; the reference is uniform. Greedy in the state or not."""
    from rlkit.core.divergences import ChiSquaredPolicyRef

    class Pair(World):
        @property
        def sequences(self):
            return torch.cartesian_prod(torch.arange(2), torch.arange(2))

    logits = torch.tensor([[0.6, 0.4], [0.9, 0.1], [0.5, 0.5]], dtype=torch.float64).log()
    uniform = torch.full((3, 2), 0.5, dtype=torch.float64).log()
    world = Pair(logits=logits, ref_logprobs=uniform, behaviour_logprobs=uniform)
    by_token, to_go, whole = (
        expected(world, ReverseKL(place=place))[0] for place in (Place.loss, Place.token_reward, Place.sequence_reward)
    )
    torch.testing.assert_close(by_token, torch.tensor([0.097312, -0.097312], dtype=torch.float64), rtol=0, atol=1e-6)
    for found in (to_go, whole):
        torch.testing.assert_close(found, torch.tensor([0.185647, -0.185647], dtype=torch.float64), rtol=0, atol=1e-6)
    chi2 = expected(world, ChiSquaredPolicyRef(place=Place.token_reward))
    torch.testing.assert_close(
        chi2[:2], torch.tensor([[0.3456, -0.3456], [0.1728, -0.1728]], dtype=torch.float64), rtol=0, atol=1e-6
    )


def test_leave_one_out_baselines_change_spread_and_no_mean():
    """All pairs of responses to one prompt, each with the other as its baseline."""
    world, divergence = WORLDS[0], JensenShannon(place=Place.sequence_reward)
    logits = world.logits.clone().requires_grad_()
    logprobs, ref = world.of_tokens(logits.log_softmax(-1)), world.of_tokens(world.ref_logprobs)
    probabilities = logprobs.detach().sum(-1).exp()
    n = len(logprobs)
    first, second = (index.flatten() for index in torch.meshgrid(torch.arange(n), torch.arange(n), indexing="ij"))
    rows = torch.cat([first, second])
    penalty = divergence.penalty(
        log_ratio=(logprobs - ref).detach()[rows],
        response_mask=torch.ones(len(rows), 2, dtype=torch.bool),
        group_ids=torch.arange(n * n).repeat(2),
    )
    assert penalty is not None
    weight = (probabilities[first] * probabilities[second]).repeat(2)
    (found,) = torch.autograd.grad((weight * (penalty * logprobs[rows]).sum(-1)).sum() / 2, logits)
    assert relative(found, exact_gradient(world, divergence)[1]) < ROUNDING


def test_the_ledger_in_the_docs_is_what_the_code_prints():
    assert DOCUMENT.read_text(encoding="utf-8") == document(), "run: python tests/core/test_ledger.py"


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
