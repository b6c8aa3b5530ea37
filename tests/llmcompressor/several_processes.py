"""Prune in several processes, as torchrun starts them, in one scenario after another: MODEL RECIPES.

Each process is a fork of this one, which has imported everything: a run of its own takes a second, not ten. It runs `rac prune`.
RECIPES is a folder with paper.yaml, quality.yaml, int4.yaml, recovered.yaml and few.yaml, and a mixture of experts with
experts.yaml.
Prints what happened as JSON.
"""

from __future__ import annotations

import datetime
import json
import os
import random
import resource
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from llmcompressor import oneshot
from torch import distributed

import rac_modifier  # noqa: F401 - registers the modifier
from rac_modifier import cli, model_tools, processes
from rac_modifier.errors import RacError
from rac_modifier.llmcompressor import resume
from rac_modifier.llmcompressor import run as run_module
from rac_modifier.processes import Processes

Before = Callable[[], None]
_LONGEST = 60.0  # seconds; a run that takes longer hangs
HUNG = -signal.SIGALRM


def start(
    model: str,
    recipe: Path,
    output: str,
    count: int,
    before: Mapping[int, Before] | None = None,
    run: Any = None,
) -> dict[int, int]:
    """Start so many processes; their ids by rank. `before` is called in the process of that rank first.

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
            os.dup2(
                os.open(f"{output}.{rank}.txt", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644), 2
            )
            place = {
                "RANK": rank,
                "LOCAL_RANK": rank,
                "WORLD_SIZE": count,
                "LOCAL_WORLD_SIZE": count,
            }
            os.environ.update({name: str(value) for name, value in place.items()})
            os.environ.update({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
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


def ended(children: Mapping[int, int], agent: bool = False) -> list[int]:
    """Wait for the processes: exit codes by rank, negative for a signal. One that hangs is killed, and is `HUNG`.

    With `agent`, where one has failed the others are told to end (SIGTERM) 5 seconds later; torchrun does it at once.
    """
    late, codes, tell = time.monotonic() + _LONGEST, {}, 0.0
    while len(codes) < len(children):
        for rank in children.keys() - codes.keys():
            done, status = os.waitpid(children[rank], os.WNOHANG)
            if done:
                codes[rank] = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > late:
                os.kill(children[rank], signal.SIGKILL)
                os.waitpid(children[rank], 0)
                codes[rank] = HUNG
        if agent and any(codes.values()) and not tell:
            tell, late = time.monotonic() + 5.0, min(late, time.monotonic() + _LONGEST / 2)
        if tell and time.monotonic() > tell:
            tell = late
            for rank in children.keys() - codes.keys():
                os.kill(children[rank], signal.SIGTERM)
        time.sleep(0.01)
    return [codes[rank] for rank in sorted(codes)]


def slow() -> None:
    """A process that comes late to every sum and every result."""
    for name in ("exchanged", "joined", "send", "meet"):
        method, chance = getattr(Processes, name), random.Random(os.getpid())

        def late(self: Any, *args: Any, method: Any = method, chance: Any = chance) -> Any:
            time.sleep(chance.uniform(0.0, 0.1))
            return method(self, *args)

        setattr(Processes, name, late)


def fails_at(group: int, how: Before) -> Before:
    """Do something in place of pruning the so-manieth group, with the others or beside the one that solves it."""

    def before() -> None:
        solve, groups = run_module.solve_on_all_ranks, iter(range(1, 10**6))

        def failing(*args: Any, **kwargs: Any) -> Any:
            if next(groups) == group:
                how()
            return solve(*args, **kwargs)

        run_module.solve_on_all_ranks = failing

    return before


def full_disk() -> None:
    """What a process raises whose disk is full."""
    raise RacError("the disk of this process is full; make room")


def killed() -> None:
    """As the system kills a process for which there is no memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def patience_of(seconds: float) -> Before:
    """Wait for the other processes so long."""

    def before() -> None:
        processes._ANSWER = datetime.timedelta(seconds=seconds)

    return before


def small_accelerator() -> None:
    """The CPU in the part of an accelerator that the model must not be moved to as a whole."""
    model_tools.accelerator = lambda: torch.device("cpu")
    model_tools.free_bytes = lambda device: 0


def upstream(model: str, recipe: Path, output: str) -> Before:
    """`oneshot` of llm-compressor in a user's own script, which joins the processes itself."""

    def run() -> None:
        distributed.init_process_group("gloo")
        oneshot(model=model, recipe=str(recipe), output_dir=output)
        distributed.destroy_process_group()

    return run


def main() -> None:
    """See above."""
    model, recipes = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    resume._SAVE_SECONDS = 0.0  # here and not at import: tests import this module
    codes: dict[str, list[int]] = {}

    def run(
        name: str,
        recipe: str,
        count: int,
        before: Mapping[int, Before] | None = None,
        run: Any = None,
        of: str = model,
    ) -> None:
        codes[name] = ended(start(of, recipes / f"{recipe}.yaml", name, count, before, run))

    for recipe in ("paper", "quality"):
        for count in (1, 2):
            run(f"{recipe}-{count}", recipe, count)
        run(f"{recipe}-4", recipe, 4, {1: slow, 3: slow})
    for count in (1, 3):
        run(f"int4-{count}", "int4", count, {2: slow})
    for count in (1, 2):
        run(f"experts-{count}", "experts", count, of=str(recipes / "mixture"))
    run("streamed-2", "quality", 2, {0: small_accelerator, 1: small_accelerator})
    run("upstream-2", "paper", 2, run=upstream(model, recipes / "paper.yaml", "upstream-2"))
    for count in (1, 2):
        run(f"recovered-{count}", "recovered", count)
    run("many-4", "few", 4)
    run("full", "quality", 2, {1: fails_at(3, full_disk)})
    run("gone", "quality", 2, {1: fails_at(2, killed)})
    soon = patience_of(2.0)
    run("stuck", "quality", 2, {0: soon, 1: lambda: (soon(), fails_at(2, lambda: time.sleep(5))())})  # type: ignore[dict-item]
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = round(spent.ru_utime + spent.ru_stime)
    print(json.dumps({"codes": codes, "cpu_seconds": seconds}))


if __name__ == "__main__":
    main()
