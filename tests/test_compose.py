"""From overrides to settings: the usual choices, experiments, sweeps, and the words for what does not fit."""

from pathlib import Path

import pytest
import yaml

from rlkit.compose import compose, compose_arms, expand, read_stored
from rlkit.config import to_dict
from rlkit.controller.tracking import files
from rlkit.controller.tracking.redaction import plain_settings
from rlkit.core.divergences import Estimator, NoDivergence, ReverseKL
from rlkit.errors import ConfigError
from rlkit.settings import AdamW, Dtype, ExpressionsData, JsonlData, Sgd, TransformersEngine


@pytest.fixture
def own(in_folder: Path) -> list[str]:
    """Overrides for somebody's own data and reward, in the current folder."""
    (in_folder / "train.jsonl").write_text('{"question": "1+1", "answer": "2"}\n')
    (in_folder / "my_rewards.py").write_text("def exact(prompts, completions, answer, **columns):\n    return [0.0]\n")
    return ["data.path=train.jsonl", "reward.fn=my_rewards.py:exact"]


def refused(*overrides: str, sweep: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        compose_arms(overrides) if sweep else compose(overrides)
    return str(caught.value)


def test_nothing_is_the_quickstart():
    assert compose([]) == compose(["experiment=quickstart"])
    assert compose([]).experiment_name == "quickstart"


def test_a_real_run_needs_model_data_and_reward_only(own: list[str]):
    config = compose(["model=smollm2_135m", "data=gsm8k_jsonl", *own])
    assert (config.model.path, config.model.dtype) == ("smollm2_135m", Dtype.bfloat16)
    assert config.data == JsonlData(path="train.jsonl", prompt_column="question", chat=True)
    assert config.reward.functions == {"": "my_rewards.py:exact"}


def test_own_data_gets_none_of_the_quickstarts_numbers(own: list[str]):
    quickstart, mine = compose([]), compose(["data=jsonl", *own])
    assert quickstart.max_prompt_tokens < mine.max_prompt_tokens
    assert quickstart.optimizer.learning_rate > mine.optimizer.learning_rate
    assert mine.experiment_name == "run"
    kept = compose(["experiment=quickstart", "data=jsonl", *own])  # said explicitly, they hold
    assert (kept.max_prompt_tokens, kept.data) == (quickstart.max_prompt_tokens, mine.data)


def test_another_model_alone_stays_on_the_built_in_task():
    config = compose(["model=smollm2_135m"])
    assert (config.experiment_name, config.data, config.model.path) == ("quickstart", ExpressionsData(), "smollm2_135m")


def test_overrides_win_over_the_experiment_wherever_they_stand():
    config = compose(["divergence.coef=0.5", "optimizer.learning_rate=1e-5", "experiment=grpo_published"])
    assert config.divergence == ReverseKL(coef=0.5, estimator=Estimator.k3)
    assert config.optimizer.learning_rate == 1e-5


def test_a_replaced_choice_takes_its_settings_with_it_and_leaves_those_of_every_choice():
    published = compose(["experiment=grpo_published"])
    config = compose(["experiment=grpo_published", "divergence=none", "optimizer=sgd"])
    assert config.divergence == NoDivergence()  # the experiment's coef and estimator went with reverse_kl
    assert config.optimizer == Sgd(learning_rate=published.optimizer.learning_rate)  # which every optimiser has


def test_what_a_preset_sets_holds_against_what_came_before_it(in_folder: Path):
    config = compose([])
    files.write_settings(in_folder, config, plain_settings(config) | {"model": {"path": "elsewhere", "dtype": "float32"}})
    replaced = compose(["model=smollm2_135m"], stored=read_stored(in_folder)).model
    assert (replaced.path, replaced.dtype) == ("smollm2_135m", Dtype.bfloat16)


def test_values_are_taken_as_they_are_written():
    config = compose(
        ["experiment_name=007", "evaluation.ks=[2,1]", "model.dtype=bfloat16", "cluster.num_cpus=null", "rollout.temperature=2"]
    )
    assert config.experiment_name == "007"
    assert config.evaluation.ks == [2, 1]  # pyright: ignore[reportAttributeAccessIssue]
    assert config.model.dtype is Dtype.bfloat16
    assert config.rollout.temperature == 2.0
    assert compose(['experiment_name="a, b"']).experiment_name == "a, b"
    assert compose(["seed=1", "seed=2"]).seed == 2
    assert compose(["+seed=1", "++num_steps=2"]).seed == 1  # Hydra's ways of writing mean the same here


def test_tables_take_new_keys(own: list[str]):
    whole = compose(["data=jsonl", *own, "data.columns={target: answer}"])
    single = compose(["data=jsonl", *own, "data.columns.target=answer"])
    assert whole.data.columns == single.data.columns == {"target": "answer"}  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_step=3", "num_step: no such setting. Did you mean num_steps?"),
        ("learning_rate=1", "learning_rate: no such setting. Did you mean optimizer.learning_rate?"),
        ("divergance=none", "divergance: no such setting. Did you mean divergence?"),
        ("learner.num_rank=2", "learner.num_rank: no such setting. Did you mean learner.num_ranks?"),
        ("learner.temperature=2", "learner.temperature: no such setting. Did you mean rollout.temperature? learner=fsdp has "),
        ("num_steps.x=2", "num_steps.x: no such setting. num_steps is a whole number."),
        ("xyzzy=2", "xyzzy: no such setting. `rlkit choices` lists them."),
        ("num_steps=ten", "num_steps=ten: not a whole number. Write num_steps=70."),
        ("num_steps=1.5", "num_steps=1.5: not a whole number. Write num_steps=70."),
        ("num_steps=null", "num_steps=null: not a whole number. Write num_steps=70."),
        ("rollout.temperature=hot", "rollout.temperature=hot: not a number. Write rollout.temperature=1.0."),
        ("dry_run=maybe", "dry_run=maybe: not true or false. Write dry_run=false."),
        ("model.dtype=half", "model.dtype=half: not one of float32, bfloat16. Write model.dtype=float32."),
        ("evaluation.ks=4", "evaluation.ks=4: not a list like [a,b], each a whole number. Write evaluation.ks=[1,4,16]."),
        ("evaluation.ks=[a]", "evaluation.ks=[a]: not a list like [a,b], each a whole number. Write evaluation.ks=[1,4,16]."),
        ("experiment_name=[a]", "experiment_name=[a]: not text. Write experiment_name=quickstart."),
        ("cluster.num_cpus=all", "cluster.num_cpus=all: not a whole number or null. Write cluster.num_cpus=null."),
        ("experiment=grpoo", "experiment=grpoo: no such choice. Did you mean grpo? Choices: "),
        ("divergence=null", "divergence=null: no such choice. Choices: none, reverse_kl, forward_kl, "),
        (
            "divergence.coef=0.1",
            "divergence.coef: divergence=none has no settings. Write divergence=reverse_kl divergence.coef=0.1, or",
        ),
        ("data.path=x", "data.path: data=expressions has held_out_fraction, on_bad_row. Write data=jsonl data.path=x, or leave"),
        ("--seed=1", "--seed=1: settings are written without dashes. Write seed=1."),
        ("seed", "seed: not a setting. Write key=value, such as seed=1."),
        ("~seed", "~seed: a setting cannot be removed."),
        ("seed=1,2", "seed=1,2: several values. Write -m to train one run for each."),
        ("experiment_name='a", "experiment_name='a: cannot be read (token recognition error at: ''a'). Put quotes "),
        ("hydra.run.dir=x", "hydra.run.dir=x: Hydra only composes the settings here. run_dir names the run's folder."),
        ("divergence@x=none", "divergence@x=none: there are no packages here. Write divergence=none."),
    ],
)
def test_an_override_that_does_not_fit_is_refused_with_what_to_write(override: str, message: str):
    assert refused(override).startswith(message)


