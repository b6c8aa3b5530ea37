"""New files of a folder that are put in place together, and never half of them.

All new files are first written under temporary names: a full disk or a crash up to there leaves
the folder unchanged. Then a journal that lists the renames is written, the files are renamed, and
the journal is removed. After a crash between two renames `TensorFiles` refuses the folder, and
the next call for the same job finishes the renames. A lock file keeps a second process out; it
holds only as long as the process that took it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import save_file
from torch import Tensor

from rac_modifier.checkpoint.files import CONFIG_FILE, JOURNAL_FILE, is_file_name
from rac_modifier.errors import RacError
from rac_modifier.files import read_json, write_json_atomic

TEMPORARY = ".rac_new."
LOCK_FILE = ".rac_packing.lock"
STAGING = ".rac_saving"  # a folder in the output folder, in which a model is saved
Summary = TypeVar("Summary")


def is_leftover(name: str) -> bool:
    """Tell whether a job that was cut off left this file, and the next job may remove it."""
    return name in (LOCK_FILE, STAGING) or _is_temporary(name)


def _is_temporary(name: str) -> bool:
    """Tell whether a file is temporary: a new file, or one that writing JSON starts with."""
    return name.startswith((TEMPORARY, f".{TEMPORARY}", f".{JOURNAL_FILE}."))


def move_into_place(staging: Path, folder: Path) -> None:
    """Move what was saved in `staging` up into its folder, config.json last.

    Without config.json no loader takes the folder for a model, so a kill leaves a whole model
    or none.
    """
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    _sync_folder(staging)
    for path in sorted(staging.iterdir(), key=lambda path: (path.name == CONFIG_FILE, path.name)):
        os.replace(path, folder / path.name)
    _sync_folder(folder)
    staging.rmdir()


class NewFiles:
    """The new files of one folder. A context manager that holds the folder's lock.

    Leaving it without `commit` removes what was written, and the folder where it was made here.
    `create`: make the folder.

    Raises:
        RacError: another process writes to the folder, or it cannot be made or locked.
    """

    def __init__(self, folder: Path, create: bool = False) -> None:
        self.folder, self._create = folder, create
        self._made, self._lock = False, -1
        self._journal = folder / JOURNAL_FILE

    def __enter__(self) -> NewFiles:
        try:
            if self._create and not self.folder.exists():
                self.folder.mkdir(parents=True)
                self._made = True
            self._lock = _locked(self.folder)
        except OSError as error:
            raise RacError(
                f"{self.folder}: cannot be written to ({error}); name another folder"
            ) from error
        self._remove_temporaries()
        return self

    def __exit__(self, *_: object) -> None:
        self._remove_temporaries()
        (self.folder / LOCK_FILE).unlink(missing_ok=True)
        os.close(self._lock)
        if self._made and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def path(self, name: str) -> Path:
        """Return where the new file `name` is written."""
        return self.folder / (TEMPORARY + name)

    def write_json(self, name: str, obj: Any) -> None:
        """Write a new JSON file."""
        write_json_atomic(self.path(name), obj)

    def write_tensors(
        self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]
    ) -> None:
        """Write a new safetensors file, mode 644."""
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, self.path(name), metadata=metadata)
        _sync(self.path(name))

    def copy(self, source: Path) -> None:
        """Write a new file of the same name with the content of `source`."""
        shutil.copyfile(source, self.path(source.name))
        _sync(self.path(source.name))

    def commit(self, job: str, names: list[str], summary: dict[str, Any]) -> None:
        """Put the new files in place, in this order. `job`, `summary`: for a call of `finish`."""
        _sync_folder(self.folder)
        write_json_atomic(self._journal, {"job": job, "files": names, "summary": summary})
        self._rename(names)

    def finish(self, job: str, parse: Callable[[Any], Summary]) -> Summary | None:
        """Make the renames that an earlier call left; return its summary, None for no renames.

        Raises:
            RacError: the journal is damaged, or is that of another job.
        """
        if not self._journal.exists():
            return None
        journal = read_json(self._journal)
        try:
            names, summary = journal["files"], parse(journal["summary"])
            self._check_journal(names)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RacError(
                f"{self._journal}: is damaged ({error!r}); save the model again"
            ) from error
        if journal.get("job", job) != job:
            raise RacError(
                f"{self.folder}: another job was cut off here ({journal['job']!r}); "
                "run that one again to finish it, or name another folder"
            )
        self._rename(names)
        return summary

    def _check_journal(self, names: list[str]) -> None:
        """Refuse a list of renames that cannot make a checkpoint of this folder (ValueError)."""
        if not isinstance(names, list) or not all(map(is_file_name, names)):
            raise ValueError(f"{names!r} is no list of file names of this folder")
        if CONFIG_FILE not in names:
            raise ValueError(f"{CONFIG_FILE} is not among its files")
        for name in names:
            if not (self.path(name).exists() or (self.folder / name).exists()):
                raise ValueError(f"{name} is lost")

    def _rename(self, names: list[str]) -> None:
        for name in names:
            # A missing file has been renamed before. Any other error stops here, and the
            # journal stays.
            with contextlib.suppress(FileNotFoundError):
                os.replace(self.path(name), self.folder / name)
        _sync_folder(self.folder)
        self._journal.unlink()

    def _remove_temporaries(self) -> None:
        """Remove temporary files unless a journal says that the next call renames them."""
        if not self._journal.exists():
            for path in [path for path in self.folder.iterdir() if _is_temporary(path.name)]:
                path.unlink()


def _locked(folder: Path) -> int:
    """Return a locked descriptor of the folder's lock file; it is free when the process ends."""
    path = folder / LOCK_FILE
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The process that held the lock may have removed its file since it was opened here:
            # then lock the new one.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
        except BlockingIOError as error:
            os.close(descriptor)
            raise RacError(
                f"{folder}: another process is writing to it; wait for that one to end, "
                "or name another folder"
            ) from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _sync(path: Path) -> None:
    os.chmod(path, 0o644)
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
