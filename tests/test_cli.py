"""The command line: answers at once, explains itself, refuses cleanly."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rlkit import cli
from rlkit.compose import compose
from rlkit.config import CHOICES, RunConfig
from rlkit.controller.checkpoint import FORMAT, MANIFEST, PROGRESS
from rlkit.controller.tracking import files
from rlkit.controller.tracking.redaction import plain_settings
from rlkit.core.feedback import DualAscent
from rlkit.core.objectives import ClippedSurrogate
from rlkit.errors import ConfigError, WorkerError

RLKIT = [sys.executable, "-c", "from rlkit.cli import main; main()"]


@dataclass(kw_only=True, slots=True)
class Mine(ClippedSurrogate):
    """An objective from outside rlkit."""

    scale: float = 2.0  # of the loss


@pytest.fixture
def extra() -> Iterator[dict[str, dict[str, type]]]:
    yield {"objective": {"mine": Mine}}
    CHOICES["objective"].pop("mine", None)


def call(*arguments: str) -> int:
    return cli.guard(lambda: cli.dispatch(list(arguments)))


class Trainings:
    """Takes the place of the training loop, and remembers what it was asked to train."""

    def __init__(self):
        self.configs: list[RunConfig] = []
        self.failure: BaseException | None = None

    def __call__(self, config: RunConfig, cluster: Any, *, resume: bool = False) -> None:
        self.configs.append(config)
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trainings:
    trainings = Trainings()
    monkeypatch.setattr("rlkit.controller.loop.train", trainings)
    return trainings


ATTEMPTS = 4


def timed(command: list[str], cwd: Path | None = None) -> tuple[subprocess.CompletedProcess[str], float]:
    """Runs the command, and the processor seconds it takes when nothing disturbs it: the best of a few attempts, because on a
    busy machine even processor time counts what neighbours do to the caches and to a core's other half."""
    seconds = []
    for _ in range(ATTEMPTS):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return done, min(seconds)


IN_PROCESS = ["cluster=inprocess", "rollout=transformers"]


def test_help_takes_less_than_a_second_and_imports_the_standard_library_only():
    script = (
        "import sys\nfrom rlkit import cli\ncli.dispatch(['--help'])\ncli.dispatch(['train', '--help'])\n"
        "names = {name.partition('.')[0] for name in sys.modules}\n"
        "print('LOADED', *sorted(names - set(sys.stdlib_module_names) - {'__main__', '__mp_main__'}))"
    )
    done, seconds = timed([sys.executable, "-I", "-c", script])
    assert seconds < 1
    assert done.returncode == 0
    loaded = set(done.stdout.splitlines()[-1].split()[1:])
    heavy = {"torch", "ray", "hydra", "omegaconf", "numpy", "vllm", "transformers", "datasets", "rich", "yaml"}
    assert "rlkit" in loaded
    assert not loaded & heavy  # an editable install may load its own finder


def test_help_explains_itself(capsys: pytest.CaptureFixture[str]):
    assert call("--help") == 0
    text = capsys.readouterr().out
    for command in cli.COMMANDS:
        assert f"  {command}" in text
    assert "rlkit train -m divergence=none,reverse_kl seed=1,2" in text
    assert call() == 2
    assert capsys.readouterr().out == text
    for command in cli.COMMANDS:
        assert call(command, "--help") == 0
        assert f"usage: rlkit {command}" in capsys.readouterr().out
    assert call("--version") == 0
    assert capsys.readouterr().out.startswith("rlkit 0.")


