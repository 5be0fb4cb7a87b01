from pathlib import Path

import numpy as np
import pytest

from rlkit.controller.tracking.history import Estimate, History
from rlkit.report.compare import compare, sequence_kl, tail

BEFORE = [0, 1, 2, 4]  # right answers of four to each of four prompts
KL = ["divergence=reverse_kl", "divergence.coef=0.1"]


@pytest.fixture
def compared(make_run, evaluation):
    """Two arms with two seeds: one unchanged, and one that gained a prompt and lost another."""
    for seed in (1, 2):
        make_run(f"s/plain{seed}", f"seed={seed}", evaluations={0: evaluation(BEFORE), 20: evaluation(BEFORE)})
        make_run(f"s/kl{seed}", f"seed={seed}", *KL, evaluations={0: evaluation(BEFORE), 20: evaluation([seed, 0, 4, 4])}, kl=0.2)
    return compare([Path("s/plain1"), Path("s/kl1"), Path("s/plain2"), Path("s/kl2")])


def value(estimate: Estimate | None) -> float:
    assert estimate is not None
    return estimate.value


def test_final_figures_are_means_over_seeds_and_prompts(compared):
    assert [arm.name for arm in compared.arms] == ["divergence=none", "divergence=reverse_kl"]
    assert (compared.max_k, len(compared.prompt_ids)) == (4, 4)
    assert value(compared.estimate(0, "pass@1")) == pytest.approx(7 / 16)
    assert value(compared.estimate(1, "pass@1")) == pytest.approx((9 + 10) / 32)
    assert value(compared.estimate(1, "pass@4")) == pytest.approx(3 / 4)
    assert value(compared.estimate(1, "reward")) == pytest.approx((9 + 10) / 32)
    assert value(compared.estimate(1, "distinct right answers")) == pytest.approx((1 + 2 + 2 + 2 + 2 + 2) / 8)
    assert value(compared.estimate(1, "pass@1 gained")) == pytest.approx((2 + 3) / 32)
    assert value(compared.estimate(1, "support lost")) == 0.25  # the second prompt
    assert value(compared.estimate(1, "support gained")) == 0.25  # the first
    assert value(compared.estimate(0, "support lost")) == 0
    assert value(compared.estimate(0, "entropy")) == pytest.approx(1 - 0.02 * 19.5)  # steps 19 and 20
    assert value(compared.estimate(1, "KL to reference")) == pytest.approx(0.2 * 19.5 / 20)
    assert compared.estimate(0, "KL to reference") is None

    # Differences are from the first arm, on the same prompts.
    difference = compared.difference(1, "pass@1")
    assert difference is not None
    assert difference.value == pytest.approx(5 / 32)
    assert difference.low is not None
    assert difference.high is not None
    assert difference.low < difference.value < difference.high
    assert compared.difference(1, "KL to reference") is None


def test_five_seeds_are_needed_for_a_claim(make_run, evaluation):
    for seed in range(5):
        make_run(f"five/{seed}", f"seed={seed}", evaluations={0: evaluation(BEFORE)})
    assert compare([Path("five")]).may_claim
    assert not compare([Path(f"five/{seed}") for seed in range(4)]).may_claim


def test_one_seed_has_an_interval_over_prompts_and_none_where_there_are_no_prompts(make_run, evaluation):
    make_run("a", evaluations={0: evaluation(BEFORE), 20: evaluation(BEFORE)})
    alone = compare([Path("a")])
    passed, entropy = alone.estimate(0, "pass@1"), alone.estimate(0, "entropy")
    assert passed is not None
    assert passed.low is not None
    assert passed.low < passed.value
    assert entropy == Estimate(pytest.approx(1 - 0.02 * 19.5))  # pyright: ignore[reportArgumentType]


def test_what_a_reader_must_know_is_noted(make_run, evaluation):
    make_run("a", "seed=1", evaluations={0: evaluation(BEFORE), 10: evaluation(BEFORE)})
    make_run("b", "seed=2", "evaluation.temperature=0.5", evaluations={0: evaluation(BEFORE), 20: evaluation(BEFORE)})
    make_run("c", "seed=3", "evaluation.temperature=0.5", evaluations={0: evaluation(BEFORE), 20: evaluation(BEFORE)})
    assert compare([Path("a"), Path("b"), Path("c")]).notes == (
        "evaluation.temperature differs between arms, so their held-out figures do not measure the same thing.",
        "Runs were last evaluated at different steps: a 10, b 20, c 20.",
        "Unfinished: a, evaluated at step 10 of 20.",
        "Arms have different numbers of seeds: evaluation.temperature=1.0 1, evaluation.temperature=0.5 2.",
    )


def test_a_run_that_has_only_begun_is_compared_as_it_began(make_run, evaluation):
    make_run("a", evaluations={0: evaluation(BEFORE)})
    begun = compare([Path("a")])
    assert "support lost" not in begun.names
    assert value(begun.estimate(0, "pass@1")) == pytest.approx(7 / 16)


def test_prompts_with_failed_samples_lower_the_largest_k(make_run, evaluation):
    fewer = evaluation([1, 1, 2, 3], n=3, num_failed=4)
    make_run("a", "evaluation.ks=[1]", evaluations={0: evaluation(BEFORE), 20: fewer})
    found = compare([Path("a")])
    assert found.max_k == 3
    # Of the base's four samples three are looked at, as many as the policy has: 0, 3/4, 1, 1 of the prompts are solved by them.
    assert found.figures[0]["support gained"] == pytest.approx(np.array([[1, 1 / 4, 0, 0]]))


def test_the_kl_of_responses_is_that_of_the_last_steps():
    rows = [{"step": float(s), "kl/ref_sequence": float(s), "length/mean": 2.0} for s in range(1, 31)]
    assert sequence_kl(History(rows, [])) == 29  # of the last three
    assert sequence_kl(History([{"step": 1.0, "kl/ref_token_mean": 0.1, "length/mean": 4.0}], [])) is None
    assert tail([1.0, 2.0]) == [2.0]
