"""Factor, solve and inverse of positive definite matrices block by block, so that nearly all of it are large products.

LAPACK's are in the library that torch calls, which is slow on some processors (float32_products.py). Each works on
the lower triangle of a symmetric matrix A [d, d], in its memory, with blocks of 512 rows and columns.

*Cholesky*, d^3 / 6 multiply-adds, from the first block of columns to the last, with L on the left of it:
A_k <- A_k - L_left L_k,left^T, L_kk = chol(A_kk), L_below,k = A_below,k L_kk^-T. Each number is written once or twice.

*Solve*, d^2 multiply-adds per right side, and d BLOCK more for the corners: L v = b block by block, then L^T x = v back.

*Inverse*, d^3 / 2 multiply-adds: the factor, then X = L^-1 row by row of blocks, X_k = [-L_kk^-1 L_k X, L_kk^-1], then X^T X.
X^T is kept above the diagonal, so that the numbers that a product sums up lie side by side.
"""

from __future__ import annotations

import torch

from rac_modifier.float32_products import add_product, product

BLOCK = 512
_ROWS = 1024  # of a block of columns that are updated at once
_SMALL = 64  # rows of a triangle that is inverted by LAPACK


def cholesky_(matrix: torch.Tensor, *, bf16: bool = False) -> torch.Tensor | None:
    """The lower factor [d, d], zero above the diagonal, in the memory of `matrix`; None where it is not positive definite.

    `bf16` rounds the factors of products to bfloat16, but for those with the first 512 inputs: these carry most of what all
    inputs share, and what rounding it would leave can be larger than the small eigenvalues.
    """
    d = matrix.shape[0]
    for start in range(0, d, BLOCK):
        stop = min(start + BLOCK, d)
        here, below = slice(start, stop), slice(stop, d)
        exact = slice(0, min(BLOCK if bf16 else d, start))
        if start:
            add_product(
                matrix[start:, here],
                matrix[start:, exact],
                matrix[here, exact].T,
                alpha=-1,
                rows=_ROWS,
            )
        if bf16 and start > BLOCK:
            _subtract_rounded(matrix, start, stop)
        corner = matrix[here, here]
        lower, info = torch.linalg.cholesky_ex(corner)
        if int(info):
            return None
        corner.copy_(lower)
        if stop < d:
            inverse = _inverse_of_triangle(lower).T
            for rows in matrix[below, here].split(_ROWS):
                rows.copy_(product(rows, inverse))
    return matrix.tril_()


def solve(b: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """(`lower` `lower`^T)^-1 `b`, for b [d, rows]; a new tensor."""
    found, d = b.T.clone(memory_format=torch.contiguous_format), len(b)
    starts = range(0, d, BLOCK)
    corners = [
        _inverse_of_triangle(lower[start : start + BLOCK, start : start + BLOCK])
        for start in starts
    ]
    for start, corner in zip(starts, corners, strict=True):
        here = slice(start, start + BLOCK)
        if start:
            add_product(found[:, here], found[:, :start], lower[here, :start].T, alpha=-1)
        found[:, here] = product(found[:, here], corner.T)
    for start, corner in reversed(list(zip(starts, corners, strict=True))):
        here, after = slice(start, start + BLOCK), slice(start + BLOCK, d)
        if start + BLOCK < d:
            add_product(found[:, here], found[:, after], lower[after, here], alpha=-1)
        found[:, here] = product(found[:, here], corner)
    return found.T


def invert_corners_(lower: torch.Tensor) -> torch.Tensor:
    """A lower factor [d, d] with its diagonal blocks inverted, in its memory, as `solve_` takes it."""
    for start in range(0, len(lower), BLOCK):
        _invert_triangle_(lower[start : start + BLOCK, start : start + BLOCK])
    return lower


def solve_(b: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
    """(L L^T)^-1 `b` in the memory of b [d, rows], for a factor L after `invert_corners_`; both of one dtype, bfloat16 too."""
    d = len(b)
    starts = range(0, d, BLOCK)
    for start in starts:
        here = slice(start, start + BLOCK)
        left = b[here] - lower[here, :start] @ b[:start] if start else b[here]
        b[here] = lower[here, here] @ left
    for start in reversed(starts):
        here, after = slice(start, start + BLOCK), slice(start + BLOCK, d)
        left = b[here] - lower[after, here].T @ b[after] if start + BLOCK < d else b[here]
        b[here] = lower[here, here].T @ left
    return b


def inverse_(matrix: torch.Tensor) -> torch.Tensor | None:
    """The inverse [d, d], symmetric, in the memory of `matrix`; None where it is not positive definite."""
    d = matrix.shape[0]
    if cholesky_(matrix) is None:
        return None
    blocks = [slice(start, min(start + BLOCK, d)) for start in range(0, d, BLOCK)]
    for here in blocks:  # L is below the diagonal and X^T above it; in the corners L, then X^T
        corner, start = _inverse_of_triangle(matrix[here, here]), here.start
        before = torch.empty_like(matrix[here, :start])
        for columns in (
            one for one in blocks if one.start < start
        ):  # where X is zero above `columns.start`
            left = slice(columns.start, start)
            before[:, columns] = product(matrix[here, left], matrix[columns, left].T)
        matrix[:start, here] = product(corner, before).neg_().T
        matrix[here, here] = corner.T
    for here in blocks:  # the result takes the place of L; only earlier ones read the corner
        stop, after = here.stop, slice(here.start, d)
        matrix[here, :stop] = product(matrix[here, after], matrix[:stop, after].T)
    return mirror_lower_(matrix, BLOCK)


def mirror_lower_(matrix: torch.Tensor, block: int) -> torch.Tensor:
    """Copy the lower triangle of `matrix` [d, d] to the upper one, so many rows at a time."""
    for start in range(0, matrix.shape[0], block):
        stop = start + block
        corner = matrix[start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T
    return matrix


def _subtract_rounded(matrix: torch.Tensor, start: int, stop: int) -> None:
    """From columns [start, stop) of `matrix`, on and below the diagonal, the products in bfloat16 of L on their left."""
    left = slice(BLOCK, start)
    of_block = matrix[start:stop, left].bfloat16().T
    for rows in matrix[start:].split(_ROWS):
        rows[:, start:stop].sub_(rows[:, left].bfloat16() @ of_block)


def _inverse_of_triangle(lower: torch.Tensor) -> torch.Tensor:
    found = lower.clone(memory_format=torch.contiguous_format)
    _invert_triangle_(found)
    return found


def _invert_triangle_(lower: torch.Tensor) -> None:
    """A triangle that is zero above its diagonal, by halves: where A and C have B between them, -C^-1 B A^-1 takes its place."""
    half = len(lower) // 2
    if len(lower) <= _SMALL:
        lower.copy_(
            torch.linalg.solve_triangular(lower, torch.eye(len(lower)).to(lower), upper=False)
        )
        return
    first, last = lower[:half, :half], lower[half:, half:]
    _invert_triangle_(first)
    _invert_triangle_(last)
    lower[half:, :half] = (last @ (lower[half:, :half] @ first)).neg_()
