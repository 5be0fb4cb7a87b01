"""README tells the truth: its table and map are generated from the code, and `test_end_to_end.py` runs its commands.

python tests/test_readme.py      writes the table and the map anew
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


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


def test_every_command_is_of_a_kind_that_tests_run():
    known = (
        "bash launchers/quickstart.sh",
        "bash launchers/test.sh",
        "source .venv/bin/activate",
        "rlkit ",
        "tensorboard --logdir",
    )
    for line in (line for block in commands("bash") for line in block.splitlines() if line.strip()):
        assert line.startswith(known), line


if __name__ == "__main__":
    text = README.read_text(encoding="utf-8")
    for name, block in blocks().items():
        text = marked(name).sub(lambda match, block=block: f"{match.group(1)}{block}\n{match.group(2)}", text)
    README.write_text(text, encoding="utf-8")
