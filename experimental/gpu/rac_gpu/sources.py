"""The CUDA C++ sources of the kernels, package data in source/."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from rac_modifier.errors import RacError

FOLDER = Path(__file__).parent / "source"


@lru_cache(maxsize=1)
def read_sources() -> dict[str, str]:
    """Read the kernels (`.cu`) and headers (`.h`): text by file name.

    Raises:
        RacError: the sources are missing.
    """
    if not (FOLDER / "ptx.h").is_file():
        raise RacError(f"{FOLDER}: no kernel sources; install rac-modifier-gpu again")
    paths = sorted(FOLDER.iterdir())
    return {path.name: path.read_text() for path in paths if path.suffix in (".cu", ".h")}
