"""Every preset trains: real Ray, real vLLM, the tiny model; one sweep, so that they share the engine."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from rlkit.resources import conf_dir

RLKIT = str(Path(sys.executable).with_name("rlkit"))
OTHER_MODEL = {"smollm2_arithmetic"}  # its own model, which is not the tiny one
PRESETS = sorted({file.stem for file in (conf_dir() / "experiment").glob("*.yaml")} - {"none"} - OTHER_MODEL)
STEPS = 5


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_preset_trains_five_steps_with_finite_losses_and_weights_that_reach_the_engine(tmp_path):
    command = [RLKIT, "train", "-m", f"experiment={','.join(PRESETS)}", "run_dir=sweep", "evaluation=none", f"num_steps={STEPS}"]
    command += ["prompts_per_step=8", "group_size=4", "tracking.save_rollouts_every=100"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1450, check=False)
    outcomes = {outcome["label"]: outcome for outcome in json.loads((tmp_path / "sweep" / "sweep.json").read_text())}
    assert {label: outcome["message"] for label, outcome in outcomes.items() if outcome["exit_code"] != 0} == {}, done.stderr[
        -3000:
    ]
    assert outcomes.keys() == {f"experiment={name}" for name in PRESETS}
    for name in PRESETS:
        rows = [json.loads(line) for line in (tmp_path / "sweep" / f"experiment={name}" / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1)), name
        for row in rows:
            assert math.isfinite(row["policy/loss"]), name
            assert row["policy/skipped_steps"] == 0, name
            assert row["sync/probe_max"] <= 1e-4, name
        # Its policy stands still for longer than these steps.
        assert any(row["critic/grad_norm" if name == "wsrl" else "policy/grad_norm"] > 0 for row in rows), name
        if name in ("grpo_tis", "grpo_icepop", "decoupled_ppo"):
            assert all(0 < row["is/ess"] <= 1 + 1e-6 for row in rows), name
