"""The values that a quantized weight can have: code times scale, symmetric, with one scale per row or per group of columns.

Weights are transposed here, [d, rows], as in the solvers; scales are [groups, rows].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

# The scales that are tried, as shares of the largest weight over the half range. With smaller ones, clipping costs more than the
# finer steps gain.
_SHRINK = (0.5, 1.0)
_STEPS = 51
_E4M3_MAX = 448.0


@dataclass(frozen=True)
class Grid:
    """Integers of `bits` bits, or the 8-bit floats e4m3; `group_size` columns share a scale, with None a whole row does."""

    kind: Literal["int", "float"]
    bits: int
    group_size: int | None = None

    @property
    def half_range(self) -> float:
        """The divisor that turns the largest weight into its scale, as in compressed-tensors: (max - min) / 2."""
        return _E4M3_MAX if self.kind == "float" else ((1 << self.bits) - 1) / 2

    def groups(self, columns: int) -> int:
        """Number of scales of a row of `columns` weights."""
        return -(-columns // self.group_size) if self.group_size else 1

    def column_scales(self, scales: torch.Tensor, columns: int) -> torch.Tensor:
        """[groups, rows] to [columns, rows]: the scale of every weight."""
        return scales.repeat_interleave(self.group_size or columns, dim=0)[:columns]

    def round_(self, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """Round `weight` in place to the nearest code times `scale`, which broadcasts over it. Returns it."""
        return self.codes_(weight.div_(scale)).mul_(scale)

    def codes_(self, scaled: torch.Tensor) -> torch.Tensor:
        """Round weights divided by scales to codes, in place, as compressed-tensors does: clamp, then round half to even."""
        if self.kind == "float":
            scaled.clamp_(-_E4M3_MAX, _E4M3_MAX)
            return scaled.copy_(scaled.to(torch.float8_e4m3fn))
        return scaled.clamp_(-(1 << (self.bits - 1)), (1 << (self.bits - 1)) - 1).round_()


def search_scales(weight: torch.Tensor, grid: Grid, importance: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales [groups, rows], exact in `dtype`, with the least weighted error of rounding.

    `weight` is [d, rows] with zeros where pruned, `importance` [d] the diagonal of the Hessian. Minimises
    sum_j importance_j (w_j - round(w_j))^2 over scales between half and all of max|w| / half_range.
    """
    d, rows = weight.shape
    size = grid.group_size or d
    result = weight.new_empty(grid.groups(d), rows)
    for group, start in enumerate(range(0, d, size)):
        part, weights = weight[start : start + size], importance[start : start + size].unsqueeze(1)
        largest = part.abs().amax(dim=0) / grid.half_range
        largest = torch.where(largest == 0, 1.0, largest)  # a group of zeros only: any scale is right
        least = torch.full_like(largest, torch.inf)
        for step in range(_STEPS):
            shrink = _SHRINK[1] - (_SHRINK[1] - _SHRINK[0]) * step / (_STEPS - 1)
            scale = stored(largest * shrink, dtype)
            error = grid.round_(part.clone(), scale).sub_(part).square_().mul_(weights).sum(dim=0)
            better = error < least
            least = torch.where(better, error, least)
            result[group] = torch.where(better, scale, result[group])
    return result


def stored(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Scales rounded to `dtype`, in which they are stored, but never 0."""
    return scales.to(dtype).clamp(min=torch.finfo(dtype).tiny).to(scales.dtype)
