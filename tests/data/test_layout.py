from dataclasses import replace

import pytest
import torch

from rlkit.data.layout import LayoutKind, ModelCost, arrange, is_plain, lay_out, plan, plan_cost, row_width, whole_sequences
from rlkit.data.models.loading import load_model
from rlkit.data.models.policy import Policy
from rlkit.types import Sequences

COST = ModelCost(per_token=1000.0, per_pair=1.0)
KINDS = [LayoutKind.padded, LayoutKind.packed, LayoutKind.shared]


def sequences(groups: list[tuple[int, list[int]]], *, vocab: int = 19, seed: int = 0) -> Sequences:
    """Groups as (prompt length, lengths of its responses), shuffled."""
    generator = torch.Generator().manual_seed(seed)
    rows, prompts, responses = [], [], []
    for prompt_length, response_lengths in groups:
        prompt = torch.randint(1, vocab, (prompt_length,), generator=generator)
        for length in response_lengths:
            rows.append(torch.cat([prompt, torch.randint(1, vocab, (length,), generator=generator)]))
            prompts.append(prompt_length)
            responses.append(length)
    order = torch.randperm(len(rows), generator=generator).tolist()
    return Sequences(
        input_ids=torch.nn.utils.rnn.pad_sequence([rows[i] for i in order], batch_first=True),
        prompt_lengths=torch.tensor([prompts[i] for i in order]),
        response_lengths=torch.tensor([responses[i] for i in order]),
    )


RAGGED = sequences([(5, [1, 4, 9, 2]), (3, [7]), (11, [3, 0, 6]), (1, [2, 2])])


def by_sample(policy: Policy, given: Sequences, kind: LayoutKind, *, budget: int = 10_000) -> list[torch.Tensor]:
    """Log-probs of each sample's response tokens."""
    found: dict[int, torch.Tensor] = {}
    for samples, layout in arrange(given, token_budget=budget, kind=kind, cost=COST):
        values = policy(layout, temperature=0.7, chunk_tokens=1000).logprobs
        found |= dict(zip(samples, values.split(given.response_lengths[samples].tolist()), strict=True))
    return [found[sample] for sample in range(len(given.prompt_lengths))]


@pytest.mark.parametrize("budget", [1, 12, 40, 10_000])
@pytest.mark.parametrize("kind", LayoutKind)
def test_a_plan_holds_every_sample_once_and_stays_within_its_budget(kind, budget):
    microbatches = plan(RAGGED, token_budget=budget, kind=kind, cost=COST)
    assert sorted(sample for rows in microbatches for row in rows for group in row for sample in group) == list(range(10))
    for rows in microbatches:
        widest = max(row_width(RAGGED, row) for row in rows)
        alone = len(rows) == len(rows[0]) == len(rows[0][0]) == 1
        assert len(rows) * widest <= budget or alone
        for row in rows:
            for group in row:
                assert len({tuple(RAGGED.prompt(sample)) for sample in group}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_predicts_what_the_sequences_alone_predict(kind, random_model):
    policy = Policy(load_model(str(random_model(tied=True)), dtype=torch.float32))
    expected = []
    for sample in range(len(RAGGED.prompt_lengths)):
        ids = [*RAGGED.prompt(sample), *RAGGED.response(sample).tolist()]
        count = int(RAGGED.response_lengths[sample])
        scores = policy(whole_sequences([ids]), temperature=0.7, chunk_tokens=1000).logprobs if len(ids) > 1 else torch.zeros(0)
        expected.append(scores[len(scores) - count :])
    for budget in (24, 10_000):
        found = by_sample(policy, RAGGED, kind, budget=budget)
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_has_the_gradient_of_the_padded_one(kind, random_model):
    """Weights in float64; rotary embeddings and norms are float32 in there whatever the weights are."""
    gradients = []
    for each in (LayoutKind.padded, kind):
        policy = Policy(load_model(str(random_model(tied=True)), dtype=torch.float64))
        policy.requires_grad_(True)
        values = torch.cat(by_sample(policy, RAGGED, each, budget=40))
        (values * torch.randn(len(values), generator=torch.Generator().manual_seed(1))).sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None]))
    assert (gradients[1] - gradients[0]).norm() <= 1e-6 * gradients[0].norm()


def test_a_token_of_another_sample_changes_nothing(random_model):
    """The mask, tested where it would leak: in a row of several samples, one other response and one other prompt change."""
    policy = Policy(load_model(str(random_model(tied=True)), dtype=torch.float32))
    given = sequences([(4, [5, 5]), (4, [5])])
    changed = given.input_ids.clone()
    prompts = [tuple(given.prompt(sample)) for sample in range(3)]
    first = [sample for sample in range(3) if prompts.count(prompts[sample]) == 2]
    (other,) = {0, 1, 2} - set(first)
    target, neighbour = first[0], first[-1]
    changed[neighbour, 4:9] = (changed[neighbour, 4:9] + 1) % 19
    changed[other, :9] = (changed[other, :9] + 1) % 19
    for rows in ([[first]], [[[target], [neighbour], [other]]], [[first, [other]]]):
        both = [
            policy(lay_out(each, rows), temperature=1.0, chunk_tokens=100).logprobs[:5]
            for each in (given, replace(given, input_ids=changed))
        ]
        torch.testing.assert_close(both[0], both[1], rtol=0, atol=0)


def test_auto_takes_the_cheapest_layout():
    long_prompts = sequences([(200, [8] * 8)] * 2)
    assert plan(long_prompts, token_budget=10_000, kind=LayoutKind.auto, cost=COST) == plan(
        long_prompts, token_budget=10_000, kind=LayoutKind.shared, cost=COST
    )
    alone = sequences([(4, [60]) for _ in range(16)])
    chosen = plan(alone, token_budget=10_000, kind=LayoutKind.auto, cost=ModelCost(per_token=1.0, per_pair=10.0))
    assert all(is_plain(rows) for rows in chosen)
    for given in (long_prompts, alone, RAGGED):
        costs = {kind: plan_cost(given, plan(given, token_budget=256, kind=kind, cost=COST), COST) for kind in LayoutKind}
        assert costs[LayoutKind.auto] == min(costs.values())


def test_models_whose_layers_see_a_window_keep_one_sample_a_row(random_model):
    policy = Policy(load_model(str(random_model(tied=True)), dtype=torch.float32))
    assert policy.takes_masks
    policy.model.config.sliding_window = 16
    assert not policy.takes_masks
    policy.model.config.layer_types = ["full_attention", "full_attention"]
    assert policy.takes_masks
    policy.model.config.layer_types = ["full_attention", "sliding_attention"]
    assert not policy.takes_masks
