"""Least squares for the scales of given codes.

A row of the weight is q = sum_g s_g C_g: C_g holds the codes (minus the zero point) of group g and
zeros elsewhere. With the target t and the damped Hessian H, the error (q - t) H (q - t)^T is a
quadratic function of the scales s, and its minimum solves

    A s = b,   A_gh = C_g H C_h^T,   b_g = C_g H t^T.

Rounding chooses codes for scales that a search found from the weights alone; this step uses the
whole Hessian. Two-stage grid optimisation (arXiv 2602.02126) does the same for GPTQ.
"""

from __future__ import annotations

import torch

from rac_modifier.pruning.linalg import Dampening
from rac_modifier.quantization.grid import Grid, Steps, stored

_LARGEST_CHANGE = 3.0  # a scale that moves further belongs to a group with hardly any codes
_ROWS = 256  # solved per call; bounds the memory of A, [rows, groups, groups] in float64


def refit_scales(
    codes: torch.Tensor,
    target: torch.Tensor,
    steps: Steps,
    grid: Grid,
    hessian: torch.Tensor,
    dampening: Dampening,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return the scales [groups, rows], exact in `dtype`, with the least error for the codes.

    `codes` [d, rows] are code minus zero point, `target` [d, rows], `hessian` [d, d] undamped. A
    scale stays as it is where its solution is not finite, changes sign, or changes by more than a
    factor of 3; a row keeps its scales where rounding them to `dtype` loses the gain.
    """
    d, rows = codes.shape
    size, groups = grid.group_size or d, grid.groups(d)
    gram = codes.new_empty(rows, groups, groups)
    for group in range(groups):
        columns = slice(group * size, (group + 1) * size)
        image = hessian[:, columns] @ codes[columns]  # H C_g, [d, rows]
        image[columns].addcmul_(dampening.added[columns, None], codes[columns])
        gram[:, :, group] = _group_sums(image.mul_(codes), groups, size).T
    image = torch.addcmul(hessian @ target, dampening.added[:, None], target)
    right = _group_sums(image.mul_(codes), groups, size).T
    result = steps.scale.clone()
    for first in range(0, rows, _ROWS):
        chunk = slice(first, first + _ROWS)
        old = steps.scale[:, chunk].T
        new = _solve(gram[chunk].double(), right[chunk].double(), old.double())
        result[:, chunk] = stored(new.to(old), dtype).T
    before, after = (_error(gram, right, scale.T) for scale in (steps.scale, result))
    return torch.where(after < before, result, steps.scale)


def _solve(gram: torch.Tensor, right: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """Solve A s = b per row; [rows, groups, groups], [rows, groups] and the old scales, float64."""
    gram = (gram + gram.mT) / 2
    empty = gram.diagonal(dim1=1, dim2=2) <= 0  # a group without a code
    gram = gram + torch.diag_embed(empty.to(gram))
    factor, failed = torch.linalg.cholesky_ex(gram)
    new = torch.cholesky_solve(right.unsqueeze(2), factor).squeeze(2)
    ratio = new / old
    usable = (ratio < _LARGEST_CHANGE) & (ratio > 1 / _LARGEST_CHANGE) & ~empty
    return torch.where(usable & (failed == 0).unsqueeze(1), new, old)


def _error(gram: torch.Tensor, right: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return s A s - 2 b s per row, [rows]: the error without its constant."""
    image = torch.bmm(gram, scale.unsqueeze(2)).squeeze(2)
    return ((image - 2 * right) * scale).sum(dim=1)


def _group_sums(values: torch.Tensor, groups: int, size: int) -> torch.Tensor:
    """Sum [d, rows] over the columns of each group: [groups, rows]."""
    return values.reshape(groups, size, -1).sum(dim=1)
