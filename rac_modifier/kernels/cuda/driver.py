"""Loading and launching compiled kernels through NVIDIA's cuda-bindings. Torch owns contexts, streams and memory."""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Sequence
from typing import Any

from rac_modifier.errors import RacError

INSTALL = "pip install cuda-bindings"
# weight, x, bias, out; rows, columns, tokens, units, first tile: the parameters of every kernel (csrc/gpu/decode.h).
PARAMETERS = (ctypes.c_void_p,) * 4 + (ctypes.c_int,) * 5


def bindings() -> Any:
    """The module `cuda.bindings.driver`; imported at the first use.

    Raises:
        RacError: it is not installed, or there is no driver.
    """
    try:
        return importlib.import_module("cuda.bindings.driver")
    except ImportError as error:
        raise RacError(f"cuda-bindings cannot be imported ({error}); {INSTALL}") from error


class Module:
    """Machine code on the current device. `kernels` names what is launched, with the shared memory that each needs.

    Everything that a launch needs is done here, so that launches may be captured in a CUDA graph.

    Raises:
        RacError: the driver does not take the code, or a kernel needs more than the device has.
    """

    def __init__(self, code: bytes, kernels: dict[str, int]) -> None:
        self._driver = bindings()
        self._module = self._check("cuModuleLoadData", self._driver.cuModuleLoadData(code))
        attribute = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        self._functions = {}
        for name, shared_bytes in kernels.items():
            function = self._check(name, self._driver.cuModuleGetFunction(self._module, name.encode()))
            if shared_bytes:
                self._check(name, self._driver.cuFuncSetAttribute(function, attribute, shared_bytes))
            if hasattr(self._driver, "cuFuncLoad"):  # otherwise the first launch would load it
                self._check(name, self._driver.cuFuncLoad(function))
            self._functions[name] = function, shared_bytes

    def launch(self, name: str, grid: tuple[int, int], threads: int, stream: int, arguments: Sequence[int]) -> None:
        """Queue a kernel on a stream; `arguments` are those of PARAMETERS, pointers as integers."""
        function, shared_bytes = self._functions[name]
        parameters = (tuple(arguments), PARAMETERS)
        self._check(
            name, self._driver.cuLaunchKernel(function, *grid, 1, threads, 1, 1, shared_bytes, stream, parameters, 0)
        )

    def _check(self, what: str, answer: tuple[Any, ...]) -> Any:
        status, *values = answer
        if int(status) != 0:
            name = getattr(status, "name", str(status))
            raise RacError(
                f"{what}: the GPU's driver answers {name}; if it is older than the NVRTC in use, update the driver, or "
                "install an older nvidia-cuda-nvrtc"
            )
        return values[0] if values else None
