"""Shared by the kernel tests: compiling csrc/ without installing, random packed weights, and an error bound."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rac_modifier.kernels.cpu import library, support
from rac_modifier.kernels.cpu.operator import sparse_linear
from rac_modifier.kernels.cpu.packed import pack_dense, pack_values, unpack
from tests.kept_builds import kept_build

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
CSRC = ROOT / "csrc"
SHARED = ["-fPIC", "-shared", "-fvisibility=hidden", "-fopenmp"]
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{HERE}", f"-I{CSRC}"]


class Packed(NamedTuple):
    """A packed weight with its shape."""

    data: Tensor
    rows: int
    columns: int


def compile_sources(out: Path, *flags: str, sources: tuple[Path, ...] = ()) -> Path:
    """All of csrc/ for this x86-64 machine, on emulated_intrinsics.h where a source is for AVX512 or AMX.

    Skips the test elsewhere, and without a compiler.
    """
    if shutil.which("g++") is None or platform.machine() != "x86_64":
        pytest.skip("needs g++ on x86-64")

    def compile_one(source: Path) -> Path | None:
        build_line = re.match(r"// build: (\w+)(.*)", source.read_text())
        processor, own_flags = build_line.groups() if build_line else ("any", "")
        if processor not in ("any", "x86_64"):
            return None
        if "avx512" in own_flags:
            own_flags = ""
        to = out.with_name(f"{out.name}.{source.stem}.o")
        run(
            "g++",
            *FLAGS,
            *flags,
            "-DRAC_EMULATE",
            *own_flags.split(),
            "-c",
            str(source),
            "-o",
            str(to),
        )
        return to

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*sorted(CSRC.rglob("*.cpp")), *sources]))
    run("g++", *flags, *(str(path) for path in objects if path), "-o", str(out))
    return out


def sources_digest(*more: str) -> str:
    """Of all that a library is built from."""
    paths = [*sorted(CSRC.rglob("*.[hc]*")), *sorted(HERE.glob("*.[hc]*")), ROOT / "setup.py"]
    text = "".join(path.read_text() for path in paths if path.is_file())
    return hashlib.sha256(f"{text}{more}".encode()).hexdigest()[:16]


def emulated_library(folder: Path) -> Path:
    """The library on emulated_intrinsics.h. Compiled once: build/ keeps it for the next run of the tests."""

    def build(out: Path) -> None:
        shutil.copy(compile_sources(folder / "emulated.so", "-O1", *SHARED), out)

    return kept_build(f"emulated_{sources_digest()}.so", build)


def setup_library(folder: Path, **environment: str) -> Path:
    """The library as setup.py builds it, compiled once; skips the test without a compiler."""
    if shutil.which(environment.get("CXX", "g++")) is None:
        pytest.skip("no compiler on this machine")

    def build(out: Path) -> None:
        done = run_setup(folder, **environment)
        assert done.returncode == 0, done.stderr
        (built,) = (folder / "lib").rglob("_native_kernels*.so")
        shutil.copy(built, out)

    return kept_build(f"_native_kernels_{sources_digest(str(environment))}.so", build)


def run_setup(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build by setup.py, into lib/ of a folder."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder / "lib")]
    command += ["--build-temp", str(folder / "temp")]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **environment}
    )


def run(*command: str) -> None:
    """Run a command that must succeed."""
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def take(path: Path | None, isa: str | None, patch: pytest.MonkeyPatch) -> None:
    """Make the package use this library and this RAC_KERNEL."""
    patch.setattr(library, "built_libraries", lambda: [path] if path else [])
    patch.setenv("RAC_KERNEL", isa) if isa is not None else patch.delenv(
        "RAC_KERNEL", raising=False
    )
    support.forget()


@contextmanager
def threads(number: int) -> Iterator[None]:
    """Run with this number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bitmask_of(mask: Tensor) -> Tensor:
    """Bool [N, K] to uint8 [N, ceil(K/8)], bit i of byte j is column 8j + i."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8))
    return (
        (padded.view(len(mask), -1, 8) << torch.arange(8, dtype=torch.uint8))
        .sum(-1)
        .to(torch.uint8)
    )


def random_mask(rows: int, columns: int, density: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=generator) < density


def pack(values: Tensor, bitmask: Tensor, columns: int) -> Packed:
    """A packed weight from the two tensors of a checkpoint."""
    return Packed(pack_values(values, bitmask, columns), len(bitmask), columns)


def multiply(
    x: Tensor, weight: Packed, bias: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """X times the transposed packed weight."""
    return sparse_linear(x, weight.data, weight.rows, weight.columns, bias, scale)


def unpacked(weight: Packed) -> Tensor:
    """The dense weight."""
    return unpack(*weight)


def sparse(mask: Tensor, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Packed]:
    """A random weight with these weights stored: dense and packed."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(mask.shape, generator=generator).to(dtype).masked_fill(~mask, 0.0)
    return dense, pack(dense[mask], bitmask_of(mask), mask.shape[1])


