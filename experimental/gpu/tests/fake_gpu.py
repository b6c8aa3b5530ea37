"""A GPU that is not there: a driver that records what it is told and runs launches in the emulator, on the CPU's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rac_gpu import backend, driver, library, operator
from rac_gpu.layout import ALL, TILE, Layout
from rac_gpu.library import Device
from torch import Tensor

from tests.emulate import emulate_pointers

H100 = Device(0, (9, 0), 132)
STREAM = 0x5EED


class Status(IntEnum):
    """What a call returns first."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_INVALID_CONTEXT = 201
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209
    CUDA_ERROR_INVALID_HANDLE = 400


class FakeDriver:
    """The functions of cuda.bindings.driver that are used. `calls` are their names; `launches` have everything of a launch.

    A context is the number of its device; `contexts` are those of this thread, the last one is current. Modules and functions
    begin with the context that they were loaded in. `refuses`: what cuModuleLoadData answers.
    """

    CUfunction_attribute = SimpleNamespace(
        CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="most shared bytes"
    )

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.launches: list[SimpleNamespace] = []
        self.most_shared: dict[tuple[int, Layout, str], int] = {}
        self.refuses = Status(0)
        self.capturing = False
        self.contexts: list[int] = []

    def cuInit(self, flags: int) -> tuple[Any, ...]:  # noqa: N802
        self._call("cuInit")
        return (Status(0),)

    def cuDeviceGet(self, ordinal: int) -> tuple[Any, ...]:  # noqa: N802
        self._call("cuDeviceGet")
        return Status(0), f"device {ordinal}"

    def cuDevicePrimaryCtxRetain(self, device: str) -> tuple[Any, ...]:  # noqa: N802
        self._call("cuDevicePrimaryCtxRetain")
        return Status(0), int(device.removeprefix("device "))

    def cuCtxPushCurrent(self, context: int) -> tuple[Any, ...]:  # noqa: N802
        self._call("cuCtxPushCurrent")
        self.contexts.append(context)
        return (Status(0),)

    def cuCtxPopCurrent(self) -> tuple[Any, ...]:  # noqa: N802
        self._call("cuCtxPopCurrent")
        return Status(0), self.contexts.pop()

    def cuCtxSetCurrent(self, context: int) -> tuple[Any, ...]:  # noqa: N802
        self.calls.append("cuCtxSetCurrent")
        self.contexts[-1:] = [context]
        return (Status(0),)

    def cuModuleLoadData(self, code: bytes) -> tuple[Any, ...]:  # noqa: N802
        self._call("cuModuleLoadData")
        if not self.contexts:
            return Status(201), None
        return (
            (self.refuses, None)
            if self.refuses
            else (Status(0), (self.contexts[-1], layout_of_code(code)))
        )

    def cuModuleGetFunction(self, module: tuple[int, Layout], name: bytes) -> tuple[Any, ...]:  # noqa: N802
        self._call("cuModuleGetFunction")
        return Status(0), (*module, name.decode())

    def cuFuncSetAttribute(  # noqa: N802
        self, function: tuple[int, Layout, str], attribute: str, value: int
    ) -> tuple[Any, ...]:
        self._call("cuFuncSetAttribute")
        assert attribute == "most shared bytes"
        self.most_shared[function] = value
        return (Status(0),)

    def cuFuncLoad(self, function: tuple[int, Layout, str]) -> tuple[Any, ...]:  # noqa: N802
        self._call("cuFuncLoad")
        return (Status(0),)

    def cuLaunchKernel(self, function: tuple[int, Layout, str], *launch: Any) -> tuple[Any, ...]:  # noqa: N802
        self.calls.append("cuLaunchKernel")
        grid, block, (shared_bytes, stream, (values, types), extra) = (
            launch[:3],
            launch[3:6],
            launch[6:],
        )
        device, layout, name = function
        assert (grid[2], block[1:], extra) == (1, (1, 1), 0)
        assert [type_.__name__ for type_ in types] == ["c_void_p"] * 4 + ["c_int"] * 5
        if not self.contexts:
            return (Status(201),)
        if self.contexts[-1] != device:
            return (Status(400),)
        if shared_bytes > self.most_shared.get(function, 48 << 10):
            return (Status(1),)
        done = SimpleNamespace(
            device=device, layout=layout, name=name, grid=grid[:2], stream=stream, values=values
        )
        self.launches.append(done)
        rows, columns, tokens, units, first_tile = values[4:]
        expanded = min(rows - TILE * first_tile, layout.tile_rows * grid[0])
        written = 2 * rows * tokens if tokens else 2 * columns * expanded
        packed = layout.unit_bytes * units if layout.any_pattern else layout.nbytes(rows, columns)
        sizes = (packed, 2 * tokens * columns, 2 * rows, written)
        buffers = [
            (start, size if start else 0) for start, size in zip(values[:4], sizes, strict=True)
        ]
        assert emulate_pointers(layout, name, grid[:2], shared_bytes, buffers, values[4:]) == ""
        return (Status(0),)

    @contextmanager
    def on(self, device: int) -> Iterator[None]:
        """The context that torch would make current for a tensor on a device."""
        self.contexts.append(device)
        try:
            yield
        finally:
            self.contexts.pop()

    def _call(self, name: str) -> None:
        assert not self.capturing, f"{name} in a captured graph"
        self.calls.append(name)


def layout_of_code(code: bytes) -> Layout:
    """The layout of what `compiled` below returned."""
    return next(layout for layout in ALL if code == code_of(layout))


def code_of(layout: Layout) -> bytes:
    """Machine code that only the fake driver reads."""
    return f"{layout.title} {layout.group}".encode()


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch, device: Device = H100) -> Iterator[FakeDriver]:
    """Tensors stay on the CPU; the operator has an implementation for it meanwhile."""
    fake = FakeDriver()
    monkeypatch.setattr(driver, "bindings", lambda: fake)
    monkeypatch.setattr(library, "current_device", lambda: device)
    monkeypatch.setattr(library, "compiled", lambda architecture, layout: code_of(layout))
    monkeypatch.setattr(backend, "torch_device", lambda device: torch.device("cpu"))
    monkeypatch.setattr(operator, "_device", lambda x: device)
    monkeypatch.setattr(operator, "_stream", lambda x: STREAM)
    monkeypatch.setattr(operator, "_current", lambda x: fake.on(device.index))
    library.forget()
    registered = torch.library.Library("rac_modifier", "FRAGMENT")
    registered.impl("sparse_linear_gpu", operator._forward, "CPU")
    try:
        yield fake
    finally:
        registered._destroy()
        library.forget()


def tensor_at(tensor: Tensor | None) -> int:
    """The address that a launch gets."""
    return 0 if tensor is None else tensor.data_ptr()
