"""Runs the tests of a mutant in a copy of the tree."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from scripts.mutants.operators import Mutant
from scripts.mutants.plugin import WRONG_COPY
from scripts.mutants.reach import Environment, RecordedTest, pytest_command

# Neither tests nor package need these, and some are large.
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "build", "demo", "rac_traces", "*.egg-info")
SURVIVED, KILLED, TIMED_OUT = "survived", "killed", "timed out"
NO_TESTS = 5  # exit status of pytest


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant."""

    identity: str
    result: str
    tests: int
    seconds: float

    @property
    def survived(self) -> bool:
        """No test noticed it."""
        return self.result == SURVIVED

    def as_dict(self) -> dict[str, object]:
        """For a line of JSON."""
        return asdict(self)


def copy_tree(tree: Path, copy: Path) -> Path:
    """A fresh copy of a tree, without environments, caches and results."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(tree, copy, ignore=LEFT_OUT)
    return copy


def attempt(
    mutant: Mutant | None,
    choices: Sequence[tuple[Environment, list[RecordedTest]]],
    tree: Path,
    package: str,
) -> Outcome:
    """Put a mutant into a tree of its own, run its tests of each environment until one fails, put the file back.

    Without a mutant, the tests should pass.
    """
    start, result, number = time.monotonic(), SURVIVED, 0
    identity = mutant.identity if mutant else "no mutant"
    if mutant is not None:
        file = tree / mutant.file
        source = file.read_bytes()
        file.write_bytes(mutant.apply(source))
    try:
        for environment, tests in choices:
            if tests and result == SURVIVED:
                number += len(tests)
                result = _run(environment, tests, tree, package)
    finally:
        if mutant is not None:
            file.write_bytes(source)
    return Outcome(identity, result, number, round(time.monotonic() - start, 1))


def _run(environment: Environment, tests: list[RecordedTest], tree: Path, package: str) -> str:
    """Whether tests pass, one process group for them all."""
    temporary = tree.with_name(f"{tree.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    listed = temporary / "tests.txt"
    listed.write_text("\n".join(test.name for test in tests))
    command, variables = pytest_command(
        environment, tree, package, MUTANTS_TESTS=str(listed), TMPDIR=str(temporary)
    )
    files = list(dict.fromkeys(test.file for test in tests))
    process = subprocess.Popen(
        [*command, "-x", *files],
        cwd=tree,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        # the recording was made on this machine, perhaps when it was less busy
        output, _ = process.communicate(timeout=60 + 4 * sum(test.seconds for test in tests))
    except subprocess.TimeoutExpired:
        return TIMED_OUT
    finally:
        _end(process)
        shutil.rmtree(temporary, ignore_errors=True)
    if process.returncode in (WRONG_COPY, NO_TESTS):
        raise RuntimeError(
            f"{' '.join(command)} in {tree} ended with {process.returncode}:\n{output.decode()[-2000:]}"
        )
    return SURVIVED if process.returncode == 0 else KILLED


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process with those that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.communicate()
