import torch

from rlkit.data.layout import LayoutKind, arrange, whole_sequences
from rlkit.data.models.critic import CriticModel, ValueHeads
from rlkit.data.models.loading import load_model
from rlkit.data.models.policy import Policy


def test_one_head_starts_at_zero_and_two_start_apart():
    hidden = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    assert ValueHeads(64, 1, seed=0)(hidden).tolist() == [[0.0]] * 5
    two = ValueHeads(64, 2, seed=0)(hidden)
    assert two.shape == (5, 2)
    assert (two[:, 0] != two[:, 1]).all()


def test_heads_are_a_function_of_their_seed_and_leave_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (ValueHeads(64, 2, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(torch.get_rng_state(), before)
    hidden = torch.ones(1, 64)
    assert torch.equal(first(hidden), again(hidden))
    assert not torch.equal(first(hidden), other(hidden))


def test_a_critic_reads_the_state_before_each_token_whatever_the_layout(random_model, make_batch):
    """What follows a token cannot change its value, and the layout changes nothing."""
    model = load_model(random_model(tied=True), dtype=torch.float32)
    critic = CriticModel(model, ValueHeads(64, 2, seed=0))
    changed = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[5, 6, 7, 20, 30]])
    first, second = (critic(whole_sequences(ids.tolist())) for ids in changed)
    assert torch.equal(first[:3], second[:3])  # of the states after 5, 6 and 7
    assert not torch.equal(first[3], second[3])
    sequences = make_batch().sequences
    cost = Policy(model).cost
    found = []
    for kind in (LayoutKind.padded, LayoutKind.packed, LayoutKind.shared):
        values: dict[int, torch.Tensor] = {}
        for samples, layout in arrange(sequences, token_budget=64, kind=kind, cost=cost):
            values |= dict(zip(samples, critic(layout).split(sequences.response_lengths[samples].tolist()), strict=True))
        found.append(torch.cat([values[sample] for sample in range(len(values))]))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[2], found[0], atol=1e-5, rtol=1e-5)
