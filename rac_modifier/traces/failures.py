"""The side file of a store: problems that an engine could not complete, each with the reason.

One JSON object a line. Only what is complete counts, so a kill while writing costs a line, and its problem is tried again.
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
    """What failed on the way to a store; empty without a side file.

    Raises:
        RacError: the file cannot be read, or a line of it is something else.
    """
    path = failures_path(store)
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RacError(f"{str(path)!r} cannot be read: {error}; repair or remove it") from error
    try:
        return [FailedProblem(**json.loads(line)) for line in lines if line.endswith(b"\n") and line.strip()]
    except (ValueError, TypeError) as error:
        raise RacError(f"{str(path)!r} is no list of failed problems ({error}); remove it to try them again") from error


def append_failures(store: Path, failed: Sequence[FailedProblem]) -> None:
    """Add to the side file; durable once this returns. Call it with the store locked.

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
        raise RacError(f"{str(path)!r} cannot be written: {error}; make room, then run again") from error


def forget_failures(store: Path) -> None:
    """Let the failed problems be tried again."""
    failures_path(store).unlink(missing_ok=True)
