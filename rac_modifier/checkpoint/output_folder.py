"""The folders that a command reads a model from and writes to, checked before the work.

New files are first written into a hidden folder in the output folder: a full disk or a crash
leaves the output folder unchanged. Then they are moved up, config.json last. Without config.json
no loader takes the folder for a model.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from rac_modifier.checkpoint.files import CONFIG_FILE
from rac_modifier.errors import RacError
from rac_modifier.files import lock, write_json_atomic

STAGING = ".rac_saving"
# What a checkpoint of safetensors consists of; the weights in other formats are not downloaded.
_DOWNLOADED = [
    *("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "*.py"),
    *("LICENSE*", "NOTICE*"),
]


class NewFiles:
    """The new files of a folder, moved into place together at the end. A context manager.

    An error in its body removes what was written. It locks the folder against other processes.

    Raises:
        RacError: another process writes to the folder, or it cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._staging = folder, folder / STAGING
        self._is_new = not folder.exists()

    def __enter__(self) -> NewFiles:
        try:
            self._staging.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._staging, os.O_RDONLY)  # locked until it is closed
        except OSError as error:
            raise RacError(
                f"{self.folder}: cannot be written to ({error}); name another folder"
            ) from error
        if not lock(self._lock, self.folder, patience=0):
            os.close(self._lock)
            raise RacError(
                f"{self.folder}: another process is writing to it; wait for that one to end, "
                "or name another folder"
            )
        for path in self._staging.iterdir():  # what a kill left
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                move_into_place(self._staging, self.folder)
                return
            shutil.rmtree(self._staging, ignore_errors=True)
            if self._is_new and not any(self.folder.iterdir()):
                self.folder.rmdir()
        finally:
            os.close(self._lock)
        if isinstance(error, (OSError, SafetensorError)):
            raise RacError(
                f"{self.folder}: cannot be written ({error}); it is as before, make room and try "
                "again"
            ) from error

    def path(self, name: str) -> Path:
        """Return where the new file `name` is written."""
        return self._staging / name

    def write_json(self, name: str, obj: Any) -> None:
        """Write a new JSON file."""
        write_json_atomic(self.path(name), obj)

    def write_tensors(
        self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]
    ) -> None:
        """Write a new safetensors file, mode 644."""
        contiguous = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, self.path(name), metadata=metadata)
        self.path(name).chmod(0o644)

    def copy(self, source: Path) -> None:
        """Write a new file of the same name with the content of `source`."""
        shutil.copyfile(source, self.path(source.name))


def move_into_place(staging: Path, folder: Path) -> None:
    """Move the files in `staging` up into its folder, config.json last."""
    for path in [*staging.iterdir(), staging]:
        _sync(path)
    if (staging / CONFIG_FILE).exists():
        (folder / CONFIG_FILE).unlink(missing_ok=True)
    for path in sorted(staging.iterdir(), key=lambda path: (path.name == CONFIG_FILE, path.name)):
        os.replace(path, folder / path.name)
    _sync(folder)
    staging.rmdir()


def _sync(path: Path) -> None:
    """Write a file or folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def folder_problem(folder: Path) -> str | None:
    """Say why this is no folder of a saved model; None where it is one."""
    if (folder / CONFIG_FILE).is_file():
        return None
    files = [folder] if folder.is_file() else folder.glob("*")
    if any(file.suffix.lower() == ".gguf" for file in files):
        return (
            "GGUF, which is not read; take the model that it was made from, with its "
            "safetensors files"
        )
    if folder.is_file():
        return "a file; name the folder that it is in"
    return f"no {CONFIG_FILE} is in it" if folder.is_dir() else "no such folder"


def check_is_id(model: str | Path) -> None:
    """Refuse what can be no hub id without asking the network (RacError)."""
    if str(model).count("/") != 1 or str(model)[0] in "./~":
        raise RacError(
            f"{model}: no such folder; give the folder of a saved model, or a hub id as owner/name"
        )


def local_folder(model: str | Path) -> Path:
    """Return the folder itself, or a hub id's, downloaded if needed (RacError)."""
    if Path(model).exists():
        if problem := folder_problem(Path(model)):
            raise RacError(
                f"{model}: {problem}; give the folder of a saved model, or a hub id as owner/name"
            )
        return Path(model)
    check_is_id(model)
    try:
        return Path(snapshot_download(str(model), allow_patterns=_DOWNLOADED))
    except (OSError, ValueError) as error:
        raise RacError(
            f"{model}: neither a folder nor a model that can be had from the hub "
            f"({str(error).strip().splitlines()[0]}); check the name, and the network"
        ) from error


