"""The same random numbers in each run of a test, and a GPU that is not there."""

from __future__ import annotations

import zlib
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from rac_gpu import backend, library
from rac_gpu.layout import TILE, packed_bytes
from rac_gpu.library import Device
from torch import Tensor

from tests.emulate import emulate

H100 = Device(0, (9, 0), 132)
STREAM = 0x5EED


@pytest.fixture(autouse=True)
def seeded(request: pytest.FixtureRequest) -> None:
    """Seed torch from the test's name."""
    torch.manual_seed(zlib.crc32(request.node.name.encode()))


class FakeModule:
    """Loaded kernels of which launches run in the emulator, on the CPU's memory; `launches` has them."""

    def __init__(self, group: int, launches: list[SimpleNamespace]) -> None:
        self.group, self.launches = group, launches

    def launch(self, name, grid, threads, stream, arguments):
        rows, columns, tokens, _, first = arguments[4:]
        written = 2 * rows * tokens or 2 * columns * min(rows - TILE * first, TILE * grid[0])
        nbytes = (packed_bytes(rows, columns, self.group), 2 * tokens * columns, 2 * rows, written)
        buffers = [(at, size if at else 0) for at, size in zip(arguments[:4], nbytes, strict=True)]
        assert emulate(self.group, name, grid, 99 << 10, buffers, arguments[4:]) == ""
        self.launches.append(
            SimpleNamespace(name=name, grid=grid, threads=threads, stream=stream, values=arguments)
        )


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """The launches on an H100 that is not there: tensors stay on the CPU, and the operator has an implementation for it."""
    launches: list[SimpleNamespace] = []
    monkeypatch.setattr(library, "current_device", lambda: H100)
    monkeypatch.setattr(library, "prepare", lambda device, group: None)
    monkeypatch.setattr(library, "module", lambda device, group: FakeModule(group, launches))
    monkeypatch.setattr(Device, "of", lambda device: H100)
    monkeypatch.setattr(backend, "_torch_device", lambda device: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM)
    )
    registered = torch.library.Library("rac_modifier", "FRAGMENT")
    registered.impl("sparse_linear_gpu", backend._forward, "CPU")
    yield launches
    registered._destroy()


def assert_product(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None = None) -> None:
    """Y is x W^T + bias up to sums in fp32 and one rounding to bfloat16; `dense` is in float64."""
    exact, terms = x.double() @ dense.T, x.double().abs() @ dense.abs().T
    if bias is not None:
        exact, terms = exact + bias.double(), terms + bias.double().abs()
    bound = terms * 2.0**-20 + exact.abs() * 2.0**-8
    assert y.shape == exact.shape
    error = (y.double() - exact).abs()
    assert bool((error <= bound).all()), float(error.max())
