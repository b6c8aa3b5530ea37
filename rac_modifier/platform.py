"""Tweaks for the CPU that a run computes on, and matrix algorithms that they speed up.

docs/results/pruning_time.md and docs/results/scale.md have the measurements.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

BLOCK = 512  # columns of a block of a factor
HEAP_GAPS = 1.15  # pages of a process / bytes of its blocks, whose sizes leave gaps in glibc's heap
_LEAST_WORK = 1 << 26  # multiply-adds below which a call of oneDNN costs more than it gains
_LEAST_ROWS = 256  # rows of the first factor below which copying the second costs too much
_SIZES_PER_DOUBLING = 8  # of the number of tokens
_CHUNK = 2048  # rows of a matmul that is added to a matrix; bounds its temporary memory
_FACTOR_CHUNK = 1024  # the same within a Cholesky factorization
_SMALL_TRIANGLE = 64  # rows up to which LAPACK inverts a triangle
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # mallopt's numbers in malloc.h
_LARGEST_KEPT_BLOCK, _KEPT_AT_END_OF_HEAP = 256 << 20, 1 << 30
_MALLOC_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX")
_resident_limit: int | None = None  # bytes; None: no forecast was made
_raise = 0  # bytes


# ---- float32 matmuls by oneDNN instead of MKL: 0.31 instead of 0.51 of the time of SparseGPT


def onednn_is_faster(device: torch.device) -> bool:
    """Return whether float32 matmuls on a device go to oneDNN: on AMD CPUs with AVX-512.

    Results differ in the last bits from MKL's; each shape takes the same way in every process.
    """
    return device.type == "cpu" and _is_amd_with_avx512()


@functools.cache
def _is_amd_with_avx512() -> bool:
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    built = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return bool(built and has.get("avx512_f") and str(has.get("cpu_name", "")).startswith("AMD"))


def matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return `a` [m, k] @ `b` [k, n]."""
    return _linear_by_onednn(a, b.T) if _onednn_gains(a, b.T) else a @ b


def add_matmul_(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    alpha: float = 1.0,
    chunk: int | None = None,
) -> torch.Tensor:
    """Add `alpha` `a` [m, k] @ `b` [k, n] to `out` [m, n] in place, `chunk` rows at a time."""
    if not _onednn_gains(a, b.T):
        return out.addmm_(a, b, alpha=alpha)
    chunk = chunk or _CHUNK
    weight = b.T.contiguous()
    for out_rows, a_rows in zip(out.split(chunk), a.split(chunk), strict=True):
        out_rows.add_(_linear_by_onednn(a_rows, weight), alpha=alpha)
    return out


