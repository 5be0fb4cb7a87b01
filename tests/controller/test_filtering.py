from dataclasses import replace

import pytest

from rlkit.controller.filtering import rollout_metrics, trainable
from rlkit.controller.sampling import Sampled
from rlkit.types import RewardResult, RewardStatus, judgement

ok, wrong, error = RewardStatus.ok, RewardStatus.wrong, RewardStatus.error


@pytest.fixture
def rollouts(make_rollout):
    """Two groups of two, judged by two functions of which the second weighs a fifth and fails once."""
    judged = [
        (ok, 1.2, {"right": 1.0, "form": 0.2}, {"right": ok, "form": ok}),
        (wrong, 0.2, {"right": 0.0, "form": 0.2}, {"right": wrong, "form": ok}),
        (error, None, {"right": 1.0}, {"right": ok, "form": error}),
        (ok, 1.0, {"right": 1.0, "form": 0.0}, {"right": ok, "form": ok}),
    ]
    return [
        replace(
            make_rollout(row, [5], [6]),
            group_id=str(row // 2),
            reward=reward,
            reward_components=parts,
            status=status,
            reward_statuses=statuses,
        )
        for row, (status, reward, parts, statuses) in enumerate(judged)
    ]


def found(rollouts, at_least=2) -> dict[str, float]:
    sampled = Sampled(rollouts=rollouts, generate_s=0.0, reward_s=0.0, num_prompts=2, num_tokens=4)
    kept, dropped = trainable(rollouts, at_least=at_least)
    return rollout_metrics(sampled, kept, dropped, {"form": 0.2})


def test_failures_are_counted_for_each_function_and_a_count_of_zero_is_one(rollouts):
    metrics = found(rollouts)
    assert (metrics["reward/error"], metrics["reward/wrong"], metrics["reward/timeout"]) == (1, 1, 0)
    assert (metrics["reward/form/error"], metrics["reward/form/wrong"]) == (1, 0)
    assert (metrics["reward/right/error"], metrics["reward/right/wrong"]) == (0, 1)


def test_a_parts_mean_is_without_its_weight_and_of_all_that_have_it(rollouts):
    metrics = found(rollouts)
    assert metrics["reward/right/mean"] == 0.75  # also of the sample whose form could not be judged
    assert metrics["reward/form/mean"] == pytest.approx(2 / 3)
    assert metrics["reward/form/std"] == pytest.approx((2 / 9) ** 0.5)


def test_a_function_says_for_how_many_of_its_samples_it_gave_a_reward(rollouts):
    metrics = found(rollouts)
    assert (metrics["reward/right/scored_fraction"], metrics["reward/form/scored_fraction"]) == (1.0, 0.75)


def test_a_function_whose_source_a_step_does_not_draw_has_counts_of_zero_and_no_mean(rollouts):
    without = [replace(r, reward_components={"right": 1.0}, reward_statuses={"right": ok}) for r in rollouts]
    metrics = found(without)
    counts = {name: value for name, value in metrics.items() if name.startswith("reward/form/")}
    assert counts == dict.fromkeys(
        (f"reward/form/{status}" for status in ("wrong", "unparsable", "skipped", "timeout", "error")), 0.0
    )


def test_parts_of_parts_are_statistics_and_nothing_else(rollouts):
    subparts = [replace(r, reward_subparts={"form/box": float(row)}) for row, r in enumerate(rollouts[:2])]
    metrics = found([*subparts, *rollouts[2:]])
    assert (metrics["reward/form/box/mean"], metrics["reward/form/box/std"]) == (0.5, 0.5)
    assert {name: value for name, value in metrics.items() if "/box/" not in name} == found(rollouts)


def test_what_was_issued_is_kept_or_dropped(rollouts):
    metrics = found(rollouts)
    assert (metrics["data/issued"], metrics["data/kept"], metrics["data/dropped_failed"]) == (2, 1, 1)
    metrics = found(rollouts, at_least=1)
    assert (metrics["data/kept"], metrics["data/dropped_failed"]) == (2, 0)


def test_why_a_reward_failed_stays_with_the_rollout():
    result = RewardResult(sample_id="s", status=error, message="no \ud83d here: " + "x" * 1000)
    kept = judgement(result)
    assert kept["reward_message"].startswith("no ? here: xxx")
    assert len(kept["reward_message"]) == 200
    assert kept["status"] is error
