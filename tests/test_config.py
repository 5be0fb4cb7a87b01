"""The schema: what can be set, what is refused, and with which words."""

import ast
from dataclasses import dataclass, fields
from pathlib import Path

import hydra
import pytest
import yaml
from omegaconf import OmegaConf

from rlkit import compose
from rlkit.checks import problems
from rlkit.config import CHOICES, GROUP_BASELINES, RunConfig, register, to_dict, to_yaml
from rlkit.core.objectives import ClippedSurrogate
from rlkit.errors import ConfigError
from rlkit.examine import load
from rlkit.overrides import options
from rlkit.resources import conf_dir

PACKAGE = Path(__file__).parent.parent / "rlkit"
REQUIRED = {
    "data.files": "data.files={a:rows.jsonl}",
    "reward.fns": "reward.fns={form:format}",
    "data.path": "data.path=rows.jsonl",
    "data.task": "data.task=chain_sum",
    "reward.fn": "reward.fn=expressions",
    "reward.path": "reward.path=reward-model",
    "environment.env": "environment.env=worlds.py:World",
    "environment.env_id": "environment.env_id=wordle",
    "data.env_id": "data.env_id=wordle",
}
REQUIRED |= {"model.path": "model.path=tiny"}
CONTROLS = ("control", "divergence_control", "threshold_control")
for setting, value in {"target": "0.1", "updates": "[10]", "coefs": "[0.01]"}.items():
    REQUIRED |= {f"{group}.{setting}": f"{group}.{setting}={value}" for group in CONTROLS}
REQUIRED |= {"reference.path": "reference.path=other", "reference.paths": "reference.paths=[one,other]"}


@pytest.fixture
def rows(in_folder: Path) -> Path:
    """The current folder, with a data file and a reward function in it."""
    (in_folder / "rows.jsonl").write_text('{"prompt": "1+1", "answer": "2"}\n')
    (in_folder / "worlds.py").write_text("class World: ...\n")
    (in_folder / "my_rewards.py").write_text("def exact(prompts, completions, answer, **columns):\n    return [0.0]\n")
    return in_folder


def wrong(*overrides: str) -> list[str]:
    """The sentences that the overrides are refused with."""
    with pytest.raises(ConfigError) as caught:
        compose.compose(overrides)
    lines = str(caught.value).splitlines()
    return [line.strip() for line in lines[1:]] if len(lines) > 1 else lines


def test_groups_are_those_of_the_run_and_of_the_defaults_list():
    assert list(CHOICES) == [field.name for field in fields(RunConfig) if field.name in CHOICES]
    defaults = OmegaConf.to_container(OmegaConf.load(conf_dir() / "config.yaml"))["defaults"]  # pyright: ignore
    assert [key for entry in defaults if isinstance(entry, dict) for key in entry] == [*CHOICES, "experiment"]


def compose_with_what_is_missing(overrides: list[str]) -> RunConfig:
    """A choice may ask for values that only the user has."""
    try:
        return compose.compose(overrides)
    except ConfigError as error:
        missing = [value for key, value in REQUIRED.items() if f" {key}: has no value" in f" {error}"]
        if not missing:
            raise
    return compose.compose([*overrides, *missing])


GOES_WITH = {  # a choice of this name asks for another
    "inprocess": "rollout=transformers",
    **dict.fromkeys(("gae", "vc_ppo", "vapo"), "critic=value_model"),
    **dict.fromkeys(("value_model", "double_softmin"), "advantage=gae"),
    "kl_cov": "objective=unclipped",
    "reward=environment": "environment=guessing_game",
    "environment=verifiers": "data=verifiers",
    "old_policy": "optimizer_steps_per_batch=2",
    **dict.fromkeys(("model", "soup", "geometric_mixture", "refresh", "soft_refresh", "ema", "bema"), "divergence=reverse_kl"),
    **dict.fromkeys(("dads", "entropy_gated", "asymmetric"), "divergence=reverse_kl"),
    "control": "entropy=bonus entropy.coef=0.005",  # any choice of this group
    "divergence_control": "divergence=reverse_kl divergence.coef=0.005",
    "threshold_control": "optimizer_steps_per_batch=2",
    "threshold_control=pid": "optimizer_steps_per_batch=2 threshold_control.low=0.1 threshold_control.high=0.5",
    "threshold_control=dual": "optimizer_steps_per_batch=2 threshold_control.low=0.1",
}


