"""What compilers make of the kernels for the tests, kept in build/ for the next run.

Several processes run tests: one of them builds while the others that need the same wait.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable
from pathlib import Path

KEPT = Path(__file__).parents[1] / "build" / "test-libraries"


def kept_build(name: str, build: Callable[[Path], object]) -> Path:
    """build/test-libraries/NAME; where it is missing, `build` makes it at the path that it is given."""
    path = KEPT / name
    KEPT.mkdir(parents=True, exist_ok=True)
    with open(KEPT / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = KEPT / f"{name}.unfinished"
            build(unfinished)
            unfinished.rename(path)
    return path
