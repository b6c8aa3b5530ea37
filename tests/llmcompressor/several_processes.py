"""What test_several_processes.py starts in each process: `rac prune`, or it dies on the way.

A process that is killed kills itself when it reaches a given point, so no scenario depends on time.
"""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llmcompressor import oneshot
from torch import distributed

import rac_modifier  # noqa: F401 - registers the modifier
from rac_modifier import cli
from rac_modifier.checkpoint import files, saving
from rac_modifier.llmcompressor.run import Run

Before = Callable[[], None]


def die(*_: Any) -> None:
    """End as the system kills a process for which there is no memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def half_written(tensors: Any, path: Path, *_: Any) -> None:
    """Die with half of a file of groups on the disk."""
    path.write_bytes(b"half")
    die()


def at(owner: Any, name: str, call: int, how: Callable[..., None]) -> Before:
    """Do something before the given call of a function, with its arguments."""

    def before() -> None:
        inner, calls = getattr(owner, name), iter(range(1, 10**6))

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if next(calls) == call:
                how(*args)
            return inner(*args, **kwargs)

        setattr(owner, name, wrapped)

    return before


# By scenario: the rank to which it happens, and what.
FAULTS: dict[str, tuple[int, Before]] = {
    "before the first file": (1, at(Run, "solve_on_all_ranks", 1, die)),
    "between two files": (0, at(Run, "solve_on_all_ranks", 3, die)),
    "while a file is written": (0, at(files, "save_file", 3, half_written)),
    "while the result is saved": (0, at(saving, "pack_checkpoint", 1, die)),
}


def main() -> None:
    """SCENARIO MODEL OUTPUT RECIPE; in "a user's script", by `oneshot` of llm-compressor."""
    scenario, model, output, recipe = sys.argv[1:]
    if scenario == "a user's script":
        distributed.init_process_group("gloo")
        oneshot(model=model, recipe=recipe, output_dir=output)
        distributed.destroy_process_group()
        return
    rank, before = FAULTS.get(scenario, (None, None))
    if rank == int(os.environ["RANK"]):
        before()
    sys.argv = ["rac", "prune", model, output, "--recipe", recipe]
    cli.main()