@pytest.mark.parametrize("group", CHOICES)
def test_every_choice_and_preset_of_a_group_composes(group: str, rows: Path):
    for name in options(group):
        overrides = [f"{group}={name}"]
        overrides += next((GOES_WITH[key] for key in (overrides[0], group, name) if key in GOES_WITH), "").split()
        config = compose_with_what_is_missing(overrides)
        if name in CHOICES[group]:
            assert type(getattr(config, group)) is CHOICES[group][name]


@pytest.mark.parametrize("name", options("experiment"))
def test_every_experiment_composes_and_says_what_it_is(name: str):
    needed = ["reward.fn=expressions"] if name == "none" else []
    config = compose.compose([f"experiment={name}", *needed])
    assert config.experiment_name == ("run" if name == "none" else name)
    header, description, *_ = (conf_dir() / "experiment" / f"{name}.yaml").read_text().splitlines()
    assert header == "# @package _global_"  # Hydra reads it only above every other line
    assert description.startswith("# ")
    assert name == "none" or "arXiv" in description


def test_no_file_of_conf_repeats_a_default(rows: Path):
    """A default lives in its dataclass; YAML that repeats it would keep the old value when it changes."""
    repeated = []
    for file in sorted(conf_dir().glob("*/*.yaml")):
        group, content = file.parent.name, yaml.safe_load(file.read_text()) or {}
        extends = next((entry for entry in content.pop("defaults", []) if isinstance(entry, str)), None)
        if group != "experiment":
            before = {field.name: getattr(field.default, "name", field.default) for field in fields(CHOICES[group][str(extends)])}
            repeated += [f"{file.name}: {key}" for key, value in content.items() if before[key] == value]
            continue
        # What holds without this file: the experiment that it extends, or every default, of the same choices.
        # Without its controllers, which have settings that only the file gives, and its anchor, which needs several updates.
        apart = (*CONTROLS, "anchor")
        choices = [f"{group}={name}" for group, name in compose._hydra(file.stem)[1].items() if group not in apart]
        fn = ["reward.fn=exact_match"] if "reward=function" in choices else []
        before = to_dict(compose_with_what_is_missing([f"experiment={extends or 'none'}", *fn, *choices]))
        for key, value in content.items():
            for inner, inner_value in value.items() if isinstance(value, dict) else [(None, value)]:
                if (before[key].get(inner) if inner else before[key]) == inner_value:
                    repeated.append(f"{file.name}: {key}{f'.{inner}' if inner else ''}")
    assert not repeated


def test_every_setting_is_read_somewhere():
    """A setting that nobody reads is deleted. Its own check, and what only prints or composes it, are no readers."""
    read: set[str] = set()
    for file in PACKAGE.rglob("*.py"):
        if file.relative_to(PACKAGE).as_posix() in ("settings.py", "compose.py", "overrides.py", "choices.py", "schedule.py"):
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        checks = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and "problems" in node.name]
        checks += [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "__post_init__"]
        skipped = {inner for node in checks for inner in ast.walk(node)}
        read |= {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and node not in skipped
        }
    settings = {f"{group}.{field.name}" for group, choices in CHOICES.items() for cls in choices.values() for field in fields(cls)}
    # A group with a single choice that has no settings says nothing yet.
    settings |= {field.name for field in fields(RunConfig) if len(CHOICES.get(field.name, "many")) > 1}
    unread = sorted(key for key in settings if key.rpartition(".")[2] not in read)
    assert not unread, f"no code reads {', '.join(unread)}"


def test_the_names_that_errors_and_folders_are_made_of_are_free():
    for group, choices in CHOICES.items():
        for name, cls in choices.items():
            taken = [field.name for field in fields(cls)]
            assert "choice" not in taken, f"{group}={name}: `choice` is the key of its name in to_dict"


def test_a_choice_is_what_hydra_would_compose():
    for turn in range(max(len(options(group)) for group in CHOICES)):
        chosen = {group: names[turn % len(names)] for group in CHOICES if (names := options(group))}
        with hydra.initialize_config_dir(config_dir=str(conf_dir()), version_base="1.3"):
            composed = hydra.compose("config", ["experiment=none", *(f"{group}={name}" for group, name in chosen.items())])
        for group, name in chosen.items():
            assert compose._option(group, name) == composed[group], f"{group}={name}"


