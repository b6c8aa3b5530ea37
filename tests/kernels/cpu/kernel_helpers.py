"""Shared by the kernel tests: compiling csrc/ without installing, random packed weights."""

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from rac_modifier.kernels.cpu import library, pack_values, support
from rac_modifier.kernels.cpu.library import PACKED_TYPES
from rac_modifier.kernels.cpu.operator import sparse_linear

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
BUILDS = ROOT / "build" / "test-libraries"
CSRC = ROOT / "csrc"
SHARED = ["-fPIC", "-shared", "-fvisibility=hidden", "-fopenmp"]
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{HERE}", f"-I{CSRC}"]


class Packed(NamedTuple):
    """A packed weight with its shape."""

    data: Tensor
    rows: int
    columns: int


def compile_sources(
    out: Path, *flags: str, drive: bool = False, compiler: str = "g++", machine: str = "x86_64"
) -> Path:
    """Compile csrc/, with emulated_intrinsics.h for AVX512 and AMX."""
    if shutil.which(compiler) is None or (compiler == "g++" and platform.machine() != machine):
        pytest.skip(f"needs {compiler} for {machine}")

    def compile_source(source: Path) -> str | None:
        build_line = re.match(r"// build: (\w+)(.*)", source.read_text())
        processor, isa_flags = build_line.groups() if build_line else ("any", "")
        if processor not in ("any", machine):
            return None
        isa_flags = "" if "avx512" in isa_flags else isa_flags
        to = str(out.with_name(f"{out.name}.{source.stem}.o"))
        command = [compiler, *FLAGS, *flags, "-DRAC_EMULATE", *isa_flags.split()]
        run(*command, "-c", str(source), "-o", to)
        return to

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        sources = [*sorted(CSRC.rglob("*.cpp")), *([HERE / "drive.cpp"] if drive else [])]
        objects = list(pool.map(compile_source, sources))
    run(compiler, *flags, *filter(None, objects), "-o", str(out))
    return out


