"""Scales and zero points: searched on the weights, then fitted to the codes by least squares.

The fit: a row of the weight is q = sum_g s_g C_g, where C_g holds the codes (minus the zero point)
of group g and zeros elsewhere. With the target t and the damped Hessian H, the error
(q - t) H (q - t)^T is a quadratic function of the scales s, and its minimum solves

    A s = b,   A_gh = C_g H C_h^T,   b_g = C_g H t^T.

The search chooses scales from the weights alone; the fit uses the whole Hessian. Two-stage grid
optimisation (arXiv 2602.02126) does the same for GPTQ. Weights are transposed, as in grid.py.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from rac_modifier.formats.encoding import Encoding, Steps
from rac_modifier.pruning.linalg import Dampening

# Symmetric: shares of the largest weight over the half range.
_FACTORS = tuple(0.4 + 0.02 * step for step in range(41))
# The same for 4-bit floats, whose scales are an eighth apart or a power of two: at a share of 1.5
# the largest weight has the code 4.
_FP4_FACTORS = tuple(0.5 + 0.05 * step for step in range(23))
# Asymmetric: shares, down to the least, of the scale that covers the group, for each zero point
# near the one of the finest steps: all four of 2 bits, three on either side of others.
_LEAST_SHARE, _SHARES, _NEAR = 0.25, 31, 3
_LARGEST_CHANGE = 3.0  # a scale that moves further belongs to a group with hardly any codes
_Store = Callable[[Tensor], Tensor]  # rounds scales to what is stored
_ROWS = 256  # fitted at a time: bounds the memory of A, [rows, groups, groups]


def search_steps(
    weight: Tensor,
    grid: Encoding,
    importance: Tensor,
    dtype: torch.dtype,
    global_scale: Tensor | None = None,
) -> Steps:
    """Search scales, exact in `dtype`, and zero points [groups, rows] with the least error.

    Minimise sum_j importance_j (w_j - (c_j - z) s)^2 over the candidates of each group, for a
    weight [d, rows] with zeros where pruned. `importance` [d] is the diagonal of the Hessian.
    """
    *batch, d, rows = weight.shape
    store = partial(grid.stored, dtype=dtype, global_scale=global_scale)
    size, candidates = grid.group_size or d, _symmetric if grid.symmetric else _asymmetric
    scales, zeros = (weight.new_zeros(*batch, grid.groups(d), rows) for _ in range(2))
    for group, start in enumerate(range(0, d, size)):
        columns = slice(start, start + size)
        part, weights = weight[..., columns, :], importance[..., columns].unsqueeze(-1)
        best_scale, best_zero = scales[..., group, :], zeros[..., group, :]
        least = torch.full_like(best_scale, torch.inf)
        for scale, zero in candidates(part, grid, store):
            spread = None if zero is None else zero.unsqueeze(-2)
            # sum_j h_j (w_j - q_j)^2, and the least of it so far
            rounded = grid.round_(part.clone(), scale.unsqueeze(-2), spread)
            error = rounded.sub_(part).square_().mul_(weights).sum(dim=-2)
            better = error < least
            least = torch.where(better, error, least)
            best_scale.copy_(torch.where(better, scale, best_scale))
            if zero is not None:
                best_zero.copy_(torch.where(better, zero, best_zero))
    return Steps(scales, None if grid.symmetric else zeros)


def _symmetric(part: Tensor, grid: Encoding, store: _Store) -> Iterator[tuple[Tensor, None]]:
    """Yield scales [rows] of a group of columns, `part` [columns, rows]."""
    largest = part.abs().amax(dim=-2) / grid.half_range
    largest = torch.where(largest == 0, 1.0, largest)  # only zeros: every scale is right
    for factor in _FP4_FACTORS if grid.has_coarse_scales else _FACTORS:
        # With the right sign of the scale, the extra code below zero serves the larger weights.
        for sign in (1, -1) if grid.is_lopsided else (1,):
            yield store(largest * (sign * factor)), None


def _asymmetric(part: Tensor, grid: Encoding, store: _Store) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield scales and zero points [rows] of a group of columns, `part` [columns, rows]."""
    # Codes c in [lowest, highest] with the zero point z reach from (lowest - z) s to
    # (highest - z) s. The finest s that covers all weights puts z at lowest - low / s.
    lowest, highest = grid.lowest, -grid.lowest - 1
    low, high = part.amin(dim=-2).clamp_(max=0.0), part.amax(dim=-2).clamp_(min=0.0)
    finest = (high - low) / (highest - lowest)
    finest = torch.where(finest == 0, 1.0, finest)  # only zeros: every scale is right
    count = min(1 << grid.bits, 2 * _NEAR + 1)
    first = (lowest - low / finest).round_().sub_(count // 2).clamp_(lowest, highest + 1 - count)
    for offset in range(count):
        zero = first + offset
        # the scale that covers both ends; an end with no codes on its side of zero is not covered
        above, below = high / (highest - zero), low / (lowest - zero)
        covering = torch.maximum(above.where(zero < highest, 0.0), below.where(zero > lowest, 0.0))
        covering = torch.where(covering == 0, finest, covering)
        for step in range(_SHARES):
            yield store(covering * (1 - (1 - _LEAST_SHARE) * step / (_SHARES - 1))), zero


def refit_scales(
    codes: Tensor,
    target: Tensor,
    scale: Tensor,
    grid: Encoding,
    hessian: Tensor,
    dampening: Dampening,
    dtype: torch.dtype,
) -> Tensor:
    """Return the scales [groups, rows], exact in `dtype`, with the least error for the codes.

    `codes` [d, rows] are code minus zero point, `scale` [groups, rows] their scales, `hessian`
    [d, d] is undamped. A scale stays as it is where its solution is not finite, changes sign, or
    changes by more than a factor of 3; a row keeps its scales where rounding loses the gain.
    """
    size, groups = grid.group_size or len(codes), grid.groups(len(codes))
    fitted = []
    for c, t, s in zip(*(x.split(_ROWS, dim=1) for x in (codes, target, scale)), strict=True):
        gram = c.new_empty(c.shape[1], groups, groups)
        for group in range(groups):
            # A_gh = C_h H' C_g^T for each group h of the row
            columns = slice(group * size, (group + 1) * size)
            image = hessian[:, columns] @ c[columns]  # H C_g^T, [d, rows]
            image[columns].addcmul_(dampening.added[columns, None], c[columns])
            gram[:, :, group] = _group_sums(image.mul_(c), groups, size).T
        # b_h = C_h H' t^T
        image = torch.addcmul(hessian @ t, dampening.added[:, None], t)
        right = _group_sums(image.mul_(c), groups, size).T
        new = _solve(gram.double(), right.double(), s.T.double())
        stored = grid.stored(new.to(s), dtype).T
        before, after = (_error(gram, right, x.T) for x in (s, stored))
        fitted.append(torch.where(after < before, stored, s))
    return torch.cat(fitted, dim=1)


def _solve(gram: Tensor, right: Tensor, old: Tensor) -> Tensor:
    """Solve A s = b per row; [rows, groups, groups], [rows, groups] and the old scales, float64."""
    gram = (gram + gram.mT) / 2  # float32 sums are symmetric but for rounding
    empty = gram.diagonal(dim1=1, dim2=2) <= 0  # a group without a code
    gram = gram + torch.diag_embed(empty.to(gram))
    factor, failed = torch.linalg.cholesky_ex(gram)  # A = L L^T
    new = torch.cholesky_solve(right.unsqueeze(2), factor).squeeze(2)  # s = A^-1 b
    ratio = new / old
    usable = (ratio < _LARGEST_CHANGE) & (ratio > 1 / _LARGEST_CHANGE) & ~empty
    return torch.where(usable & (failed == 0).unsqueeze(1), new, old)


def _error(gram: Tensor, right: Tensor, scale: Tensor) -> Tensor:
    """Return s A s - 2 b s per row, [rows]: the error without its constant."""
    # q H' q^T = s A s and q H' t^T = b s, for q = sum_g s_g C_g
    image = torch.bmm(gram, scale.unsqueeze(2)).squeeze(2)
    return ((image - 2 * right) * scale).sum(dim=1)


def _group_sums(values: Tensor, groups: int, size: int) -> Tensor:
    """Sum [d, rows] over the columns of each group: [groups, rows]."""
    return values.reshape(groups, size, -1).sum(dim=1)
