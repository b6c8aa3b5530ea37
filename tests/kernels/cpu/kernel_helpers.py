"""Shared by the kernel tests: compiling csrc/ without installing, random packed weights, and an error bound."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rac_modifier.kernels.cpu import library, operator, support
from rac_modifier.kernels.cpu.operator import sparse_linear
from rac_modifier.kernels.cpu.packed import pack_dense, pack_scale, pack_values, unpack
from tests.kept_builds import kept_build

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
SHARED = ["-fPIC", "-shared", "-fvisibility=hidden", "-fopenmp"]
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{HERE}", f"-I{CSRC}"]


class Packed(NamedTuple):
    """A packed weight with its shape."""

    data: Tensor
    rows: int
    columns: int


def compile_sources(
    out: Path, *flags: str, sources: list[Path] | None = None, compiler: str = "g++"
) -> Path:
    """All of csrc/; skips the test where there is no compiler."""
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} on this machine")

    def compile_one(source: Path) -> Path:
        to = out.with_name(f"{out.name}.{source.stem}.o")
        run(compiler, *FLAGS, *flags, "-c", str(source), "-o", str(to))
        return to

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, [*sorted(CSRC.glob("*.cpp")), *(sources or [])]))
    run(compiler, *flags, *map(str, objects), "-o", str(out))
    return out


def compiled_library(folder: Path, *flags: str, compiler: str = "g++") -> Path:
    """The library of these sources and flags. Compiled once: build/ keeps it for the next run of the tests."""
    text = "".join(
        path.read_text() for folder in (CSRC, HERE) for path in sorted(folder.glob("*.[hc]*"))
    )
    digest = hashlib.sha256(f"{text}{flags}{compiler}".encode()).hexdigest()[:16]

    def build(out: Path) -> None:
        shutil.copy(compile_sources(folder / "_native.so", *flags, compiler=compiler), out)

    return kept_build(f"_native_{digest}.so", build)


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


def pack_whole(weight: Tensor) -> Packed:
    """A packed int8 weight without masks."""
    return Packed(pack_dense(weight), *weight.shape)


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


LEVELS = 127 * 256 + 127  # the largest integer of x
BLOCK = 512  # columns of x that share a scale, where the weight has one scale per row


def scaled(dense: Tensor, scale: Tensor) -> Tensor:
    """Integers [N, K] times `scale` [N, groups], in float64."""
    return dense.double() * scale.double().repeat_interleave(
        dense.shape[1] // scale.shape[1], dim=1
    )


def expanded(
    kernel: str, dtype: torch.dtype, dense: Tensor, scale: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor]:
    """Scaled weight and bias of the path of many rows. Where that multiplies bfloat16, they and the scale are rounded to it."""
    if dtype != torch.bfloat16 or not multiplies_bf16(kernel):
        return scaled(dense, scale), bias
    return scaled(dense, scale.bfloat16()).bfloat16().double(), bias.bfloat16().float()


def multiplies_bf16(kernel: str) -> bool:
    """Whether dense products are in bfloat16 beside this kernel: by AMX, or by AVX512-BF16 as Linux names it."""
    flags = Path("/proc/cpuinfo")
    has = flags.exists() and "avx512_bf16" in flags.read_text().split()
    return kernel.endswith("amx") or (kernel.endswith("avx512") and has)


def assert_integer_product(
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    groups: int = 1,
    bias: Tensor | None = None,
    levels: int = LEVELS,
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


def assert_threads_change_nothing(weight: Packed, scale: Tensor) -> None:
    """For each way of the kernels by the number of rows of x."""
    for m in (1, 7, 20, 70):
        x = torch.randn(m, weight.columns)
        with threads(1):
            one = multiply(x, weight, None, scale)
        for number in (2, 3):
            with threads(number):
                assert torch.equal(multiply(x, weight, None, scale), one)


def assert_expanded_panels(
    kernel: str, monkeypatch: pytest.MonkeyPatch, dense: Tensor, weight: Packed, groups: int
) -> None:
    """The path of many rows, in several chunks with a tail: x is not rounded. `dense` is int8, with `groups` of columns."""
    monkeypatch.setattr(operator, "CROSSOVER4", dict.fromkeys(operator.CROSSOVER4, 0))
    monkeypatch.setattr(operator, "SCRATCH_BYTES", 2 * 16 * 70 * 4)
    rows, columns = dense.shape
    scale = (torch.rand(rows, groups) + 0.01).bfloat16().float()
    for dtype in (torch.bfloat16, torch.float32):
        x, bias = torch.randn(130, columns).to(dtype), torch.randn(rows)
        y = multiply(x, weight, bias, pack_scale(scale, narrow=True))
        times, plus = expanded(kernel, dtype, dense, scale, bias)
        assert_integer_product(y, x, times, groups, plus)


def assert_many_lines_and_panels(dense: Tensor, weight: Packed, groups: int) -> None:
    """More lines than AMX uses at a time, with a tail."""
    rows, columns = dense.shape
    scale = (torch.rand(rows, groups) + 0.01).bfloat16().float()
    x, bias = torch.randn(401, columns), torch.randn(rows)
    assert_integer_product(
        multiply(x, weight, bias, pack_scale(scale, narrow=True)),
        x,
        scaled(dense, scale),
        groups,
        bias,
    )
