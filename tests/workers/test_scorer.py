"""The frozen scorer against plain transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from rlkit.data.models.loading import load_model
from rlkit.workers.scorer import Scorer, ScorerSpec


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
