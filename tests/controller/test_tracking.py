import contextlib
import io
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import numpy as np
import pyarrow.parquet as pq
import pytest
from omegaconf import OmegaConf
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import rlkit
from rlkit.config import (
    AdamW,
    ClippedSurrogate,
    Fixed,
    GroupNormalized,
    HeldOut,
    InitialReference,
    InProcess,
    Learner,
    Model,
    NoCorrection,
    NoCritic,
    NoDivergence,
    NoEntropy,
    NoReplay,
    NoSelector,
    NoTeacher,
    ReasoningGymData,
    Reward,
    RunConfig,
    SingleTurn,
    Tracking,
    VllmEngine,
    WandbTracking,
)
from rlkit.config import FileTracking as Files
from rlkit.controller.tracking import Tracker, console, files, forecast
from rlkit.controller.tracking.console import LiveDisplay, Pace, PlainDisplay, open_display
from rlkit.controller.tracking.format import aligned, duration, markdown_table, number, sparkline
from rlkit.controller.tracking.history import Estimate, Evaluated, History, estimates, read_history, step_parts
from rlkit.controller.tracking.plots import write_plots
from rlkit.controller.tracking.redaction import REDACTED, redact
from rlkit.controller.tracking.summary import summarise
from rlkit.errors import ConfigError, DataError, ResourceError
from rlkit.types import FinishReason, Origin, RewardStatus, Rollout

CANARY = "canary-5c1f0a9e77"
NUM_STEPS = 30


def run_config(*, num_steps: int = NUM_STEPS, tracking: Tracking | None = None) -> RunConfig:
    return RunConfig(
        experiment_name="demo",
        num_steps=num_steps,
        max_prompt_tokens=48,
        model=Model(path="tiny"),
        data=ReasoningGymData(
            task="chain_sum", options={"api_key": CANARY, "password": 918273, "note": f"see {CANARY}", "digits": 2}
        ),
        reward=Reward(fn="exact"),
        environment=SingleTurn(),
        rollout=VllmEngine(),
        learner=Learner(),
        optimizer=AdamW(),
        advantage=GroupNormalized(),
        objective=ClippedSurrogate(),
        correction=NoCorrection(),
        critic=NoCritic(),
        divergence=NoDivergence(),
        entropy=NoEntropy(),
        selector=NoSelector(),
        control=Fixed(),
        replay=NoReplay(),
        reference=InitialReference(),
        teacher=NoTeacher(),
        evaluation=HeldOut(),
        cluster=InProcess(),
        tracking=tracking or Files(save_rollouts_every=2),
    )


def step_metrics(step: int) -> dict[str, float]:
    return {
        "reward/mean": 0.3 + 0.01 * step,
        "length/mean": 6.5,
        "length/max": 9.0,
        "length/frac_truncated": 0.01,
        "entropy/mean": 0.6 - 0.01 * step,
        "policy/clip_fraction": 0.02,
        "policy/grad_norm": math.nan if step == 3 else 0.5,
        "policy/approx_kl_k3": 1e-3,
        "kl/ref_token_mean": 0.01 * step,
        "mismatch/mean": 1.2e-5,
        "mismatch/max": 4.5e-5,
        "mismatch/k3": 0.0 if step == 1 else 2e-9,
        "rate/generated_tokens_per_s": 4123.0,
    }


TIMINGS = {
    "time/generate_s": 0.8,
    "time/reward_s": 0.1,
    "time/score_s": 0.1,
    "time/learn_s": 0.5,
    "time/sync_s": 0.1,
    "time/sync_check_s": 0.1,
    "time/step_s": 2.0,
}


def held_out(pass_at_1: float) -> dict[str, float]:
    return {
        "evaluation/pass@1": pass_at_1,
        "evaluation/pass@1_low": pass_at_1 - 0.05,
        "evaluation/pass@1_high": pass_at_1 + 0.05,
        "evaluation/pass@16": 0.9,
        "evaluation/reward": pass_at_1,
        "evaluation/distinct": 2.5,
    }


