"""README tells the truth: its table and map are generated from the code, and its commands are run.

python tests/test_readme.py      writes the table and the map anew
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
BIN = Path(sys.executable).parent
SHORT = [
    "num_steps=1",
    "prompts_per_step=2",
    "group_size=2",
    "max_response_tokens=16",
]  # appended, so that a command is tried and not waited for


def choices_table() -> str:
    from rlkit.choices import describe

    lines = ["| group | choice | what it is |", "|---|---|---|"]
    for group, options in describe()["groups"].items():
        for place, (name, option) in enumerate(options.items()):
            lines.append(
                f"| {f'`{group}`' if place == 0 else ''} | `{name}` | {option['description'].replace('|', chr(92) + '|')} |"
            )
    return "\n".join(lines)


def first_line(file: Path) -> str:
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8")))
    assert docstring, f"{file} has no docstring: the module map shows its first line"
    return docstring.splitlines()[0]


def module_map() -> str:
    """Every module with the first line of its docstring, folders after files, in the order of the layers."""
    lines = ["```text"]

    def add(folder: Path, depth: int, order: list[str]) -> None:
        entries = [entry for entry in folder.iterdir() if entry.suffix == ".py" or (entry / "__init__.py").exists()]
        place = {name: number for number, name in enumerate(order)}
        for entry in sorted(entries, key=lambda e: (place.get(e.stem, 99), e.is_dir(), e.name)):
            if entry.name == "__init__.py":
                continue
            name = "  " * depth + entry.name + ("/" if entry.is_dir() else "")
            lines.append(f"{name:<34}{first_line(entry / '__init__.py' if entry.is_dir() else entry)}")
            if entry.is_dir():
                add(entry, depth + 1, [])

    layers = re.search(r"LAYERS = (\{.*?\})", (ROOT / "tests" / "test_architecture.py").read_text(), re.DOTALL)
    assert layers
    lines.append("rlkit/")
    add(ROOT / "rlkit", 1, list(ast.literal_eval(layers.group(1))))
    return "\n".join([*lines, "```"])


def blocks() -> dict[str, str]:
    return {"choices": choices_table(), "map": module_map()}


def marked(name: str) -> re.Pattern[str]:
    return re.compile(rf"(<!-- {name}: begin -->\n).*?(<!-- {name}: end -->)", re.DOTALL)


@pytest.mark.parametrize("name", ["choices", "map"])
def test_what_is_generated_is_up_to_date(name):
    match = marked(name).search(README.read_text(encoding="utf-8"))
    assert match
    assert match.group(0).split("\n", 1)[1].rsplit("\n", 1)[0] == blocks()[name], "run `python tests/test_readme.py`"


def commands(language: str) -> list[str]:
    text = README.read_text(encoding="utf-8")
    return list(re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL))


def test_the_readme_never_tells_anyone_to_install_another_package_called_rlkit():
    assert not re.search(r"pip install\s+rlkit\b", README.read_text(encoding="utf-8"))


def test_every_command_is_one_that_the_tests_below_run():
    known = (
        "bash launchers/quickstart.sh",
        "bash launchers/test.sh",
        "source .venv/bin/activate",
        "rlkit ",
        "tensorboard --logdir",
    )
    for line in (line for block in commands("bash") for line in block.splitlines() if line.strip()):
        assert line.startswith(known), line


def run(line: list[str], folder: Path) -> str:
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=540, check=False)
    assert done.returncode == 0, f"{shlex.join(line)}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a dozen commands, each with its own start of Ray and vLLM
def test_every_rlkit_command_runs(tmp_path):
    row, code = commands("json")[0], commands("python")
    (tmp_path / "rows.jsonl").write_text("".join(row.replace("7", str(number)) for number in range(30)))
    (tmp_path / "my_rewards.py").write_text(code[0])
    evaluation = ["evaluation.num_prompts=2", "evaluation.samples_per_prompt=2", "evaluation.ks=[1]"]
    for line in (line for block in commands("bash") for line in block.splitlines() if line.startswith("rlkit ")):
        words = shlex.split(line, comments=True)
        newest = max((tmp_path / "runs").glob("*/metrics.jsonl"), key=lambda file: file.stat().st_mtime, default=None)
        if words[1:] == ["train", "resume=runs/<run>"]:
            assert newest is not None
            run([*words[:2], f"resume={newest.parent}"], tmp_path)
            continue
        if words[1] == "train":
            words += [*SHORT, *evaluation]
        if words[1] == "eval":
            assert newest is not None
            words = ["rlkit", "eval", str(newest.parent), *evaluation]
        run(words, tmp_path)
    assert len(list((tmp_path / "runs").glob("**/metrics.jsonl"))) == 7
    assert json.loads(row)


@pytest.mark.slow
def test_the_users_own_divergence_trains(tmp_path):
    (tmp_path / "my_run.py").write_text(commands("python")[1])
    # Enough samples for the policy to move in the first step: until it has, every divergence is zero.
    size = ["num_steps=2", "prompts_per_step=8", "group_size=8"]
    words = [sys.executable, "my_run.py", "divergence=my_forward_kl", *size, "evaluation=none", "run_dir=run"]
    run(words, tmp_path)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["divergence/loss"] != 0


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    for name, block in blocks().items():
        text = marked(name).sub(lambda match, block=block: f"{match.group(1)}{block}\n{match.group(2)}", text)
    README.write_text(text, encoding="utf-8")
