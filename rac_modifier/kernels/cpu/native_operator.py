"""Matmuls with few tokens as an operator in C++, `torch.ops.rac_modifier.native_linear`: a call enters C++ once.

csrc/torch_operator.cpp is built without torch. It is given the functions of torch's stable C interface
that are listed here. A torch without them leaves the operator in Python in use.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu.library import Library

# In the order of `Torch` of csrc/torch_operator.cpp.
FUNCTIONS = (
    "aoti_torch_library_init_impl",
    "torch_library_impl",
    "torch_call_dispatcher",
    "aoti_torch_delete_tensor_object",
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_dim",
    "aoti_torch_get_sizes",
    "aoti_torch_get_dtype",
    "aoti_torch_get_device_type",
    "aoti_torch_is_contiguous",
    "aoti_torch_empty_strided",
    "torch_get_num_threads",
    "aoti_torch_device_type_cpu",
    "aoti_torch_dtype_bfloat16",
    "aoti_torch_dtype_float32",
    "aoti_torch_dtype_uint8",
)
SINCE_2_13 = ("torch_delete_stable_ivalue", "torch_exception_get_what_without_backtrace")
TOKENS = 8  # up to which the operator multiplies itself


class _State:
    """The library whose operator torch has, or the reason why torch has none; and whether it is in use."""

    registered: Library | None = None
    refused: str | None = None
    active = False


state = _State()


def activate(library: Library, isa: str) -> None:
    """Let the operator in C++ multiply with `isa`, if torch has that of `library` or accepts it now."""
    if type(library) is not Library:  # of an emulated processor in another process, in tests
        return
    if state.registered is None and state.refused is None:
        state.refused = _register(library)
        state.registered = library if state.refused is None else None
    if state.registered is not None and state.registered.handle == library.handle:
        library.use_operator(isa, TOKENS)
        state.active = True


def deactivate() -> None:
    """Send every call to the operator in Python."""
    if state.registered is not None:
        state.registered.use_operator(None, 0)
    state.active = False


def _register(library: Library) -> str | None:
    """Give torch the operator; the reason where that is not possible."""
    paths = sorted((Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"))
    try:
        loaded = ctypes.CDLL(str(paths[0]))
        addresses = [_address(loaded, name) for name in FUNCTIONS]
    except (IndexError, OSError, AttributeError) as error:
        return f"torch {torch.__version__} has no stable C interface ({error})"
    addresses += [_address(loaded, name) if hasattr(loaded, name) else None for name in SINCE_2_13]
    try:
        library.register_operator(addresses)
    except RacError as error:
        return str(error)
    return None


def _address(loaded: ctypes.CDLL, name: str) -> int | None:
    return ctypes.cast(getattr(loaded, name), ctypes.c_void_p).value
