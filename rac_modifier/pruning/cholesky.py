"""Cholesky factors, solves and inverses of symmetric matrices, in place.

Where float32 matmuls go to oneDNN (cpu_tuning.py), large matrices are factored by blocks of
columns, nearly all matmuls: 1.3 times as fast as LAPACK, whose matmuls would be MKL's.
"""

import torch
from torch import Tensor

from rac_modifier.runtime.cpu_tuning import add_matmul_, matmul, onednn_is_faster

BLOCK = 512  # columns of a block of a factor
_CHUNK = 1024  # rows of a matmul that is added to a matrix; bounds its temporary memory
_SMALL_TRIANGLE = 64  # rows up to which LAPACK inverts a triangle


def _in_blocks(matrix: Tensor) -> bool:
    large = matrix.shape[0] >= 2 * BLOCK
    return large and matrix.dtype == torch.float32 and onednn_is_faster(matrix.device)


def cholesky_(matrix: Tensor) -> Tensor | None:
    """Compute the lower factor [d, d] in the memory of `matrix`; None: not positive definite.

    By blocks of columns, with L on the left of block k, d^3 / 6 multiply-adds:
    A_k <- A_k - L_left L_k,left^T, L_kk = chol(A_kk), L_below,k = A_below,k L_kk^-T.
    """
    if not _in_blocks(matrix):
        by_columns = matrix.mT  # LAPACK's layout: a matrix by rows would be copied
        lower, info = torch.linalg.cholesky_ex(
            by_columns, out=(by_columns, matrix.new_empty((), dtype=torch.int32))
        )
        return lower if int(info) == 0 else None
    d = matrix.shape[0]
    for start in range(0, d, BLOCK):
        stop = min(start + BLOCK, d)
        block, below = slice(start, stop), slice(stop, d)
        # A_k <- A_k - L_left L_k,left^T
        rows, right = matrix[start:], matrix[block, :start].T
        add_matmul_(rows[:, block], rows[:, :start], right, alpha=-1, chunk=_CHUNK)
        corner = matrix[block, block]
        lower, info = torch.linalg.cholesky_ex(corner)
        if int(info):
            return None
        corner.copy_(lower)
        inverse = _inverse_of_triangle(lower).T  # L_below,k = A_below,k L_kk^-T
        for rows in matrix[below, block].split(_CHUNK):
            rows.copy_(matmul(rows, inverse))
    return matrix.tril_()


def cholesky_solve(b: Tensor, lower: Tensor) -> Tensor:
    """Return (`lower` `lower`^T)^-1 `b` [d, rows]; torch.cholesky_solve would copy `lower`."""
    if not _in_blocks(lower):
        half: Tensor = torch.linalg.solve_triangular(lower, b, upper=False)  # L y = b
        solved: Tensor = torch.linalg.solve_triangular(lower.mT, half, upper=True)  # L^T x = y
        return solved
    x, d = b.T.clone(memory_format=torch.contiguous_format), len(b)
    starts = range(0, d, BLOCK)
    corners = [_inverse_of_triangle(lower[s : s + BLOCK, s : s + BLOCK]) for s in starts]
    # forward, L y = b: y_k = L_kk^-1 (b_k - L_k,left y_left); then L^T x = y from the last block
    for start, corner in zip(starts, corners, strict=True):
        block = slice(start, start + BLOCK)
        add_matmul_(x[:, block], x[:, :start], lower[block, :start].T, alpha=-1)
        x[:, block] = matmul(x[:, block], corner.T)
    for start, corner in reversed(list(zip(starts, corners, strict=True))):
        block, after = slice(start, start + BLOCK), slice(start + BLOCK, d)
        add_matmul_(x[:, block], x[:, after], lower[after, block], alpha=-1)
        x[:, block] = matmul(x[:, block], corner)
    return x.T


def invert_corners_(lower: Tensor) -> Tensor:
    """Invert the diagonal blocks of a lower factor [d, d] in place, for `solve_with_corners_`."""
    for start in range(0, len(lower), BLOCK):
        _invert_triangle_(lower[start : start + BLOCK, start : start + BLOCK])
    return lower


def solve_with_corners_(b: Tensor, lower: Tensor) -> Tensor:
    """Compute (L L^T)^-1 `b` in the memory of b [d, rows], for L after `invert_corners_`."""
    starts = range(0, len(b), BLOCK)
    # y_k = L_kk^-1 (b_k - L_k,left y_left), then x_k = L_kk^-T (y_k - L_below,k^T x_below)
    for start in starts:
        block = slice(start, start + BLOCK)
        b[block] = lower[block, block] @ (b[block] - lower[block, :start] @ b[:start])
    for start in reversed(starts):
        block, after = slice(start, start + BLOCK), slice(start + BLOCK, len(b))
        b[block] = lower[block, block].T @ (b[block] - lower[after, block].T @ b[after])
    return b


def inverse_(matrix: Tensor) -> Tensor | None:
    """Compute the inverse [d, d] in the memory of `matrix`; None where it is not positive definite.

    By blocks: the factor L, X = L^-1 row by row, X_k = [-L_kk^-1 L_k X, L_kk^-1], then X^T X.
    """
    lower = cholesky_(matrix)
    if lower is None:
        return None
    if not _in_blocks(matrix):
        return torch.cholesky_inverse(lower, out=lower)
    d = matrix.shape[0]
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


def mirror_lower_(matrix: Tensor, block: int) -> Tensor:
    """Copy the lower triangle of `matrix` [d, d] to the upper one, `block` rows at a time."""
    for start in range(0, matrix.shape[0], block):
        stop = start + block
        corner = matrix[start:stop, start:stop]
        corner.copy_(corner.tril() + corner.tril(-1).T)
        matrix[start:stop, stop:] = matrix[stop:, start:stop].T
    return matrix


def _inverse_of_triangle(lower: Tensor) -> Tensor:
    inverse = lower.clone(memory_format=torch.contiguous_format)
    _invert_triangle_(inverse)
    return inverse


def _invert_triangle_(lower: Tensor) -> None:
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
