"""Prune in several processes, as torchrun starts them, in one scenario after another: MODEL
RECIPES.

Each process is a fork of this one, which has imported everything, and runs `rac prune`. RECIPES is
a folder of recipes, and a mixture of experts. Processes that are killed kill themselves when they
reach a given point, so no scenario depends on time. Prints exit codes by scenario as JSON.
"""

import gc
import json
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot
from torch import distributed

import rac_modifier  # noqa: F401 - registers the modifier
from rac_modifier import cli
from rac_modifier.checkpoint import files, saving
from rac_modifier.errors import RacError
from rac_modifier.llmcompressor.run import Run

Before = Callable[[], None]


def start(
    model: str,
    recipe: Path,
    output: str,
    count: int,
    before: Mapping[int, Before] | None = None,
    run: Any = None,
) -> dict[int, int]:
    """Start `count` processes; their ids by rank. `before` is called in that rank first.

    What a process says on standard error goes to OUTPUT.RANK.txt.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["rac", "prune", model, output, "--recipe", str(recipe)]
    children = {}
    for rank in range(count):
        children[rank] = os.fork()
        if children[rank]:
            continue
        code = 1
        try:
            log = os.open(f"{output}.{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644)
            os.dup2(log, 2)
            place = {"RANK": rank, "LOCAL_RANK": rank}
            place |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()})
            os.environ["MASTER_ADDR"] = "127.0.0.1"
            sys.argv = command
            (before or {}).get(rank, lambda: None)()
            (run or cli.main)()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    return children


def ended(children: dict[int, int]) -> list[int]:
    """Wait for the processes: exit codes by rank, negative for a signal."""
    codes, rank_of = {}, {child: rank for rank, child in children.items()}
    for _ in children:
        child, status = os.wait()
        codes[rank_of[child]] = os.waitstatus_to_exitcode(status)
    return [codes[rank] for rank in sorted(codes)]


def die() -> None:
    """End as the system kills a process for which there is no memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def full_disk() -> None:
    raise RacError("the disk of this process is full; make room")


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


def half_written(tensors: Any, path: Path, *_: Any) -> None:
    """Die with half of a file of groups on the disk."""
    path.write_bytes(b"half")
    die()


def upstream(model: str, recipe: Path, output: str) -> Before:
    """`oneshot` of llm-compressor in a user's own script, which joins the processes itself."""

    def run() -> None:
        distributed.init_process_group("gloo")
        oneshot(model=model, recipe=str(recipe), output_dir=output)
        distributed.destroy_process_group()

    return run


def group(call: int, how: Callable[..., None]) -> Before:
    """Do something instead of pruning a group."""
    return at(Run, "solve_on_all_ranks", call, lambda *_: how())


KILLS: dict[str, dict[int, Before]] = {
    "before the first file": {1: group(1, die)},
    "between two files": {0: group(3, die)},
    "while a file is written": {0: at(files, "save_file", 3, half_written)},
    "while the result is saved": {0: at(saving, "pack_checkpoint", 1, lambda *_: die())},
}


def main() -> None:
    """See above."""
    model, recipes = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    gc.freeze()
    codes: dict[str, list[int]] = {}

    def run(name: str, recipe: str, count: int, before: Any = None, **more: Any) -> None:
        source = more.pop("of", model)
        children = start(source, recipes / f"{recipe}.yaml", name, count, before, **more)
        codes[name] = ended(children)

    run("paper-4", "paper", 4)
    for count in (1, 2):
        run(f"quality-{count}", "quality", count)
        run(f"experts-{count}", "experts", count, of=str(recipes / "mixture"))
        run(f"recovered-{count}", "recovered", count)
    run("upstream-2", "paper", 2, run=upstream(model, recipes / "paper.yaml", "upstream-2"))
    run("full", "quality", 2, {1: group(3, full_disk)})
    for moment, before in KILLS.items():  # each kill meets the run that those before it left
        run("killed", "quality", 2, before)
        codes[moment] = codes.pop("killed")
        os.rename("killed.0.txt", f"{moment}.0.txt")
    run("killed", "quality", 2)
    print(json.dumps(codes))


if __name__ == "__main__":
    main()
