"""The side file of a store: problems that an engine could not complete, each with the reason.

It has one JSON object per line. A line that a kill cut short does not count, and its problem is tried again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rac_modifier.errors import RacError


@dataclass(frozen=True)
class FailedProblem:
    """A trace that is missing from its store; `id` is that of the trace."""

    id: str
    question: str
    reason: str


def failures_path(store: Path) -> Path:
    """traces.jsonl -> traces.failed.jsonl."""
    return store.with_name(f"{store.stem}.failed.jsonl")


def read_failures(store: Path) -> list[FailedProblem]:
    """The failed problems of a store; an empty list without a side file.

    Raises:
        RacError: the file cannot be read, or a line of it is not a failed problem.
    """
    path = failures_path(store)
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RacError(f"{str(path)!r} cannot be read: {error}; repair or remove it") from error
    try:
        return [
            FailedProblem(**json.loads(line))
            for line in lines
            if line.endswith(b"\n") and line.strip()
        ]
    except (ValueError, TypeError) as error:
        raise RacError(
            f"{str(path)!r} is not a list of failed problems ({error}); remove it to try them again"
        ) from error


def append_failures(store: Path, failed: Sequence[FailedProblem]) -> None:
    """Append to the side file; it is on the disk when this returns. Call it with the store locked.

    Raises:
        RacError: it cannot be written.
    """
    path = failures_path(store)
    try:
        with path.open("ab+") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.write("".join(json.dumps(asdict(one)) + "\n" for one in failed).encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise RacError(
            f"{str(path)!r} cannot be written: {error}; make room, then run again"
        ) from error


def forget_failures(store: Path) -> None:
    """Delete the side file, so that the failed problems are tried again."""
    failures_path(store).unlink(missing_ok=True)
