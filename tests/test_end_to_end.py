"""What a user runs, as they run it: the command line, real Ray actors, real vLLM engines, the shipped model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.slow

RLKIT = [str(Path(sys.executable).with_name("rlkit"))]
QUICK = ["evaluation.num_prompts=32", "evaluation.samples_per_prompt=8", "evaluation.ks=[1,8]"]


def rlkit(folder: Path, *arguments: str, code: int = 0, timeout_s: float = 540) -> str:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "RLKIT_"))}
    done = subprocess.run(
        [*RLKIT, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    assert done.returncode == code, f"exit code {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def steps(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if "reward/mean" in row]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Path:
    """One shortened quickstart run."""
    folder = tmp_path_factory.mktemp("quickstart")
    rlkit(folder, "train", "num_steps=30", "run_dir=run", *QUICK)
    return folder / "run"


def test_the_reward_rises(quickstart):
    rewards = np.array([row["reward/mean"] for row in steps(quickstart)])
    assert rewards[-8:].mean() > rewards[:8].mean() + 0.05


def test_engine_and_learner_agree_after_every_sync_of_the_run(quickstart):
    """float32, tied head: on the probes of each sync and on every token that was trained on."""
    assert len(steps(quickstart)) == 30
    for row in steps(quickstart):
        assert row["sync/probe_max"] <= 1e-4
        assert row["mismatch/max"] <= 1e-4


def test_the_checkpoint_loads_in_transformers_and_evaluates_as_the_run_said(quickstart):
    from rlkit.data.models.loading import load_model, load_tokenizer

    checkpoint = quickstart / "checkpoints" / "step_000030"
    tokenizer, model = load_tokenizer(str(checkpoint)), load_model(str(checkpoint), dtype=torch.float32)
    ids = tokenizer.encode("3 5 7 2 = 7:")
    for _ in range(7):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert set(str(tokenizer.decode(ids[-7:], skip_special_tokens=True))) <= set("0123456789+-")
    rows = [json.loads(line) for line in (quickstart / "metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "evaluation/pass@1" in row][-1]
    output = rlkit(quickstart.parent, "eval", "run")  # vLLM, from the folder on disk
    assert f"{last['evaluation/pass@1']:.3f}" in output


def test_an_untied_model_agrees_after_every_sync_of_a_run(tmp_path):
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
    rlkit(
        tmp_path,
        "train",
        "model.path=untied",
        "num_steps=20",
        "prompts_per_step=8",
        "group_size=8",
        "run_dir=run",
        "evaluation=none",
    )
    assert len(steps(tmp_path / "run")) == 20
    for row in steps(tmp_path / "run"):
        assert row["sync/probe_max"] <= 1e-4
        assert row["mismatch/max"] <= 1e-4


def test_bfloat16_stays_close(tmp_path):
    rlkit(tmp_path, "train", "model.dtype=bfloat16", "num_steps=4", "run_dir=run", "evaluation=none")
    for row in steps(tmp_path / "run"):
        assert row["mismatch/exp_mean"] <= 1.05


def test_a_sweep_is_one_command_and_a_broken_run_does_not_stop_it(tmp_path):
    (tmp_path / "my_rewards.py").write_text(
        "calls = 0\ndef fragile(prompts, completions, digits, target):\n    return [float(len(completions[0])) / 10]\n"
    )
    small = ["num_steps=2", "prompts_per_step=4", "group_size=4", "evaluation=none", "reward.fn=my_rewards.py:fragile"]
    output = rlkit(tmp_path, "train", "-m", "divergence=none,reverse_kl", "objective.clip_low=0.2", "seed=1,2", *small)
    runs = sorted((tmp_path / "runs").glob("*/*/metrics.jsonl"))
    assert len(runs) == 4, output
    assert sum("kl/ref_k3" in steps(run.parent)[-1] for run in runs) == 2
    assert output.count("done") >= 4


def test_a_misspelt_setting_is_answered_before_anything_starts(tmp_path):
    output = rlkit(tmp_path, "train", "optimizer.learning_rat=1", "divergence=revers_kl", "group_size=many", code=2, timeout_s=60)
    for expected in ("optimizer.learning_rate", "reverse_kl", "group_size"):
        assert expected in output
    assert "Traceback" not in output
    assert not (tmp_path / "runs").exists()
