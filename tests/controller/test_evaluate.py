import json
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from rlkit.controller.evaluate import Evaluation, gain, summarize
from rlkit.core.evaluation import pass_at_k
from rlkit.errors import DataError
from rlkit.settings import HeldOut
from rlkit.types import Prompt, RewardStatus, Rollout


@pytest.fixture
def evaluation(make_rollout: Callable[..., Rollout]) -> Evaluation:
    """Three prompts of four samples: one lacks too many rewards, one lacks one."""
    rewards = {"a": [1.0, 0.0, 0.25, 1.0], "b": [None, None, 1.0, 0.0], "c": [0.0, 0.5, None, 0.1]}
    groups = [
        [
            replace(
                make_rollout(i, [1], [2]),
                prompt_id=name,
                text=f"answer {i % 2} ",
                reward=reward,
                status=RewardStatus.error if reward is None else RewardStatus.ok,
            )
            for i, reward in enumerate(given)
        ]
        for name, given in rewards.items()
    ]
    settings = HeldOut(samples_per_prompt=4, ks=[1, 3])
    return summarize(groups, settings, {"a": "x", "b": "y", "c": "z"})


def test_every_scored_sample_is_kept_and_counted(evaluation: Evaluation):
    assert evaluation.rows == [("a", "x"), ("c", "z")]
    assert evaluation.sample_rewards == ((1.0, 0.0, 0.25, 1.0), (0.0, 0.5, 0.1))
    assert evaluation.num_samples.tolist() == [4, 3]
    assert evaluation.num_correct.tolist() == [2, 1]  # at least 0.5
    assert evaluation.distinct.tolist() == [2, 1]
    assert evaluation.num_failed == 3
    assert evaluation.rewards == pytest.approx([0.5625, 0.2])
    assert evaluation.pass_at(3) == pytest.approx([pass_at_k(4, 2, 3), 1.0])
    metrics = evaluation.metrics()
    assert metrics["evaluation/pass@1"] == pytest.approx((0.5 + 1 / 3) / 2)
    assert metrics["evaluation/pass@3"] == 1.0
    assert metrics["evaluation/reward"] == pytest.approx(0.38125)
    with pytest.raises(DataError, match=r"pass@4 cannot be estimated from 3 samples"):
        evaluation.pass_at(4)


def test_an_evaluation_comes_back_from_json_to_the_last_bit(evaluation: Evaluation):
    odd = replace(evaluation, sample_rewards=((0.1 + 0.2, 1 / 3, 1e-17, 1.0), (-0.0, 0.5, 0.1)))
    again = Evaluation.from_json(json.loads(json.dumps(odd.to_json())))
    assert again.to_json() == odd.to_json()
    assert again.sample_rewards == odd.sample_rewards
    assert (again.rewards == odd.rewards).all()


def test_prompts_are_selected_in_the_order_asked_for(evaluation: Evaluation):
    turned = evaluation.select(["c", "a"])
    assert turned.rows == [("c", "z"), ("a", "x")]
    assert turned.rewards == pytest.approx(evaluation.rewards[::-1])
    assert (turned.num_correct.tolist(), turned.distinct.tolist()) == ([1, 2], [1, 2])


def test_a_gain_is_paired_by_prompt(evaluation: Evaluation):
    better = replace(evaluation, num_correct=np.array([4, 2]))
    assert gain(evaluation, better)[0] == pytest.approx((0.5 + 1 / 3) / 2)
    assert gain(evaluation, evaluation) == (0, 0, 0)
    with pytest.raises(DataError, match="asked different prompts"):
        gain(evaluation, evaluation.select(["c", "a"]))


def test_a_rows_digest_is_of_everything_in_it():
    def digest(**columns: object) -> str:
        return Prompt(id="row-1", text="t", prompt_ids=(1,), source="s", columns=columns).row_digest

    assert digest(prompt="2+2", answer="4") == digest(prompt="2+2", answer="4")
    assert len({digest(prompt="2+2", answer="4"), digest(prompt="2+3", answer="4"), digest(prompt="2+2", answer="5")}) == 3
