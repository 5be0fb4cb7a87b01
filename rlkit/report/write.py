"""A comparison in a folder: comparison.md, comparison.json and pictures."""

from __future__ import annotations

import json
from pathlib import Path

from rlkit.controller.tracking.files import write_atomically
from rlkit.errors import ConfigError
from rlkit.report.compare import Comparison
from rlkit.report.curves import write_pictures
from rlkit.report.tables import as_json, as_markdown, as_text, sections


def write(comparison: Comparison, folder: Path) -> str:
    """Returns the same as text, with the names of the files. Raises ConfigError where `folder` cannot be one.

    An earlier comparison in the folder is replaced; nothing else in it is touched.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out={folder}: no folder can be made there ({error.strerror}). Choose another.") from None
    pictures = write_pictures(comparison, folder)
    found = sections(comparison)
    write_atomically(folder / "comparison.md", as_markdown(found, pictures))
    write_atomically(folder / "comparison.json", json.dumps(as_json(comparison) | {"pictures": pictures}, indent=1) + "\n")
    return f"{as_text(found)}{folder}: comparison.md, comparison.json, {len(pictures)} pictures\n"
