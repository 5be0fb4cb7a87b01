"""Finds what a user named, imports it, and says what its exceptions were. Workers import this file, so it may not import torch."""

from __future__ import annotations

import ctypes
import inspect
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

from rlkit.errors import ConfigError

TRACEBACK_LINES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class Location:
    """Where a user's function or class is: a file or a module, and a name in it."""

    key: str  # the setting that names it
    name: str  # as it is written there
    file: Path | None
    module: str | None
    member: str
    import_path: Path | None  # put first on sys.path, so that the file's own imports work


def locate(key: str, name: str, base_dir: Path) -> Location:
    """Resolves `file.py:member` or `package.module:member` without running any of its code. Raises ConfigError."""
    place, _, member = name.rpartition(":")
    if not place or not member.isidentifier():
        raise ConfigError(f"{key}={name}: write file.py:name or package.module:name.")
    if place.endswith(".py"):
        file = (base_dir / Path(place).expanduser()).resolve()
        if not file.is_file():
            there = listed(sorted(path.name for path in file.parent.glob("*.py"))) if file.parent.is_dir() else "no such folder"
            raise ConfigError(f"{key}={name}: there is no file {file}. Python files in {file.parent}: {there}.")
        return Location(key=key, name=name, file=file, module=None, member=member, import_path=file.parent)
    _check_module(key, name, place, base_dir)
    return Location(key=key, name=name, file=None, module=place, member=member, import_path=base_dir)


def _check_module(key: str, name: str, module: str, base_dir: Path) -> None:
    # importlib.util.find_spec would import the parent packages: user code, in a process that must not hang.
    path: Iterable[str] = [str(base_dir), *sys.path]
    for depth, part in enumerate(parts := module.split("."), start=1):
        spec = PathFinder.find_spec(part, list(path))
        if spec is None:
            missing, parent = ".".join(parts[:depth]), ".".join(parts[: depth - 1])
            if parent:
                hint = f"{parent} has {listed(sorted(info.name for info in iter_modules(path)))}"
            else:
                hint = f"{base_dir} has {listed(sorted(info.name for info in iter_modules([str(base_dir)])))}"
            raise ConfigError(f"{key}={name}: there is no module {missing}; {hint}. Install it, or correct its name.")
        if depth < len(parts) and spec.submodule_search_locations is None:
            raise ConfigError(f"{key}={name}: {'.'.join(parts[:depth])} is a module, not a package. Correct the name.")
        path = spec.submodule_search_locations or []


def load(location: Location, *, package: str) -> Callable:
    """Imports it: runs user code, so only a worker calls this. Raises ConfigError when there is no such function or class.

    `package`: a name of its own for modules that are files, so that theirs are not found by somebody else's import.
    """
    if location.import_path is not None:
        sys.path.insert(0, str(location.import_path))
    if location.file is not None:
        module = _import_file(location.file, package)
    else:
        assert location.module is not None
        module = import_module(location.module)
    found = getattr(module, location.member, None)
    if not callable(found):
        members = inspect.getmembers(module, lambda each: inspect.isfunction(each) or inspect.isclass(each))
        own = sorted(name for name, value in members if value.__module__ == module.__name__)
        raise ConfigError(f"{location.key}={location.name}: there is no {location.member} in it. It has {listed(own)}.")
    return found


def _import_file(file: Path, package: str) -> ModuleType:
    spec = spec_from_file_location(f"{package}.{file.stem}", file)
    assert spec is not None, file
    assert spec.loader is not None, file
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up
    spec.loader.exec_module(module)
    return module


def listed(names: list[str]) -> str:
    return ", ".join(names) if names else "none"


def die_with(parent_pid: int) -> None:
    """The kernel kills this process when the thread that started it ends, even by SIGKILL."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent_pid:  # it was gone before the line above
        os._exit(1)


def memory_mib(pid: int) -> float:
    """That a process has in memory. 0 where the system does not say."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (FileNotFoundError, IndexError):  # another system, or it has just ended
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def show(value: Any) -> str:
    """A value that somebody returned, for a message about it."""
    try:
        text = repr(value)
    except Exception:  # a broken __repr__ must not hide the message about it
        text = "?"
    return f"a {type(value).__name__} ({text[:80]})"


def describe(error: BaseException) -> dict[str, str]:
    """The exception in one line with the place in user code, and the traceback's last lines."""
    try:
        summary = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
        frames = traceback.extract_tb(error.__traceback__)
        lines = "".join(traceback.format_exception(error)).strip().splitlines()
    except Exception:  # a broken __str__
        return {"summary": type(error).__name__, "traceback": ""}
    places = [(frame.filename, frame.lineno) for frame in frames if not frame.filename.startswith("<frozen ")]
    if isinstance(error, SyntaxError) and error.filename and not error.filename.startswith("<"):  # "<": a text that was evaluated
        places.append((error.filename, error.lineno))
    where = f" ({Path(places[-1][0]).name}:{places[-1][1]})" if places else ""
    return {"summary": summary[:500] + where, "traceback": "\n".join(line[:500] for line in lines[-TRACEBACK_LINES:])}
