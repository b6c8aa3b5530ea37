"""The compiled library: finding it, what it runs here, and its calls with torch tensors checked before it sees them.

RAC_KERNEL=portable|avx2|avx512|amx takes a lower instruction set than the best one, and RAC_KERNEL=off none at all.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import c_char_p, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from rac_modifier.errors import RacError

ISAS = ("portable", "avx2", "avx512", "amx")  # the library's numbers for them
TYPES = {torch.bfloat16: 0, torch.float32: 1}  # of x, bias and results
VALUE_TYPES = {**TYPES, torch.int8: 2}
DENSE8 = 3  # a weight of int8 without masks
_NUMBER = {isa: number for number, isa in enumerate(ISAS)}
_TITLES = {"portable": "portable", "avx2": "AVX2", "avx512": "AVX512", "amx": "AMX"}
_NEXT_STEP = "install a C++ compiler and reinstall rac-modifier"
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "rac_best_isa": (c_int32, []),
    "rac_compiler": (c_char_p, []),
    "rac_bytes": (c_int64, [c_int64, c_int64, c_int64, c_int32]),
    "rac_pack": (c_char_p, [c_void_p, c_int64, c_void_p, c_int64, c_int64, c_int32, c_void_p, c_int64, c_int32]),
    "rac_check": (c_char_p, [c_void_p, c_int64, c_int64, c_int64, c_int32]),
    "rac_type": (c_int32, [c_void_p, c_int64]),
    "rac_expand": (
        c_char_p,
        [c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int32, c_int64, c_int32, c_int32],
    ),
    "rac_linear": (
        c_char_p,
        [
            c_void_p,
            c_int64,
            c_int64,
            c_int64,
            c_void_p,
            c_int32,
            c_int64,
            c_void_p,
            c_int64,
            c_void_p,
            c_int32,
            c_void_p,
            c_int32,
            c_int32,
        ],
    ),
}


@dataclass(frozen=True)
class Support:
    """What runs on this machine: `isa` is "amx", "avx512", "avx2", "portable" or None; `reason` is a line for people."""

    isa: str | None
    reason: str


class Library:
    """The calls of one compiled library. Callers pass contiguous CPU tensors; a refusal becomes a RacError."""

    def __init__(self, path: Path) -> None:
        """Raise OSError or AttributeError if the file is no such library."""
        self._calls = ctypes.CDLL(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            call = getattr(self._calls, name)
            call.restype, call.argtypes = result, arguments
        self.best = ISAS[self._calls.rac_best_isa()]
        self.compiler: str = self._calls.rac_compiler().decode()

    def bytes(self, rows: int, columns: int, nonzeros: int, kind: int) -> int:
        """Bytes of a packed weight of a type (`VALUE_TYPES`, `DENSE8`), -1 for sizes that there cannot be."""
        limit = 1 << 62
        if not all(-limit < size < limit for size in (rows, columns, nonzeros)):
            return -1
        return self._calls.rac_bytes(rows, columns, nonzeros, kind)

    def pack(self, values: Tensor, bitmask: Tensor | None, rows: int, columns: int, kind: int, data: Tensor) -> None:
        """Fill `data`, of `bytes` bytes; no bitmask for `DENSE8`."""
        where, count = values.data_ptr(), values.numel()
        masks = None if bitmask is None else bitmask.data_ptr()
        room, threads = data.numel(), torch.get_num_threads()
        _raise_if(
            self._calls.rac_pack(where, count, masks, rows, columns, kind, data.data_ptr(), room, threads),
            "the sparse weight cannot be packed",
        )

    def check(self, data: Tensor, rows: int, columns: int, kind: int) -> None:
        """Everything of packed data that a kernel relies on."""
        wrong = self._calls.rac_check(data.data_ptr(), data.numel(), rows, columns, kind)
        _raise_if(wrong, f"packed weight [{rows}, {columns}]: damaged")

    def kind(self, data: Tensor) -> int:
        """The type of the values, from the header; -1 where it is damaged."""
        return self._calls.rac_type(data.data_ptr(), data.numel())

    def expand(self, data: Tensor, first: int, last: int, out: Tensor, isa: str) -> None:
        """Panels [first, last) of 16 rows into `out` [columns, 16 (last - first)]: the transposed rows, unscaled."""
        where, room, threads = data.data_ptr(), data.numel(), torch.get_num_threads()
        kind, stride = TYPES[out.dtype], out.shape[1]
        _raise_if(
            self._calls.rac_expand(where, room, first, last, out.data_ptr(), kind, stride, _NUMBER[isa], threads),
            "the packed weight cannot be expanded",
        )

    def linear(
        self,
        data: Tensor,
        rows: int,
        columns: int,
        x: Tensor,
        scale: Tensor | None,
        bias: Tensor | None,
        out: Tensor,
        isa: str,
    ) -> None:
        """Fill `out` [M, rows] with x [M, columns] W^T + bias; `scale` is float32 [panels, groups, 16]."""
        where, kind = (bias.data_ptr(), TYPES[bias.dtype]) if bias is not None else (None, 0)
        scales, groups = (scale.data_ptr(), scale.shape[1]) if scale is not None else (None, 1)
        wrong = self._calls.rac_linear(
            data.data_ptr(), data.numel(), rows, columns, x.data_ptr(), TYPES[x.dtype], x.shape[0],
            scales, groups, where, kind, out.data_ptr(), _NUMBER[isa], torch.get_num_threads(),
        )  # fmt: skip
        _raise_if(wrong, f"sparse_linear with a weight [{rows}, {columns}]")


def _raise_if(wrong: bytes | None, what: str) -> None:
    if wrong is not None:
        raise RacError(f"{what}: {wrong.decode()}; load the checkpoint again, or copy it again if that does not help")


def _built() -> list[Path]:
    return sorted(Path(__file__).parent.glob("_native*.so"))


@lru_cache(maxsize=1)
def _load() -> tuple[Library | None, str]:
    """The library, or None and why."""
    found = _built()
    if not found:
        return None, f"no compiled kernel: it was not built when rac-modifier was installed; {_NEXT_STEP}"
    try:
        return Library(found[0]), ""
    except (OSError, AttributeError) as error:
        return None, f"no compiled kernel: {found[0].name} does not load ({error}); {_NEXT_STEP}"


@lru_cache(maxsize=1)
def support() -> Support:
    """What runs here; raise RacError for a RAC_KERNEL that this machine or library cannot do. Decided once a process."""
    wanted = os.environ.get("RAC_KERNEL") or None
    if wanted not in (None, "off", *ISAS):
        raise RacError(f'RAC_KERNEL="{wanted}": use one of {", ".join(ISAS)}, off, or unset it')
    if wanted == "off":
        return Support(None, "no compiled kernel: RAC_KERNEL=off; unset it to use the sparse kernels")
    found, reason = _load()
    if found is None:
        if wanted:
            raise RacError(f"RAC_KERNEL={wanted}: {reason}")
        return Support(None, reason)
    if wanted and ISAS.index(wanted) > ISAS.index(found.best):
        raise RacError(f"RAC_KERNEL={wanted}: this machine runs {found.best} at best; use that or a lower one")
    isa = wanted or found.best
    asked = ", asked for by RAC_KERNEL" if wanted else ""
    return Support(isa, f"{_TITLES[isa]} kernel{asked}, compiled with {found.compiler}")


@lru_cache(maxsize=1)
def library() -> tuple[Library, str]:
    """The library and the instruction set to use; raise RacError with the reason if there is none."""
    found = support()
    loaded, _ = _load()
    if found.isa is None or loaded is None:
        raise RacError(f"a sparse weight needs the compiled kernel; {found.reason}, or keep the weight dense")
    return loaded, found.isa


def forget() -> None:
    """Decide anew at the next use: for a changed RAC_KERNEL, in tests."""
    for cached in (_load, support, library):
        cached.cache_clear()
