"""Compiled kernels on disk, so that each is compiled once per machine and not once per process.

An entry is valid for one source, one set of options, one NVRTC version and one architecture: its name is a digest of these. It
begins with a digest of its own content, so that a cut or changed file is compiled again. The folder is the user's own:
RAC_GPU_CACHE, or rac_modifier/gpu in XDG_CACHE_HOME or ~/.cache. Where there is no home, or the folder cannot be written or
others can write to it, nothing is kept and the log says so, once per process and reason.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
import tempfile
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

logger = logging.getLogger(__name__)
VARIABLE = "RAC_GPU_CACHE"
_MAGIC = b"rac-cubin-1\n"
_DIGEST_BYTES = 32


def folder() -> Path | None:
    """Where entries are kept; None where no variable names a folder and the user has no home, as in some containers."""
    if chosen := os.environ.get(VARIABLE):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "rac_modifier" / "gpu"
    except RuntimeError:  # neither HOME nor an entry in the table of users
        return None


def key_of(*parts: str) -> str:
    """The name of an entry: a digest of everything that its content depends on."""
    return hashlib.sha256("".join(f"{len(part)}:{part}" for part in parts).encode()).hexdigest()


def cached(key: str, build: Callable[[], bytes]) -> bytes:
    """The entry `key`, or what `build` returns, which then is kept."""
    place = folder()
    refused = f"user {os.getuid()} has no home folder" if place is None else _prepare(place)
    kept = None if place is None or refused is not None else place / f"{key}.cubin"
    if kept is not None and (found := _read(kept, key)) is not None:
        return found
    content = build()
    if kept is not None:
        refused = _write(kept, _header(key, content) + content)
    if refused is not None:
        _warn(refused)
    return content


@lru_cache(maxsize=64)  # once per reason, not once per layout
def _warn(refused: str) -> None:
    logger.warning(
        "compiled GPU kernels are not kept, each process compiles them: %s; set %s",
        refused,
        VARIABLE,
    )


def _prepare(place: Path) -> str | None:
    """Create the folder; the reason if it cannot be used."""
    try:
        place.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = place.stat()
    except OSError as error:
        return f"{place} cannot be used ({error.strerror})"
    if found.st_uid != os.getuid() or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{place} belongs to another user, or others can write to it"
    return None


def _header(key: str, content: bytes) -> bytes:
    return _MAGIC + hashlib.sha256(key.encode() + content).digest()


def _read(path: Path, key: str) -> bytes | None:
    try:
        entry = path.read_bytes()
    except OSError:
        return None
    content = entry[len(_MAGIC) + _DIGEST_BYTES :]
    return content if content and entry == _header(key, content) + content else None


def _write(path: Path, entry: bytes) -> str | None:
    """Write through a temporary file, mode 600; the reason if it cannot be."""
    try:
        handle, temporary = tempfile.mkstemp(
            dir=path.parent, prefix=f".{path.name}.", suffix=".tmp"
        )
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(entry)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    except OSError as error:
        return f"{path.parent} cannot be written ({error.strerror})"
    return None