def check_output_folder(folder: Path, source: Path | None, need: int) -> None:
    """Refuse a folder that the result could not be written to, before hours of work (RacError).

    Args:
        folder: need not exist. The hidden folder of a job that was killed is no obstacle.
        source: the folder that is read.
        need: bytes that must be free.
    """
    if folder.exists() and not folder.is_dir():
        raise RacError(f"output {folder} is a file; name a folder")
    if source is not None and folder.resolve() == source.resolve():
        raise RacError(
            f"output folder {folder} is the model itself, which is left as it is; name "
            "another folder"
        )
    if folder.is_dir() and any(path.name != STAGING for path in folder.iterdir()):
        raise RacError(f"output folder {folder} is in use; {_next_step(folder)}")
    parent = _existing(folder)
    if not parent.is_dir():
        raise RacError(
            f"output {folder}: {parent} is a file, so no folder can be made in it; name "
            "another folder"
        )
    check_room(folder, need)


def check_room(folder: Path, need: int, groups: int = 0) -> None:
    """Refuse a folder on a disk with too little space (RacError).

    Args:
        folder: need not exist.
        need: bytes that the checkpoint takes at most while it is packed.
        groups: bytes that a pruning run keeps next to the folder. Files of an earlier run count
            as written.
    """
    groups -= sum(file.stat().st_size for file in unfinished(folder).glob("*.safetensors"))
    free = shutil.disk_usage(_existing(folder)).free
    if free < need + max(groups, 0):
        also = (
            f", and what is pruned so far up to {groups / 2**30:.1f} GiB next to it"
            if groups > 0
            else ""
        )
        raise RacError(
            f"{folder}: {free / 2**30:.1f} GiB are free, the checkpoint needs up to "
            f"{need / 2**30:.1f} GiB while it is packed{also}; free some or name a folder "
            "on another disk"
        )


def _existing(folder: Path) -> Path:
    """Return the folder, or what exists of the path to it."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def bytes_of_weights(model: str) -> int | None:
    """Return the bytes of the weights of a folder, or of a hub id in the cache; else None."""
    if (folder := cached_folder(model)) is None:
        return None
    files = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    return sum(file.stat().st_size for file in files) or None


def cached_folder(model: str) -> Path | None:
    """Return the folder itself, or a hub id's folder in the cache; None: not cached."""
    if Path(model).is_dir():
        return Path(model)
    config = cached_file(model, CONFIG_FILE)
    return config.parent if config is not None else None


def cached_file(model: str, name: str) -> Path | None:
    """Return a file of a hub id, where it is in the hub's cache."""
    try:
        path = try_to_load_from_cache(model, name)
    except HFValidationError:
        return None
    return Path(path) if isinstance(path, str) else None


def unfinished(output: str | Path) -> Path:
    """Return where a pruning run keeps what it has pruned until its result is saved."""
    folder = Path(output)
    return folder.with_name(f"{folder.name}.unfinished")


def _next_step(folder: Path) -> str:
    if not unfinished(folder).is_dir():
        return "name an empty or a new one"
    return (
        f"the run that keeps what is pruned so far in {unfinished(folder)} was stopped while it "
        f"saved, or another process is at it now. If it was stopped, remove {folder} and start "
        "the same run again: what is pruned is not pruned again"
    )
