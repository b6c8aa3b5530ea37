"""JSON and text files that are written whole or not at all, and files that one process uses at a time."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path
from typing import Any

from rac_modifier.errors import RacError


def write_json_atomic(path: str | Path, obj: Any) -> None:
    """Write `obj` as strict JSON (no NaN) in the way of `write_text_atomic`.

    Raises:
        RacError: `obj` is not JSON, or the file cannot be written; the old file then stands.
    """
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise RacError(f"{path}: what is to be recorded is not JSON ({error})") from error
    write_text_atomic(path, text)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write UTF-8 text through a temporary file, mode 644; a reader sees the old file or the new one.

    Raises:
        RacError: the file cannot be written; the old file then stands.
    """
    path = Path(path)
    try:
        handle, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"
        )
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp's 600 would hide the file from other readers
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    except (OSError, UnicodeError) as error:
        raise RacError(
            f"{path}: cannot be written ({error}); make room or choose another folder"
        ) from error


def read_json(path: str | Path, next_step: str = "is this a saved model folder?") -> dict[str, Any]:
    """Return a JSON object from a file; `next_step` ends the message where there is none.

    Raises:
        RacError: no such file, not JSON, or not an object.
    """
    try:
        if kind := _special_kind(Path(path)):
            raise ValueError(f"it is a {kind}")
        obj = json.loads(Path(path).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        reason = (
            error.strerror if isinstance(error, OSError) else error
        )  # without the path, which stands before it
        raise RacError(f"{path}: cannot be read as JSON ({reason}); {next_step}") from error
    if not isinstance(obj, dict):
        raise RacError(f"{path}: holds a {type(obj).__name__} where an object is expected")
    return obj


def regular_file(path: str | Path, what: str) -> Path:
    """Return the path of a file that a user named, after checking that reading it will end.

    A link to a regular file counts as one. `what` names the file in the message ("recipe").

    Raises:
        RacError: nothing is at `path`, or a folder, device, pipe or socket.
    """
    path = Path(path)
    try:
        kind = _special_kind(path)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        reason = error.strerror if isinstance(error, OSError) else error
        raise RacError(f"{what} {path}: {reason}; name an existing file") from error
    if kind is not None:
        raise RacError(f"{what} {path} is a {kind}; name a regular file")
    return path


def _special_kind(path: Path) -> str | None:
    """Return what is at `path`, links followed; None for a regular file."""
    mode = path.stat().st_mode
    if stat.S_ISREG(mode):
        return None
    kinds = {stat.S_ISDIR: "folder", stat.S_ISFIFO: "pipe", stat.S_ISSOCK: "socket"}
    return next((kind for is_kind, kind in kinds.items() if is_kind(mode)), "device")


def remove_folder(folder: Path) -> None:
    """Remove a folder, if it is there, so that a kill leaves all of it under its name or nothing.

    It is renamed first. What an earlier kill left under that other name is removed too.
    """
    gone = folder.with_name(f"{folder.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def lock(descriptor: int, path: Path, patience: float) -> bool:
    """Lock an open file against other processes, until it is closed; False where another one holds it for `patience` seconds.

    Raises:
        RacError: the file system has no locks.
    """
    give_up = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= give_up:
                return False
            time.sleep(0.05)
        except OSError as error:
            raise RacError(
                f"{path} cannot be locked ({error.strerror}); name one on a file system that has locks"
            ) from error
