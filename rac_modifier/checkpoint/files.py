"""The safetensors files of a checkpoint folder, read one tensor at a time by name."""

import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rac_modifier.errors import RacError, refusing
from rac_modifier.runtime.files import CONFIG_FILE as CONFIG_FILE
from rac_modifier.runtime.files import read_json, regular_file, replacing

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_SMALL_HEADER = 1 << 20  # bytes; a longer one is at most a quarter of its file
_NAME_LENGTH, _LONG_NUMBER = 256, re.compile(r"\d{20}")
_UNREADABLE = ("copy the model again", SafetensorError, OSError)

_DTYPES = {
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "BOOL": torch.bool,
    **{f"F{bits}": getattr(torch, f"float{bits}") for bits in (16, 32, 64)},
    **{f"I{bits}": getattr(torch, f"int{bits}") for bits in (8, 16, 32, 64)},
    **{f"U{bits}": getattr(torch, f"uint{bits}") for bits in (8, 16, 32, 64)},
}


class TensorFiles:
    """All tensors of a folder by name; opening reads only the headers. A context manager.

    `where` maps tensor names to file names; `index` is the index file, None for a single file.
    RacError: no safetensors, a malformed index or file, a tensor of the index that its file lacks.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise RacError(
                f"{self.folder}: no such folder; give that of a saved model (download it first)"
            )
        self.index: dict[str, Any] | None = None
        self._files: dict[str, Any] = {}
        self.where = self._locate()

    def _locate(self) -> dict[str, str]:
        index, single = self.folder / INDEX_FILE, self.folder / SINGLE_FILE
        if index.exists() and single.exists():
            raise RacError(
                f"{self.folder}: holds both {SINGLE_FILE} and {INDEX_FILE}, and loaders disagree "
                "which of them is the model; remove the one that is not"
            )
        if single.exists():
            return dict.fromkeys(self._open(SINGLE_FILE), SINGLE_FILE)
        if not index.exists():
            raise RacError(
                f"{self.folder}: no {SINGLE_FILE} or {INDEX_FILE}; save the model as safetensors"
            )
        self.index = read_json(index)
        where = _check_weight_map(self.index, index)
        names = {file: set(self._open(file)) for file in sorted(set(where.values()))}
        for name, file in where.items():
            if name not in names[file]:
                raise RacError(
                    f"{name}: in the index, but not in {self.folder / file}; copy the model again"
                )
        if not isinstance(self.index.get("metadata"), dict):  # transformers fails without
            raise RacError(f"{index}: has no metadata; save the model again")
        return where

    def _open(self, file: str) -> list[str]:
        """Open a file, whose header safetensors checks, and return the names of its tensors."""
        path = regular_file(self.folder / file, "safetensors file")
        with refusing(f"{path}: cannot be read as safetensors", *_UNREADABLE):
            with path.open("rb") as opened:
                header = int.from_bytes(opened.read(8), "little")
            if header > max(_SMALL_HEADER, path.stat().st_size // 4):
                raise OSError(f"a header of {header:,} bytes, more than a quarter of the file")
            self._files[file] = safe_open(path, framework="pt", backend="pread")
        names: list[str] = self._files[file].keys()
        for name in names:
            if not name.isprintable():  # a terminal would obey an escape sequence
                raise RacError(
                    f"{path}: tensor name {name!r} holds control characters; copy the model again"
                )
            if len(name) > _NAME_LENGTH or _LONG_NUMBER.search(name):  # patterns would take long
                raise RacError(
                    f"{path}: tensor name {name[:80]!r}... has {len(name):,} characters, or a "
                    f"number of 20 digits; save the model with names of at most {_NAME_LENGTH}"
                )
        return names

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()  # which closes them

    def __contains__(self, name: str) -> bool:
        return name in self.where

    def tensor(self, name: str) -> Tensor:
        """Read one tensor into memory of its own (RacError: it is missing, or cannot be read)."""
        file = self._file(name)
        path = self.folder / self.where[name]
        self.dtype(name)  # torch has no C64 or F4 of safetensors' own
        with refusing(f"{name}: cannot be read from {path}", *_UNREADABLE):
            tensor: Tensor = file.get_tensor(name)
        return tensor

    def tensors(self, module: str, parts: Iterable[str]) -> dict[str, Tensor]:
        """Read the tensors `{module}.{part}` that exist, by part (RacError: as `tensor`)."""
        names = {part: f"{module}.{part}" for part in parts}
        return {part: self.tensor(name) for part, name in names.items() if name in self.where}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape in the file's header."""
        return tuple(self._file(name).get_slice(name).get_shape())

    def dtype_name(self, name: str) -> str:
        """Return the dtype in safetensors' spelling, such as "BF16"."""
        return str(self._file(name).get_slice(name).get_dtype())

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype as torch has it (RacError: it is not supported)."""
        spelt = self.dtype_name(name)
        if spelt not in _DTYPES:
            raise RacError(
                f"{name}: {spelt} is not supported; save the model in one of {', '.join(_DTYPES)}"
            )
        return _DTYPES[spelt]

    def nbytes(self, name: str) -> int:
        """Return the bytes that the tensor takes in the file."""
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def _file(self, name: str) -> Any:
        """Return the open file of a tensor."""
        if name not in self.where:
            raise RacError(f"{name}: not in {self.folder}; copy or save the model again")
        return self._files[self.where[name]]


def _check_weight_map(index: dict[str, Any], path: Path) -> dict[str, str]:
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise RacError(f"{path}: has no weight_map; save the model again")
    for name, file in weight_map.items():
        is_name = isinstance(file, str) and file not in ("", ".", "..") and file.isprintable()
        if not is_name or Path(file).name != file:
            raise RacError(f"{path}: {name!r}: no file {file!r} here; copy the model again")
    return dict(weight_map)


def write_tensors_atomic(path: Path, tensors: Mapping[str, Tensor], about: dict[str, str]) -> None:
    """Write tensors with metadata `about`, mode 644; a reader sees the old file or the new one.

    OSError, SafetensorError: the file cannot be written, and the old file is unchanged.
    """
    with replacing(path) as new:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new, about)
