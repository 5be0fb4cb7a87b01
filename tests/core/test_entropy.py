import pytest
import torch

from rlkit.core.entropy import EntropyBonus, NoEntropy, NoSelector
from rlkit.core.logprobs import token_statistics
from rlkit.core.objectives import Surrogate
from rlkit.core.reduce import Aggregation, Denominators, reduce


def test_the_bonus_is_the_negative_entropy_and_leaves_the_coefficient_to_its_term(f1):
    loss = EntropyBonus(coef=0.01).loss(entropy=f1.entropy)
    torch.testing.assert_close(loss, -f1.entropy, equal_nan=True)
    denominators = Denominators.count(f1.response_mask, max_response_tokens=4)
    value = reduce(loss, f1.response_mask, aggregation=Aggregation.token_mean, denominators=denominators)
    assert 0.01 * value.item() == pytest.approx(-0.0109)


def test_descending_the_bonus_raises_the_entropy_with_its_exact_gradient():
    probs = torch.tensor([[0.7, 0.2, 0.1], [0.7, 0.2, 0.1]], dtype=torch.float64)
    logits = probs.log().requires_grad_()
    stats = token_statistics(
        hidden=logits,
        head=torch.eye(3, dtype=torch.float64),
        targets=torch.tensor([0, 1]),
        temperature=1.0,
        chunk_tokens=1,
        with_entropy=True,
    )
    assert stats.entropy is not None
    mask = torch.tensor([[True, False]])
    loss = reduce(
        EntropyBonus().loss(entropy=stats.entropy[None]),
        mask,
        aggregation=Aggregation.token_mean,
        denominators=Denominators(num_tokens=10, num_sequences=4, max_response_tokens=4),
    )
    (gradient,) = torch.autograd.grad(0.01 * loss, logits)
    # -(coef / N) dH/dz, dH/dz = -p (log p + H); nothing for the masked position
    expected = torch.tensor([[-0.311601, 0.161524, 0.150077], [0.0, 0.0, 0.0]], dtype=torch.float64) * -0.01 / 10
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-9)


def test_the_coefficient_has_a_default_and_only_the_bonus_needs_the_entropy():
    assert EntropyBonus().coef == 0.01
    assert EntropyBonus().needs == {"entropy"}
    assert NoEntropy().needs == frozenset()


def test_no_selector_hands_the_surrogate_on_untouched(f1):
    surrogate = Surrogate(loss=-f1.advantages * f1.logprobs, clipped=torch.zeros_like(f1.response_mask))
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    selected = NoSelector()(
        surrogate,
        logprobs=f1.logprobs,
        old_logprobs=f1.old_logprobs,
        advantages=f1.advantages,
        response_mask=f1.response_mask,
        generator=generator,
    )
    assert selected.loss is surrogate.loss
    assert selected.clipped is surrogate.clipped
    assert torch.equal(generator.get_state(), before)
