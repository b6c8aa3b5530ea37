"""Loading and launching compiled kernels through NVIDIA's cuda-bindings. Torch owns streams and memory.

Torch may not have created a device's context yet, or not in this thread: modules are loaded into the device's primary context,
which is the one that torch uses.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rac_modifier.errors import RacError

INSTALL = "pip install cuda-bindings"
# weight, x, bias, out; rows, columns, tokens, units, first tile: the parameters of every kernel (rac_gpu/source/decode.h).
PARAMETERS = (ctypes.c_void_p,) * 4 + (ctypes.c_int,) * 5
# What the driver answers to machine code that it does not know: invalid image, no binary for this GPU, unsupported PTX version.
_CODE_REFUSED = (200, 209, 222)
_UPDATE = "the driver is older than the NVRTC in use: update the driver, or install an older nvidia-cuda-nvrtc"
_REPORT = "uninstall rac-modifier-gpu to run dense, and report this"


def bindings() -> Any:
    """The module `cuda.bindings.driver`; imported at the first use.

    Raises:
        RacError: it is not installed.
    """
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise RacError(f"cuda-bindings cannot be imported ({error}); {INSTALL}") from error


class Module:
    """Machine code on the device with this number for torch. `kernels` names what is launched, with the shared memory of each.

    Everything that a launch needs is done here, so that launches may be captured in a CUDA graph.

    Raises:
        RacError: there is no driver, it does not take the code, or a kernel needs more than the device has.
    """

    def __init__(self, code: bytes, kernels: dict[str, int], device: int) -> None:
        self._driver = bindings()
        self._call("cuInit", 0)
        self._context = self._call("cuDevicePrimaryCtxRetain", self._call("cuDeviceGet", device))
        with self._current():
            self._module = self._call("cuModuleLoadData", code)
            self._functions = {
                name: (self._function(name, size), size) for name, size in kernels.items()
            }

    @contextmanager
    def _current(self) -> Iterator[None]:
        """Make the context current in this thread, and put back what was."""
        self._call("cuCtxPushCurrent", self._context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent")

    def _function(self, name: str, shared_bytes: int) -> Any:
        attribute = (
            self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        )
        function = self._call("cuModuleGetFunction", self._module, name.encode())
        if shared_bytes:
            self._call("cuFuncSetAttribute", function, attribute, shared_bytes)
        self._call("cuFuncLoad", function)  # otherwise the first launch would load it
        return function

    def launch(
        self, name: str, grid: tuple[int, int], threads: int, stream: int, arguments: Sequence[int]
    ) -> None:
        """Queue a kernel on a stream; `arguments` are those of PARAMETERS, pointers as integers."""
        function, shared_bytes = self._functions[name]
        parameters = (tuple(arguments), PARAMETERS)
        self._call("cuCtxSetCurrent", self._context)  # this thread may not have used a GPU yet
        launch = (function, *grid, 1, threads, 1, 1, shared_bytes, stream, parameters, 0)
        self._call("cuLaunchKernel", *launch)

    def _call(self, function: str, *arguments: Any) -> Any:
        """Return what a function of the driver returns."""
        try:
            status, *values = getattr(self._driver, function)(*arguments)
        except (AttributeError, RuntimeError) as error:  # the driver or a function of it is missing
            raise RacError(
                f"{function} cannot be called ({error}); install or update NVIDIA's driver, and see that `nvidia-smi` lists "
                "the GPU"
            ) from error
        if status:
            advice = _UPDATE if status in _CODE_REFUSED else _REPORT
            raise RacError(f"{function}: the GPU's driver answers {status}; {advice}")
        return values[0] if values else None
