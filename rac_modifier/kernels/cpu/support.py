"""What runs on this machine: the compiled library and the instruction set that is used.

RAC_KERNEL=portable|avx2|avxvnni|avx512|amx, or portable|neon|dotprod|i8mm|sve on ARM, uses another instruction set than the best
one, and RAC_KERNEL=off none at all.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

import torch

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu import native_operator
from rac_modifier.kernels.cpu.library import ISAS, Library, load

_TITLES = {
    "portable": "portable",
    "avx2": "AVX2",
    "avxvnni": "AVX-VNNI",
    "avx512": "AVX512",
    "amx": "AMX",
    "neon": "NEON",
    "dotprod": "SDOT",
    "i8mm": "SMMLA",
    "sve": "SVE",
}


@dataclass(frozen=True)
class Support:
    """What runs on this machine: `isa` is one of `ISAS` or None; `reason` is one readable line."""

    isa: str | None
    reason: str


@lru_cache(maxsize=1)
def support() -> Support:
    """What runs on this machine. Decided once per process.

    Raises:
        RacError: a RAC_KERNEL that this machine or library cannot run.
    """
    wanted = os.environ.get("RAC_KERNEL") or None
    if wanted not in (None, "off", *ISAS):
        raise RacError(f'RAC_KERNEL="{wanted}": use one of {", ".join(ISAS)}, off, or unset it')
    if wanted == "off":
        return Support(
            None, "no compiled kernel: RAC_KERNEL=off; unset it to use the sparse kernels"
        )
    found, reason = load()
    if found is None:
        if wanted:
            raise RacError(f"RAC_KERNEL={wanted}: {reason}")
        return Support(None, reason)
    if wanted and wanted not in found.runs:
        raise RacError(
            f"RAC_KERNEL={wanted}: this machine runs {', '.join(found.runs)}; use one of these, or unset it"
        )
    isa = wanted or found.best
    asked = ", requested by RAC_KERNEL" if wanted else ""
    return Support(isa, f"{_TITLES[isa]} kernel{asked}, compiled with {found.compiler}")


@lru_cache(maxsize=1)
def library_and_isa() -> tuple[Library, str]:
    """The library and the instruction set to use.

    Raises:
        RacError: there is none; with the reason.
    """
    found = support()
    loaded, _ = load()
    if found.isa is None or loaded is None:
        raise RacError(
            f"a sparse weight needs the compiled kernel; {found.reason}, or keep the weight dense"
        )
    native_operator.activate(loaded, found.isa)
    return loaded, found.isa


def dense_products_in_bf16(isa: str) -> bool:
    """Whether torch's dense products of bfloat16 are faster than those of float32 on the processor where `isa` is in use.

    With AMX they are. With AVX512 that depends on AVX512-BF16 (Zen 4, Zen 5, Cooper Lake), which torch knows of its processor.
    A lower instruction set is treated as a processor without it.
    """
    return isa == "amx" or (isa == "avx512" and _torch_has_avx512_bf16())


def _torch_has_avx512_bf16() -> bool:
    """False where this torch cannot say it: float32 is right everywhere."""
    if hasattr(torch.cpu, "get_capabilities"):  # torch 2.10 has none
        return bool(torch.cpu.get_capabilities().get("avx512_bf16"))
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported and supported())


def forget() -> None:
    """Decide anew at the next use. For tests that change RAC_KERNEL or the library."""
    for cached in (load, support, library_and_isa):
        cached.cache_clear()
    native_operator.deactivate()
