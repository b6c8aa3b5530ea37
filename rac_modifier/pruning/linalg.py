"""Linear algebra that the solvers share: dampening, the Cholesky factor, products in bfloat16, quadratic forms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from rac_modifier import platform
from rac_modifier.errors import RacError
from rac_modifier.platform import add_matmul_, matmul, onednn_is_faster

# Each retry multiplies the dampening by ten, up to the mean of the diagonal. With more, H would hardly matter, and the
# result would be magnitude pruning under another name.
MAX_DAMPENING = 1.0
_FIRST_RETRY = 1e-4  # when dampening_frac is 0
BLOCK, _SUMMED, VECTORS = (
    512,
    2048,
    1024,
)  # of quadratic_form: rows of H, numbers that are summed up, vectors at once
_ROUNDED_AT_ONCE = 64  # rows of a matrix, which are copied

_PRODUCT_ROWS = 256  # of a product that is added: so many are there beside what it is added to
# Numbers that passes over memory take at once: on a CPU they stay in its caches, on a GPU, where calls take longer, more.
AT_ONCE_ON_CPU, _AT_ONCE_ON_GPU = 1 << 17, 1 << 22

T = TypeVar("T")


@dataclass(frozen=True)
class Dampening:
    """What is added to the diagonal of a Hessian [d, d]: lambda = `frac` * mean(diag H).

    Attributes:
        frac: share of the mean of the diagonal.
        retries: how often `frac` was raised to reach this value.
        uniform: lambda, a tensor with one number.
        added: [d], lambda, and the mean on top of it for inputs that are 0 on every token.
        diagonal: [d], the damped diagonal; it is positive everywhere.
    """

    frac: float
    retries: int
    uniform: torch.Tensor
    added: torch.Tensor
    diagonal: torch.Tensor

    @classmethod
    def of(cls, hessian: torch.Tensor, frac: float, retries: int = 0) -> Dampening:
        """For a Hessian whose diagonal is nowhere negative and somewhere positive."""
        diagonal = hessian.diagonal()
        mean = diagonal.mean()
        uniform = frac * mean
        added = torch.where(diagonal == 0, mean, torch.zeros_like(mean)) + uniform
        return cls(frac, retries, uniform, added, diagonal + added)


def raise_until_it_works(
    attempt: Callable[[Dampening], T | None],
    hessian: torch.Tensor,
    dampening: Dampening,
    label: str,
) -> tuple[T, Dampening]:
    """`attempt(dampening)`, with the dampening raised tenfold as long as it returns None.

    Returns:
        What it returned, and the dampening that it succeeded with.

    Raises:
        RacError: naming `label`, when the mean of the diagonal is not enough.
    """
    while True:
        result = attempt(dampening)
        if result is not None:
            return result, dampening
        larger = max(dampening.frac * 10, _FIRST_RETRY)
        if larger > MAX_DAMPENING * (1 + 1e-9):
            raise RacError(
                f"{label}: the Hessian is not positive definite, even with dampening_frac {dampening.frac:.4g}; "
                "use more calibration tokens, or look for activations that overflow in this layer"
            )
        dampening = Dampening.of(hessian, larger, dampening.retries + 1)


@dataclass(frozen=True)
class Factor:
    """The damped Hessian as U U^T, with U [d, d] upper triangular and U^-1 = R, so that its inverse is R^T R.

    U is the Cholesky factor of the matrix read from the last input to the first:
    U[i, j] = `reversed_lower`[d-1-i, d-1-j], lower triangular. With an `order` [d], input i of U is input order[i] of H.
    """

    reversed_lower: torch.Tensor
    dampening: Dampening
    order: torch.Tensor | None = None

    def solve(self, b: torch.Tensor) -> torch.Tensor:
        """`b` [rows, d] times the inverse of the damped Hessian."""
        if self.order is None:
            return cholesky_solve(b.T.flip(0), self.reversed_lower).flip(0).T
        back = self.order.flip(0)
        solved = torch.empty_like(b)
        solved[:, back] = cholesky_solve(b.T[back], self.reversed_lower).T
        return solved

    def block(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The diagonal blocks of U and of R at inputs [start, stop)."""
        return diagonal_blocks(self.reversed_lower, start, stop)


