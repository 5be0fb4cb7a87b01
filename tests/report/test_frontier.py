from pathlib import Path

import numpy as np
import pytest

from rlkit.core.evaluation import best_of_n_kl, pass_at_k
from rlkit.report.compare import compare
from rlkit.report.frontier import LAMS, Point, best_of_n, point

BEFORE = [0, 1, 2, 4]
KL = ["divergence=reverse_kl", "divergence.coef=0.1"]


def test_best_of_n_is_of_the_model_before_training(make_run, evaluation):
    make_run("a", *KL, evaluations={0: evaluation(BEFORE), 20: evaluation([4, 4, 4, 4])}, kl=0.1)
    (base,) = best_of_n(compare([Path("a")]))
    # Rewards of 0 and 1: the best of n is right as often as one of n is.
    assert base.reward == pytest.approx([np.mean([pass_at_k(4, c, n) for c in BEFORE]) for n in (1, 2, 3, 4)])
    assert base.kl_bound == pytest.approx([best_of_n_kl(n) for n in (1, 2, 3, 4)])
    first, second = 1 - (3 / 4) ** 2, 1 - (1 / 2) ** 2  # chances of a right one among two
    kls = [first * np.log(first * 4) + (1 - first) * np.log((1 - first) * 4 / 3), second * np.log(second * 2) + 0.25 * np.log(0.5)]
    assert base.kl_ties[1] == pytest.approx(sum(kls) / 4)  # 0 for a prompt with only wrong or only right answers
    assert (base.kl_ties <= base.kl_bound + 1e-12).all()
    assert len(base.optimum_kl) == 0  # four samples carry nothing
    assert [base.matches(reward) for reward in (0.1, float(base.reward[0]), float(base.reward[2]), 0.8)] == [1, 1, 3, None]


def test_the_optimum_is_drawn_as_far_as_every_prompt_carries_it(make_run, evaluation):
    many = evaluation([10, 20], n=40)
    make_run("a", "evaluation.samples_per_prompt=40", "evaluation.ks=[1,40]", evaluations={0: many, 20: many})
    (base,) = best_of_n(compare([Path("a")]))
    assert base.optimum_reward[0] == pytest.approx(0.375)
    assert base.optimum_kl[0] == pytest.approx(0)
    assert (np.diff(base.optimum_reward) > 0).all()
    assert (np.diff(base.optimum_kl) > 0).all()
    lams = np.array(LAMS[: len(base.optimum_kl)])
    tilted = [p * np.exp(lams) / (1 - p + p * np.exp(lams)) for p in (1 / 4, 1 / 2)]  # shares of right answers
    assert base.optimum_reward == pytest.approx(np.mean(tilted, axis=0))


def test_arms_that_began_with_different_models_have_a_line_each(make_run, evaluation):
    make_run("a", evaluations={0: evaluation(BEFORE)})
    make_run("b", "model=path", "model.path=elsewhere", evaluations={0: evaluation([1, 1, 1, 1])})
    assert [each.arms for each in best_of_n(compare([Path("a"), Path("b")]))] == [("model.path=tiny",), ("model.path=elsewhere",)]


def test_a_run_stands_at_its_kl_and_its_reward(make_run, evaluation):
    make_run("a", *KL, evaluations={0: evaluation(BEFORE), 20: evaluation([0, 2, 4, 4])}, kl=0.1)
    found = compare([Path("a")])
    # Means over the last two of twenty steps, ten tokens a response.
    assert point(found.arms[0].runs[0], found.prompt_ids) == Point(kl=pytest.approx(10 * 0.1 * 19.5 / 20), reward=10 / 16)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("overrides", "kl", "last", "reason"),
    [
        ([], None, 20, "no KL to a reference was measured"),
        (KL, 0.1, 0, "it lacks an evaluation before or after training"),
        ([*KL, "evaluation.temperature=0.7"], 0.1, 20, "rollout.temperature and evaluation.temperature differ"),
        ([*KL, "evaluation.top_p=0.9"], 0.1, 20, "evaluation.top_p=0.9: samples are not of the distribution"),
    ],
)
def test_a_run_without_a_point_says_why(make_run, evaluation, overrides, kl, last, reason):
    make_run("a", *overrides, evaluations={0: evaluation(BEFORE), last: evaluation(BEFORE)}, kl=kl)
    found = compare([Path("a")])
    stands = point(found.arms[0].runs[0], found.prompt_ids)
    assert isinstance(stands, str)
    assert stands.startswith(reason)