def test_a_misspelt_choice_hides_no_other_problem_and_invents_none(own: list[str]):
    # divergence.coef exists in some divergence, so nothing is said about it until the choice is spelt right.
    assert refused("divergence=reverse_k", "divergence.coef=1", "divergence.coeff=1", "seed=x").splitlines()[1:] == [
        "  divergence=reverse_k: no such choice. Did you mean reverse_kl? Choices: none, reverse_kl, forward_kl, rapo, "
        "jensen_shannon, generalized_js, alpha, total_variation, "
        "chi2_policy_ref, chi2_ref_policy, squared_hellinger, jeffreys, renyi, cauchy_schwarz, sinkhorn.",
        "  divergence.coeff: no such setting. Did you mean divergence.coef?",
        "  seed=x: not a whole number. Write seed=0.",
    ]
    assert "2 settings are wrong." in refused("data=jsnol", "num_steps=0", *own)  # and data.path is not missed


def test_expand_is_the_product_with_the_last_key_fastest():
    assert expand(["divergence=none,reverse_kl", "num_steps=5", "seed=range(1,3)"]) == [
        ["divergence=none", "num_steps=5", "seed=1"],
        ["divergence=none", "num_steps=5", "seed=2"],
        ["divergence=reverse_kl", "num_steps=5", "seed=1"],
        ["divergence=reverse_kl", "num_steps=5", "seed=2"],
    ]
    assert expand(["seed=choice(3,4)", "evaluation.ks=[1],[1,4]"])[-1] == ["seed=4", "evaluation.ks=[1,4]"]
    assert expand([]) == [[]]