def rollout(i: int, *, reward: float | None = 1.0) -> Rollout:
    return Rollout(
        sample_id=f"s{i}",
        group_id="g0",
        prompt_id="p0",
        source="chain_sum",
        prompt_ids=(1, 2, 3),
        response_ids=np.array([7, 8 + i]),
        rollout_logprobs=np.array([-0.5, -0.25], dtype=np.float32),
        policy_version=np.array([4, 4]),
        turn_index=np.zeros(2, dtype=np.int64),
        origin=np.full(2, Origin.policy),
        token_rewards=np.array([0.0, reward or 0.0], dtype=np.float32),
        text=f"answer {i}",
        finish_reason=FinishReason.stop,
        reward=reward,
        reward_components={} if reward is None else {"exact": reward},
        status=RewardStatus.error if reward is None else RewardStatus.ok,
        num_uses=1,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A whole run: its folder and what it printed."""
    run_dir = tmp_path_factory.mktemp("runs") / "my run"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("SOME_API_KEY", CANARY)
        with Tracker(run_dir, run_config()) as tracker:
            tracker.evaluation(0, held_out(0.3))
            for step in range(1, NUM_STEPS + 1):
                tracker.step(step, step_metrics(step), TIMINGS)
                tracker.rollouts(step, [rollout(0), rollout(1, reward=None)], [0.75, math.nan])
                if step == 20:
                    tracker.message(f"reward raised [bold] with {CANARY}")
                    tracker.evaluation(20, held_out(0.6))
            tracker.evaluation(NUM_STEPS, held_out(0.5))
            tracker.finish(checkpoint=run_dir / "checkpoints" / "step_000030", stopped=None)
    return SimpleNamespace(run_dir=run_dir, lines=printed.getvalue().splitlines())


def read_jsonl(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_metrics_jsonl_has_a_line_for_every_step_and_evaluation(run):
    rows = read_jsonl(run.run_dir)
    assert [row["step"] for row in rows] == [0, *range(1, 21), 20, *range(21, 31), 30]
    assert rows[1] == {"step": 1, **step_metrics(1), **TIMINGS}
    assert rows[0] == {"step": 0, **held_out(0.3)}


def test_a_value_that_is_not_finite_is_null_in_json_and_absent_from_the_history(run):
    assert "NaN" not in (run.run_dir / "metrics.jsonl").read_text()
    assert read_jsonl(run.run_dir)[3]["policy/grad_norm"] is None
    steps, values = read_history(run.run_dir / "metrics.jsonl").series("policy/grad_norm")
    assert 3 not in steps
    assert len(steps) == NUM_STEPS - 1
    assert set(values) == {0.5}


def test_tensorboard_reads_the_same_numbers(run):
    events = EventAccumulator(str(run.run_dir / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {*step_metrics(1), *TIMINGS, *held_out(0.3)}
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [
        (step, pytest.approx(0.3 + 0.01 * step)) for step in range(1, NUM_STEPS + 1)
    ]
    assert [e.step for e in events.Scalars("evaluation/pass@1")] == [0, 20, 30]
    assert math.isnan(events.Scalars("policy/grad_norm")[2].value)


def test_rollouts_are_stored_every_so_many_steps_with_tokens_text_reward_and_advantage(run):
    stored = sorted(path.name for path in (run.run_dir / "rollouts").iterdir())
    assert stored == [f"step_{step:06d}.parquet" for step in range(2, NUM_STEPS + 1, 2)]  # save_rollouts_every=2
    first, second = pq.read_table(run.run_dir / "rollouts" / "step_000012.parquet").to_pylist()
    assert first == {
        "sample_id": "s0",
        "group_id": "g0",
        "prompt_id": "p0",
        "source": "chain_sum",
        "prompt_ids": [1, 2, 3],
        "response_ids": [7, 8],
        "text": "answer 0",
        "transcript": None,
        "part_of": None,
        "finish_reason": "stop",
        "status": "ok",
        "reward": 1.0,
        "reward_components": '{"exact": 1.0}',
        "reward_message": "",
        "reward_statuses": "{}",
        "reward_subparts": "{}",
        "advantage": 0.75,
        "rollout_logprobs": [-0.5, -0.25],
        "policy_version": [4, 4],
        "turn_index": [0, 0],
        "origin": [0, 0],
        "token_rewards": [0.0, 1.0],
        "ref_version": None,
        "num_uses": 1,
    }
    assert (second["status"], second["reward"], second["advantage"]) == ("error", None, None)


def test_rollouts_without_an_advantage_each_are_an_error(tmp_path):
    with pytest.raises(DataError, match="2 rollouts came with 1 advantages"):
        files.write_rollouts(tmp_path / "step_000001.parquet", [rollout(0), rollout(1)], [0.0])
    assert list(tmp_path.iterdir()) == []


def test_what_a_reward_said_is_stored_and_read_without_secrets(tmp_path):
    said = replace(
        rollout(0),
        reward_message=f"judge: HTTPError: api_key={CANARY} is over its quota",
        reward_statuses={"judge": RewardStatus.error, "form": RewardStatus.ok},
        reward_subparts={"form/box": 0.5},
    )
    files.write_rollouts(tmp_path / "new.parquet", [said], [0.0])
    (back,) = files.read_rollouts(tmp_path / "new.parquet")
    assert back.reward_message == f"judge: HTTPError: api_key={REDACTED} is over its quota"
    assert (back.reward_statuses, back.reward_subparts) == (said.reward_statuses, said.reward_subparts)
    assert CANARY.encode() not in (tmp_path / "new.parquet").read_bytes()


def test_rollouts_of_an_earlier_version_are_read_without_the_columns_that_they_lack(tmp_path):
    files.write_rollouts(tmp_path / "new.parquet", [rollout(0), rollout(1)], [0.0, 0.0])
    later = ["reward_message", "reward_statuses", "reward_subparts"]
    pq.write_table(pq.read_table(tmp_path / "new.parquet").drop_columns(later), tmp_path / "old.parquet")
    new, old = (files.read_rollouts(tmp_path / name) for name in ("new.parquet", "old.parquet"))
    assert [(each.sample_id, each.reward, each.status) for each in old] == [(e.sample_id, e.reward, e.status) for e in new]
    assert [(each.reward_message, each.reward_statuses, each.reward_subparts) for each in old] == [("", {}, {})] * 2


def test_config_yaml_holds_every_setting_and_no_secret(run):
    config = OmegaConf.to_container(OmegaConf.load(run.run_dir / "config.yaml"))
    assert isinstance(config, dict)
    assert config["max_prompt_tokens"] == 48  # a count, though its name has "token" in it
    assert config["model"] == {"path": "tiny", "dtype": "float32", "trust_remote_code": False}
    assert config["objective"]["clip_low"] == 0.2
    assert config["tracking"] == {"save_rollouts_every": 2}
    assert config["data"]["options"] == {"api_key": REDACTED, "password": REDACTED, "note": f"see {REDACTED}", "digits": 2}


def test_choices_yaml_names_the_option_taken_in_each_group(run):
    taken = OmegaConf.to_container(OmegaConf.load(run.run_dir / "choices.yaml"))
    assert isinstance(taken, dict)
    assert (taken["objective"], taken["data"], taken["divergence"], taken["cluster"]) == (
        "clipped",
        "reasoning_gym",
        "none",
        "inprocess",
    )


def test_versions_json_names_python_packages_and_machine(run):
    versions = json.loads((run.run_dir / "versions.json").read_text())
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"torch", "transformers", "ray"} <= versions["packages"].keys()
    assert versions["cpu"]["cores"] >= 1
    assert {"rlkit", "platform", "gpus"} <= versions.keys()


def test_the_commit_is_that_of_rlkits_own_clone_and_of_no_other_repository(tmp_path, monkeypatch):
    def git(*arguments: str) -> None:
        identity = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    (tmp_path / "rlkit").mkdir()
    (tmp_path / "rlkit" / "__init__.py").touch()
    monkeypatch.setattr(rlkit, "__file__", str(tmp_path / "rlkit" / "__init__.py"))
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    assert files.rlkit_commit() == {}  # a virtual environment inside somebody else's repository
    (tmp_path / "pyproject.toml").touch()
    found = files.rlkit_commit()
    assert len(found["commit"]) == 40
    assert found["modified"] is True
    git("add", ".")
    git("commit", "-m", "two")
    assert files.rlkit_commit()["modified"] is False


def test_no_file_of_the_run_holds_a_secret(run):
    written = [path for path in run.run_dir.rglob("*") if path.is_file()]
    assert len(written) > 20
    assert [path.name for path in written if CANARY.encode() in path.read_bytes()] == []
    assert REDACTED in (run.run_dir / "log.txt").read_text()
    assert not any(CANARY in line for line in run.lines)


def test_every_curve_is_a_picture_with_something_on_it(run):
    drawn = {path.stem: matplotlib.image.imread(path) for path in (run.run_dir / "plots").iterdir()}
    assert drawn.keys() == {"reward", "evaluation", "entropy", "kl", "length", "mismatch", "time"}
    for name, pixels in drawn.items():
        assert pixels.shape[:2] == (560, 960), name
        colours = pixels[..., :3]
        saturated = colours.max(-1) - colours.min(-1) > 0.4  # curves are coloured; axes, grid and text are grey
        assert saturated.sum() > 500, name


def test_what_was_not_measured_is_not_drawn(tmp_path):
    nothing = write_plots(History([], []), tmp_path / "none")
    one_step = History([{"step": 1, "entropy/mean": 0.5, "mismatch/mean": 0.0, "time/learn_s": 1.0}], [])
    assert nothing == []
    assert [path.stem for path in write_plots(one_step, tmp_path / "one")] == ["entropy", "time"]


def test_the_summary_compares_before_and_after_and_says_how_to_go_on(run):
    summary = json.loads((run.run_dir / "summary.json").read_text())
    assert summary["evaluation"]["first"]["estimates"]["pass@1"] == pytest.approx({"value": 0.3, "low": 0.25, "high": 0.35})
    assert summary["evaluation"]["last"]["step"] == NUM_STEPS
    assert summary["best"] == {"metric": "held-out pass@1", "step": 20, "value": 0.6}
    assert summary["steps"] == NUM_STEPS
    assert summary["stopped"] is None
    assert summary["commands"] == [
        f"rlkit eval '{run.run_dir}/checkpoints/step_000030'",  # a space in the path needs quotes
        f"tensorboard --logdir '{run.run_dir}'",
    ]
    markdown = (run.run_dir / "summary.md").read_text()
    assert "| pass@1 | 0.300 [0.250, 0.350] | 0.500 [0.450, 0.550] | +0.200 |" in markdown
    assert all(command in markdown for command in summary["commands"])
    printed = "\n".join(run.lines)
    assert "  pass@1    0.300 [0.250, 0.350]  0.500 [0.450, 0.550]  +0.200\n" in printed
    assert "held-out pass@1 0.600 at step 20" in printed


def test_the_summarys_time_adds_up_to_the_wall_clock_of_this_process():
    history = History([{"step": step, **TIMINGS} for step in (1, 2, 3)], [])
    summary = summarise(
        history,
        name="demo",
        run_dir=Path("runs/a"),
        num_steps=9,
        start_step=1,
        wall_s=10.0,
        checkpoint=None,
        stopped="SIGTERM",
    )
    # two steps of 2 s after step 1: sync is 0.1 + 0.1 s of each, 0.3 s of each is in no part, 6 of 10 s are outside
    assert summary.time_s == pytest.approx(
        {"generate": 1.6, "reward": 0.2, "score": 0.2, "learn": 1.0, "sync": 0.4, "other": 0.6, "outside steps": 6.0}
    )
    assert summary.headline == "demo: stopped after 3 of 9 steps, 10s: SIGTERM"
    assert summary.commands == ["tensorboard --logdir runs/a"]
    assert summary.table() == []


def history_with(scores: list[float], entropies: list[float]) -> History:
    """An evaluation after every tenth step, of the policy that the step after it measures."""
    evaluations = [Evaluated(10 * number, {"pass@1": Estimate(score)}) for number, score in enumerate(scores)]
    steps = [{"step": 10.0 * number + 1, "entropy/mean": entropy} for number, entropy in enumerate(entropies)]
    return History(steps, evaluations)


def test_a_forecast_is_fitted_to_the_first_evaluations_and_tested_on_the_others():
    entropies = [1.2, 0.9, 0.6, 0.4, 0.25]
    scores = [0.6 - 0.12 * math.exp(entropy) for entropy in entropies]
    history = history_with([*scores, 0.46], entropies)  # the newest evaluation has no entropy yet
    assert forecast.scored(history) == list(zip(entropies, scores, strict=True))
    found = forecast.metrics(history)
    assert found["predictor/ceiling"] == pytest.approx(0.48)
    assert found["predictor/headroom"] == pytest.approx(0.48 - scores[-1])
    assert found["predictor/holdout_rmse"] == pytest.approx(0, abs=1e-9)
    assert str(forecast.fact(history)).startswith("pass@1 0.480 +- ")


def test_a_forecast_that_means_nothing_says_why_or_is_silent():
    rising = history_with([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3, 0.4])
    assert forecast.metrics(rising) == {}
    assert str(forecast.fact(rising)).startswith("none. Scores do not fall with entropy")
    assert forecast.fact(history_with([0.1, 0.2], [0.4, 0.3])) is None


def test_a_run_that_did_nothing_still_gets_a_summary(tmp_path, capsys):
    with Tracker(tmp_path / "run", run_config()) as tracker:
        tracker.finish(checkpoint=None, stopped="asked to")
    assert "demo: stopped after 0 of 30 steps" in capsys.readouterr().out
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["best"] is None


def test_without_a_terminal_every_step_is_one_short_aligned_line_of_plain_characters(run):
    steps = [line for line in run.lines if line.startswith("step ") and "held out" not in line]
    assert len(steps) == NUM_STEPS
    assert steps[8].startswith(
        "step  9/30  reward  0.390  len 6.500  entropy  0.510  kl  0.090  clip  2.0%  mismatch 1.2e-5    2.0s  left"
    )
    assert {len(line) for line in steps} == {len(steps[0])}
    assert all(line.index("entropy") == steps[0].index("entropy") for line in steps)
    assert "step  0/30  held out:  pass@1 0.300 [0.250, 0.350]  pass@16 0.900  reward 0.300  distinct 2.500" in run.lines
    for line in run.lines:
        assert line.isprintable()
    assert max(len(line) for line in run.lines if "step" in line and "/30" in line) <= 120


def test_a_plain_line_stays_short_whatever_is_sent(capsys):
    display = PlainDisplay(num_steps=1_000_000)
    metrics = {**step_metrics(1), **TIMINGS, "reward/mean": -123456.789, "entropy/mean": math.inf, "time/step_s": 123456.0}
    display.step(1, metrics)
    display.evaluation(1, {f"evaluation/pass@{k}{end}": 0.5 for k in (1, 2, 4, 8, 16, 32) for end in ("", "_low", "_high")})
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 120
    assert sum("pass@" in line for line in lines) == 2
    assert "pass@32 0.500 [0.500, 0.500]" in lines[-1]


def test_absent_metrics_are_not_shown(capsys):
    PlainDisplay(num_steps=5).step(1, {"reward/mean": 0.25})
    assert capsys.readouterr().out == "step 1/5  reward  0.250\n"


def test_weights_of_objectives_have_a_line_of_their_own_and_a_row_of_the_panel(capsys):
    weights = {"recap/math/weight": 1.25, "recap/code/weight": 0.75, "recap/math/c": 0.5, "recap/weight_entropy": 0.69}
    PlainDisplay(num_steps=50).step(7, {"reward/mean": 0.25, **weights})
    assert capsys.readouterr().out == "step  7/50  reward  0.250\n            weights:  math 1.250  code 0.750\n"
    PlainDisplay(num_steps=50).step(7, {f"recap/{'x' * 60}{number}/weight": 1.0 for number in range(3)})
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 120
    assert "weights math 1.250 code 0.750" in " ".join(panel(80, weights).replace("│", " ").split())


def test_text_from_a_model_cannot_act_on_the_terminal(capsys):
    PlainDisplay(num_steps=5).message("a\x1b[31mb\x1b]0;title\x07c\rd\n[/red] \u2713")
    assert capsys.readouterr().out == "ab]0;titlec\nd\n[/red] \u2713\n"


def test_plain_lines_are_chosen_where_stdout_is_no_terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # must not bring control characters into a file
    assert isinstance(open_display(title="t", subtitle="s", num_steps=1, start_step=0), PlainDisplay)


def test_the_live_panel_is_chosen_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stdout", terminal)
    assert isinstance(open_display(title="t", subtitle="s", num_steps=1, start_step=0), LiveDisplay)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_display(title="t", subtitle="s", num_steps=1, start_step=0), PlainDisplay)


def panel(width: int, metrics: dict[str, float], *, evaluation: dict[str, float] | None = None, steps: int = 10) -> str:
    """What stands on a terminal of this width after some steps."""
    display = LiveDisplay(
        Console(file=io.StringIO(), force_terminal=True, width=width), title="demo", subtitle="runs/demo", num_steps=20
    )
    with contextlib.closing(display):
        for step in range(1, steps + 1):
            display.step(step, {**metrics, "reward/mean": step / 20})
        if evaluation:
            display.evaluation(steps, evaluation)
        page = Console(file=io.StringIO(), width=width, record=True)
        page.print(display.render())
        return page.export_text()


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_live_panel_shows_progress_measurements_and_where_the_time_went(width):
    text = panel(width, {**step_metrics(1), **TIMINGS}, evaluation=held_out(0.4))
    assert max(map(len, text.splitlines())) <= width
    words = " ".join(text.replace("│", " ").split())
    for shown in (
        "step 10/20",
        "held-out pass@1 0.400",
        "reward 0.500",
        "entropy 0.590",
        "clip fraction 2.0%",
        "mismatch max 4.5e-5",
        "tokens/s 4,123",
        "▁▂▃▃▄▅▆▆▇█",  # reward rises evenly
        "from 0.050 to 0.500",
        "2.0s a step",
        "■ generate 40%",
        "■ sync 10%",
        "■ other 15%",
    ):
        assert shown in words, shown
    assert text.count("█") - 1 == 40 or width == 60  # the time bar is whole; one more is the sparkline's


def test_the_live_panel_leaves_out_what_was_not_sent():
    text = panel(80, {}, steps=1)
    assert "reward" in text
    assert not any(word in text for word in ("KL", "mismatch", "time", "nan"))


def test_messages_and_summary_of_the_live_display_are_printed_as_they_are():
    terminal = io.StringIO()
    display = LiveDisplay(Console(file=terminal, force_terminal=True, width=40), title="t", subtitle="s", num_steps=3)
    display.step(1, {"reward/mean": 0.5})
    display.message("[/red] is no markup, and a path is not wrapped: /a/long/path/to/somewhere")
    display.summary("done\n  rlkit eval /a/path/that/is/longer/than/forty/characters")
    display.close()
    assert "[/red] is no markup, and a path is not wrapped: /a/long/path/to/somewhere" in terminal.getvalue()
    assert "rlkit eval /a/path/that/is/longer/than/forty/characters" in terminal.getvalue()


def test_time_left_comes_from_the_first_step_and_then_from_the_clock():
    pace = Pace(num_steps=10, start_step=4)
    assert pace.left_s(0.0) is None
    pace.step(5, 2.0, now=100.0)
    assert pace.left_s(100.0) == 10.0  # five steps to go at the first one's 2 s
    pace.step(6, 2.0, now=103.0)
    assert pace.left_s(104.0) == 11.0  # four to go at 3 s from one end to the next, one second of them gone


def test_a_folder_with_files_in_it_is_refused(tmp_path):
    (tmp_path / "old.txt").touch()
    with pytest.raises(ConfigError, match=r"already has files in it\. Choose a new folder"):
        Tracker(tmp_path, run_config())
    with pytest.raises(ConfigError, match="is a file"):
        Tracker(tmp_path / "old.txt", run_config())
    assert [path.name for path in tmp_path.iterdir()] == ["old.txt"]


def test_a_resumed_run_measures_the_lost_steps_once(tmp_path, capsys):
    with Tracker(tmp_path, run_config()) as tracker:
        tracker.evaluation(0, held_out(0.3))
        for step in (1, 2, 3):
            tracker.step(step, step_metrics(step), TIMINGS)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 4, "reward/me')  # a crash in the middle of a line
    with Tracker(tmp_path, run_config(), resume_after=2) as tracker:
        for step in (3, 4):
            tracker.step(step, {"reward/mean": 0.9}, {})
    assert [(row["step"], row.get("reward/mean")) for row in read_jsonl(tmp_path)] == [
        (0, None),
        (1, 0.31),
        (2, 0.32),
        (3, 0.9),
        (4, 0.9),
    ]
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, pytest.approx(e.value)) for e in events.Scalars("reward/mean")] == [(1, 0.31), (2, 0.32), (3, 0.9), (4, 0.9)]


def test_evaluations_are_kept_by_prompt_and_those_after_the_checkpoint_made_again(tmp_path, capsys):
    with Tracker(tmp_path, run_config()) as tracker:
        for step in (0, 10, 20):
            tracker.store_evaluation(step, {"rewards": [1 / 3, step]})
    assert files.read_evaluations(tmp_path) == {step: {"rewards": [1 / 3, step]} for step in (0, 10, 20)}
    with Tracker(tmp_path, run_config(), resume_after=10) as tracker:
        assert list(files.read_evaluations(tmp_path)) == [0, 10]
        tracker.store_evaluation(10, {"rewards": [7]})  # a checkpoint without the evaluation that came after it
    assert files.read_evaluations(tmp_path)[10] == {"rewards": [7]}
    with Tracker(tmp_path, run_config(), resume_after=-1):  # there was no checkpoint
        assert files.read_evaluations(tmp_path) == {}


def test_an_exception_leaves_everything_measured_so_far_on_disk(tmp_path):
    tracker = Tracker(tmp_path, run_config())

    def fail():
        with tracker:
            tracker.step(1, step_metrics(1), TIMINGS)
            raise ZeroDivisionError("api_key=abcdefg123 was divided by zero")

    with pytest.raises(ZeroDivisionError):
        fail()
    assert len(read_jsonl(tmp_path)) == 1
    assert "ZeroDivisionError: api_key=<redacted> was divided by zero" in (tmp_path / "log.txt").read_text()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("reward/mean")) == 1
    with pytest.raises(ValueError, match="closed file"):
        tracker.step(2, step_metrics(2), TIMINGS)


def test_wandb_without_its_package_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ResourceError, match=r'needs the wandb package .*`pip install -e "\.\[wandb\]"`'):
        Tracker(tmp_path, run_config(tracking=WandbTracking()))
    assert list(tmp_path.iterdir()) == []


class FakeWandb:
    """Stands for the package: what was asked of it, in order."""

    class Error(Exception):
        pass

    def __init__(self, *, fails: bool = False):
        self.fails, self.settings, self.logged, self.finished = fails, {}, [], 0

    def init(self, **settings):
        if self.fails:
            raise self.Error("no API key")
        self.settings = settings
        return self

    def log(self, metrics, *, step):
        self.logged.append((step, metrics))

    def finish(self):
        self.finished += 1


def test_wandb_gets_settings_without_secrets_and_every_measurement(tmp_path, monkeypatch):
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setenv("SOME_API_KEY", CANARY)
    with Tracker(tmp_path / "run7", run_config(tracking=WandbTracking(project="p"))) as tracker:
        tracker.evaluation(0, held_out(0.3))
        tracker.step(1, {"reward/mean": 0.5}, {"time/step_s": 2.0})
    assert (wandb.settings["project"], wandb.settings["name"]) == ("p", "run7")
    assert CANARY not in str(wandb.settings)
    assert wandb.settings["config"]["num_steps"] == NUM_STEPS
    assert wandb.settings["settings"]["x_disable_meta"] is True  # it would record the command line
    assert wandb.logged == [(0, held_out(0.3)), (1, {"reward/mean": 0.5, "time/step_s": 2.0})]
    assert wandb.finished == 1


def test_wandb_that_cannot_start_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", FakeWandb(fails=True))
    with pytest.raises(ResourceError, match=r"did not start \(no API key\)\. Run `wandb login`"):
        Tracker(tmp_path, run_config(tracking=WandbTracking()))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("use hf_abcdefghijklmnopqrstuv now", f"use {REDACTED} now"),
        ("sk-" + "a1b2" * 6, REDACTED),
        ("ghp_ABCDEFGHIJKLMNOPQRSTUVWXYZ", REDACTED),
        ("AKIAIOSFODNN7EXAMPLE", REDACTED),
        ("https://me:pw@example.org/x", f"https://{REDACTED}@example.org/x"),
        ("Authorization: Bearer abc.def-ghi", f"Authorization: Bearer {REDACTED}"),
        ('{"password": "hunter2", "user": "me"}', f'{{"password": "{REDACTED}", "user": "me"}}'),
        ("-----BEGIN RSA PRIVATE KEY-----\nMII\n-----END RSA PRIVATE KEY----- after", f"{REDACTED} after"),
        ("max_prompt_tokens=512, task-1234567890123456789012", "max_prompt_tokens=512, task-1234567890123456789012"),
        ("a path http://host:8000/x and step 3: ok", "a path http://host:8000/x and step 3: ok"),
    ],
)
def test_known_shapes_of_secrets_are_redacted_and_plain_text_is_not(text, expected):
    assert redact(text) == expected


def test_the_environments_secrets_are_redacted_wherever_they_turn_up(monkeypatch, tmp_path):
    monkeypatch.setenv("MY_TOKEN", "q7-secret-q7")
    monkeypatch.setenv("MY_LONGER_TOKEN", "q7-secret-q7-and-more")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false-ish-1")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path))
    text = f"q7-secret-q7-and-more q7-secret-q7 disabled false-ish-1 {tmp_path}"
    assert redact(text) == f"{REDACTED} {REDACTED} disabled false-ish-1 {tmp_path}"


def test_tables_line_up_and_a_bar_in_a_cell_is_no_border():
    rows = [["name", "value"], ["a|b", "1"], ["", "22"]]
    assert aligned(rows) == ["name  value", "a|b   1", "      22"]
    assert markdown_table(rows) == ["| name | value |", "| --- | --- |", r"| a\|b | 1 |", "|  | 22 |"]


def test_a_steps_other_time_is_what_no_part_accounts_for():
    assert step_parts(TIMINGS) == pytest.approx(
        {"generate": 0.8, "reward": 0.1, "score": 0.1, "learn": 0.5, "sync": 0.2, "other": 0.3}
    )
    assert step_parts({"time/reward_s": 2.0, "time/step_s": 1.0}) == {"reward": 2.0, "other": 0.0}  # overlaps with generation
    assert step_parts({"reward/mean": 1.0}) == {}


def test_intervals_are_folded_into_the_metric_they_belong_to():
    found = estimates(
        {"evaluation/pass@1": 0.5, "evaluation/pass@1_low": 0.4, "evaluation/pass@1_high": 0.6, "evaluation/ends_low": 1.0}
    )
    assert found == {"pass@1": Estimate(0.5, 0.4, 0.6), "ends_low": Estimate(1.0)}
    assert str(found["pass@1"]) == "0.500 [0.400, 0.600]"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.5, "0.500"),
        (-12.345, "-12.35"),
        (123.45, "123.5"),
        (4123.4, "4,123"),
        (3.4e-5, "3.4e-5"),
        (2.5e7, "2.5e7"),
        (math.nan, "nan"),
    ],
)
def test_numbers_are_short(value, text):
    assert number(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(1.64, "1.6s"), (9.97, "10s"), (59.6, "1m 00s"), (185, "3m 05s"), (7620, "2h 07m"), (97200, "1d 03h")]
)
def test_durations_have_two_units(seconds, text):
    assert duration(seconds) == text


def test_a_sparkline_averages_a_long_series_and_leaves_out_nan():
    assert sparkline([0, 0, math.nan, 7, 7], 2) == "▁█"
    assert sparkline([1.0, 1.0], 10) == "▄▄"
    assert sparkline([math.nan], 10) == ""
    assert len(sparkline(list(range(1000)), 40)) == 40


def test_the_panel_has_a_colour_for_every_part_of_a_step():
    assert console._PART_STYLES.keys() >= step_parts(TIMINGS).keys()
