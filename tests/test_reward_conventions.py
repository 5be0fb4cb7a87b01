"""The same reward in the five conventions, and as two halves that are added up: the same run, bit for bit."""

import json
from pathlib import Path

import pytest

from rlkit.compose import compose
from rlkit.controller.local import InProcessCluster
from rlkit.controller.loop import train

EXACT = """
def of_lists(prompts, completions, answer):
    return [float(text == right) for text, right in zip(completions, answer)]

def trl(completions, completion_ids, answer, **kwargs):
    assert all(isinstance(token, int) for ids in completion_ids for token in ids)
    return [float(text == right) for text, right in zip(completions, answer)]

def verl(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(solution_str == ground_truth), "length": len(solution_str)}

async def verifiers(completion, answer, state, **kwargs):
    return float(completion[-1]["content"] == answer)

def plain(prompt, completion, answer):
    return float(completion == answer)

def half(completions, answer):
    return [0.5 * (text == right) for text, right in zip(completions, answer)]
"""
SETTINGS = ["cluster=inprocess", "rollout=transformers", "model=tiny", "data=jsonl", "data.path=rows.jsonl", "num_steps=3"]
SETTINGS += ["prompts_per_step=4", "group_size=8", "max_prompt_tokens=24", "max_response_tokens=2", "evaluation=none"]
SETTINGS += ["optimizer.learning_rate=1e-3", "seed=3", "data.held_out_fraction=0"]


def outcome(folder: Path) -> tuple[list[dict], bytes]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    parts = ("time/", "rate/", "reward/a/", "reward/b/")
    measured = [{name: value for name, value in line.items() if not name.startswith(parts)} for line in lines]
    return measured, (folder / "checkpoints/step_000003/model.safetensors").read_bytes()


@pytest.mark.slow
def test_the_same_reward_in_every_convention_is_the_same_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlkit.controller.tracking.tracker.write_plots", lambda history, folder: None)
    Path("exact.py").write_text(EXACT)
    # The tiny model begins its answers with a digit, so that in every group some are right.
    Path("rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n} 5 7 2 = 7:", "answer": f"{n}+"}) + "\n" for n in range(1, 10))
    )
    outcomes = {}
    for name in ("of_lists", "trl", "verl", "verifiers", "plain"):
        train(compose([*SETTINGS, f"reward.fn=exact.py:{name}", f"run_dir={name}"]), InProcessCluster())
        outcomes[name] = outcome(Path(name))
    both = ["reward=weighted", "reward.fns={a:exact.py:half,b:exact.py:half}", "run_dir=both"]
    train(compose([*SETTINGS, *both]), InProcessCluster())
    outcomes["both"] = outcome(Path("both"))
    first = outcomes.pop("of_lists")
    assert 0 < first[0][0]["reward/mean"] < 1
    assert any(line["policy/grad_norm"] > 0 for line in first[0])
    assert {name: found == first for name, found in outcomes.items()} == dict.fromkeys(outcomes, True)