def test_the_arms_of_a_sweep_have_their_own_settings_labels_and_folders():
    arms = compose_arms(["divergence=none,reverse_kl", "seed=1,2", "num_steps=5"])
    assert [arm.label for arm in arms] == [
        "divergence=none,seed=1",
        "divergence=none,seed=2",
        "divergence=reverse_kl,seed=1",
        "divergence=reverse_kl,seed=2",
    ]
    assert [(type(arm.config.divergence), arm.config.seed) for arm in arms] == [
        (NoDivergence, 1),
        (NoDivergence, 2),
        (ReverseKL, 1),
        (ReverseKL, 2),
    ]
    folders = [Path(arm.config.run_dir) for arm in arms]
    assert [folder.name for folder in folders] == [arm.label for arm in arms]
    assert len({folder.parent for folder in folders}) == 1
    assert folders[0].parent.name.startswith("quickstart-")
    (named, _) = compose_arms(["seed=1,2", "run_dir=here"])
    assert named.config.run_dir == "here/seed=1"
    (single,) = compose_arms(["seed=1"])
    assert (single.label, single.config.run_dir) == ("", "")


def test_a_setting_that_only_some_runs_have_is_refused_with_two_commands():
    assert refused("divergence=none,reverse_kl", "divergence.coef=0.1", "seed=1,2", sweep=True).splitlines() == [
        "divergence.coef: only some runs of this sweep have it. Write two commands:",
        "    rlkit train -m divergence=reverse_kl divergence.coef=0.1 seed=1,2",
        "    rlkit train -m divergence=none seed=1,2",
    ]
    assert refused("experiment=grpo,grpo_published", "divergence.coef=0.1,0.2", sweep=True).splitlines()[1:] == [
        "    rlkit train -m experiment=grpo_published divergence.coef=0.1,0.2",
        "    rlkit train -m experiment=grpo",
    ]


def test_every_run_of_a_sweep_is_checked_before_one_starts():
    assert refused("group_size=1,2", "seed=1,2", "num_step=3", sweep=True).splitlines()[1:] == [
        "  num_step: no such setting. Did you mean num_steps?",  # once, though wrong in all four
        "  group_size=1: advantage=grpo compares the responses to one prompt with each other, and one response has an advantage "
        "of 0. Write 2 or more; 8 or 16 is usual. (In run group_size=1,seed=1 and 1 more.)",
    ]
    assert "divergence=reverse_k: no such choice." in refused("divergence=none,reverse_k", sweep=True)
    message = refused("cluster=local,inprocess", "rollout=transformers", sweep=True)
    assert message == "cluster: the runs of a sweep share one cluster. Write one command for each cluster."


def test_a_run_folder_gives_its_settings_back(in_folder: Path):
    config = compose(["experiment=grpo_published", "divergence.coef=0.3", "optimizer.schedule=cosine", "rollout=transformers"])
    files.write_settings(in_folder, config, plain_settings(config))
    stored = read_stored(in_folder)
    assert stored == to_dict(config)
    assert compose([], stored=stored) == config
    changed = compose(["divergence=none", "evaluation.num_prompts=8"], stored=stored)
    assert changed.divergence == NoDivergence()
    assert changed.optimizer == config.optimizer
    assert isinstance(changed.optimizer, AdamW)
    assert changed.rollout == TransformersEngine()


def test_a_stored_setting_that_is_unknown_here_is_an_error(in_folder: Path):
    with pytest.raises(ConfigError, match="not the folder of a run"):
        read_stored(in_folder)
    config = compose([])
    files.write_settings(in_folder, config, plain_settings(config) | {"gone": 3})
    with pytest.raises(ConfigError, match=r"gone=3: this version of rlkit cannot read the stored setting"):
        compose([], stored=read_stored(in_folder))
    files.write_settings(in_folder, config, plain_settings(config))
    choices = yaml.safe_load((in_folder / "choices.yaml").read_text()) | {"objective": "mine.py:Mine"}
    (in_folder / "choices.yaml").write_text(yaml.safe_dump(choices))
    with pytest.raises(ConfigError, match=r"objective=mine.py:Mine: the stored run's choice is unknown here. Write objective="):
        compose([], stored=read_stored(in_folder))
    assert compose(["objective=clipped"], stored=read_stored(in_folder)).objective == config.objective
