"""Files that are written whole or not at all, read to their end, and free of a machine's paths."""

import contextlib
import fcntl
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import IO, Any
from weakref import WeakValueDictionary

from rac_modifier.errors import RacError, refusing

CONFIG_FILE = "config.json"  # of a model
_FILES_OF_MODELS = (CONFIG_FILE, "model.safetensors.index.json")
_MOST_VALUES = 500_000  # in one of them: two per tensor of the largest models


def write_json_atomic(path: str | Path, obj: Any) -> None:
    """Write `obj` as strict JSON (no NaN) by `write_text_atomic` (RacError: it is not JSON)."""
    try:
        text = json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise RacError(f"{path}: what is to be recorded is not JSON ({error})") from error
    write_text_atomic(path, text)


def write_text_atomic(path: str | Path, text: str) -> None:
    """Write UTF-8 text by `replacing`; the old file stays on a RacError."""
    step = "make room or choose another folder"
    with (
        refusing(f"{path}: cannot be written", step, OSError, UnicodeError),
        replacing(Path(path)) as new,
    ):
        new.write_text(text, encoding="utf-8")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new file that replaces `path`, mode 644; an error leaves the old file as it is."""
    handle, name = tempfile.mkstemp(".tmp", f".{path.name}.", path.parent)
    os.close(handle)
    new = Path(name)
    try:
        yield new
        new.chmod(0o644)  # mkstemp's 600 would hide the file from other readers
        with new.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def read_json(path: str | Path, next_step: str = "is this a saved model folder?") -> dict[str, Any]:
    """Return a JSON object from a file (RacError: there is none; it ends in `next_step`)."""
    if not os.path.isfile(path):  # a pipe or a device might never end
        raise RacError(f"{path}: cannot be read as JSON (no regular file is there); {next_step}")
    try:
        data = Path(path).read_bytes()
        if Path(path).name in _FILES_OF_MODELS:
            values = sum(map(data.count, (b",", b"[", b"{")))
            if values > _MOST_VALUES:  # parsed, they would take up to 40 times the file
                raise ValueError(f"{values:,} values, and no model has over {_MOST_VALUES:,}")
        obj = json.loads(data, parse_float=_finite, parse_constant=_finite)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error  # without the path
        raise RacError(f"{path}: cannot be read as JSON ({reason}); {next_step}") from error
    if not isinstance(obj, dict):
        raise RacError(f"{path}: holds a {type(obj).__name__} where an object is expected")
    return obj


def _finite(text: str) -> float:
    """Return a number of JSON (ValueError: inf or nan, which JSON cannot hold)."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not finite")
    return number


def regular_file(path: str | Path, label: str) -> Path:
    """Return the path of a user's regular file, links followed (RacError, from `label` on)."""
    if not os.path.isfile(path):
        raise RacError(f"{label} {path}: no regular file is there; name an existing one")
    return Path(path)


def remove_folder(folder: Path) -> None:
    """Rename a folder, if it exists, and remove it; a kill leaves all of it or nothing."""
    gone = folder.with_name(f"{folder.name}.removed")
    shutil.rmtree(gone, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.rename(folder, gone)
    shutil.rmtree(gone, ignore_errors=True)


def lock(descriptor: int, path: Path, patience: float) -> bool:
    """Lock an open file until it is closed; return False if `patience` seconds did not suffice."""
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
            next_step = "name one on a file system that has locks"
            raise RacError(f"{path} cannot be locked ({error.strerror}); {next_step}") from error


_held: WeakValueDictionary[Path, IO[str]] = WeakValueDictionary()  # by folder, in this process


def hold(folder: Path, next_step: str, *, take_over: bool = False) -> IO[str]:
    """Lock a folder until the file is closed (RacError: another process has it, not writable).

    `take_over`: from an earlier run of this process, whose file is closed; it has failed.
    """
    place, process = folder.resolve(), str(os.getpid())
    if take_over and (earlier := _held.get(place)):
        earlier.close()
    with refusing(f"{folder}: cannot be written to", next_step, OSError):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("a+")
    try:
        file.seek(0)
        holder = file.read()
        if not lock(file.fileno(), folder, patience=0):
            raise RacError(f"{folder} is in use by process {holder}; wait for it, or {next_step}")
        if holder != process:
            with refusing(f"{folder}: cannot be written to", next_step, OSError):
                file.truncate(0)
                os.write(file.fileno(), process.encode())  # `close` would write a buffer again
    except BaseException:
        file.close()
        raise
    _held[place] = file
    return file


_REASONER = ("rac_modifier", "reasoner", "assets")  # the embedded model; its name is "reasoner"


def public_name(name: str | Path) -> str:
    """Return the last name of an absolute path, or in the hub's cache the hub id; else `name`."""
    text = str(name)
    if not _is_absolute(text):
        return text
    folders = PureWindowsPath(text).parts
    if folders[-3:] == _REASONER:
        return "reasoner"
    if folders[-2:-1] == ("snapshots",) and folders[-3].startswith("models--"):
        return folders[-3].removeprefix("models--").replace("--", "/")
    return folders[-1]


def without_paths(value: Any) -> Any:
    """Return a copy of a record with the public names of its absolute paths, also within texts."""
    return _replaced(value, sorted(set(_paths(value)), key=len, reverse=True))


def text_without_paths(text: str, parsed: Any) -> str:
    """Return the text of a file without the absolute paths of what was parsed from it."""
    return str(_replaced(text, sorted(set(_paths(parsed)), key=len, reverse=True)))


def _is_absolute(text: str) -> bool:
    """Return whether a string is an absolute path of two names or more, unlike "/no_think".

    A prompt is none either: "/no_think Answer in SI/metric units." has spaces in its first name.
    """
    path = PureWindowsPath(text)  # splits at both kinds of slash
    rooted = text.startswith(("/", "~/", "file:///")) or bool(path.drive and path.root)
    worded = text.startswith("/") and " " in text.split("/")[1]
    named = (len(path.parts) > 2 and not worded) or (len(path.parts) >= 2 and os.path.exists(text))
    return rooted and named and "\n" not in text


def _paths(value: Any) -> Iterator[str]:
    if isinstance(value, (str, Path)):
        if _is_absolute(str(value)):
            yield str(value)
    elif isinstance(value, Mapping):
        yield from _paths([*value.keys(), *value.values()])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _paths(item)


def _replaced(value: Any, paths: list[str]) -> Any:
    if isinstance(value, (str, Path)):
        text = str(value)
        for path in paths:
            text = text.replace(path, public_name(path))
        return text
    if isinstance(value, Mapping):
        return {_replaced(key, paths): _replaced(item, paths) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_replaced(item, paths) for item in value]
    return value
