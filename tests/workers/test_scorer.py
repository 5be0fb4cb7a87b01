"""The scorer against plain transformers, and its weights against the rules that move them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlkit.core.references import BEMAReference, EMAReference, Refresh, SoftRefresh
from rlkit.data.models.loading import load_model
from rlkit.errors import DataError, SyncError, WorkerError
from rlkit.workers.scorer import Move, Scorer, ScorerSpec
from rlkit.workers.weight_sync import Manifest, WeightPart, digests, pack


@pytest.fixture(scope="module")
def scorer(random_model) -> Scorer:
    return Scorer(
        ScorerSpec(
            model_path=random_model(tied=False),
            dtype="float32",
            trust_remote_code=False,
            tokens_per_microbatch=24,
            head_memory_mib=1,
        )
    )


@pytest.fixture(scope="module")
def rollouts(make_rollout):
    rng = np.random.default_rng(0)
    return [make_rollout(i, rng.integers(3, 96, 1 + i).tolist(), rng.integers(3, 96, 7 - i).tolist()) for i in range(6)]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_are_the_models_logprobs_at_the_asked_temperature_in_the_rollouts_order(scorer, rollouts, random_model, temperature):
    scores = scorer.score(rollouts, temperature=temperature, with_hidden=True)
    model = load_model(random_model(tied=False), dtype=torch.float32)
    assert scores.hidden is not None
    for rollout, logprobs, hidden in zip(rollouts, scores.logprobs, scores.hidden, strict=True):
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids.tolist()]])
        with torch.no_grad():
            whole = (model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1] / temperature).log_softmax(-1)
        expected = whole.gather(1, torch.from_numpy(rollout.response_ids).unsqueeze(1)).squeeze(1)
        np.testing.assert_allclose(logprobs, expected, atol=2e-5)
        rebuilt = (torch.from_numpy(hidden @ scorer.head().T) / temperature).log_softmax(-1)
        np.testing.assert_allclose(rebuilt, whole, atol=2e-5)  # whole distributions, from what was sent


def test_scoring_changes_nothing_and_keeps_no_gradient(scorer, rollouts):
    before = {name: parameter.clone() for name, parameter in scorer.policy.named_parameters()}
    scores = scorer.score(rollouts, temperature=1.0, with_hidden=False)
    assert scores.hidden is None
    for name, parameter in scorer.policy.named_parameters():
        assert torch.equal(before[name], parameter)
        assert not parameter.requires_grad


def spec_of(path: str, **changes) -> ScorerSpec:
    common = {"dtype": "float32", "trust_remote_code": False, "tokens_per_microbatch": 24, "head_memory_mib": 1}
    return ScorerSpec(model_path=path, **{**common, **changes})


def weights_of(path: str) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in load_model(path, dtype=torch.float32).named_parameters()}


def changed(weights: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: weight + 0.1 * torch.randn(weight.shape, generator=generator) for name, weight in weights.items()}


def parts_of(weights: dict[str, torch.Tensor], step: int) -> tuple[list[WeightPart], Manifest]:
    """As a learner exports them."""
    packed = {name: pack(weight) for name, weight in weights.items()}
    groups = [[name] for name in packed]
    parts = [WeightPart(version=step, tensors={name: packed[name] for name in group}) for group in groups]
    return parts, Manifest(version=step, digests=digests(packed))


def follow(scorer: Scorer, weights: dict[str, torch.Tensor], step: int) -> Move:
    parts, manifest = parts_of(weights, step)
    for part in parts:
        scorer.receive(part)
    return scorer.commit(manifest)


def current(scorer: Scorer) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in scorer.policy.model.named_parameters()}


def logprobs_of(model, rollouts) -> list[torch.Tensor]:
    """[T, V] of each rollout, by plain transformers."""
    found = []
    for rollout in rollouts:
        ids = torch.tensor([[*rollout.prompt_ids, *rollout.response_ids.tolist()]])
        with torch.no_grad():
            found.append(model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1].log_softmax(-1))
    return found


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_reference_that_follows_scores_with_the_weights_its_rule_makes(random_model, rollouts, tied):
    initial = weights_of(random_model(tied=tied))
    first, second = changed(initial, 1), changed(initial, 2)
    scorer = Scorer(spec_of(random_model(tied=tied)))
    scorer.begin(BEMAReference())
    moves = [follow(scorer, first, 90), follow(scorer, second, 390)]
    assert [move.ref_version for move in moves] == [1, 2]
    # b = .1 and .05 at these steps, a = 400^-.2 at the second
    averages = {name: 0.95 * (0.9 * initial[name] + 0.1 * first[name]) + 0.05 * second[name] for name in initial}
    expected = {name: averages[name] + 400**-0.2 * (second[name] - initial[name]) for name in initial}
    for name, weight in current(scorer).items():
        torch.testing.assert_close(weight, expected[name])
    model = load_model(random_model(tied=tied), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(expected[name])
    scores = scorer.score(rollouts, temperature=1.0, with_hidden=True)
    assert scores.ref_version == 2
    assert scores.hidden is not None
    for rollout, logprobs, hidden, whole in zip(
        rollouts, scores.logprobs, scores.hidden, logprobs_of(model, rollouts), strict=True
    ):
        targets = torch.from_numpy(rollout.response_ids).unsqueeze(1)
        np.testing.assert_allclose(logprobs, whole.gather(1, targets).squeeze(1), atol=2e-5)
        np.testing.assert_allclose(torch.from_numpy(hidden @ scorer.head().T).log_softmax(-1), whole, atol=2e-5)


def test_the_distance_is_the_policys_from_the_reference_before_it_moved(random_model):
    initial = weights_of(random_model(tied=True))
    policy = changed(initial, 1)
    whole = sum(float((policy[name] - initial[name]).double().square().sum()) for name in initial) ** 0.5
    scorer = Scorer(spec_of(random_model(tied=True)))
    scorer.begin(SoftRefresh())
    assert follow(scorer, policy, 512).distance == pytest.approx(whole, rel=1e-6)
    assert follow(scorer, policy, 1024).distance == pytest.approx(0.4 * whole, rel=1e-5)  # 0.6 of the way are behind it


def test_a_slow_average_moves_in_a_model_that_computes_in_bfloat16(random_model):
    """A hundredth of a small difference is less than bfloat16 can add to a weight."""
    scorer = Scorer(spec_of(random_model(tied=True), dtype="bfloat16"))
    scorer.begin(EMAReference())
    initial = current(scorer)
    policy = {name: (weight * 1.0625).to(torch.bfloat16) for name, weight in initial.items()}
    for step in range(1, 101):
        follow(scorer, policy, step)
    way = 1 - 0.99**100
    for name, weight in current(scorer).items():
        expected = torch.lerp(initial[name].float(), policy[name].float(), way)
        assert (weight.float() - expected).norm() < 0.005 * expected.norm(), name


def test_nothing_is_scored_while_the_weights_are_of_two_versions_and_a_new_run_starts_from_the_beginning(random_model, rollouts):
    initial = weights_of(random_model(tied=True))
    parts, manifest = parts_of(changed(initial, 1), 1)
    scorer = Scorer(spec_of(random_model(tied=True)))
    scorer.begin(Refresh(every=1))
    scorer.receive(parts[0])
    with pytest.raises(WorkerError, match="half of one version"):
        scorer.score(rollouts, temperature=1.0, with_hidden=False)
    with pytest.raises(SyncError, match=r"the reference got 1 tensors and lacks \d+"):
        scorer.commit(manifest)
    scorer.begin(None)
    assert scorer.score(rollouts, temperature=1.0, with_hidden=False).ref_version == 0
    assert all(torch.equal(weight, initial[name]) for name, weight in current(scorer).items())


def test_bytes_that_are_not_the_learners_are_found(random_model):
    parts, manifest = parts_of(weights_of(random_model(tied=True)), 1)
    others, _ = parts_of(changed(weights_of(random_model(tied=True)), 1), 1)
    scorer = Scorer(spec_of(random_model(tied=True)))
    scorer.begin(Refresh(every=1))
    for part in [*parts[:-1], others[-1]]:
        scorer.receive(part)
    with pytest.raises(SyncError, match="are not those that the learner sent"):
        scorer.commit(manifest)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rule", [Refresh(), EMAReference(decay=0.9), BEMAReference()], ids=["refresh", "ema", "bema"])
def test_what_is_saved_goes_on_bit_for_bit(random_model, tmp_path, rule, dtype):
    kind = getattr(torch, dtype)
    initial = weights_of(random_model(tied=False))
    first, second = ({name: weight.to(kind) for name, weight in changed(initial, seed).items()} for seed in (1, 2))
    scorer, other = (Scorer(spec_of(random_model(tied=False), dtype=dtype)) for _ in range(2))
    (tmp_path / "state").mkdir()
    scorer.begin(rule)
    follow(scorer, first, 7)
    scorer.save(str(tmp_path))
    other.begin(rule)
    assert other.restore(str(tmp_path)) == (1, 7)
    for each in (scorer, other):
        assert follow(each, second, 14).ref_version == 2
    mine, theirs = current(scorer), current(other)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert not any(file.suffix in (".pt", ".bin", ".pkl") for file in tmp_path.rglob("*"))


def test_another_references_state_is_refused(random_model, tmp_path):
    scorer = Scorer(spec_of(random_model(tied=True)))
    scorer.begin(EMAReference())
    with pytest.raises(DataError, match="holds no reference that moved"):
        scorer.restore(str(tmp_path))
    (tmp_path / "state").mkdir()
    scorer.save(str(tmp_path))
    scorer.begin(BEMAReference())
    with pytest.raises(DataError, match=r"its reference lacks average\."):
        scorer.restore(str(tmp_path))


@pytest.fixture
def sibling(random_model, tmp_path) -> str:
    """The folder of a model that was trained from the same base as `random_model(tied=True)`."""
    model = load_model(random_model(tied=True), dtype=torch.float32)
    with torch.no_grad():
        for parameter, weight in zip(model.parameters(), changed(weights_of(random_model(tied=True)), 3).values(), strict=True):
            parameter.copy_(weight)
    model.save_pretrained(tmp_path / "sibling")
    return str(tmp_path / "sibling")


def test_a_soup_scores_as_the_average_of_its_models(random_model, sibling, rollouts):
    one, other = weights_of(random_model(tied=True)), weights_of(sibling)
    scorer = Scorer(spec_of(random_model(tied=True), soup=((random_model(tied=True), 0.25), (sibling, 0.75))))
    for name, weight in current(scorer).items():
        torch.testing.assert_close(weight, 0.25 * one[name] + 0.75 * other[name])
    alone = Scorer(spec_of(random_model(tied=True), soup=((random_model(tied=True), 0.5), (random_model(tied=True), 0.5))))
    assert all(torch.equal(weight, one[name]) for name, weight in current(alone).items())
    assert scorer.score(rollouts, temperature=1.0, with_hidden=False).logprobs[0].shape == rollouts[0].response_ids.shape


def test_a_geometric_mixture_scores_with_whole_distributions_multiplied(random_model, sibling, rollouts):
    scorer = Scorer(spec_of(random_model(tied=True), second_path=sibling, second_share=0.3))
    models = [load_model(path, dtype=torch.float32) for path in (random_model(tied=True), sibling)]
    scores = scorer.score(rollouts, temperature=1.0, with_hidden=True)
    assert scores.hidden is not None
    first, second = (logprobs_of(model, rollouts) for model in models)
    for rollout, logprobs, hidden, a, b in zip(rollouts, scores.logprobs, scores.hidden, first, second, strict=True):
        whole = (0.7 * a + 0.3 * b).log_softmax(-1)
        targets = torch.from_numpy(rollout.response_ids).unsqueeze(1)
        np.testing.assert_allclose(logprobs, whole.gather(1, targets).squeeze(1), atol=2e-5)
        np.testing.assert_allclose(torch.from_numpy(hidden @ scorer.head().T).log_softmax(-1), whole, atol=2e-5)


def test_a_head_with_a_bias_is_refused_where_it_would_be_left_out(random_model):
    scorer = Scorer(spec_of(random_model(tied=True)))
    scorer.policy.head.bias = torch.nn.Parameter(torch.zeros(96))
    with pytest.raises(DataError, match=r"its output head has a bias, which mixtures and divergence\.estimator=exact do not know"):
        scorer.head()
