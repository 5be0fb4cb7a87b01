"""The wheel is built and unpacked, and must work away from the checkout."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from rlkit import resources
from rlkit.errors import ResourceError

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, **kwargs) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def files_below(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    pytest.importorskip("hatchling", reason="the wheel is built without isolation, so that the test needs no network")
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, ROOT)
    (built,) = folder.glob("rlkit_llm-*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that holds what `pip install` of the wheel puts into site-packages."""
    target = tmp_path_factory.mktemp("site") / "packages"
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--no-compile", "--target", target, wheel)
    return target


def test_the_wheel_holds_the_package_conf_and_reward_fns_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    packed = {name for name in names if ".dist-info/" not in name}
    want = {f"rlkit/{name}" for name in files_below(ROOT / "rlkit")}
    want |= {f"rlkit/{top}/{name}" for top in ("conf", "reward_fns") for name in files_below(ROOT / top)}
    assert packed == want
    assert "rlkit/conf/config.yaml" in packed


def test_the_wheel_holds_the_tiny_model(wheel):
    sizes = {info.filename: info.file_size for info in zipfile.ZipFile(wheel).infolist()}
    tiny = {name: size for name, size in sizes.items() if name.startswith("rlkit/data/models/tiny/")}
    assert "rlkit/data/models/tiny/config.json" in tiny
    assert any(name.endswith(".safetensors") for name in tiny)
    assert sum(tiny.values()) <= 6e6


def test_an_installed_wheel_finds_its_own_conf_and_reward_fns(installed, tmp_path):
    code = "from rlkit import resources as r; print(r.conf_dir()); print(r.reward_fns_dir())"
    found = run(sys.executable, "-c", code, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)}).split("\n")
    assert found[:2] == [str(installed / "rlkit" / "conf"), str(installed / "rlkit" / "reward_fns")]


def test_the_console_script_answers_outside_the_checkout(installed, tmp_path):
    help_text = run(installed / "bin" / "rlkit", "--help", cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(installed)})
    assert "rlkit train" in help_text


def test_a_checkout_uses_its_own_folders():
    assert resources.conf_dir() == ROOT / "conf"
    assert resources.reward_fns_dir() == ROOT / "reward_fns"


def test_missing_folders_are_a_resource_error_that_says_where_they_were_looked_for(tmp_path, monkeypatch):
    (tmp_path / "conf").mkdir()  # somebody else's, beside the package in site-packages
    monkeypatch.setattr(resources, "_PACKAGE", tmp_path / "rlkit")
    with pytest.raises(ResourceError, match=r"conf/ is missing .*rlkit/conf\)\. Reinstall rlkit-llm"):
        resources.conf_dir()
