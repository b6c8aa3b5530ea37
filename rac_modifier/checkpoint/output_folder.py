"""The folders that a command reads a model from and writes to, checked before the work."""

from __future__ import annotations

import shutil
from pathlib import Path

from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError

from rac_modifier.checkpoint.files import JOURNAL_FILE
from rac_modifier.checkpoint.new_files import is_leftover
from rac_modifier.checkpoint.sparsity_config import CONFIG_FILE
from rac_modifier.errors import RacError
from rac_modifier.files import read_json

# What a checkpoint of safetensors consists of; the weights in other formats are not downloaded.
_WANTED = [
    "*.safetensors",
    "*.json",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.md",
    "*.py",
    "LICENSE*",
    "NOTICE*",
]


def folder_problem(folder: Path) -> str | None:
    """Say why this is no folder of a saved model; None where it is one, or was being packed."""
    files = [folder] if folder.is_file() else sorted(folder.glob("*"))
    if any((folder / name).is_file() for name in (CONFIG_FILE, JOURNAL_FILE)):
        return None
    if any(file.suffix.lower() == ".gguf" for file in files):
        return "GGUF, which is not read; take the model that it was made from, with its safetensors files"
    if folder.is_file():
        return "a file; name the folder that it is in"
    return f"no {CONFIG_FILE} is in it" if folder.is_dir() else "no such folder"


def check_is_id(model: str | Path) -> None:
    """Refuse what can be no hub id without asking the network (RacError)."""
    if str(model).count("/") != 1 or str(model)[0] in "./~":
        raise RacError(
            f"{model}: no such folder; give the folder of a saved model, or a hub id as owner/name"
        )


def local_folder(model: str | Path, revision: str | None = None) -> Path:
    """Return the folder itself, or that of a hub id in the hub's cache, downloaded first if needed.

    Raises:
        RacError: no such folder or model.
    """
    if Path(model).exists():
        if problem := folder_problem(Path(model)):
            raise RacError(
                f"{model}: {problem}; give the folder of a saved model, or a hub id as owner/name"
            )
        return Path(model)
    check_is_id(model)
    try:
        return Path(snapshot_download(str(model), revision=revision, allow_patterns=_WANTED))
    except (OSError, ValueError) as error:
        raise RacError(
            f"{model}: neither a folder nor a model that can be had from the hub "
            f"({str(error).strip().splitlines()[0]}); check the name, and the network"
        ) from error


def check_output_folder(folder: Path, source: Path | None, need: int) -> None:
    """Refuse a folder that the result could not be written to, before hours of work.

    Args:
        folder: need not exist. What a job that was cut off left there is no obstacle.
        source: the folder that is read.
        need: bytes that must be free.

    Raises:
        RacError: a file, or a folder in a file, the source itself, a folder that is not empty,
            or too little disk space.
    """
    if folder.exists() and not folder.is_dir():
        raise RacError(f"output {folder} is a file; name a folder")
    if source is not None and folder.resolve() == source.resolve():
        raise RacError(
            f"output folder {folder} is the model itself, which is left as it is; name "
            "another folder"
        )
    if folder.is_dir() and any(not is_leftover(path.name) for path in folder.iterdir()):
        raise in_use(folder)
    parent = _existing(folder)
    if not parent.is_dir():
        raise RacError(
            f"output {folder}: {parent} is a file, so no folder can be made in it; name "
            "another folder"
        )
    check_room(folder, need)


def check_room(folder: Path, need: int, groups: int = 0) -> None:
    """Refuse a folder on a disk with too little space.

    Args:
        folder: need not exist.
        need: bytes that the checkpoint takes at most while it is packed.
        groups: bytes that a pruning run keeps next to the folder. Files of an earlier run count
            as written.

    Raises:
        RacError: with the bytes that are free and needed.
    """
    groups = max(
        groups - sum(file.stat().st_size for file in unfinished(folder).glob("*.safetensors")), 0
    )
    free = shutil.disk_usage(_existing(folder)).free
    if free < need + groups:
        also = (
            f", and what is pruned so far up to {groups / 2**30:.1f} GiB next to it"
            if groups
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
    """Return the bytes of the weights of a folder, or of a hub id in the cache; else None.

    No network is used.
    """
    if Path(model).is_dir():
        files = list(Path(model).glob("*.safetensors")) or list(Path(model).glob("*.bin"))
        return sum(file.stat().st_size for file in files)
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (index := _cached(model, f"{name}.index.json")) is not None:
            total = read_json(index).get("metadata", {}).get("total_size")
            return int(total) if total else None
        if (file := _cached(model, name)) is not None:
            return file.stat().st_size
    return None


def cached_folder(model: str) -> Path | None:
    """Return the folder itself, or that of a hub id in the cache; None without network."""
    if Path(model).is_dir():
        return Path(model)
    config = _cached(model, CONFIG_FILE)
    return config.parent if config is not None else None


def _cached(model: str, name: str) -> Path | None:
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


def in_use(folder: Path) -> RacError:
    """Return the error for an output folder that is not empty, with the next step."""
    if unfinished(folder).is_dir():
        return RacError(
            f"output folder {folder} is in use: the run that keeps what is pruned so far in "
            f"{unfinished(folder)} was stopped while it saved, or another process is at it "
            f"now. If it was stopped, remove {folder} and start the same run again: what is "
            "pruned is not pruned again"
        )
    return RacError(f"output folder {folder} is in use; name an empty or a new one")
