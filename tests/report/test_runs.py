import json
from pathlib import Path

import pytest

from rlkit.errors import ConfigError, DataError
from rlkit.report.runs import differing, find_runs, group_runs, name_groups, shared_prompts


def test_a_run_is_read_as_it_was_written(make_run, evaluation):
    make_run(
        "runs/a",
        "divergence=reverse_kl",
        "divergence.coef=0.1",
        "seed=3",
        evaluations={0: evaluation([1, 2]), 20: evaluation([3, 4])},
    )
    (run,), notes = find_runs([Path("runs/a")])
    assert notes == []
    assert (run.seed, run.settings["divergence"], run.settings["divergence.coef"]) == (3, "reverse_kl", "0.1")
    assert run.settings["evaluation.ks"] == "[1,4]"
    assert list(run.evaluations) == [0, 20]
    assert run.before is not None
    assert run.before.to_json() == evaluation([1, 2]).to_json()
    assert run.last.to_json() == evaluation([3, 4]).to_json()
    assert run.history.series("reward/mean")[0] == list(range(1, 21))


def test_a_sweeps_folder_is_all_its_runs_in_the_order_of_the_sweep(make_run, evaluation):
    for seed in (1, 2, 10):
        make_run(f"s/seed={seed}", f"seed={seed}", evaluations={0: evaluation([1])})
    Path("s/sweep.json").write_text(json.dumps([{"run_dir": f"elsewhere/s/seed={seed}"} for seed in (10, 1, 3)]))
    runs, _ = find_runs([Path("s"), Path("s/seed=2"), Path("./s/seed=1")])  # named twice is one
    assert [run.seed for run in runs] == [10, 1, 2]


def test_a_run_of_a_sweep_without_an_evaluation_is_left_out_and_named(make_run, evaluation):
    make_run("s/seed=1", "seed=1", evaluations={0: evaluation([1])})
    make_run("s/seed=2", "seed=2", evaluations={})
    runs, notes = find_runs([Path("s")])
    assert [run.seed for run in runs] == [1]
    assert notes == ["Left out: s/seed=2, which has no held-out evaluation."]


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("nowhere", "nowhere: no such folder. Write run folders or the folder of a sweep"),
        ("empty", r"empty: neither a run \(config.yaml\) nor a folder of runs"),
        ("unevaluated", r"unevaluated: no held-out evaluation in it .*Train with evaluation=held_out"),
        ("half", "half: not the folder of a run .*choices.yaml"),
    ],
)
def test_a_folder_that_cannot_be_compared_is_refused_in_a_sentence(make_run, evaluation, folder, message):
    make_run("unevaluated", "evaluation=none", evaluations={})
    make_run("half", evaluations={0: evaluation([1])})
    Path("half/choices.yaml").unlink()
    Path("empty").mkdir()
    with pytest.raises(ConfigError, match=message):
        find_runs([Path(folder)])


def test_runs_that_differ_in_the_seed_alone_are_an_arm(make_run, evaluation):
    for seed in (1, 2):
        for name in ("none", "reverse_kl"):
            make_run(f"{name}{seed}", f"divergence={name}", f"seed={seed}", evaluations={0: evaluation([1])})
    arms = group_runs(find_runs([Path(name) for name in ("none1", "reverse_kl1", "none2", "reverse_kl2")])[0])
    assert [(arm.name, [run.seed for run in arm.runs]) for arm in arms] == [
        ("divergence=none", [1, 2]),
        ("divergence=reverse_kl", [1, 2]),
    ]
    keys = differing([arm.settings for arm in arms])
    assert keys[0] == "divergence"
    assert all(key.startswith("divergence") for key in keys)


def test_the_same_settings_and_seed_twice_are_one_observation(make_run, evaluation):
    make_run("a", "seed=1", evaluations={0: evaluation([1])})
    make_run("b", "seed=1", evaluations={0: evaluation([1])})
    with pytest.raises(DataError, match="a and b: the same settings and the same seed=1, so they are one observation and not two"):
        group_runs(find_runs([Path("a"), Path("b")])[0])


def settings(experiment: str = "run", **values: str) -> dict[str, str]:
    return {"experiment_name": experiment, **{key.replace("__", "."): value for key, value in values.items()}}


def test_arms_are_named_by_as_few_settings_as_tell_them_apart():
    grid = [settings(lr=lr, divergence=d, same="1") for d in ("none", "kl") for lr in ("1", "2")]
    assert name_groups(grid) == ["lr=1, divergence=none", "lr=2, divergence=none", "lr=1, divergence=kl", "lr=2, divergence=kl"]
    together = [settings(a="1", b="x"), settings(a="2", b="y")]  # one of the two is enough
    assert name_groups(together) == ["a=1", "a=2"]
    # The coefficient alone would tell them apart, and leave the first without a name.
    nested = [settings(divergence="none"), *(settings(divergence="kl", divergence__coef=c) for c in ("0.1", "0.2"))]
    assert name_groups(nested) == [
        "divergence=none",
        "divergence=kl, divergence.coef=0.1",
        "divergence=kl, divergence.coef=0.2",
    ]


def test_arms_are_named_by_their_experiments_where_these_tell_them_apart():
    assert name_groups([settings("grpo", a="1"), settings("dapo", a="2")]) == ["grpo", "dapo"]
    assert name_groups([settings("grpo", a="1"), settings("grpo", a="2"), settings("dapo", a="1", b="3")]) == [
        "a=1",
        "a=2",
        "a=1, b=3",
    ]
    assert name_groups([settings("grpo", a="1")]) == ["grpo"]


def test_runs_on_different_prompts_cannot_be_paired(make_run, evaluation):
    make_run("a", "seed=1", evaluations={0: evaluation([1, 2, 3])})
    make_run("fewer", "seed=2", evaluations={0: evaluation([1, 2])})
    make_run("renumbered", "seed=3", evaluations={0: evaluation([1, 2, 3], dataset="b")})  # the same ids, other rows
    for other in ("fewer", "renumbered"):
        with pytest.raises(
            DataError, match=r"at step 0 lacks \d of the \d prompts .* cannot be paired\. Compare runs with the same data"
        ):
            shared_prompts(find_runs([Path("a"), Path(other)])[0])


def test_a_prompt_whose_rewards_failed_is_left_out_of_all_runs(make_run, evaluation):
    make_run("a", "seed=1", evaluations={0: evaluation([1, 2, 3]), 20: evaluation([1, 2, 3])})
    make_run("b", "seed=2", evaluations={0: evaluation([2, 3], first=1, num_failed=2), 20: evaluation([1, 2, 3])})
    prompts, notes = shared_prompts(find_runs([Path("a"), Path("b")])[0])
    assert prompts == ("p1", "p2")
    assert notes == ["1 of 3 prompts left out: in some evaluation their rewards failed."]