def sources_digest() -> str:
    """Return a hash of what a library is built from."""
    paths = [*sorted(CSRC.rglob("*.[hc]*")), *sorted(HERE.glob("*.[hc]*")), ROOT / "setup.py"]
    text = "".join(path.read_text() for path in paths if path.is_file())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def kept_build(name: str, build: Callable[[Path], object]) -> Path:
    """Return build/test-libraries/NAME, made once and kept for the next run."""
    path = BUILDS / name
    BUILDS.mkdir(parents=True, exist_ok=True)
    with open(BUILDS / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            unfinished = BUILDS / f"{name}.unfinished"
            build(unfinished)
            unfinished.rename(path)
    return path


def emulated_library(folder: Path) -> Path:
    """The library on emulated_intrinsics.h."""

    def build(out: Path) -> None:
        shutil.copy(compile_sources(folder / "emulated.so", "-O0", *SHARED), out)

    return kept_build(f"emulated_{sources_digest()}.so", build)


def setup_library(folder: Path) -> Path:
    """The library as setup.py builds it, compiled once; skips the test without a compiler."""
    if shutil.which("g++") is None:
        pytest.skip("no compiler on this machine")

    def build(out: Path) -> None:
        process = run_setup(folder)
        assert process.returncode == 0, process.stderr
        (built,) = (folder / "lib").rglob("_native_kernels*.so")
        shutil.copy(built, out)

    return kept_build(f"_native_kernels_{sources_digest()}.so", build)


def run_setup(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Build by setup.py, into lib/ of a folder."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder / "lib")]
    command += ["--build-temp", str(folder / "temp")]
    whole = {**os.environ, **environment}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=whole)


def run(*command: str) -> None:
    """Run a command that must succeed."""
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def take(path: Path | None, isa: str | None, patch: pytest.MonkeyPatch) -> None:
    """Make the package use this library and this RAC_KERNEL."""
    patch.setattr(library, "built_libraries", lambda: [path] if path else [])
    patch.setenv("RAC_KERNEL", isa or "")
    forget()


def forget() -> None:
    """Decide anew at the next use which library and kernel run."""
    for cached in (library.load, support.support, support.library_and_isa):
        cached.cache_clear()
    if support.cpp_operator.registered is not None:
        support.cpp_operator.registered.use_operator(None, 0)


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
    bits = padded.view(len(mask), -1, 8) << torch.arange(8, dtype=torch.uint8)
    return bits.sum(-1).to(torch.uint8)


def random_mask(rows: int, columns: int, density: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=generator) < density


def pack(values: Tensor, bitmask: Tensor, columns: int) -> Packed:
    """A packed weight from the two tensors of a checkpoint."""
    shape = (len(bitmask), columns)
    return Packed(pack_values(values, bitmask, shape), *shape)


def pack_dense(dense: Tensor, bits: int = 8, zeros: Tensor | None = None) -> Tensor:
    """Pack an int8 weight without masks."""
    return pack_values(dense, None, tuple(dense.shape), bits, zeros)


def set_activation_bits(weight: Packed, bits: int) -> None:
    support.library_and_isa()[0].set_activation_bits(weight.data, bits)


def activation_bits(data: Tensor) -> int:
    """Return the bits that the kernel in use rounds x to with packed integers, by their header."""
    used, isa = support.library_and_isa()
    return 8 if data[12] and used.kernels[isa].multiplies_bytes else 16


def multiply(
    x: Tensor, weight: Packed, bias: Tensor | None = None, scale: Tensor | None = None
) -> Tensor:
    """X times the transposed packed weight."""
    return sparse_linear(x, weight.data, weight.rows, weight.columns, bias, scale)


def unpacked(weight: Packed) -> Tensor:
    """Return the dense weight with every stored bit, after the check of packed data."""
    used, isa = support.library_and_isa()
    value_type = used.value_type(weight.data)
    used.check(*weight, value_type)
    dtype = PACKED_TYPES[value_type].dtype
    panels = -(-weight.rows // 16)
    transposed = torch.empty(weight.columns, 16 * panels)
    used.expand(*weight, 0, panels, transposed, isa)
    dense = transposed.t()[: weight.rows]
    if dtype == torch.bfloat16:  # the upper halves: a conversion may change the bits of a NaN
        return (dense.contiguous().view(torch.int32) >> 16).to(torch.int16).view(dtype)
    return dense.to(dtype)


def check_form(weight: Packed, form: str) -> None:
    """Check data as a packed weight of a form of `FORMS`, "bf16" or "fp32"."""
    number = {"bf16": 0, "fp32": 1, "int8": 2, "int4": 4}.get(form)
    if number is None:  # without masks
        number = {8: 3, 4: 5, 3: 6, 2: 7}[FORMS[form][0]]
    support.library_and_isa()[0].check(*weight, number)


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round [N, K] to int8 with one scale per row: values [N, K], scales float32 [N, 1]."""
    scales = (weight.abs().amax(dim=1, keepdim=True) / 127).clamp_min(1e-9)
    return (weight / scales).round().clamp(-127, 127).to(torch.int8), scales


def quantize_groups(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Round [N, K] to -8..7 in groups of columns."""
    groups = weight.unflatten(1, (-1, group))
    scale = (groups.abs().amax(2) / 7).clamp_min(1e-9).bfloat16().float()
    values = (groups / scale[..., None]).round().clamp(-8, 7).to(torch.int8)
    return values.flatten(1), scale


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
    assert bool(((y.double() - exact).abs() <= bound).all())


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


def integers(form, rows, columns, groups=1, zeros=False, seed=0, density=0.5):
    """A random weight of a form, with zeros and the least value among the stored ones: dense int8,
    and packed.

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
        pack_values(dense[mask], bitmask_of(mask), (rows, columns), bits, given)
        if masked
        else pack_dense(dense, bits, given)
    )
    return dense.masked_fill(~mask, 0), Packed(data, rows, columns)


def scaled(dense: Tensor, scale: Tensor) -> Tensor:
    """Integers [N, K] times `scale` [N, groups], in float64."""
    width = dense.shape[1] // scale.shape[1]
    return dense.double() * scale.double().repeat_interleave(width, dim=1)


def assert_integer_product(y, x, weight, groups=1, bias=None, levels=LEVELS[16]):
    """Y is x W^T + bias, x within half a step of its blocks' integers, at most `levels`."""
    exact, terms = x.double() @ weight.T, x.double().abs() @ weight.abs().T
    block, bound = weight.shape[1] // groups if groups > 1 else BLOCK, torch.zeros_like(exact)
    blocks = (tensor.split(block, 1) for tensor in (x.double().abs(), weight.abs()))
    for x_block, w_block in zip(*blocks, strict=True):
        bound += 0.502 / levels * x_block.amax(1, keepdim=True) * w_block.sum(1)
    if bias is not None:
        exact, terms = exact + bias.double(), terms + bias.double().abs()
    bound += terms * 2.0**-20 + (exact.abs() * 2.0**-8 if y.dtype == torch.bfloat16 else 0.0)
    assert y.shape == exact.shape
    assert bool(((y.double() - exact).abs() <= bound).all())
