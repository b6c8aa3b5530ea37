"""What the compiled library is and which instruction sets it runs here, in words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu import library as native
from rac_modifier.kernels.cpu.support import support


@dataclass(frozen=True)
class Found:
    """One finding; `mend` is what to do about it, None where installing the package again does it."""

    name: str
    status: Literal["ok", "missing", "broken"]
    detail: str
    mend: str | None = None


def examine_library() -> list[Found]:
    """The library, its instruction sets, and the one in use."""
    paths = native.built_libraries()
    if not paths:
        return [
            Found(
                "compiled library",
                "missing",
                "not built when rac-modifier was installed; without it, sparse layers run dense. Install a C++ compiler, then",
            )
        ]
    library, reason = native.load()
    if library is None:
        return [Found("compiled library", "broken", reason)]
    found = [
        Found(
            "compiled library",
            "ok",
            f"{paths[0].name}, interface {native.ABI}, compiled with {library.compiler}",
        ),
        Found(
            "instruction sets",
            "ok",
            f"{library.best} is the best here; runs {', '.join(library.runs)}",
        ),
    ]
    try:
        found.append(Found("in use", "ok", support().reason))
    except RacError as error:
        found.append(Found("in use", "broken", str(error), "unset RAC_KERNEL"))
    return found