def test_load_takes_what_hydra_composed_and_returns_plain_dataclasses():
    cfg, _ = compose._hydra("quickstart")
    config = load(cfg)
    assert isinstance(config, RunConfig)
    assert config == compose.compose([])
    assert type(config.evaluation.ks) is list  # pyright: ignore[reportAttributeAccessIssue]


def test_load_reports_keys_that_got_past_hydra():
    cfg = compose._hydra("quickstart")[0].copy()
    OmegaConf.update(cfg, "num_stepz", 3, force_add=True)
    OmegaConf.update(cfg, "optimizer.learning_rat", 3, force_add=True)
    with pytest.raises(ConfigError) as caught:
        load(cfg)
    assert "num_stepz: no such setting. Did you mean num_steps?" in str(caught.value)
    assert "optimizer.learning_rat: no such setting. Did you mean learning_rate?" in str(caught.value)


def test_all_problems_come_in_one_report():
    report = wrong(
        "divergence=revers_kl",
        "seed=x",
        "num_step=3",
        "reward.timeout_s=-1",
        "reward.num_workers=0",
        "rollout.top_p=0.9",
        "group_size=1",
        "evaluation.ks=[1,32]",
        "reward.fn=expresions",
    )
    assert report == [
        "divergence=revers_kl: no such choice. Did you mean reverse_kl? Choices: none, reverse_kl, forward_kl, rapo, "
        "jensen_shannon, generalized_js, alpha, total_variation, "
        "chi2_policy_ref, chi2_ref_policy, squared_hellinger, jeffreys, renyi, cauchy_schwarz, sinkhorn.",
        "seed=x: not a whole number. Write seed=0.",
        "num_step: no such setting. Did you mean num_steps?",
        "reward.timeout_s=-1.0: no time to answer. Write seconds above 0; 10 is usual.",
        "reward.num_workers=0: nobody computes rewards. Write 1 or more.",
        "rollout.top_p=0.9: truncated sampling biases every ratio in training. Write rollout.top_p=1.0; "
        "evaluation.top_p may differ.",
        "evaluation.ks=[1, 32]: pass@k needs 1 <= k <= evaluation.samples_per_prompt=16. Write evaluation.ks=[1] "
        "or draw more samples.",
        "group_size=1: advantage=grpo compares the responses to one prompt with each other, and one response has an advantage "
        "of 0. Write 2 or more; 8 or 16 is usual.",
        report[-1],
    ]
    assert report[-1].startswith("reward.fn=expresions: no such function in reward_fns/. Did you mean expressions? Write file.py:")


