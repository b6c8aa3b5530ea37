"""The values that a quantized weight can have: (code - zero point) times scale, with one of each per row or group of columns.

A symmetric grid has no zero points: they are 0. Weights are transposed here, [d, rows], as in the solvers; scales and zero points
are [groups, rows]. All may have a leading dimension: several problems.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

# The scales that are tried, as shares of the largest weight over the half range.
_FACTORS = tuple(0.4 + 0.02 * step for step in range(41))
_E4M3_MAX = 448.0


@dataclass(frozen=True)
class Grid:
    """Integers of `bits` bits, or the 8-bit floats e4m3; `group_size` columns share a scale, with None a whole row does.

    Without `symmetric` (integers only) they share a zero point, too: the code that means zero.
    """

    kind: Literal["int", "float"]
    bits: int
    group_size: int | None = None
    symmetric: bool = True

    @property
    def half_range(self) -> float:
        """The divisor that turns the largest weight into its scale, as in compressed-tensors: (max - min) / 2."""
        return _E4M3_MAX if self.kind == "float" else ((1 << self.bits) - 1) / 2

    @property
    def lowest(self) -> int:
        """The lowest code of an integer grid."""
        return -(1 << (self.bits - 1))

    @property
    def is_lopsided(self) -> bool:
        """Whether the extra code below zero is worth a search for the sign: 1 of 256 is not."""
        return self.kind == "int" and self.symmetric and self.bits < 8

    def groups(self, columns: int) -> int:
        """Number of scales of a row of `columns` weights."""
        return -(-columns // self.group_size) if self.group_size else 1

    def column_scales(self, scales: torch.Tensor, columns: int) -> torch.Tensor:
        """[groups, rows] to [columns, rows]: the scale of every weight."""
        return scales.repeat_interleave(self.group_size or columns, dim=-2)[..., :columns, :]

    def round_(
        self, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Round `weight` in place to the nearest point of the grid, (code - `zero`) `scale`; both broadcast. Returns it."""
        return self.codes_(weight.div_(scale), zero).mul_(scale)

    def codes_(self, scaled: torch.Tensor, zero: torch.Tensor | None = None) -> torch.Tensor:
        """Round weights divided by scales, in place, as compressed-tensors does: clamp, then round half to even.

        The result is code - `zero`, so that it means `result` times scale whether there are zero points or not.
        """
        if zero is not None:
            return self.codes_(scaled.add_(zero)).sub_(zero)
        if self.kind == "float":
            scaled.clamp_(-_E4M3_MAX, _E4M3_MAX)
            return scaled.copy_(scaled.to(torch.float8_e4m3fn))
        return scaled.clamp_(self.lowest, -self.lowest - 1).round_()


@dataclass(frozen=True)
class Steps:
    """Scales and zero points: [groups, rows], or [columns, rows] where each weight has its own.

    `zero` holds whole numbers in the dtype of the scales; None on a symmetric grid.
    """

    scale: torch.Tensor
    zero: torch.Tensor | None = None

    def spread(self, grid: Grid, columns: int) -> Steps:
        """Those of every weight."""
        zero = None if self.zero is None else grid.column_scales(self.zero, columns)
        return Steps(grid.column_scales(self.scale, columns), zero)

    def of(self, column: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Scale and zero point, [rows], of one column or group."""
        return self.scale.select(-2, column), None if self.zero is None else self.zero.select(
            -2, column
        )


def search_scales(
    weight: torch.Tensor, grid: Grid, importance: torch.Tensor, dtype: torch.dtype
) -> Steps:
    """Search the scales [groups, rows] of a symmetric grid, exact in `dtype`.

    `weight` is [d, rows] with zeros where pruned, `importance` [d] the diagonal of the Hessian.
    Minimises sum_j importance_j (w_j - round(w_j))^2 over _FACTORS times max|w| / half_range. An
    integer grid has one more code below zero than above, so both signs of the scale are tried:
    the longer side then covers the larger weights.
    """
    *several, d, rows = weight.shape
    size = grid.group_size or d
    result = weight.new_empty(*several, grid.groups(d), rows)
    for group, start in enumerate(range(0, d, size)):
        columns = slice(start, start + size)
        part, weights = weight[..., columns, :], importance[..., columns].unsqueeze(-1)
        largest = part.abs().amax(dim=-2) / grid.half_range
        largest = torch.where(largest == 0, 1.0, largest)  # only zeros: every scale is right
        least = torch.full_like(largest, torch.inf)
        for factor in _FACTORS:
            for sign in (1, -1) if grid.is_lopsided else (1,):
                scale = stored(largest * (sign * factor), dtype)
                rounded = grid.round_(part.clone(), scale.unsqueeze(-2))
                error = rounded.sub_(part).square_().mul_(weights).sum(dim=-2)
                better = error < least
                least = torch.where(better, error, least)
                result[..., group, :] = torch.where(better, scale, result[..., group, :])
    return Steps(result)


def stored(scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round scales to `dtype`, in which they are stored, away from 0; the sign stays."""
    sizes = scales.abs().to(dtype).clamp(min=torch.finfo(dtype).tiny).to(scales.dtype)
    return torch.where(scales < 0, -sizes, sizes)
