"""The worker scores as its spec says."""

import numpy as np

from rlkit.data.models.reward_model import ScoredText
from rlkit.settings import ModelKind
from rlkit.workers.reward_model import RewardModelSpec, RewardModelWorker


def worker(folder: str, kind: ModelKind, **changes) -> RewardModelWorker:
    settings = {"dtype": "float32", "trust_remote_code": False, "tokens_per_microbatch": 100, "max_rows": 8} | changes
    return RewardModelWorker(RewardModelSpec(model_path=folder, kind=kind, **settings))


def test_an_outcome_model_has_one_score_a_text_and_a_process_model_one_a_step(random_reward_model):
    texts = [ScoredText(ids=(5, 6, 7, 8), places=(1, 3)), ScoredText(ids=(9,), places=(0,))]
    outcome = worker(random_reward_model("ForSequenceClassification"), ModelKind.outcome)
    assert [scores.shape for scores in outcome.score(texts)] == [(1,), (1,)]
    process = worker(random_reward_model("ForTokenClassification"), ModelKind.process)
    assert [scores.shape for scores in process.score(texts)] == [(2,), (1,)]
    assert process.score([]) == []


def test_it_computes_in_the_precision_of_its_spec(random_reward_model):
    folder, texts = random_reward_model("ForSequenceClassification"), [ScoredText(ids=(5, 6, 7, 8))]
    exact, rounded = (worker(folder, ModelKind.outcome, dtype=dtype).score(texts)[0] for dtype in ("float32", "bfloat16"))
    assert rounded.dtype == np.float32
    assert exact != rounded
    np.testing.assert_allclose(rounded, exact, atol=0.1)
