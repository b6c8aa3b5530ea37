"""What runs on this machine: the compiled library, the kernel in use, and torch's C++ operator.

RAC_KERNEL=NAME uses another kernel than the best, RAC_KERNEL=off none. csrc/torch_operator.cpp
multiplies few tokens without entering Python, through torch's stable C interface (`FUNCTIONS`).
"""

import ctypes
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu import library as native
from rac_modifier.kernels.cpu.library import Library

# In the order of `Torch` of csrc/torch_operator.cpp.
FUNCTIONS = (
    "aoti_torch_library_init_impl", "torch_library_impl", "torch_call_dispatcher",
    "aoti_torch_delete_tensor_object", "aoti_torch_get_data_ptr", "aoti_torch_get_dim",
    "aoti_torch_get_sizes", "aoti_torch_get_dtype", "aoti_torch_get_device_type",
    "aoti_torch_is_contiguous", "aoti_torch_empty_strided", "torch_get_num_threads",
    "aoti_torch_device_type_cpu", "aoti_torch_dtype_bfloat16", "aoti_torch_dtype_float32",
    "aoti_torch_dtype_uint8",
)  # fmt: skip
_SINCE_2_13 = ("torch_delete_stable_ivalue", "torch_exception_get_what_without_backtrace")
TOKENS = 8  # up to which the C++ operator multiplies itself


@dataclass(frozen=True)
class Support:
    """What runs on this machine: `isa` is the name of a kernel or None; `reason` is readable."""

    isa: str | None
    reason: str
    multiplies_bytes: bool = False
    status: Literal["ok", "missing", "broken"] = "ok"


@lru_cache(maxsize=1)
def support() -> Support:
    """Return what runs on this machine, decided once (RacError: RAC_KERNEL names another)."""
    name = os.environ.get("RAC_KERNEL") or None
    if name == "off":
        reason = "no compiled kernel: RAC_KERNEL=off; unset it to use the sparse kernels"
        return Support(None, reason, status="missing")
    library, reason = native.load()
    if library is None:
        if name:
            raise RacError(f"RAC_KERNEL={name}: {reason}")
        built = bool(native.built_libraries())
        return Support(None, reason, status="broken" if built else "missing")
    if name and name not in library.runs:
        raise RacError(
            f'RAC_KERNEL="{name}": this machine runs {", ".join(library.runs)}; '
            "use one of these, off, or unset it"
        )
    kernel = library.kernels[name or library.runs[-1]]
    requested = ", requested by RAC_KERNEL" if name else ""
    reason = f"{kernel.title} kernel{requested}, compiled with {library.compiler}"
    return Support(kernel.name, reason, kernel.multiplies_bytes)


@lru_cache(maxsize=1)
def library_and_isa() -> tuple[Library, str]:
    """Return the library and the name of the kernel to use (RacError: there is none)."""
    available = support()
    library, _ = native.load()
    if available.isa is None or library is None:
        raise RacError(
            f"a sparse weight needs the compiled kernel; {available.reason}, or keep it dense"
        )
    _activate(library, available.isa)
    return library, available.isa


class _CppOperator:
    """The library whose operator torch has, or the reason why torch refused."""

    registered: Library | None = None
    refused: str | None = None


cpp_operator = _CppOperator()


def _activate(library: Library, isa: str) -> None:
    """Let the C++ operator multiply with `isa`; torch takes the operator of one library only."""
    state = cpp_operator
    if state.registered is None and state.refused is None:
        state.refused = _register(library)
        state.registered = library if state.refused is None else None
    if state.registered is not None and state.registered.handle == library.handle:
        library.use_operator(isa, TOKENS)


def _register(library: Library) -> str | None:
    """Give torch the C++ operator; return the reason where torch lacks the interface."""
    paths = sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))
    try:
        loaded = ctypes.CDLL(str(paths[0]))
        addresses = [_address(loaded, name) for name in FUNCTIONS]
    except (IndexError, OSError, AttributeError) as error:
        return f"torch {torch.__version__} has no stable C interface ({error})"
    addresses += [_address(loaded, name) if hasattr(loaded, name) else None for name in _SINCE_2_13]
    try:
        library.register_operator(addresses)
    except RacError as error:
        return str(error)
    return None


def _address(loaded: ctypes.CDLL, name: str) -> int | None:
    return ctypes.cast(getattr(loaded, name), ctypes.c_void_p).value