@pytest.mark.parametrize(
    ("overrides", "start", "fix"),
    [
        ("num_steps=0", "num_steps=0: ", "write 1 or more"),
        ("max_response_tokens=0", "max_response_tokens=0: ", "write 1 or more"),
        ("checkpoint_every=-1", "checkpoint_every=-1: ", "0 for one checkpoint at the end"),
        ("seed=-1", "seed=-1: ", "write a number from 0"),
        (
            "prompts_per_step=32 optimizer_steps_per_batch=5",
            "optimizer_steps_per_batch=5: ",
            "Write optimizer_steps_per_batch=4 or prompts_per_step=35.",
        ),
        (
            "prompts_per_step=2 optimizer_steps_per_batch=4",
            "optimizer_steps_per_batch=4: ",
            "Write optimizer_steps_per_batch=2 or prompts_per_step=4.",
        ),
        ("selector=kl_cov", "selector=kl_cov: ", "Write objective=unclipped."),
        ("selector=clip_cov objective=gspo", "selector=clip_cov: ", "Write objective=clipped, or selector=none."),
        ("selector=clip_cov objective=cispo", "selector.exclude_clipped=true: ", "Write selector.exclude_clipped=false."),
        (
            "control=pid control.target=1 divergence=reverse_kl",
            "control=pid: entropy=none has no coef for it to move. Write entropy=bonus, ",
            "divergence_control=pid for a divergence, threshold_control=pid for a clip threshold, or control=fixed.",
        ),
        (
            "divergence_control=dual divergence_control.target=1 entropy=bonus",
            "divergence_control=dual: divergence=none has no coef",
            "Write divergence=reverse_kl, or divergence_control=fixed.",
        ),
        (
            "threshold_control=dual_log threshold_control.target=1 objective=reinforce",
            "threshold_control=dual_log: objective=reinforce has no clip_high",
            "Write objective=clipped, or threshold_control=fixed.",
        ),
        (
            "threshold_control=dual_log threshold_control.target=1",
            "threshold_control=dual_log: with one optimiser step on each batch every ratio is 1",
            "Write optimizer_steps_per_batch=2, or threshold_control=fixed.",
        ),
        (
            "threshold_control=pid threshold_control.target=1 threshold_control.high=0.5 epochs_per_batch=2",
            "threshold_control=pid: it may go down to objective.clip_high=0, which is refused. ",
            "such as threshold_control.low, or choose another controller.",
        ),
        (
            "threshold_control=schedule threshold_control.updates=[5] threshold_control.coefs=[-0.1] epochs_per_batch=2",
            "threshold_control=schedule: it may go down to objective.clip_high=-0.1, which is refused. ",
            "Write settings that keep it higher",
        ),
        (
            "divergence=reverse_kl divergence_control=dual divergence_control.target=1 divergence_control.low=-1",
            "divergence_control=dual: it may go down to divergence.coef=-1, which is refused. ",
            "such as divergence_control.low",
        ),
        (
            "entropy=bonus control=skywork control.target=0.2",
            "entropy.coef=0.01: a start outside of control.low=0.0 and control.high=0.005; ",
            "move the start or a bound.",
        ),
        (
            "threshold_control=pid threshold_control.target=1 threshold_control.low=0.3 threshold_control.high=1 group_size=4"
            " epochs_per_batch=2",
            "objective.clip_high=0.2: a start outside of threshold_control.low=0.3 and threshold_control.high=1.0; ",
            "move the start or a bound.",
        ),
        (
            "divergence=reverse_kl divergence.coef=0 divergence_control=proportional divergence_control.target=1",
            "divergence.coef=0.0: is where it starts, and it moves by factors; ",
            "start above 0.",
        ),
        (
            "divergence=reverse_kl divergence_control=proportional divergence_control.target=1 divergence_control.horizon=10",
            "divergence_control.horizon=10.0: one step over 512 responses ",
            "write more than 102.4, 10000 is usual.",
        ),
        (
            "divergence=reverse_kl divergence_control=dual divergence_control.target=nan",
            "divergence_control.target=nan: ",
            "write a finite number.",
        ),
        (
            "entropy=bonus control=pid control.target=1 control.low=0.02 control.high=0.01 entropy.coef=0.015",
            "control.low=0.02, control.high=0.01: write finite bounds",
            "the lower one first.",
        ),
        ("advantage=gae", "critic=none: ", "Write critic=value_model."),
        ("replay=buffer objective=reinforce", "objective=reinforce: ", "Write objective=clipped, or correction=tis."),
        ("replay=buffer correction=rejection", "correction=rejection: ", "Write correction=decoupled_ppo or tis"),
        ("replay=buffer correction=divergence_rejection", "correction=divergence_rejection: ", "or correction=none for a ratio"),
        ("replay=buffer prompts_per_step=1", "prompts_per_step=1: ", "Write more prompts, or a larger replay.fraction."),
        ("replay=buffer epochs_per_batch=4", "replay.max_uses=4: ", "Write replay.max_uses=8 or more."),
        ("replay=buffer replay.fraction=1", "replay.fraction=1.0: ", "0.2 is usual"),
        ("replay=buffer tempering=aepo", "tempering=aepo: the entropy that it holds", "Write tempering=none or replay=none."),
        ("replay=zero_variance advantage=reinforce_pp", "replay=zero_variance: advantage=reinforce_pp", "or replay=buffer."),
        ("replay=zero_variance objective=unclipped", "objective=unclipped: replay=zero_variance", "Write objective=clipped."),
        ("replay=zero_variance prompt_filter=dynamic", "prompt_filter=dynamic: it leaves no group", "Write prompt_filter=none"),
        ("replay=zero_variance prompt_advantage=copo", "prompt_advantage=copo: it also looks", "Write prompt_advantage=none"),
        ("replay=buffer divergence=reverse_kl divergence.estimator=k2", "divergence.estimator=k2: its gradient", "trains on older"),
        ("objective_weights=recap_code objective_weights.alpha=2", "objective_weights.alpha=2.0: ", "null to anneal"),
        (
            "objective_weights=recap objective_weights.alpha=0.5",
            "objective_weights.alpha: objective_weights=recap has ",
            "recap_code",
        ),
        ("advantage=gdpo shaping=overlong", "shaping=overlong: advantage=gdpo learns from the parts", "or advantage=grpo."),
        (
            "advantage=gdpo objective_weights=recap objective_weights.apply_to=reward",
            "objective_weights.apply_to=reward: advantage=gdpo normalises",
            "Write objective_weights.apply_to=advantage or loss",
        ),
        ("critic=value_model", "critic=value_model: ", "Write advantage=gae, or critic=none."),
        ("objective=gspo aggregation=token_mean", "aggregation=token_mean: ", "Write aggregation=seq_mean_token_mean."),
        ("optimizer.warmup_steps=100", "optimizer.warmup_steps=100: ", "the run has only 70 optimiser steps"),
        ("optimizer.final_fraction=0.1", "optimizer.final_fraction=0.1: ", "Write optimizer.schedule=cosine."),
        ("optimizer.learning_rate=0", "optimizer.learning_rate=0.0: ", "Write a number above 0"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate=nan: ", "Write a number above 0"),
        ("learner=lora learner.lora_rank=0", "learner.lora_rank=0: ", "Write 1 or more; 16 is usual."),
        ("learner=lora learner.lora_alpha=0", "learner.lora_alpha=0.0: ", "Write a number above 0"),
        (
            "learner=lora learner.target_modules=all-linear",
            "learner.target_modules=all-linear: ",
            "Write learner.target_modules=[all-",
        ),
        ("learner=lora learner.target_modules=[]", "learner.target_modules=[]: ", "or names such as [q_proj,v_proj]"),
        (
            "learner=lora learner.target_modules=[all-linear,q_proj]",
            "learner.target_modules=[all-linear,q_proj]: ",
            "[all-linear],",
        ),
        ("learner.lora_rank=8", "learner.lora_rank: learner=fsdp has ", "Write learner=lora learner.lora_rank=8, or leave"),
        ("learner.tokens_per_microbatch=39", "learner.tokens_per_microbatch=39: ", "Write 40 or more."),
        ("data.held_out_fraction=0", "data.held_out_fraction=0: ", "or evaluation=none"),
        ("data.held_out_fraction=1", "data.held_out_fraction=1.0: ", "0.1 is usual"),
        ("rollout.temperature=0", "rollout.temperature=0.0: ", "Write a number above 0; 1.0 is usual."),
        ("evaluation.temperature=0", "evaluation.temperature=0.0: ", "evaluation.samples_per_prompt=1"),
        ("cluster=inprocess", "rollout=vllm: ", "Write rollout=transformers or cluster=local."),
        ("cluster=inprocess rollout=transformers learner.num_ranks=2", "learner.num_ranks=2: ", "Write learner.num_ranks=1"),
        ("cluster=inprocess rollout=transformers rollout.num_engines=2", "rollout.num_engines=2: ", "Write rollout.num_engines=1"),
        (
            "rollout.weight_transport=nccl cluster.placement=colocated",
            "rollout.weight_transport=nccl: ",
            "Write rollout.weight_transport=ipc or host, or cluster.placement=separate.",
        ),
        (
            "rollout.weight_transport=ipc",
            "rollout.weight_transport=ipc: ",
            "Write rollout.weight_transport=nccl or host, or cluster.placement=colocated.",
        ),
        (
            "rollout.weight_transport=ipc cluster.placement=colocated rollout.num_engines=2",
            "rollout.weight_transport=ipc: every device of an engine needs a learner rank",
            "Write learner.num_ranks=2 or rollout.weight_transport=host.",
        ),
        ("reward.fn=my_reward.py:exact", "reward.fn=my_reward.py:exact: there is no file my_reward.py", "Check its spelling."),
        ("reward.fn=my_rewards.py:", "reward.fn=my_rewards.py:: '' is no name.", "Write reward.fn=my_rewards.py:my_"),
        ("data=jsonl data.path=row.jsonl reward.fn=exact_match", "data.path=row.jsonl: no such file", "Check its spelling."),
        (
            "environment=guessing_game data=guessing reward=weighted reward.fns={environment:format}",
            "reward.fns.environment: it is the name of what the environment gives.",
            "Write another.",
        ),
        ("data=jsonl reward.fn=exact_match", "data.path: has no value.", "Write data.path=file."),
        ("model=path", "model.path: has no value.", "Write model=tiny, model=smollm2_135m, or model.path="),
    ],
)
def test_a_wrong_run_is_refused_with_what_to_write_instead(overrides: str, start: str, fix: str, rows: Path):
    (sentence,) = wrong(*overrides.split())
    assert sentence.startswith(start)
    assert fix in sentence


def test_k2_with_several_optimiser_steps_per_batch_is_refused():
    assert compose.compose(["divergence=reverse_kl", "divergence.estimator=k2"])
    for several in ("optimizer_steps_per_batch=2", "epochs_per_batch=2"):
        (sentence,) = wrong("divergence=reverse_kl", "divergence.estimator=k2", several)
        assert sentence.startswith("divergence.estimator=k2: its gradient is right only for the first optimiser step on a batch")
        assert "there are 2" in sentence
        assert "Write divergence.estimator=k3_weighted, score or exact" in sentence


@pytest.mark.parametrize("advantage", GROUP_BASELINES)
def test_group_baselines_refuse_groups_of_one(advantage: str):
    (sentence,) = wrong(f"advantage={advantage}", "group_size=1")
    assert sentence.startswith(f"group_size=1: advantage={advantage} compares the responses to one prompt with each other")


def test_held_out_rows_of_their_own_stand_in_for_a_share(rows: Path):
    own = ["data=jsonl", "data.path=rows.jsonl", "data.held_out_fraction=0", "reward.fn=my_rewards.py:exact"]
    assert compose.compose([*own, "data.held_out_path=rows.jsonl"])
    assert compose.compose([*own, "evaluation=none"])
    assert len(wrong(*own)) == 1


def test_a_checked_config_has_no_problems():
    assert list(problems(compose.compose([]))) == []


def test_yaml_names_the_choice_of_every_group():
    config = compose.compose(["divergence=reverse_kl"])
    read = OmegaConf.to_container(OmegaConf.create(to_yaml(config)))
    assert isinstance(read, dict)
    assert {group: read[group]["choice"] for group in CHOICES}["divergence"] == "reverse_kl"
    usual = {"coef": 0.05, "estimator": "score", "place": "loss", "top_k": 0, "allow_biased": False}
    assert read["divergence"] == {"choice": "reverse_kl", **usual}


@dataclass(kw_only=True, slots=True)
class Halved(ClippedSurrogate):
    """Half of the clipped surrogate."""

    factor: float = 0.5  # of the loss

    def __post_init__(self):
        ClippedSurrogate.__post_init__(self)
        if self.factor <= 0:
            raise ConfigError(f"objective.factor={self.factor}: write a number above 0.")


@pytest.fixture
def halved():
    register({"objective": {"halved": Halved}})
    yield
    del CHOICES["objective"]["halved"]


@pytest.mark.usefixtures("halved")
def test_a_registered_choice_is_chosen_set_and_checked_like_any_other():
    config = compose.compose(["objective=halved", "objective.factor=0.25"])
    assert config.objective == Halved(factor=0.25)
    assert wrong("objective=halved", "objective.factor=0") == ["objective.factor=0.0: write a number above 0."]
    (refused,) = wrong("objective=halve")
    assert refused.startswith("objective=halve: no such choice. Did you mean halved? Choices: clipped, ")
    assert refused.endswith(", halved.")


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"objectives": {"mine": Halved}}, "objectives: no such group of choices. Did you mean objective?"),
        ({"divergence": {"mine": Halved}}, "divergence=mine: .* is not a dataclass that extends rlkit.core.divergences"),
        ({"objective": {"clipped": Halved}}, "objective=clipped: rlkit has a choice of that name, ClippedSurrogate."),
    ],
)
def test_what_cannot_be_registered(extra: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        register(extra)
