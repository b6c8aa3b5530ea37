"""What runs on this machine: the compiled library and the kernel in use.

RAC_KERNEL=NAME uses another kernel than the best, RAC_KERNEL=off none. `rac inspect` prints the names.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu import library as native
from rac_modifier.kernels.cpu import native_operator
from rac_modifier.kernels.cpu.library import Library


@dataclass(frozen=True)
class Support:
    """What runs on this machine: `isa` is the name of a kernel or None; `reason` is a readable line."""

    isa: str | None
    reason: str
    multiplies_bytes: bool = False


@lru_cache(maxsize=1)
def support() -> Support:
    """What runs on this machine. Decided once per process.

    Raises:
        RacError: a RAC_KERNEL that this machine or library cannot run.
    """
    name = os.environ.get("RAC_KERNEL") or None
    if name == "off":
        return Support(
            None, "no compiled kernel: RAC_KERNEL=off; unset it to use the sparse kernels"
        )
    library, reason = native.load()
    if library is None:
        if name:
            raise RacError(f"RAC_KERNEL={name}: {reason}")
        return Support(None, reason)
    if name and name not in library.runs:
        raise RacError(
            f'RAC_KERNEL="{name}": this machine runs {", ".join(library.runs)}; '
            "use one of these, off, or unset it"
        )
    kernel = library.kernels[name or library.runs[-1]]
    asked = ", requested by RAC_KERNEL" if name else ""
    reason = f"{kernel.title} kernel{asked}, compiled with {library.compiler}"
    return Support(kernel.name, reason, kernel.multiplies_bytes)


@lru_cache(maxsize=1)
def library_and_isa() -> tuple[Library, str]:
    """The library and the name of the kernel to use.

    Raises:
        RacError: there is none; with the reason.
    """
    available = support()
    library, _ = native.load()
    if available.isa is None or library is None:
        raise RacError(
            f"a sparse weight needs the compiled kernel; {available.reason}, or keep the weight dense"
        )
    native_operator.activate(library, available.isa)
    return library, available.isa


def forget() -> None:
    """Decide anew at the next use. For tests that change RAC_KERNEL or the library."""
    for cached in (native.load, support, library_and_isa):
        cached.cache_clear()
    native_operator.deactivate()


@dataclass(frozen=True)
class Found:
    """A finding; `mend`: what to do about it, None where installing the package again does it."""

    name: str
    status: Literal["ok", "missing", "broken"]
    detail: str
    mend: str | None = None


def examine_library() -> list[Found]:
    """Describe the library, its instruction sets, and the kernel in use."""
    paths = native.built_libraries()
    if not paths:
        detail = (
            "not built when rac-modifier was installed; without it, sparse layers run dense. "
            "Install a C++ compiler, then"
        )
        return [Found("compiled library", "missing", detail)]
    library, reason = native.load()
    if library is None:
        return [Found("compiled library", "broken", reason)]
    built = f"{paths[0].name}, interface {native.ABI}, compiled with {library.compiler}"
    sets = f"{library.runs[-1]} is the best here; runs {', '.join(library.runs)}"
    findings = [Found("compiled library", "ok", built), Found("instruction sets", "ok", sets)]
    try:
        return [*findings, Found("in use", "ok", support().reason)]
    except RacError as error:
        return [*findings, Found("in use", "broken", str(error), "unset RAC_KERNEL")]
