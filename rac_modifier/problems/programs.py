"""Run programs that a model wrote, each alone in a confined process (`confined.py`) and an own temporary folder.

This takes much away and is no virtual machine: a hole in the kernel is a hole here. `examine_runner` says what holds on this
machine; who can should run evaluations of code in a container without network and data.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from rac_modifier.errors import RacError

_CONFINED = Path(__file__).with_name("confined.py")
_WALL_FACTOR, _WALL_MORE = (
    4,
    5,
)  # seconds by the clock per second of processor time: a busy machine changes no verdict
_SOURCE = "program.py"
End = Literal["finished", "failed", "time", "output"]


@dataclass(frozen=True)
class Limits:
    """Of one run: seconds of processor time, bytes of address space, bytes of each file and of the output.

    The time and the memory are LiveCodeBench's (6 s, 4 GB).
    """

    seconds: int = 6
    memory: int = 4 * 2**30
    file: int = 64 * 2**20
    output: int = 16 * 2**20


DEFAULT = Limits()


@dataclass(frozen=True)
class Outcome:
    """How a run ended, and what it wrote to standard output; "failed": with another exit code than 0, or by a signal."""

    end: End
    output: str


def run_program(source: str, stdin: str, limits: Limits = DEFAULT) -> Outcome:
    """Run a Python program on an input. Its whole process group is gone when this returns, and so is its folder.

    Args:
        source: of the program; it has the standard library and nothing else.
        stdin: its standard input.
        limits: of the run.

    Raises:
        RacError: Python cannot be started so.
    """
    with tempfile.TemporaryDirectory(prefix="rac-program-", ignore_cleanup_errors=True) as folder:
        path = Path(folder) / _SOURCE
        path.write_bytes(source.encode("utf-8", "replace"))
        return _run(
            [_python(), "-I", "-S", "-B", str(path)],
            stdin.encode("utf-8", "replace"),
            folder,
            limits,
        )


@lru_cache(maxsize=1)
def examine_runner() -> dict[str, bool]:
    """Which parts of the confinement hold on this machine, tried out: "files" and "system_calls" (see `confined.py`).

    Raises:
        RacError: no Linux, or Python cannot be started so.
    """
    if sys.platform != "linux":
        raise RacError(
            f"programs are confined on Linux only, and this is {sys.platform}; use a Linux machine or container"
        )
    with tempfile.TemporaryDirectory(prefix="rac-program-") as folder:
        command = [_python(), "-I", "-S", "-c", "print('works')"]
        outcome = _run(command, b"", folder, DEFAULT, report=True)
    lines = outcome.output.splitlines()
    if outcome.end != "finished" or lines[1:] != ["works"]:
        raise RacError(
            f"{command[0]} cannot be run confined ({outcome.end}: {outcome.output[-200:]!r}); use another machine"
        )
    found = json.loads(lines[0])
    return {name: bool(found[name]) for name in ("files", "system_calls")}


def describe_runner(found: dict[str, bool]) -> str:
    """In one line, what holds and what does not."""
    parts = {
        "files": "files are read from Python's folders and written to a temporary folder only",
        "system_calls": "no new processes, no network, no signals, no change of rights of files",
    }
    holds = [
        "limits of time, memory and output",
        *(text for name, text in parts.items() if found[name]),
    ]
    missing = [text for name, text in parts.items() if not found[name]]
    text = f"Programs of the model are run on this machine: {'; '.join(holds)}."
    return f"{text} NOT CONFINED here: {'; '.join(missing)}." if missing else text


def _run(
    command: list[str], stdin: bytes, folder: str, limits: Limits, *, report: bool = False
) -> Outcome:
    values = {
        "seconds": limits.seconds,
        "memory": limits.memory,
        "file": limits.file,
        "parent": os.getpid(),
    }
    confined = [
        _python(),
        "-I",
        "-S",
        "-B",
        str(_CONFINED),
        json.dumps({**values, "report": report}),
        *command,
    ]
    with tempfile.TemporaryFile() as given, tempfile.TemporaryFile() as written:
        given.write(stdin)
        given.seek(0)
        try:
            process = subprocess.Popen(
                confined,
                stdin=given,
                stdout=written,
                stderr=subprocess.DEVNULL,
                cwd=folder,
                env={},
                start_new_session=True,
            )
        except OSError as error:
            raise RacError(
                f"{confined[0]} cannot be started ({error}); make room for one more process"
            ) from error
        try:
            code = process.wait(limits.seconds * _WALL_FACTOR + _WALL_MORE)
        except subprocess.TimeoutExpired:
            code = -signal.SIGXCPU
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        size = os.fstat(written.fileno()).st_size
        output = os.pread(written.fileno(), min(size, limits.output), 0).decode("utf-8", "replace")
    if size > limits.output:
        return Outcome("output", output)
    if code in (-signal.SIGXCPU, -signal.SIGKILL):
        return Outcome("time", output)
    return Outcome("failed" if code else "finished", output)


def _python() -> str:
    """The interpreter itself, and not the link of an environment, whose packages are not wanted."""
    return os.path.realpath(sys.executable)
