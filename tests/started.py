"""Several processes of one run, as torchrun starts them."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tests import forked

ROOT = Path(__file__).parents[1]


def places(count: int) -> list[dict[str, str]]:
    """The variables of the environment that torchrun gives to each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    shared |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count))
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]


def started(arguments: list[str], folder: Path, count: int = 2) -> list[tuple[int, str]]:
    """Start Python `count` times, like torchrun: exit codes and standard errors."""
    command, streams = [sys.executable, *arguments], {"stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **place, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
            **streams,
        )
        for place in places(count)
    ]
    try:
        errors = [process.communicate()[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, error) for process, error in zip(processes, errors, strict=True)]


def started_forks(
    main: Callable[[], None], words: Sequence[str], folder: Path, count: int = 2
) -> list[tuple[int | None, str]]:
    """The same of forks that call a function of a module with these words; see forked.py."""
    errors = [folder.with_name(f"{folder.name}.{count}.{rank}.err") for rank in range(count)]
    for path in errors:
        path.unlink(missing_ok=True)
    processes = [
        forked.start(main, words, folder, path, place)
        for path, place in zip(errors, places(count), strict=True)
    ]
    try:
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()
    ends = zip(processes, errors, strict=True)
    return [(process.exitcode, path.read_text()) for process, path in ends]
