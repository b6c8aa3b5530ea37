"""The CUDA C++ sources of the kernels: package data of an installed package, csrc/gpu/ in a clone."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from rac_modifier.errors import RacError

INSTALLED = Path(__file__).parent / "source"
CLONE = Path(__file__).parents[3] / "csrc" / "gpu"


@lru_cache(maxsize=1)
def read_sources() -> dict[str, str]:
    """Text by file name: kernels (`.cu`) and what they include (`.h`).

    Raises:
        RacError: they are not there.
    """
    folder = next((folder for folder in (INSTALLED, CLONE) if (folder / "ptx.h").is_file()), None)
    if folder is None:
        raise RacError(f"{INSTALLED}: no kernel sources; install the package again")
    return {
        path.name: path.read_text()
        for path in sorted(folder.iterdir())
        if path.suffix in (".cu", ".h")
    }
