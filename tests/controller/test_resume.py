"""A run that was cut anywhere and resumed is the run that was never cut, bit for bit."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from rlkit import cli
from rlkit.compose import compose
from rlkit.controller import loop
from rlkit.controller.checkpoint import newest_valid
from rlkit.controller.local import InProcessCluster
from rlkit.controller.lookahead import Lookahead
from rlkit.data.expressions import rows
from rlkit.errors import DataError, ResourceError, WorkerError
from rlkit.workers.learner import Learner

NUM_STEPS = 8
SETTINGS = [
    "cluster=inprocess",
    "rollout=transformers",
    f"num_steps={NUM_STEPS}",
    "prompts_per_step=4",
    "group_size=4",
    "reward.num_workers=1",
    "data=jsonl",
    "data.path=data.jsonl",
    "data.held_out_fraction=0.3",
    "model=tiny",
    "max_prompt_tokens=24",
    "max_response_tokens=12",
    "reward.fn=expressions",
    "evaluation.every=3",
    "evaluation.num_prompts=4",
    "evaluation.samples_per_prompt=4",
    "evaluation.ks=[1,4]",
    "divergence=reverse_kl",
    "divergence.estimator=k3_weighted",
    "optimizer_steps_per_batch=2",
    "optimizer.learning_rate=1e-3",
    "optimizer.schedule=cosine",
    "learner.tokens_per_microbatch=128",
    "learner.layout=padded",  # two microbatches per optimiser step
    "checkpoint_every=3",
]


class Cut(Exception):
    """Stands for a process that dies here."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlkit.controller.tracking.tracker.write_plots", lambda history, folder: None)  # half of a run's time
    return tmp_path


def write_data(folder: Path) -> None:
    """16 prompts to train on, so that an epoch ends with step 4."""
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows("train")[:400:17]))


def start(run_dir: str, *overrides: str) -> None:
    loop.train(compose([*SETTINGS, f"run_dir={run_dir}", *overrides]), InProcessCluster())


def resume(run_dir: str) -> None:
    assert cli.dispatch(["train", f"resume={run_dir}"]) == 0


def outcome(run_dir: str, *, num_steps: int = NUM_STEPS) -> dict:
    """Everything that a run leaves and that does not depend on the clock."""
    lines = [json.loads(line) for line in Path(run_dir, "metrics.jsonl").read_text().splitlines()]
    measured = [{k: v for k, v in row.items() if not k.startswith(("time/", "rate/"))} for row in lines]
    last = Path(run_dir, "checkpoints", f"step_{num_steps:06d}")
    rollouts = [pq.read_table(file).to_pylist() for file in sorted(Path(run_dir, "rollouts").glob("*.parquet"))]
    return {
        "measured": measured,
        "rollouts": rollouts,
        "weights": (last / "model.safetensors").read_bytes(),
        "state": {name: tensor.numpy().tobytes() for name, tensor in load_file(last / "state/learner-0-of-1.safetensors").items()},
        "progress": json.loads((last / "state/progress.json").read_text()),
        "learner": json.loads((last / "state/learner.json").read_text()),
        "replay": [file.read_bytes() for file in sorted((last / "state").glob("replay.*"))],
        "reference": {file.name: file.read_bytes() for file in sorted((last / "state").glob("reference.*"))},
    }


