"""Finds a reward function. Workers import this file, so it may not import torch.

A reward function is `def reward(prompts, completions, <columns>, **columns) -> list[float | None]`, plain or async: text in,
one number per completion out, None for a row it cannot judge. A named argument is a column of the data set. Other conventions
are in `signatures.py`.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import PathFinder
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import TypeVar

from rlkit.data.rewards.signatures import AUTO, RewardSignature, read_signature
from rlkit.errors import ConfigError
from rlkit.resources import reward_fns_dir

F = TypeVar("F", bound=Callable)


def group_wise(function: F) -> F:
    """Marks a reward function that compares: each call gets all completions of one prompt, not a list of one."""
    function.group_wise = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


@dataclass(frozen=True, kw_only=True, slots=True)
class Location:
    """Where a reward function is: a file or a module, and a name in it."""

    name: str  # as in `reward.fn`
    file: Path | None
    module: str | None
    function: str
    import_path: Path | None  # put first on sys.path, so that the function's own imports work


def locate(name: str, base_dir: Path) -> Location:
    """Resolves `reward.fn` without running any of its code. Raises ConfigError when the file or the module is missing."""
    place, colon, function = name.rpartition(":")
    if not colon:
        return _locate_shipped(name)
    if not place or not function.isidentifier():
        raise ConfigError(f"reward.fn={name}: write file.py:function or package.module:function.")
    if place.endswith(".py"):
        file = (base_dir / Path(place).expanduser()).resolve()
        if not file.is_file():
            there = _listed(sorted(path.name for path in file.parent.glob("*.py"))) if file.parent.is_dir() else "no such folder"
            raise ConfigError(f"reward.fn={name}: there is no file {file}. Python files in {file.parent}: {there}.")
        return Location(name=name, file=file, module=None, function=function, import_path=file.parent)
    _check_module(name, place, base_dir)
    return Location(name=name, file=None, module=place, function=function, import_path=base_dir)


def _locate_shipped(name: str) -> Location:
    folder = reward_fns_dir()
    file = folder / f"{name}.py"
    if not name.isidentifier() or not file.is_file():
        shipped = _listed(sorted(path.stem for path in folder.glob("*.py")))
        raise ConfigError(
            f"reward.fn={name}: reward_fns/ has {shipped}. Write one of these, or file.py:function, or package.module:function."
        )
    return Location(name=name, file=file, module=None, function="reward", import_path=None)


def _check_module(name: str, module: str, base_dir: Path) -> None:
    # importlib.util.find_spec would import the parent packages: user code, in a process that must not hang.
    path: Iterable[str] = [str(base_dir), *sys.path]
    for depth, part in enumerate(parts := module.split("."), start=1):
        spec = PathFinder.find_spec(part, list(path))
        if spec is None:
            missing, parent = ".".join(parts[:depth]), ".".join(parts[: depth - 1])
            if parent:
                hint = f"{parent} has {_listed(sorted(info.name for info in iter_modules(path)))}"
            else:
                hint = f"{base_dir} has {_listed(sorted(info.name for info in iter_modules([str(base_dir)])))}"
            raise ConfigError(f"reward.fn={name}: there is no module {missing}; {hint}. Install it, or correct its name.")
        if depth < len(parts) and spec.submodule_search_locations is None:
            raise ConfigError(f"reward.fn={name}: {'.'.join(parts[:depth])} is a module, not a package. Correct the name.")
        path = spec.submodule_search_locations or []


def load(location: Location, convention: str = AUTO) -> tuple[Callable, RewardSignature]:
    """Imports the function: runs user code, so only a worker calls this. Raises ConfigError when there is no such function."""
    if location.import_path is not None:
        sys.path.insert(0, str(location.import_path))
    if location.file is not None:
        module = _import_file(location.file)
    else:
        assert location.module is not None
        module = import_module(location.module)
    function = getattr(module, location.function, None)
    if not callable(function):
        own = sorted(name for name, value in inspect.getmembers(module, inspect.isfunction) if value.__module__ == module.__name__)
        raise ConfigError(f"reward.fn={location.name}: there is no function {location.function}. Its functions are {_listed(own)}.")
    return function, read_signature(location.name, function, convention)


def _import_file(file: Path) -> ModuleType:
    # Under a package name of its own: reward_fns/format.py must not be found by somebody else's `import format`.
    spec = spec_from_file_location(f"reward_fns.{file.stem}", file)
    assert spec is not None, file
    assert spec.loader is not None, file
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickle look their module up
    spec.loader.exec_module(module)
    return module


def _listed(names: list[str]) -> str:
    return ", ".join(names) if names else "none"
