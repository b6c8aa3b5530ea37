"""The folders that a command reads a model from and writes to, checked before the work.

New files are first written into a hidden folder in the output folder: a full disk or a crash
leaves it unchanged. Then they are moved up, config.json last, without which it is no model.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError

from rac_modifier.errors import RacError, refusing
from rac_modifier.runtime.files import CONFIG_FILE, hold, lock

STAGING = ".rac_saving"
# What a checkpoint of safetensors consists of; the weights in other formats are not downloaded.
_DOWNLOADED = [
    *("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md", "*.py"),
    *("LICENSE*", "NOTICE*"),
]


@contextmanager
def new_files(folder: Path) -> Iterator[Path]:
    """Yield a folder for new files, which are moved into place at the end.

    RacError, with `folder` as before: another process writes to it, or it cannot be written to.
    """
    staging, is_new = folder / STAGING, not folder.exists()
    with refusing(f"{folder}: cannot be written to", "name another folder", OSError):
        staging.mkdir(parents=True, exist_ok=True)
        locked = os.open(staging, os.O_RDONLY)  # until it is closed
    try:
        if not lock(locked, folder, patience=0):
            raise RacError(
                f"{folder}: another process writes to it; wait for its end, or name another folder"
            )
        for path in staging.iterdir():  # what a kill left
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield staging
        except BaseException as error:
            shutil.rmtree(staging, ignore_errors=True)
            if is_new and not any(folder.iterdir()):
                folder.rmdir()
            if isinstance(error, (OSError, SafetensorError)):
                raise RacError(
                    f"{folder}: cannot be written ({error}); it is as before; make room and retry"
                ) from error
            raise
        move_into_place(staging, folder)
    finally:
        os.close(locked)


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
        return "GGUF, which is not read; take the safetensors files that it was made from"
    if folder.is_file():
        return "a file; name the folder that it is in"
    return f"no {CONFIG_FILE} is in it" if folder.is_dir() else "no such folder"


def check_is_id(model: str | Path) -> None:
    """Refuse what can be no hub id without asking the network (RacError)."""
    if str(model).count("/") != 1 or str(model)[0] in "./~":
        raise RacError(f"{model}: no such folder; give a saved model's, or a hub id as owner/name")


def local_folder(model: str | Path) -> Path:
    """Return the folder itself, or a hub id's, downloaded if needed (RacError)."""
    if Path(model).exists():
        if problem := folder_problem(Path(model)):
            raise RacError(f"{model}: {problem}; give a model's folder, or a hub id as owner/name")
        return Path(model)
    check_is_id(model)
    try:
        return Path(snapshot_download(str(model), allow_patterns=_DOWNLOADED))
    except (OSError, ValueError) as error:
        raise RacError(
            f"{model}: neither a folder nor a model that can be had from the hub "
            f"({str(error).strip().splitlines()[0]}); check the name, and the network"
        ) from error


def check_output_folder(folder: Path, source: Path | None = None) -> None:
    """Refuse a folder that the result could not be written to, before hours of work (RacError)."""
    existing = _existing(folder)
    if not existing.is_dir():
        raise RacError(f"output {folder}: {existing} is a file; name another folder")
    if source is not None and source.is_dir() and folder.resolve() == source.resolve():
        raise RacError(
            f"output folder {folder} is the model itself, which is left as it is; name another"
        )
    if existing == folder.absolute() and any(path.name != STAGING for path in folder.iterdir()):
        what = "holds a model" if (folder / CONFIG_FILE).exists() else "is in use"
        raise RacError(f"output folder {folder} {what}; name an empty or a new one")


def check_room(folder: Path, need: int, groups: int = 0) -> None:
    """Refuse a folder on a disk with too little space (RacError); it need not exist.

    `need`: bytes that the checkpoint takes at most while it is packed. `groups`: bytes that a
    pruning run keeps next to the folder; files of an earlier run count as written.
    """
    groups -= sum(file.stat().st_size for file in unfinished(folder).glob("*.safetensors"))
    groups, free = max(groups, 0), shutil.disk_usage(_existing(folder)).free
    if free < need + groups:
        raise RacError(
            f"{folder}: {free / 2**30:.1f} GiB are free, the checkpoint needs up to "
            f"{need / 2**30:.1f} GiB while it is packed, and what is pruned so far up to "
            f"{groups / 2**30:.1f} GiB next to it; free some or name a folder on another disk"
        )


def _existing(folder: Path) -> Path:
    """Return the folder, or what exists of the path to it."""
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def bytes_of_weights(model: str) -> int | None:
    """Return the bytes of the weights of a folder, or of a hub id in the cache; else None."""
    config = Path(model, CONFIG_FILE) if Path(model).is_dir() else cached_file(model, CONFIG_FILE)
    if config is None:
        return None
    for pattern in ("model*.safetensors", "*.safetensors", "*.bin"):  # the first one is loaded
        if size := sum(file.stat().st_size for file in config.parent.glob(pattern)):
            return size
    return None


def cached_file(model: str, name: str) -> Path | None:
    """Return a file of a hub id, where it is in the hub's cache."""
    try:
        path = try_to_load_from_cache(model, name)
    except HFValidationError:
        return None
    return Path(path) if isinstance(path, str) else None


def unfinished(output: str | Path) -> Path:
    """Return where a pruning run keeps what it has pruned until its result is saved."""
    return Path(f"{os.path.abspath(output)}.unfinished")  # "." and ".." have no name


@contextmanager
def reserved(output: Path | None, *, writes: bool = True) -> Iterator[None]:
    """Hold an output folder for one command, by the lock that a pruning run takes over (RacError).

    The lock's folder stays where a pruning run keeps groups in it.
    """
    if output is None or not writes:
        yield
        return
    folder = unfinished(output)
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    lock_file = hold(folder, "name another output folder")
    try:
        yield
    finally:
        if [path.name for path in folder.glob("*")] == [".lock"]:
            (folder / ".lock").unlink()
        for place in {folder: None, **dict.fromkeys(new)}:
            with suppress(OSError):  # it is not empty
                place.rmdir()
        lock_file.close()