def test_a_wrong_config_is_refused_within_five_seconds_with_code_2(tmp_path: Path):
    done, seconds = timed([*RLKIT, "train", "num_step=3", "divergence.coef=1"], cwd=tmp_path)
    assert seconds < 5
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: 2 settings are wrong.",
        "  num_step: no such setting. Did you mean num_steps?",
        "  divergence.coef: divergence=none has no settings. Write divergence=reverse_kl divergence.coef=1, "
        "or leave divergence.coef out.",
    ]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["trian"],
            "trian: no such command. Did you mean train? Commands: train, eval, compare, reward, choices, divergences, model.",
        ),
        (["seed=1"], "seed=1: no such command. Settings follow a command: rlkit train seed=1."),
        (["train", "--seed=1"], "--seed=1: settings are written without dashes, such as seed=1."),
        (["train", "seed=1", "-x"], "unrecognized arguments: -x See rlkit train --help."),
        (["train", "divergence=none,reverse_kl"], "divergence=none,reverse_kl: several values. Write -m "),
        (["choices", "divergense"], "divergense: no such group. Did you mean divergence?"),
        (["eval"], "rlkit eval needs a folder first"),
        (["eval", "seed=1"], "rlkit eval needs a folder first"),
        (["eval", "nowhere"], "nowhere: no such folder. Write a run folder (under runs/) or a checkpoint folder."),
        (["eval", "."], ".: neither a checkpoint (config.json) nor a run with one (checkpoints/*/config.json)."),
        (["model", "fetch", "tiny"], "model fetch tiny: write rlkit model build tiny, or rlkit model fetch smollm2_135m."),
    ],
)
def test_a_wrong_command_is_one_message_and_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], in_folder: Path
):
    assert call(*arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {message}")
    assert "Traceback" not in shown.err


def test_a_sweep_that_some_runs_cannot_do_is_refused_before_any_starts(trained: Trainings, capsys: pytest.CaptureFixture[str]):
    assert call("train", "-m", "divergence=none,reverse_kl", "divergence.coef=0.1", "seed=1,2") == 2
    assert "    rlkit train -m divergence=reverse_kl divergence.coef=0.1 seed=1,2\n" in capsys.readouterr().err
    assert trained.configs == []


def test_train_trains(trained: Trainings):
    assert call("train", *IN_PROCESS, "seed=3") == 0
    assert [config.seed for config in trained.configs] == [3]


@pytest.mark.parametrize(
    ("failure", "code", "shown"),
    [(WorkerError("engine 0 died."), 4, "error: engine 0 died.\n"), (KeyboardInterrupt(), 130, "interrupted\n")],
)
def test_failures_have_their_codes(
    trained: Trainings, capsys: pytest.CaptureFixture[str], failure: BaseException, code: int, shown: str
):
    trained.failure = failure
    assert call("train", *IN_PROCESS) == code
    assert capsys.readouterr().err == shown


def test_our_own_bugs_keep_their_traceback(trained: Trainings):
    trained.failure = ZeroDivisionError()
    with pytest.raises(ZeroDivisionError):
        call("train", *IN_PROCESS)


def test_multirun_may_stand_anywhere_and_with_one_run_is_a_run(trained: Trainings, in_folder: Path):
    assert call("train", *IN_PROCESS, "-m", "seed=3") == 0
    assert [(config.seed, config.run_dir) for config in trained.configs] == [(3, "")]


def test_a_script_brings_its_own_choice(trained: Trainings, extra: dict[str, dict[str, type]], monkeypatch: pytest.MonkeyPatch):
    cli.run(["objective=mine", "objective.scale=3", *IN_PROCESS], extra=extra)
    assert trained.configs[0].objective == Mine(scale=3.0)
    monkeypatch.setattr(sys, "argv", ["script.py", "objective=mine", *IN_PROCESS])
    cli.run(extra=extra)
    assert trained.configs[1].objective == Mine()
    with pytest.raises(SystemExit) as leaving:
        cli.run(["objective=mine", "objective.scal=3"], extra=extra)
    assert leaving.value.code == 2


def test_a_dry_run_checks_everything_and_starts_nothing(
    trained: Trainings, capsys: pytest.CaptureFixture[str], in_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    def start(*_: object) -> None:
        raise AssertionError("a dry run opened a cluster")

    monkeypatch.setattr("rlkit.controller.cluster.open_cluster", start)
    assert call("train", "dry_run=true", "group_size=8") == 0
    text = capsys.readouterr().out
    assert "32 prompts x 8 responses = 256 samples" in text
    assert "group_size: 8" in text
    assert "prompts to train on" in text
    assert trained.configs == []
    assert list(in_folder.iterdir()) == []


def test_a_dry_run_and_a_run_refuse_a_source_that_no_prompt_is_of(
    in_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    rows = [{"prompt": f"{number}+1=", "answer": "2", "kind": ("math", "chat")[number % 2]} for number in range(20)]
    (in_folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = ["reward=weighted", "reward.fns={right:exact_match,form:format}", "reward.num_workers=1"]
    data = ["experiment=none", "model=tiny", "data=jsonl", "data.path=rows.jsonl", "data.source_column=kind"]
    small = ["cluster=inprocess", "rollout=transformers", "max_prompt_tokens=24", "max_response_tokens=8", "run_dir=run"]
    run = ["train", *data, *parts, *small]
    for start in (["dry_run=true"], []):
        assert call(*run, "reward.sources={form:[caht]}", *start) == 2
        assert "error: reward.sources.form: no prompt is of the source caht." in capsys.readouterr().err
        assert not (in_folder / "run").exists()
    assert call(*run, "reward.sources={form:[chat]}", "dry_run=true") == 0


def test_a_pair_that_is_none_is_named_before_a_reward_model_is_fitted(in_folder: Path, capsys: pytest.CaptureFixture[str]):
    (in_folder / "pairs.jsonl").write_text('{"prompt": "1:", "chosen": "2"}\n')
    assert call("reward", "fit", "--data", "pairs.jsonl", "--model", "tiny", "--out", "fitted") == 2
    assert capsys.readouterr().err == (
        'error: --data pairs.jsonl: row 1 has no column rejected. Write {"prompt": ..., "chosen": ..., "rejected": ...} on each '
        "line, in text or in chat messages.\n"
    )
    assert not (in_folder / "fitted").exists()


def test_a_reward_function_is_tried_before_any_model_is_loaded(in_folder: Path, capsys: pytest.CaptureFixture[str]):
    (in_folder / "my.py").write_text("def fn(prompt, completion, answer):\n    return float(completion)\n")
    (in_folder / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    assert call("reward", "test", "my.py:fn", "--data", "rows.jsonl") == 2
    shown = capsys.readouterr()
    assert shown.err == ""
    first = shown.out.splitlines()[0]
    assert first.startswith("my.py:fn: fails on ")
    assert "ValueError: could not convert string to float" in first
    assert call("reward", "test", "numeric_match", "--data", "rows.jsonl", "--json") == 0
    assert json.loads(capsys.readouterr().out)["verdict"].startswith("numeric_match: nothing wrong was found")
    (in_folder / "rows.jsonl").write_text('{"question": "1+1="}\n')
    assert call("reward", "test", "gsm8k", "--data", "rows.jsonl") == 2
    shown = capsys.readouterr()
    assert shown.err.startswith(
        "error: reward.fn=gsm8k: needs a column answer, and 1 of 1 rows have none. The columns are question."
    )


def test_a_trial_begins_with_its_verdict_whatever_is_logged(in_folder: Path):
    (in_folder / "my.py").write_text("def fn(prompts, completions, answer):\n    return completions[0]['content']\n")
    (in_folder / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n')
    command = [*RLKIT, "reward", "test", "my.py:fn", "--data", "rows.jsonl"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    assert done.returncode == 2
    first, *_, last = done.stdout.splitlines()
    assert first.startswith("my.py:fn: fails on 17 of 17 calls; first on row 0, its answer: TypeError: ")
    assert last.startswith("TypeError: ")
    assert 'my.py", line 2, in fn' in done.stdout
    assert done.stdout.index("traceback:") > done.stdout.index("\n   0  code ")


@pytest.mark.parametrize(
    ("reward", "code"), [("float(completion.strip() == answer)", 0), ("float(completion != answer)", 2), ("1.0", 2), ("None", 2)]
)
def test_only_a_sound_function_exits_with_0(in_folder: Path, reward: str, code: int):
    (in_folder / "my.py").write_text(f"def fn(completion, answer): return {reward}\n")
    (in_folder / "rows.jsonl").write_text('{"prompt": "1+1=", "answer": "2"}\n{"prompt": "2+2=", "answer": "4"}\n')
    assert call("reward", "test", "my.py:fn", "--data", "rows.jsonl") == code


def test_a_trial_takes_columns_by_other_names(in_folder: Path, capsys: pytest.CaptureFixture[str]):
    (in_folder / "my.py").write_text("def fn(completion, solution): return float(completion.strip() == solution)\n")
    (in_folder / "rows.jsonl").write_text('{"question": "1+1=", "reply": "2"}\n{"question": "2+2=", "reply": "4"}\n')
    trial = ["reward", "test", "my.py:fn", "--data", "rows.jsonl"]
    assert call(*trial) == 2
    assert "Write --column solution=<" in capsys.readouterr().err
    columns = ["--column", "solution=reply", "--column", "prompt=question"]
    assert call(*trial, *columns, "--answer-column", "reply") == 0, capsys.readouterr().out
    for written in ("solution", "=reply", "solution="):
        assert call(*trial, "--column", written) == 2
        assert f"--column {written}: write --column name=column" in capsys.readouterr().err
    assert call(*trial, *columns, "--answer-column", "gone") == 2
    assert "--answer-column gone: no row has such a column. The columns are question, reply" in capsys.readouterr().err


def test_choices_as_json_and_as_text(capsys: pytest.CaptureFixture[str]):
    assert call("choices", "--json") == 0
    described = json.loads(capsys.readouterr().out)
    assert set(described["groups"]) == {*CHOICES, "experiment"}
    assert call("choices", "divergence", "--json") == 0
    assert list(json.loads(capsys.readouterr().out)["groups"]) == ["divergence"]
    assert call("choices", "divergence") == 0
    assert capsys.readouterr().out.startswith("divergence\n  divergence=none: No divergence")


def make_run(folder: Path, *overrides: str) -> Path:
    """A run folder with two finished checkpoints and one that was being written."""
    config = compose([*overrides, *IN_PROCESS])
    for name in ("step_000009", "step_000010", ".tmp-step_000011"):
        (folder / "checkpoints" / name).mkdir(parents=True)
        (folder / "checkpoints" / name / "state").mkdir()
        (folder / "checkpoints" / name / "config.json").write_text("{}")
        (folder / "checkpoints" / name / PROGRESS).write_text("{}")
        sizes = {"files": {"config.json": {"size": 2}}, "format": FORMAT}
        (folder / "checkpoints" / name / MANIFEST).write_text(json.dumps(sizes))
    files.write_settings(folder, config, plain_settings(config))
    return folder


def test_a_resumed_run_may_move_a_controllers_target_but_not_where_it_started(in_folder: Path):
    controlled = ["divergence=reverse_kl", "divergence_control=dual", "divergence_control.target=0.1"]
    run_dir = make_run(in_folder / "run", *controlled)
    config = cli.resumed_config(run_dir, ["divergence_control.target=0.2", "objective.clip_high=0.3"])
    assert config.divergence_control == DualAscent(target=0.2)
    with pytest.raises(ConfigError, match=r"^divergence.coef: a run that is resumed goes on from where divergence_control took it"):
        cli.resumed_config(run_dir, ["divergence.coef=0.2"])
    with pytest.raises(ConfigError, match=r"^divergence_control: a run that is resumed keeps its controller"):
        cli.resumed_config(run_dir, ["divergence_control=fixed"])


def test_a_resumed_run_takes_no_less_staleness_than_what_it_has_sampled_ahead(in_folder: Path):
    run_dir = make_run(in_folder / "run", "max_staleness=2", "rollout=vllm_async", "correction=decoupled_ppo")
    assert cli.resumed_config(run_dir, ["max_staleness=3"]).max_staleness == 3
    with pytest.raises(ConfigError, match=r"^max_staleness=1: what the run has sampled ahead may be 2 versions old\."):
        cli.resumed_config(run_dir, ["max_staleness=1"])


def test_eval_takes_the_newest_checkpoint_and_the_runs_settings(in_folder: Path):
    run_dir = make_run(in_folder / "it's a run", "experiment=grpo_published", "rollout.num_engines=1", "num_steps=7")
    checkpoint, found = cli.locate(run_dir)
    assert (checkpoint.name, found) == ("step_000010", run_dir)
    config = cli.evaluation_config(checkpoint, found, ["evaluation.num_prompts=8"])
    assert config.model.path == str(checkpoint)
    assert (config.num_steps, config.evaluation.num_prompts) == (7, 8)  # pyright: ignore[reportAttributeAccessIssue]
    older = run_dir / "checkpoints" / "step_000009"  # a checkpoint folder knows its run
    assert cli.locate(older) == (older, run_dir.resolve())


def test_eval_passes_over_a_damaged_checkpoint_and_says_so(in_folder: Path, capsys):
    run_dir = make_run(in_folder / "run")
    (run_dir / "checkpoints" / "step_000010" / "config.json").write_text('{"damaged": 1}')
    checkpoint, _ = cli.locate(run_dir)
    assert checkpoint.name == "step_000009"
    assert "Passed over: step_000010: config.json is damaged" in capsys.readouterr().out


def test_eval_evaluates_even_where_the_run_did_not(in_folder: Path):
    checkpoint, run_dir = cli.locate(make_run(in_folder / "run", "evaluation=none"))
    assert type(cli.evaluation_config(checkpoint, run_dir, []).evaluation) is CHOICES["evaluation"]["held_out"]
    with pytest.raises(ConfigError, match=r"evaluation=none: nothing to do\."):
        cli.evaluation_config(checkpoint, run_dir, ["evaluation=none"])


def test_eval_of_a_foreign_model_uses_the_quickstarts_task(in_folder: Path):
    folder = in_folder / "some, model's"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    config = cli.evaluation_config(*cli.locate(folder), [])
    assert (config.model.path, config.experiment_name) == (str(folder), "quickstart")


def test_output_that_nobody_reads_to_its_end_is_no_error():
    command = f'{sys.executable} -c "from rlkit.cli import main; main()" choices | head -1; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=os.environ)
    assert done.stderr == ""
    assert done.returncode == 0
