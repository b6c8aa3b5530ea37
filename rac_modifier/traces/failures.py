"""The side file of a store: problems that an engine could not complete, with the reasons.

It has a JSON object per line. A line that a kill cut short does not count.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rac_modifier.errors import RacError
from rac_modifier.files import regular_file


@dataclass(frozen=True)
class FailedProblem:
    """A trace that is missing from its store; `id` is that of the trace."""

    id: str
    question: str
    reason: str


def failures_path(store: Path) -> Path:
    """Return traces.failed.jsonl for traces.jsonl."""
    return store.with_name(f"{store.stem}.failed.jsonl")


def read_failures(store: Path) -> list[FailedProblem]:
    """Read the failed problems of a store; an empty list without a side file.

    Raises:
        RacError: the file cannot be read, or a line of it is not a failed problem.
    """
    path = failures_path(store)
    if not path.exists():
        return []
    try:
        lines = regular_file(path, "list of failed problems").read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise RacError(f"{str(path)!r} cannot be read: {error}; repair or remove it") from error
    try:
        return [
            FailedProblem(**json.loads(line))
            for line in lines
            if line.endswith(b"\n") and line.strip()
        ]
    except (ValueError, TypeError, RecursionError) as error:
        raise RacError(
            f"{str(path)!r} is not a list of failed problems ({error}); remove it to try them again"
        ) from error


def append_failures(store: Path, failed: Sequence[FailedProblem]) -> None:
    """Append to the side file of a locked store; it is on the disk when this returns.

    Raises:
        RacError: it cannot be written.
    """
    path = failures_path(store)
    try:
        with path.open("ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write("".join(json.dumps(asdict(problem)) + "\n" for problem in failed).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RacError(
            f"{str(path)!r} cannot be written: {error}; make room, then run again"
        ) from error


def forget_failures(store: Path) -> None:
    """Delete the side file, so that the failed problems are tried again."""
    failures_path(store).unlink(missing_ok=True)
