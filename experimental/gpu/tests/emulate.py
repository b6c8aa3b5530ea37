"""Runs the kernels' own source on the CPU, through the emulator of emulator.h; and builds for tests, kept in build/."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rac_gpu.layout import units
from rac_gpu.programs import Program
from torch import Tensor

HERE = Path(__file__).parent
SOURCES = HERE.parent / "rac_gpu" / "source"
KEPT = HERE.parent / "build" / "test-libraries"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-DRAC_EMULATE", f"-I{HERE}"]


def kept_build(name: str, build: Callable[[Path], object]) -> Path:
    """build/test-libraries/NAME, which `build` makes where it is missing."""
    path = KEPT / name
    KEPT.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        build(KEPT / f"unfinished-{name}")
        (KEPT / f"unfinished-{name}").rename(path)
    return path


@functools.cache
def library(group: int) -> ctypes.CDLL:
    """The source compiled with the emulator; skips the test where there is no g++."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on this machine")
    files = sorted([*SOURCES.iterdir(), HERE / "emulator.h", HERE / "emulate.cpp"])
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]

    def build(out: Path) -> None:
        flags = [*FLAGS, f"-DGROUP={group}", "-include", str(SOURCES / "decode.cu")]
        command = [compiler, *flags, str(HERE / "emulate.cpp"), "-o", str(out), "-ldl"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    loaded = ctypes.CDLL(str(kept_build(f"_emulated_{group}_{digest}.so", build)))
    loaded.emulate.restype = loaded.emulated_sites.restype = ctypes.c_char_p
    return loaded


def emulate(
    group: int,
    name: str,
    grid: tuple[int, int],
    shared_bytes: int,
    buffers: Sequence[tuple[int, int]],
    sizes: Sequence[int],
    skip: str = "",
) -> str:
    """Run a kernel; `buffers` are addresses and bytes of weight, x, bias and out. The first error, or ""."""
    passed = [
        argument
        for start, size in buffers
        for argument in (ctypes.c_void_p(start or None), ctypes.c_int64(size))
    ]
    run = library(group).emulate
    return run(name.encode(), *grid, shared_bytes, *passed, *sizes, skip.encode()).decode()


def place(tensor: Tensor | None) -> tuple[int, int]:
    """Address and bytes of a tensor."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.nbytes)


def product(
    program: Program,
    packed: Tensor,
    x: Tensor,
    rows: int,
    bias: Tensor | None = None,
    shared_bytes: int | None = None,
    **options: Any,
) -> tuple[Tensor, str]:
    """A program's result [tokens, rows], NaN where nothing was written, and its first error."""
    tokens, columns = x.shape
    out = torch.full((tokens, rows), torch.nan, dtype=torch.bfloat16)
    buffers = [place(each) for each in (packed, x, bias, out)]
    sizes = (rows, columns, tokens, units(columns), 0)
    shared_bytes = program.shared_bytes if shared_bytes is None else shared_bytes
    grid = program.grid(rows, tokens)
    return out, emulate(program.group, program.name, grid, shared_bytes, buffers, sizes, **options)


def sites(group: int) -> set[str]:
    """The barriers and waits, "file:line", that the last run came to."""
    return set(library(group).emulated_sites().decode().split())
