"""Finds a reward function. Workers import this file, so it may not import torch.

A reward function is `def reward(prompts, completions, <columns>, **columns) -> list[float | None]`, plain or async: text in,
one number per completion out, None for a row it cannot judge. A named argument is a column of the data set. Other conventions
are in `signatures.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rlkit.data.processes import user_code
from rlkit.data.processes.user_code import Location, listed
from rlkit.data.rewards.signatures import AUTO, RewardSignature, read_signature
from rlkit.errors import ConfigError
from rlkit.resources import reward_fns_dir

F = TypeVar("F", bound=Callable)


def group_wise(function: F) -> F:
    """Marks a reward function that compares: each call gets all completions of one prompt, not a list of one."""
    function.group_wise = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def locate(name: str, base_dir: Path) -> Location:
    """Resolves `reward.fn` without running any of its code. Raises ConfigError when the file or the module is missing."""
    return user_code.locate("reward.fn", name, base_dir) if ":" in name else _locate_shipped(name)


def _locate_shipped(name: str) -> Location:
    folder = reward_fns_dir()
    file = folder / f"{name}.py"
    if not name.isidentifier() or not file.is_file():
        shipped = listed(sorted(path.stem for path in folder.glob("*.py")))
        raise ConfigError(
            f"reward.fn={name}: reward_fns/ has {shipped}. Write one of these, or file.py:function, or package.module:function."
        )
    return Location(key="reward.fn", name=name, file=file, module=None, member="reward", import_path=None)


def load(location: Location, convention: str = AUTO) -> tuple[Callable, RewardSignature]:
    """Imports the function: runs user code, so only a worker calls this. Raises ConfigError when there is no such function."""
    # reward_fns/format.py must not be found by somebody else's `import format`.
    function = user_code.load(location, package="reward_fns")
    return function, read_signature(location.name, function, convention)