def padded_size(count: int) -> int:
    """Return `count`, rounded up to one of eight sizes per power of two.

    oneDNN keeps 0.57 MiB of code per shape: 8 shapes of an expert layer instead of one per expert.
    """
    step = max((1 << count.bit_length()) // (2 * _SIZES_PER_DOUBLING), 1)
    return -(-count // step) * step


def with_zero_rows(x: torch.Tensor) -> torch.Tensor:
    """Return `x` [rows, k] with zeros appended up to `padded_size(rows)`."""
    missing = padded_size(len(x)) - len(x)
    return torch.nn.functional.pad(x, (0, 0, 0, missing)) if missing else x


class FasterLinears(TorchFunctionMode):
    """Send float32 `linear` without gradients to oneDNN where that is faster."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.nn.functional.linear and not kwargs and not torch.is_grad_enabled():
            x, weight, *bias = args
            plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in (x, weight))
            if plain and _onednn_gains(x, weight):
                tokens = with_zero_rows(x.reshape(-1, x.shape[-1]))
                result = _linear_by_onednn(tokens, weight, *bias)
                return result[: x.shape[:-1].numel()].view(*x.shape[:-1], -1)
        return func(*args, **(kwargs or {}))


def _onednn_gains(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether oneDNN is faster for `x` [..., k] @ `weight` [n, k]^T."""
    large = x.numel() * weight.shape[0] >= _LEAST_WORK and x.numel() >= _LEAST_ROWS * x.shape[-1]
    return large and x.dtype == weight.dtype == torch.float32 and onednn_is_faster(x.device)


def _linear_by_onednn(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Return `x` [..., k] @ `weight` [n, k]^T + `bias`, by the operator of torch's compiler."""
    weight = weight.contiguous()  # oneDNN is a hundred times slower on others
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


# ---- symmetric matrices by blocks of columns, nearly all matmuls: LAPACK's would be MKL's


def cholesky_(matrix: torch.Tensor, *, bf16: bool = False) -> torch.Tensor | None:
    """Compute the lower factor [d, d] in the memory of `matrix`; None: not positive definite.

    From the first block of columns to the last, with L on the left of it, d^3 / 6 multiply-adds:
    A_k <- A_k - L_left L_k,left^T, L_kk = chol(A_kk), L_below,k = A_below,k L_kk^-T.

    `bf16` rounds the factors of matmuls to bfloat16, but not with the first 512 inputs: these carry
    most of what all inputs share, and the error of rounding it can exceed the small eigenvalues.
    """
    d = matrix.shape[0]
    for start in range(0, d, BLOCK):
        stop = min(start + BLOCK, d)
        block, below = slice(start, stop), slice(stop, d)
        exact = slice(0, min(BLOCK if bf16 else d, start))
        if start:
            lower_rows, right = matrix[start:], matrix[block, exact].T
            add_matmul_(
                lower_rows[:, block], lower_rows[:, exact], right, alpha=-1, chunk=_FACTOR_CHUNK
            )
        if bf16 and start > BLOCK:
            before = slice(BLOCK, start)
            right = matrix[block, before].bfloat16().T
            for rows in matrix[start:].split(_FACTOR_CHUNK):
                rows[:, block].sub_(rows[:, before].bfloat16() @ right)
        corner = matrix[block, block]
        lower, info = torch.linalg.cholesky_ex(corner)
        if int(info):
            return None
        corner.copy_(lower)
        if stop < d:
            inverse = _inverse_of_triangle(lower).T
            for rows in matrix[below, block].split(_FACTOR_CHUNK):
                rows.copy_(matmul(rows, inverse))
    return matrix.tril_()


def cholesky_solve(b: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """Return (`lower` `lower`^T)^-1 `b`, for b [d, rows], by blocks."""
    x, d = b.T.clone(memory_format=torch.contiguous_format), len(b)
    starts = range(0, d, BLOCK)
    corners = [_inverse_of_triangle(lower[s : s + BLOCK, s : s + BLOCK]) for s in starts]
    for start, corner in zip(starts, corners, strict=True):
        block = slice(start, start + BLOCK)
        if start:
            add_matmul_(x[:, block], x[:, :start], lower[block, :start].T, alpha=-1)
        x[:, block] = matmul(x[:, block], corner.T)
    for start, corner in reversed(list(zip(starts, corners, strict=True))):
        block, after = slice(start, start + BLOCK), slice(start + BLOCK, d)
        if start + BLOCK < d:
            add_matmul_(x[:, block], x[:, after], lower[after, block], alpha=-1)
        x[:, block] = matmul(x[:, block], corner)
    return x.T


def invert_corners_(lower: torch.Tensor) -> torch.Tensor:
    """Invert the diagonal blocks of a lower factor [d, d] in place, for `solve_with_corners_`."""
    for start in range(0, len(lower), BLOCK):
        _invert_triangle_(lower[start : start + BLOCK, start : start + BLOCK])
    return lower


def solve_with_corners_(b: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """Compute (L L^T)^-1 `b` in the memory of b [d, rows], for L after `invert_corners_`."""
    d = len(b)
    starts = range(0, d, BLOCK)
    for start in starts:
        block = slice(start, start + BLOCK)
        remainder = b[block] - lower[block, :start] @ b[:start] if start else b[block]
        b[block] = lower[block, block] @ remainder
    for start in reversed(starts):
        block, after = slice(start, start + BLOCK), slice(start + BLOCK, d)
        remainder = b[block] - lower[after, block].T @ b[after] if start + BLOCK < d else b[block]
        b[block] = lower[block, block].T @ remainder
    return b


def inverse_(matrix: torch.Tensor) -> torch.Tensor | None:
    """Compute the inverse [d, d] in the memory of `matrix`; None where it is not positive definite.

    d^3 / 2 multiply-adds: the factor L, X = L^-1 by rows of blocks, X_k = [-L_kk^-1 L_k X,
    L_kk^-1], then X^T X.
    """
    d = matrix.shape[0]
    if cholesky_(matrix) is None:
        return None
    blocks = [slice(start, min(start + BLOCK, d)) for start in range(0, d, BLOCK)]
    # L lies below the diagonal, X^T above it (a matmul reads contiguous rows), in corners
    # L, then X^T.
    for block in blocks:
        corner, start = _inverse_of_triangle(matrix[block, block]), block.start
        before = torch.empty_like(matrix[block, :start])
        for columns in (b for b in blocks if b.start < start):
            leading = slice(columns.start, start)  # X is zero above `columns.start`
            before[:, columns] = matmul(matrix[block, leading], matrix[columns, leading].T)
        matrix[:start, block] = matmul(corner, before).neg_().T
        matrix[block, block] = corner.T
    # The result takes the place of L: only earlier blocks read the corner.
    for block in blocks:
        stop, after = block.stop, slice(block.start, d)
        matrix[block, :stop] = matmul(matrix[block, after], matrix[:stop, after].T)
    return mirror_lower_(matrix, BLOCK)


def mirror_lower_(matrix: torch.Tensor, block: int) -> torch.Tensor:
    """Copy the lower triangle of `matrix` [d, d] to the upper one, `block` rows at a time."""
    for start in range(0, matrix.shape[0], block):
        stop = start + block
        corner = matrix[start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T
    return matrix


def _inverse_of_triangle(lower: torch.Tensor) -> torch.Tensor:
    inverse = lower.clone(memory_format=torch.contiguous_format)
    _invert_triangle_(inverse)
    return inverse


def _invert_triangle_(lower: torch.Tensor) -> None:
    """Invert a triangle by halves: [[A, 0], [B, C]] gives [[A^-1, 0], [-C^-1 B A^-1, C^-1]]."""
    half = len(lower) // 2
    if len(lower) <= _SMALL_TRIANGLE:
        identity = torch.eye(len(lower)).to(lower)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    first, last = lower[:half, :half], lower[half:, half:]
    _invert_triangle_(first)
    _invert_triangle_(last)
    lower[half:, :half] = (last @ (lower[half:, :half] @ first)).neg_()


# ---- freed memory: a fifth to a third of a run's time was spent on new pages


def keep_freed_memory() -> bool:
    """Have glibc keep freed blocks of up to 256 MiB, and 1 GiB at the end of its heap.

    All threads then share one heap: heaps per thread are too small for such blocks.

    Returns:
        Whether it was set: False with another C library, or where the user has set one of these.
    """
    library = ctypes.CDLL(None)
    by_user = any(name in os.environ for name in (*_MALLOC_VARIABLES, "GLIBC_TUNABLES"))
    if by_user or not hasattr(library, "gnu_get_libc_version"):
        return False
    options = {
        _MMAP_THRESHOLD: _LARGEST_KEPT_BLOCK,
        _TRIM_THRESHOLD: _KEPT_AT_END_OF_HEAP,
        _ARENA_MAX: 1,
    }
    return all(library.mallopt(option, value) == 1 for option, value in options.items())


def expect_growth(forecast: int) -> None:
    """Let this process grow by `forecast` bytes before `return_freed_memory` gives memory back."""
    global _resident_limit, _raise
    _resident_limit, _raise = resident_bytes() + forecast, forecast // 16


def return_freed_memory() -> None:
    """Return what glibc keeps where the process outgrew its forecast (by up to 1.4 times).

    Taking the pages anew costs time, so each return raises the limit by a sixteenth of the
    forecast.
    """
    global _resident_limit
    if _resident_limit is None or resident_bytes() <= _resident_limit:
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "malloc_trim"):
        library.malloc_trim(0)
        _resident_limit = max(_resident_limit + _raise, resident_bytes())


def resident_bytes() -> int:
    """Return the bytes of memory that this process occupies; 0 without Linux's /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")
