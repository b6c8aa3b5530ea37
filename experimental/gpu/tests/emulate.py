"""Runs the kernels' own sources on the CPU, through the emulator of emulator.h."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rac_gpu.layout import Layout, units_of
from rac_gpu.programs import Program
from torch import Tensor

from tests.kept_builds import kept_build

HERE = Path(__file__).parent
SOURCES = HERE.parent / "rac_gpu" / "source"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-DRAC_EMULATE", f"-I{HERE}"]


@functools.cache
def library(layout: Layout) -> ctypes.CDLL:
    """A layout's source compiled with the emulator, kept in build/ for the next run; skips the test where there is no g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on this machine")
    files = sorted([*SOURCES.iterdir(), HERE / "emulator.h", HERE / "emulate.cpp"])
    what = [layout.source, *layout.defines]
    digest = hashlib.sha256(
        b"".join(path.read_bytes() for path in files) + repr(what).encode()
    ).hexdigest()[:16]

    def build(out: Path) -> None:
        flags = [
            *FLAGS,
            *(f"-D{define}" for define in layout.defines),
            "-include",
            str(SOURCES / layout.source),
        ]
        command = [compiler, *flags, str(HERE / "emulate.cpp"), "-o", str(out), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    loaded = ctypes.CDLL(str(kept_build(f"_emulated_{digest}.so", build)))
    loaded.emulate.restype = loaded.emulated_sites.restype = ctypes.c_char_p
    return loaded


def emulate(
    layout: Layout,
    program: Program,
    grid: tuple[int, int],
    weight: Tensor,
    x: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
    sizes: tuple[int, int, int, int, int],
    skip: str = "",
    shared_bytes: int | None = None,
) -> str:
    """Run a program; `sizes` are rows, columns, tokens, units and first tile. The first error, or ""."""
    buffers = [
        (0, 0) if tensor is None else (tensor.data_ptr(), tensor.numel() * tensor.element_size())
        for tensor in (weight, x, bias, out)
    ]
    return emulate_pointers(
        layout,
        program.name,
        grid,
        program.shared_bytes if shared_bytes is None else shared_bytes,
        buffers,
        sizes,
        skip,
    )


def emulate_pointers(
    layout: Layout,
    name: str,
    grid: tuple[int, int],
    shared_bytes: int,
    buffers: Sequence[tuple[int, int]],
    sizes: Sequence[int],
    skip: str = "",
) -> str:
    """Run a kernel; `buffers` are addresses and sizes in bytes of weight, x, bias and out."""
    passed = [
        argument
        for start, size in buffers
        for argument in (ctypes.c_void_p(start or None), ctypes.c_int64(size))
    ]
    return (
        library(layout)
        .emulate(name.encode(), *grid, shared_bytes, *passed, *sizes, skip.encode())
        .decode()
    )


def product(
    layout: Layout,
    program: Program,
    packed: Tensor,
    x: Tensor,
    rows: int,
    bias: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, str]:
    """A decode program's result [tokens, rows], NaN where nothing was written, and its first error."""
    tokens, columns = x.shape
    out = torch.full((tokens, rows), torch.nan, dtype=torch.bfloat16)
    sizes = (rows, columns, tokens, units_of(layout, packed, columns), 0)
    return out, emulate(
        layout, program, program.grid(rows, tokens), packed, x, bias, out, sizes, **options
    )


def sites(layout: Layout) -> list[str]:
    """The barriers and waits, "file:line", that the last run of a layout's kernels came to."""
    return library(layout).emulated_sites().decode().split()
