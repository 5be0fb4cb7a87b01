"""Where `conf/` and `reward_fns/` are: at the top of a checkout, inside the package when installed from a wheel."""

from pathlib import Path

from rlkit.errors import ResourceError

_PACKAGE = Path(__file__).resolve().parent


def conf_dir() -> Path:
    """The folder of Hydra files, the one with `config.yaml` in it."""
    return _find("conf")


def reward_fns_dir() -> Path:
    """The folder of reward functions that come with rlkit."""
    return _find("reward_fns")


def _find(name: str) -> Path:
    checkout = _PACKAGE.parent
    places = [_PACKAGE / name]
    if (checkout / "pyproject.toml").is_file():  # else the parent is site-packages, and a `conf` there is somebody else's
        places.append(checkout / name)
    for place in places:
        if place.is_dir():
            return place
    looked = " and ".join(map(str, places))
    raise ResourceError(f"{name}/ is missing from this installation of rlkit (looked for {looked}). Reinstall rlkit-llm.")
