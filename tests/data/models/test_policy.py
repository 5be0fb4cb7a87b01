from types import SimpleNamespace

import torch

from rlkit.data.models.policy import hidden_before_responses


def test_the_gradient_at_a_position_before_many_responses_is_the_same_in_every_run():
    """A shared prompt's end is before every response of its group; the order of such a sum may not depend on threads."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 2048, 64, generator=generator, requires_grad=True)
    predicts = torch.randint(0, 64, (4096,), generator=generator) * 32
    weight = torch.randn(4096, 64, generator=generator)
    layout = SimpleNamespace(input_ids=None, position_ids=None, mask=None, predicts=predicts)

    def decoder(**_):
        return SimpleNamespace(last_hidden_state=hidden)

    found = hidden_before_responses(decoder, layout)  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(found, hidden[0][predicts], rtol=0, atol=0)
    gradients = [torch.autograd.grad(found, hidden, weight, retain_graph=True)[0] for _ in range(200)]
    assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
