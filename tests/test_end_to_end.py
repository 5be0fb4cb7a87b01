"""What a user runs, as they run it: every command of the README, real Ray actors, real vLLM engines, the shipped model."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.slow

RLKIT = str(Path(sys.executable).with_name("rlkit"))
README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
TINY_BATCH = ["prompts_per_step=2", "group_size=2"]
QUICK = ["evaluation.samples_per_prompt=8", "evaluation.ks=[1,8]"]
# Appended to a command that starts so, to have it tried and not waited for.
SHORTENED = {
    "rlkit train num_steps=30": QUICK,
    "rlkit train -m": [
        *("num_steps=2", "prompts_per_step=4", "group_size=4"),
        *("evaluation.num_prompts=8", "evaluation.samples_per_prompt=4", "evaluation.ks=[1,4]"),
    ],
    "rlkit train resume=": ["num_steps=31"],
    "rlkit train max_staleness": [*TINY_BATCH, "num_steps=3", "evaluation=none"],
    "rlkit train model=smollm2_135m data": [*TINY_BATCH, "num_steps=1", "max_response_tokens=16", "evaluation=none"],
    "rlkit train model=smollm2_135m environment": [*TINY_BATCH, "num_steps=1", "environment.max_turns=3", "evaluation=none"],
    "rlkit train experiment=calculator": [*TINY_BATCH, "evaluation=none"],
    "rlkit train experiment=grpo_published dry_run=true": [],
    "rlkit divergences": [],
    "rlkit train divergence=js": [*TINY_BATCH, "num_steps=2", "evaluation=none"],
    "rlkit eval": [],
    "rlkit compare": [],
    "rlkit choices": [],
    "rlkit model fetch": [],
    "rlkit reward test": [],
}


def rlkit(folder: Path, *arguments: str, code: int = 0, timeout_s: float = 540) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "RLKIT_"))}
    words = [RLKIT, *arguments]
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    assert done.returncode == code, f"{shlex.join(arguments)}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def programs() -> dict[str, str]:
    """The README's Python files by the names in their first lines."""
    return {block.partition("\n")[0].removeprefix("# "): block for block in blocks("python")}