@pytest.fixture(scope="module")
def uncut(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The run that nothing happened to."""
    folder = tmp_path_factory.mktemp("uncut")
    write_data(folder)
    with contextlib.chdir(folder):
        start("run")
        return outcome("run")


def raise_at(monkeypatch: pytest.MonkeyPatch, owner, name: str, number: int, *, after: bool = False) -> None:
    """The number-th call (from 1) of a method raises `Cut`, before or after its work."""
    real, calls = getattr(owner, name), []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == number and not after:
            raise Cut
        result = real(*args, **kwargs)
        if len(calls) == number:
            raise Cut
        return result

    monkeypatch.setattr(owner, name, call)


CUTS = {  # where: owner, method, number of the call, after its work, steps measured by then
    "before the first step": (loop.Run, "train_step", 1, False, 0),
    "after generation": (loop, "trainable", 4, False, 3),
    "after scoring": (loop.Run, "learn", 4, False, 3),
    "between microbatches": (Learner, "_backward", 14, False, 3),
    "between optimiser steps": (Learner, "update", 8, False, 3),
    "after the optimiser, before the save": (loop.Run, "save", 2, False, 6),
    "at an epoch's end": (loop.Run, "train_step", 4, True, 4),
}
QUICK = ("between microbatches", "after the optimiser, before the save")


@pytest.mark.parametrize("where", [pytest.param(where, marks=() if where in QUICK else pytest.mark.slow) for where in CUTS])
def test_a_run_cut_and_resumed_is_the_run_that_was_not(where, uncut, monkeypatch, folder):
    owner, name, number, after, measured = CUTS[where]
    with monkeypatch.context() as patch:
        raise_at(patch, owner, name, number, after=after)
        with pytest.raises(Cut):
            start("run")
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum("policy/loss" in line for line in lines) == measured  # the cut was where its name says
    resume("run")
    assert outcome("run") == uncut


def check_cut_and_resumed(monkeypatch, settings: list[str], *, num_steps: int) -> dict:
    """A run that is cut in its last step and resumed is the run that was not, whose outcome is returned."""
    start("whole", *settings)
    with monkeypatch.context() as patch:
        raise_at(patch, loop.Run, "learn", num_steps)
        with pytest.raises(Cut):
            start("run", *settings)
    resume("run")
    whole = outcome("whole", num_steps=num_steps)
    assert outcome("run", num_steps=num_steps) == whole
    return whole


def test_a_run_that_trains_adapters_too(monkeypatch):
    """Its checkpoint has nothing of the frozen model but what it was merged into."""
    settings = ["learner=lora", "learner.lora_rank=2", "num_steps=2", "checkpoint_every=1", "prompts_per_step=2"]
    settings += ["evaluation.every=0", "evaluation.num_prompts=1", "max_response_tokens=6"]
    check_cut_and_resumed(monkeypatch, settings, num_steps=2)


KL = ["divergence=reverse_kl", "divergence.estimator=k3_weighted"]
REMEMBERING = {  # what a strategy remembers -> a run with it
    "an anchor": ["entropy=siren"],
    "what turns were like": ["entropy=epo"],
    "how rewards moved": ["safeguard=entropy_gated", *KL],
    "how the divergence moved": ["safeguard=asymmetric", *KL],
    "which way the entropy is": ["tempering=aepo", "tempering.target=0.9"],
    "how far it is in the data": ["prompt_filter=dynamic", "prompt_filter.max_batches=0"],
    "which prompts are solved": [
        *("curriculum=pass_rate", "prompt_filter=dynamic", "prompt_filter.max_batches=0", "curriculum.min_accept=0.5"),
        *("curriculum.retire_after=1", "curriculum.retire_from=0.1", "curriculum.revisit_every=2"),
    ],
    "errors": ["entropy=bonus", "entropy.coef=0.0", "control=pid", "control.target=0.8"],
    "a multiplier": ["divergence_control=dual_log", "divergence_control.target=0.01", *KL],
    "three controllers": [
        *("entropy=bonus", "control=pid", "control.target=0.8", "control.warmup_updates=0"),
        *("divergence_control=dual_log", "divergence_control.target=0.01", "divergence_control.smoothing=0.9", *KL),
        *("threshold_control=pid_log", "threshold_control.target=0.8", "threshold_control.warmup_updates=0"),
    ],
    "groups to replay": ["replay=buffer", "replay.score_power=1", "replay.age_half_life=2", "replay.fraction=0.5"],
    "groups to replace others": ["replay=zero_variance", *KL],
    "answers to rehearse": [
        *("rehearsal=base_answers", "rehearsal.num_prompts=64", "rehearsal.samples_per_prompt=1", "rehearsal.rows_per_step=3"),
        *("divergence_control=dual_log", "divergence_control.target=0.01", *KL),
    ],
    "how objectives went": ["objective_weights=recap_code", "imitation=positive", "reward.fn=expression_parts"],
}


@pytest.mark.slow
@pytest.mark.parametrize("what", REMEMBERING)
def test_what_a_strategy_remembers_is_there_after_a_resume(what, monkeypatch):
    base = [setting for setting in SETTINGS if not setting.startswith(("evaluation", "divergence"))]
    settings = [*base, *REMEMBERING[what], "num_steps=3", "checkpoint_every=2", "evaluation=none", "max_response_tokens=8"]

    def start(run_dir: str) -> None:
        loop.train(compose([*settings, f"run_dir={run_dir}"]), InProcessCluster())

    start("whole")
    with monkeypatch.context() as patch:
        raise_at(patch, loop.Run, "learn", 3)
        with pytest.raises(Cut):
            start("run")
    resume("run")
    assert outcome("run", num_steps=3) == outcome("whole", num_steps=3)
    fresh = loop.Progress.start(compose(settings)).to_json("")
    changed = {name for name, value in outcome("run", num_steps=3)["progress"].items() if value != fresh[name]}
    changed |= {name for name in ("replay",) if "replay=" in " ".join(settings) and outcome("run", num_steps=3)[name]}
    assert changed & {"entropy", "safeguard", "tempering", "coefficients", "prompts_drawn", "objectives", "curriculum", "replay"}


def test_a_run_of_several_turns_cut_and_resumed_is_the_run_that_was_not(monkeypatch):
    settings = ["environment=tools", "environment.call_format=bare", "environment.tools=[calculator]", "environment.max_turns=2"]
    settings += ["num_steps=3", "checkpoint_every=1", "max_response_tokens=30", "evaluation.every=0", "evaluation.num_prompts=1"]
    check_cut_and_resumed(monkeypatch, settings, num_steps=3)


MOVING = {  # rule -> how it is seen to move in four steps
    "refresh": ["reference.every=2", "reference.reset_optimizer=true"],
    "soft_refresh": ["reference.every=3"],
    "ema": ["reference.decay=0.9"],
    "bema": ["reference.every=1", "divergence.estimator=exact"],
}


@pytest.mark.parametrize("rule", [pytest.param(rule, marks=() if rule == "bema" else pytest.mark.slow) for rule in MOVING])
def test_a_reference_that_moves_is_there_after_a_resume(rule, monkeypatch):
    settings = [f"reference={rule}", "num_steps=4", "checkpoint_every=2", "max_response_tokens=8", *MOVING[rule]]
    settings += ["evaluation.every=0", "evaluation.num_prompts=1"]
    whole = check_cut_and_resumed(monkeypatch, settings, num_steps=4)
    assert json.loads(whole["reference"]["reference.json"])["ref_version"] >= 1


def test_a_run_keeps_its_reference_on_resume(cut_after_six, folder, capsys):
    shutil.copytree(cut_after_six, folder / "run")
    assert cli.guard(lambda: cli.dispatch(["train", "resume=run", "reference=ema"])) == 2
    assert "reference: a run that is resumed keeps its reference" in capsys.readouterr().err


@pytest.mark.slow
def test_the_runs_differ_from_one_that_started_otherwise(uncut):
    """What the comparison above compares does depend on the run."""
    start("other", "seed=1")
    other = outcome("other")
    for part in ("measured", "rollouts", "weights", "state"):
        assert other[part] != uncut[part]


def damage_truncate(checkpoint: Path) -> None:
    file = checkpoint / "state" / "learner-0-of-1.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def damage_byte(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-7] ^= 1
    file.write_bytes(content)


def damage_missing(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()


def damage_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def damage_empty(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_text("")


def damage_future(checkpoint: Path) -> None:
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))


DAMAGES = {
    damage_truncate: "learner-0-of-1.safetensors is damaged (size",
    damage_byte: "model.safetensors is damaged (sha256",
    damage_missing: "tokenizer.json cannot be read",
    damage_manifest: "manifest cannot be read (FileNotFoundError)",
    damage_empty: "manifest cannot be read (JSONDecodeError)",
    damage_future: "written in format 99",
}


@pytest.fixture(scope="module")
def cut_after_six(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("six")
    write_data(folder)
    with contextlib.chdir(folder), pytest.MonkeyPatch.context() as patch:
        raise_at(patch, loop.Run, "train_step", 7)
        with pytest.raises(Cut):
            start("run")
    return folder / "run"


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_with_its_reason(damage, cut_after_six, folder):
    run = shutil.copytree(cut_after_six, folder / "run")
    damage(run / "checkpoints" / "step_000006")
    found, passed_over = newest_valid(run)
    assert found is not None
    assert found.folder.name == "step_000003"
    (reason,) = passed_over
    assert DAMAGES[damage] in reason


def test_a_run_whose_newest_checkpoint_is_damaged_goes_on_from_the_one_before(cut_after_six, uncut, folder):
    run = shutil.copytree(cut_after_six, folder / "run")
    damage_byte(run / "checkpoints" / "step_000006")
    resume("run")
    assert outcome("run") == uncut
    assert "Passed over: step_000006: model.safetensors is damaged" in (run / "log.txt").read_text()


def test_without_a_whole_checkpoint_nothing_starts_and_nothing_is_deleted(cut_after_six, folder, capsys):
    run = shutil.copytree(cut_after_six, folder / "run")
    for name in ("step_000003", "step_000006"):
        damage_byte(run / "checkpoints" / name)
    files = sorted(run.rglob("*"))
    assert cli.guard(lambda: cli.dispatch(["train", "resume=run"])) == DataError.exit_code
    said = capsys.readouterr().err
    assert "no checkpoint is whole" in said
    assert "step_000003: model.safetensors is damaged" in said
    assert sorted(run.rglob("*")) == files


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("owner", "where", "step"), [(Lookahead, "take", 1), (loop.Run, "learn", 2), (loop.Run, "evaluate", 3)])
def test_a_signal_saves_within_the_step_and_the_run_goes_on_from_there(number, owner, where, step, uncut, monkeypatch, capsys):
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    real, calls = getattr(owner, where), []

    def call(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, where, call)
    code = cli.guard(lambda: cli.dispatch(["train", *SETTINGS, "run_dir=run"]))
    said = capsys.readouterr().err
    assert code == 75
    assert f"Stopped by {number.name} after step {step} of 8, and saved." in said
    assert said.rstrip().endswith("Go on with: rlkit train resume=run")
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers
    resume("run")
    after = outcome("run")
    assert after.pop("progress") | {"saved_at": 0} == uncut["progress"] | {"saved_at": 0}
    assert after == {part: value for part, value in uncut.items() if part != "progress"}


@pytest.mark.slow
def test_only_the_newest_checkpoints_and_the_best_stay(folder):
    start("run", "checkpoint_every=1", "keep_checkpoints=2", "evaluation.every=1")
    kept = {entry.name for entry in (folder / "run" / "checkpoints").iterdir()}
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    rewards = {row["step"]: row["evaluation/reward"] for row in lines if row["step"] and "evaluation/reward" in row}
    best = min(step for step, reward in rewards.items() if reward == max(rewards.values()))
    assert kept == {"step_000007", "step_000008", f"step_{best:06d}"}


@pytest.mark.slow
def test_a_disk_that_refuses_leaves_the_last_checkpoint_and_stops_the_run_the_second_time(folder, monkeypatch):
    """A limit on the size of files stands for a full disk: the same calls fail in the same places."""
    real = loop.save_checkpoint
    saves = []

    def save(*args):
        saves.append(args)
        limit = 1 << 20 if len(saves) in (2, 3) else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            return real(*args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    monkeypatch.setattr(loop, "save_checkpoint", save)
    with pytest.raises(ResourceError, match=r"cannot be written .*File too large"):
        start("run", "checkpoint_every=2")
    assert len(saves) == 3
    assert [entry.name for entry in (folder / "run" / "checkpoints").iterdir()] == ["step_000002"]
    assert "Training goes on" in (folder / "run" / "log.txt").read_text()
    resume("run")


def test_a_run_folder_that_a_rank_cannot_see_is_refused_before_the_first_step(monkeypatch):
    monkeypatch.setattr(Learner, "sees", lambda learner, path: False)
    with pytest.raises(ResourceError, match=r"^run_dir=run: learner rank 0 cannot see it .* that all nodes share"):
        start("run")
    assert not Path("run/rollouts").exists() or not list(Path("run/rollouts").iterdir())


def test_a_worker_that_dies_is_named_with_the_way_to_go_on(monkeypatch):
    def die(*args, **kwargs):
        raise WorkerError("learner rank 0 died during update: killed.")

    monkeypatch.setattr(loop.Run, "learn", die)
    with pytest.raises(WorkerError, match=r"learner rank 0 died during update: killed. Go on with: rlkit train resume=run"):
        start("run")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=5", "seed: a run that is resumed keeps its seed"),
        ("group_size=2", "group_size: a run that is resumed keeps its group_size"),
        ("optimizer=sgd", "optimizer: a run that is resumed keeps its optimiser"),
        ("advantage=gae critic=value_model", "critic: a run that is resumed keeps its critic"),
        ("entropy=siren", "entropy: a run that is resumed keeps its entropy term"),
        ("divergence=reverse_kl safeguard=asymmetric", "safeguard: a run that is resumed keeps its safeguard"),
        ("rehearsal=base_answers rehearsal.samples_per_prompt=1", "rehearsal: a run that is resumed keeps its rehearsal"),
        ("learner=lora", "learner.lora_rank: a run that is resumed keeps its adapters"),
        (
            "divergence_control=doubling divergence_control.target=0.1",
            "divergence_control: a run that is resumed keeps its controller",
        ),
    ],
)
def test_what_a_resumed_run_keeps(override, message, cut_after_six, folder, capsys):
    shutil.copytree(cut_after_six, folder / "run")
    assert cli.guard(lambda: cli.dispatch(["train", "resume=run", *override.split()])) == 2
    assert message in capsys.readouterr().err


def test_other_data_is_refused_and_more_steps_are_not(cut_after_six, folder, capsys):
    shutil.copytree(cut_after_six, folder / "run")
    assert cli.dispatch(["train", "resume=run", "num_steps=7"]) == 0
    data = Path("data.jsonl").read_text().splitlines(keepends=True)
    Path("data.jsonl").write_text("".join(data[1:]))
    assert cli.guard(lambda: cli.dispatch(["train", "resume=run"])) == 2
    assert "the prompts are not those that the run began with" in capsys.readouterr().err


def test_two_processes_cannot_train_in_one_folder(cut_after_six, folder, capsys):
    from rlkit.controller.tracking.files import claim_folder

    shutil.copytree(cut_after_six, folder / "run")
    with claim_folder(folder / "run", resumes=True):
        assert cli.guard(lambda: cli.dispatch(["train", "resume=run"])) == 2
    assert f"run_dir=run: process {os.getpid()} on" in capsys.readouterr().err
