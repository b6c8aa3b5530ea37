"""What the kernel tests share: compiling csrc/ without installing, a packer as oracle, and an error bound."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rac_modifier.kernels import SparseWeight, pack
from rac_modifier.kernels.cpu import library as native

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-I{HERE}", f"-I{CSRC}"]


def compile_sources(out: Path, *flags: str, sources: list[Path] | None = None) -> Path:
    """All of csrc/ with g++; skips the test where there is none."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on this machine")
    files = [*sorted(CSRC.glob("*.cpp")), *(sources or [])]
    done = subprocess.run([compiler, *FLAGS, *flags, *map(str, files), "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


def take(path: Path | None, isa: str | None, patch: pytest.MonkeyPatch) -> None:
    """Have the package use this library, and RAC_KERNEL."""
    patch.setattr(native, "_built", lambda: [path] if path else [])
    patch.setenv("RAC_KERNEL", isa) if isa is not None else patch.delenv("RAC_KERNEL", raising=False)
    native.forget()


def bitmask_of(mask: Tensor) -> Tensor:
    """Bool [N, K] to uint8 [N, ceil(K/8)], bit i of byte j is column 8j + i."""
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.shape[1] % 8))
    return (padded.view(len(mask), -1, 8) << torch.arange(8, dtype=torch.uint8)).sum(-1).to(torch.uint8)


def random_mask(rows: int, columns: int, density: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, columns, generator=generator) < density


def sparse(mask: Tensor, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, SparseWeight]:
    """A random weight with these kept places: dense and packed."""
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
    assert bool(((y.double() - exact).abs() <= bound).all()), float((y.double() - exact).abs().max())
