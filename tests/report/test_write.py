"""The command as one runs it: what it prints and what it writes."""

import json
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import pytest

from rlkit import cli
from rlkit.report.curves import mean_line

BEFORE = [0, 1, 2, 4]
KL = ["divergence=reverse_kl", "divergence.coef=0.1"]


def call(*arguments: str) -> int:
    return cli.guard(lambda: cli.dispatch(["compare", *arguments]))


@pytest.fixture
def sweep(make_run: Callable[..., Path], evaluation: Callable) -> Path:
    for seed in (1, 2):
        halfway = {0: evaluation(BEFORE), 10: evaluation([seed, 1, 2, 4])}
        make_run(f"s/divergence=none,seed={seed}", f"seed={seed}", evaluations={**halfway, 20: evaluation([0, 0, 4, 4])})
        make_run(
            f"s/divergence=reverse_kl,seed={seed}",
            f"seed={seed}",
            *KL,
            evaluations={**halfway, 20: evaluation([1, 1, 2, 4])},
            kl=0.02,
        )
    return Path("s")


def test_the_command_tells_the_whole_story_and_writes_it_down(sweep, capsys):
    assert call(str(sweep)) == 0
    printed = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert lines[0] == "4 runs in 2 arms, on 4 held-out prompts"
    for shown in (
        "divergence=none 1, 2 20 s/divergence=none,seed=1, s/divergence=none,seed=2",
        "divergence none reverse_kl",
        "divergence.coef - 0.1",
        "figure divergence=none divergence=reverse_kl",
        "KL to reference - 0.019 [0.019, 0.019]",
        "Difference from divergence=none, on the same prompts",
        "arm k=1 k=2 k=4",
        "divergence=none before 0.438 0.583 0.750",
        "divergence=none after 0.500 0.500 0.500",
        "divergence=none: from k=2 on its curve is below the one before training.",
        "divergence=none, seed 1, 2: no point, because no KL to a reference was measured; a divergence would.",
        "divergence=reverse_kl 1 0.195 0.500 2 0.193 0.053",
        "compare: comparison.md, comparison.json, 10 pictures",
    ):
        assert shown in lines, shown
    assert any(line.startswith("pass@1 0.500 [") for line in lines)
    assert any(line.startswith("support lost 0.250 [") for line in lines)
    assert "An arm has 2 seeds, fewer than 5: intervals over so few are too narrow, and no significance is claimed." in printed
    assert "*" not in printed
    markdown = Path("compare/comparison.md").read_text()
    assert "| divergence | none | reverse_kl |" in markdown
    assert "no significance is claimed" in markdown
    stored = json.loads(Path("compare/comparison.json").read_text())
    assert [arm["name"] for arm in stored["arms"]] == ["divergence=none", "divergence=reverse_kl"]
    assert stored["arms"][0]["figures"]["pass@1"]["by_run"] == [0.5, 0.5]
    assert stored["arms"][0]["pass_at_k"]["after"] == [0.5, 0.5, 0.5, 0.5]
    assert stored["arms"][1]["minus_first_arm"]["support lost"]["value"] == -0.25
    assert stored["arms"][1]["reward_and_kl"] == [{"kl": pytest.approx(0.195), "reward": 0.5}] * 2
    assert stored["best_of_n"][0]["reward"][0] == pytest.approx(7 / 16)
    assert stored["common_settings"]["model.path"] == "tiny"
    assert not stored["common_settings"].keys() & {"seed", "run_dir", "divergence"}
    for name in stored["pictures"]:
        assert f"]({name})" in markdown
        pixels = matplotlib.image.imread(Path("compare") / name)[..., :3]
        assert (pixels.max(-1) - pixels.min(-1) > 0.4).sum() > 300, name  # curves are coloured; axes and text are grey
    assert {path.name for path in Path("compare").iterdir()} == {*stored["pictures"], "comparison.md", "comparison.json"}


def test_a_second_comparison_takes_the_place_of_the_first(sweep, capsys):
    runs = [str(path) for path in sorted(sweep.iterdir())]
    assert call(*runs, "--out", "here/it") == 0
    assert (Path("here/it") / "reward_and_kl.png").is_file()
    assert call(*runs[:2], "--out", "here/it") == 0  # without a divergence
    stored = json.loads(Path("here/it/comparison.json").read_text())
    assert {path.name for path in Path("here/it").glob("*.png")} == {*stored["pictures"]}
    assert "reward_and_kl.png" not in stored["pictures"]
    printed = capsys.readouterr().out
    assert "None but the seed." in printed


def test_many_arms_are_rows(make_run, evaluation, capsys):
    for rate in range(1, 6):
        make_run(f"s/{rate}", f"optimizer.learning_rate={rate}e-4", evaluations={0: evaluation(BEFORE), 20: evaluation(BEFORE)})
    assert call("s") == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "arm optimizer.learning_rate" in lines
    assert "optimizer.learning_rate=0.0003 0.0003" in lines
    assert any(line.startswith("optimizer.learning_rate=0.0005 0.438 [") for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "rlkit compare needs folders: rlkit compare <run or sweep folder> ..."),
        (["nowhere"], "nowhere: no such folder."),
        (["s", "--out", "file"], "--out=file: no folder can be made there"),
    ],
)
def test_a_wrong_command_is_one_message_and_code_2(make_run, evaluation, capsys, arguments, message):
    make_run("s", evaluations={0: evaluation(BEFORE)})
    Path("file").touch()
    assert call(*arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith(f"error: {message}")


def test_a_mean_line_stays_where_every_run_is():
    assert mean_line([([0, 10, 20], [1.0, 2.0, 3.0]), ([0, 20, 30], [3.0, 5.0, 9.0])]) == ([0, 20], [2.0, 4.0])