def assert_product(y: Tensor, x: Tensor, dense: Tensor, bias: Tensor | None = None) -> None:
    """Y is x W^T + bias up to fp32 accumulation and one rounding to y's dtype."""
    exact = x.double() @ dense.double().T
    terms = x.double().abs() @ dense.double().abs().T
    if bias is not None:
        exact, terms = exact + bias.double(), terms + bias.double().abs()
    bound = terms * 2.0**-20 + (exact.abs() * 2.0**-8 if y.dtype == torch.bfloat16 else 0.0)
    assert y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= bound).all()), float(
        (y.double() - exact).abs().max()
    )


LEVELS = {16: 127 * 256 + 127, 8: 127}  # the largest integer of x, by activation bits
BLOCK = 512  # columns of x that share a scale, where the weight has a scale per row
# Forms of integers by name: bits of a value, and whether the weight has masks.
FORMS = {
    "int8": (8, True),
    "dense8": (8, False),
    "int4": (4, True),
    "dense4": (4, False),
    "dense3": (3, False),
    "dense2": (2, False),
}


def integers(
    form: str,
    rows: int,
    columns: int,
    groups: int = 1,
    zeros: bool = False,
    seed: int = 0,
    density: float = 0.5,
) -> tuple[Tensor, Packed]:
    """A random weight of a form, with zeros and the least value among the stored ones: dense int8, and packed.

    `zeros`: of codes, with a random code of zero per row and group.
    """
    bits, masked = FORMS[form]
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, columns, dtype=torch.bool)
    if masked:
        mask = torch.rand(rows, columns, generator=generator) < density
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.int16, generator=generator)
    zero, given = torch.full((rows, groups), 1 << (bits - 1), dtype=torch.int16), None
    if zeros and bits < 8:
        zero = torch.randint(0, 1 << bits, (rows, groups), dtype=torch.int16, generator=generator)
        given = zero.to(torch.uint8)
    dense = (codes - zero.repeat_interleave(columns // groups, dim=1)).to(torch.int8)
    data = (
        pack_values(dense[mask], bitmask_of(mask), columns, bits, given)
        if masked
        else pack_dense(dense, bits, given)
    )
    return dense.masked_fill(~mask, 0), Packed(data, rows, columns)


def scaled(dense: Tensor, scale: Tensor) -> Tensor:
    """Integers [N, K] times `scale` [N, groups], in float64."""
    return dense.double() * scale.double().repeat_interleave(
        dense.shape[1] // scale.shape[1], dim=1
    )


def assert_integer_product(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    groups: int = 1,
    bias: Tensor | None = None,
    levels: int = LEVELS[16],
) -> None:
    """Y is x W^T + bias, x within half a step of its blocks' integers, at most `levels`; `weight` is the scaled one."""
    exact, terms = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    block, bound = weight.shape[1] // groups if groups > 1 else BLOCK, torch.zeros_like(exact)
    for x_block, w_block in zip(
        x.double().abs().split(block, 1), weight.abs().split(block, 1), strict=True
    ):
        bound += 0.502 / levels * x_block.amax(1, keepdim=True) * w_block.sum(1)
    if bias is not None:
        exact, terms = exact + bias.double(), terms + bias.double().abs()
    bound += terms * 2.0**-20 + (exact.abs() * 2.0**-8 if y.dtype == torch.bfloat16 else 0.0)
    assert y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= bound).all()), float(
        (y.double() - exact).abs().max()
    )