def rows(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps(run: Path) -> list[dict]:
    return [row for row in rows(run) if "reward/mean" in row]


@dataclass
class Story:
    """The README's commands, run in its order in one folder."""

    folder: Path
    said: dict[str, str] = field(default_factory=dict)  # beginning of the command -> its output

    @property
    def quickstart(self) -> Path:
        """The run of its first command, which others resume and evaluate."""
        return min((self.folder / "runs").glob("quickstart-*/metrics.jsonl")).parent

    def tell(self, line: str) -> None:
        (beginning,) = (known for known in SHORTENED if line.startswith(known))
        if "<run>" in line:
            line = line.replace("runs/<run>", str(self.quickstart))
        if "<sweep>" in line:
            line = line.replace("runs/<sweep>", str(next((self.folder / "runs").glob("*/sweep.json")).parent))
        words = shlex.split(line, comments=True)
        self.said[beginning] = rlkit(self.folder, *words[1:], *SHORTENED[beginning])


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> Story:
    story = Story(tmp_path_factory.mktemp("story"))
    for name, block in programs().items():
        (story.folder / name).write_text(block)
    (story.folder / "rows.jsonl").write_text("".join(blocks("json")[0].replace("7", str(number)) for number in range(30)))
    for line in (line for block in blocks("bash") for line in block.splitlines() if line.startswith("rlkit ")):
        story.tell(line)
    return story


@pytest.mark.timeout(1800)  # it waits for the whole story: a dozen commands, most with a start of Ray and vLLM
def test_every_command_of_the_readme_runs(story):
    assert story.said.keys() == SHORTENED.keys()
    assert "reverse_kl" in story.said["rlkit choices"]


def test_the_reward_rises(story):
    rewards = np.array([row["reward/mean"] for row in steps(story.quickstart)])
    assert rewards[-8:].mean() > rewards[:8].mean() + 0.05


def test_engine_and_learner_agree_after_every_sync_of_the_run_and_of_its_continuation(story):
    """float32, tied head: on the probes of each sync and on every token that was trained on."""
    assert [row["step"] for row in steps(story.quickstart)] == list(range(1, 32))  # the last one after `resume=`
    for row in steps(story.quickstart):
        assert row["sync/probe_max"] <= 1e-4
        assert row["mismatch/max"] <= 1e-4


def test_the_checkpoint_loads_in_transformers_and_evaluates_as_the_run_said(story):
    from rlkit.data.models.loading import load_model, load_tokenizer

    checkpoint = story.quickstart / "checkpoints" / "step_000031"
    tokenizer, model = load_tokenizer(str(checkpoint)), load_model(str(checkpoint), dtype=torch.float32)
    ids = tokenizer.encode("3 5 7 2 = 7:")
    for _ in range(7):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert set(str(tokenizer.decode(ids[-7:], skip_special_tokens=True))) <= set("0123456789+-")
    last = [row for row in rows(story.quickstart) if "evaluation/pass@1" in row][-1]
    assert last["step"] == 31
    assert f"{last['evaluation/pass@1']:.3f}" in story.said["rlkit eval"]  # vLLM, from the folder on disk


def test_a_sweep_is_one_command_with_a_folder_for_every_run(story):
    runs = sorted((story.folder / "runs").glob("*/*/metrics.jsonl"))
    assert len(runs) == 4
    assert sum("kl/ref_k3" in steps(run.parent)[-1] for run in runs) == 2
    assert story.said["rlkit train -m"].count("done") >= 4


def test_a_sweep_is_compared_in_tables_and_curves(story):
    said = story.said["rlkit compare"]
    assert "4 runs in 2 arms, on 8 held-out prompts" in said
    assert "divergence=reverse_kl" in said
    assert "fewer than 5" in said
    written = json.loads((story.folder / "compare" / "comparison.json").read_text())
    assert [len(arm["runs"]) for arm in written["arms"]] == [2, 2]
    points = written["arms"][1]["reward_and_kl"]
    assert all(np.isfinite([each["kl"], each["reward"]]).all() for each in points)
    assert all((story.folder / "compare" / name).is_file() for name in [*written["pictures"], "comparison.md"])


def test_the_users_own_divergence_trains(tmp_path):
    (tmp_path / "my_run.py").write_text(programs()["my_run.py"])
    # Enough samples for the policy to move in the first step: until it has, every divergence is zero.
    size = ["num_steps=2", "prompts_per_step=8", "group_size=8"]
    words = [sys.executable, "my_run.py", "divergence=le_cam", *size, "evaluation=none", "run_dir=run"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert steps(tmp_path / "run")[-1]["divergence/loss"] != 0


def test_tied_or_not_in_float32_or_bfloat16_engine_and_learner_stay_together(tmp_path):
    """One sweep over four models: the syncs of every run, and the tokens that it trained on."""
    from transformers import AutoModelForCausalLM

    from rlkit.data.models.loading import copy_tokenizer_files, load_model, resolve

    tied = load_model(resolve("tiny"), dtype=torch.float32)
    weights = dict(tied.named_parameters())
    config = tied.config
    config.tie_word_embeddings = False
    untied = AutoModelForCausalLM.from_config(config)
    untied.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].detach().clone()})
    untied.save_pretrained(tmp_path / "untied")
    copy_tokenizer_files(resolve("tiny"), tmp_path / "untied")
    size = ["num_steps=5", "prompts_per_step=4", "group_size=8", "evaluation=none", "run_dir=sweep"]
    rlkit(tmp_path, "train", "-m", "model.path=tiny,untied", "model.dtype=float32,bfloat16", *size)
    outcomes = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert len(outcomes) == 4
    for outcome in outcomes:
        done = steps(tmp_path / outcome["run_dir"])
        assert len(done) == 5
        for row in done:
            if "model.dtype=float32" in outcome["overrides"]:
                assert row["sync/probe_max"] <= 1e-4
                assert row["mismatch/max"] <= 1e-4
            else:
                assert row["mismatch/exp_mean"] <= 1.05


def test_a_misspelt_setting_is_answered_before_anything_starts(tmp_path):
    output = rlkit(tmp_path, "train", "optimizer.learning_rat=1", "divergence=revers_kl", "group_size=many", code=2, timeout_s=60)
    for expected in ("optimizer.learning_rate", "reverse_kl", "group_size"):
        assert expected in output
    assert "Traceback" not in output
    assert not (tmp_path / "runs").exists()