def diagonal_blocks(
    reversed_lower: torch.Tensor, start: int, stop: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The diagonal blocks of U and of R at inputs [start, stop), of one factor [d, d] or of several [..., d, d]."""
    d = reversed_lower.shape[-1]
    here = slice(d - stop, d - start)
    u = reversed_lower[..., here, here].flip(-2, -1)
    return u, torch.linalg.solve_triangular(
        u, torch.eye(stop - start).to(u).expand_as(u), upper=True
    )


def factorise(
    hessian: torch.Tensor, dampening: Dampening, label: str, *, largest_first: bool = False
) -> Factor:
    """Factor H with this dampening, or with a larger one where it needs it; d^3 / 6 multiply-adds.

    `largest_first` orders the inputs by the diagonal of H, falling.

    The mean is over the Hessian as it is, so scaling H changes nothing (llm-compressor sets dead diagonals to 1 first).

    Raises:
        RacError: naming `label`, when it is not positive definite even with the largest dampening.
    """
    order = dampening.diagonal.argsort(descending=True, stable=True) if largest_first else None
    back = None if order is None else order.flip(0)

    def attempt(dampening: Dampening) -> torch.Tensor | None:
        damped = hessian.flip(0, 1) if back is None else hessian[back.unsqueeze(1), back]
        damped.diagonal().copy_(
            dampening.diagonal.flip(0) if back is None else dampening.diagonal[back]
        )
        return cholesky_(damped)

    return Factor(*raise_until_it_works(attempt, hessian, dampening, label), order)


def cholesky_(matrix: torch.Tensor, *, bf16: bool = False) -> torch.Tensor | None:
    """The lower Cholesky factor of a symmetric `matrix` [d, d], in its memory; None where it is not positive definite.

    `bf16` rounds products where it is computed block by block (platform.py).
    """
    if _in_blocks(matrix):
        return platform.cholesky_(matrix, bf16=bf16)
    by_columns = (
        matrix.mT
    )  # as LAPACK has it: of a matrix that lies row by row, a second one would be made
    lower, info = torch.linalg.cholesky_ex(
        by_columns, out=(by_columns, matrix.new_empty((), dtype=torch.int32))
    )
    return lower if int(info) == 0 else None


def cholesky_solve(b: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """(`lower` `lower`^T)^-1 `b`, for b [d, rows]. torch.cholesky_solve copies `lower` first."""
    if _in_blocks(lower):
        return platform.cholesky_solve(b, lower)
    solved = torch.linalg.solve_triangular(lower, b, upper=False)
    return torch.linalg.solve_triangular(lower.mT, solved, upper=True)


def inverse_(matrix: torch.Tensor) -> torch.Tensor | None:
    """The inverse of a symmetric `matrix` [d, d], in its memory; None where it is not positive definite."""
    if _in_blocks(matrix):
        return platform.inverse_(matrix)
    factor = cholesky_(matrix)
    return None if factor is None else torch.cholesky_inverse(factor, out=factor)


def _in_blocks(matrix: torch.Tensor) -> bool:
    """Whether products of blocks are faster than LAPACK."""
    large = matrix.shape[0] >= 2 * platform.BLOCK
    return large and matrix.dtype == torch.float32 and onednn_is_faster(matrix.device)


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the device has units for bfloat16 products that are summed in float32; without them float32 is as fast.

    CPUs with AVX512-BF16 or AMX (4.3 times float32 on a Zen 5), and CUDA devices from compute capability 8. torch 2.10 cannot
    say what a CPU has: then float32, which is right everywhere.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device)[0] >= 8
    known = device.type == "cpu" and hasattr(torch.cpu, "get_capabilities")
    has = torch.cpu.get_capabilities() if known else {}
    return bool(has.get("avx512_bf16") or has.get("amx_bf16"))


def rounded_to_bf16_(matrix: torch.Tensor) -> torch.Tensor:
    """A float32 `matrix` [rows, columns] in bfloat16, in the first half of its memory: it is gone after that.

    It lies row by row or column by column, and so does the result.
    """
    if not matrix.is_contiguous():
        return rounded_to_bf16_(matrix.mT).mT
    rows, columns = matrix.shape
    rounded = matrix.view(-1).view(torch.bfloat16)[: rows * columns].view(rows, columns)
    for start in range(
        0, rows, _ROUNDED_AT_ONCE
    ):  # what is written lies before what is still to be read
        here = slice(start, start + _ROUNDED_AT_ONCE)
        rounded[here] = matrix[here].bfloat16()
    return rounded


def parts(matrix: torch.Tensor, group: int = 1) -> list[slice]:
    """Rows of `matrix` that passes over memory take at once, in whole groups of so many."""
    at_once = AT_ONCE_ON_CPU if matrix.device.type == "cpu" else _AT_ONCE_ON_GPU
    step = max(at_once // max(matrix.shape[1], 1) // group * group, group)
    return [slice(start, min(start + step, len(matrix))) for start in range(0, len(matrix), step)]


def row_blocks(matrix: torch.Tensor) -> list[slice]:
    """Rows of a product of this shape that are computed at once."""
    return [
        slice(i, min(i + _PRODUCT_ROWS, len(matrix))) for i in range(0, len(matrix), _PRODUCT_ROWS)
    ]


def bf16_addmm(out: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, bf16: bool) -> torch.Tensor:
    """`out` + `a` @ `b`, in place; with `bf16` both factors are rounded to bfloat16, else the product is as they are."""
    return out.add_(a.bfloat16() @ b.bfloat16()) if bf16 else out.addmm_(a, b)


def quadratic_form(
    vectors: torch.Tensor, hessian: torch.Tensor, *, bf16: bool = False
) -> torch.Tensor:
    """v^T H v for each column v of `vectors` [d, rows] and symmetric H [d, d]; float64 [rows].

    Uses the lower triangle and counts what is left of the diagonal blocks twice: half the work of a full product. Products have
    one of a few shapes (platform.py). `bf16` rounds the factors of H v where there are 1024 inputs or more.
    """
    result = torch.zeros(vectors.shape[1], dtype=torch.float64, device=vectors.device)
    bf16 = bf16 and len(hessian) >= 2 * BLOCK
    for some, found in zip(vectors.split(VECTORS, dim=1), result.split(VECTORS), strict=True):
        lying = some.T.contiguous()
        rounded = lying.bfloat16() if bf16 else lying
        for start in range(0, len(hessian), BLOCK):
            block, left = slice(start, start + BLOCK), slice(0, start + BLOCK)
            if bf16:
                weight = hessian[block, left].bfloat16()
                weight[:, :start] *= 2  # exact
                moved = (rounded[:, left] @ weight.T).float()
            else:
                moved = matmul(lying[:, block], hessian[block, block])
                for first in range(0, start, _SUMMED):
                    before = slice(first, min(first + _SUMMED, start))
                    add_matmul_(moved, lying[:, before], hessian[block, before].T, alpha=2)
            found += moved.mul_(lying[:, block]).sum(1)
    return result


def stacked(weights: Sequence[torch.Tensor], hessian: torch.Tensor) -> torch.Tensor:
    """Weights, each [rows_i, d], side by side and transposed, [d, sum(rows)], in the Hessian's dtype and on its device.

    One input is one contiguous row then, which is what the solvers read and write at a time.
    """
    result = hessian.new_empty(hessian.shape[0], sum(w.shape[0] for w in weights))
    for part, w in zip(result.split([w.shape[0] for w in weights], dim=1), weights, strict=True):
        part.copy_(w.T)
    return result
