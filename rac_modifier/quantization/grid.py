"""The values of a quantized weight: (code - zero point) times scale, per row or group of columns.

A symmetric grid has no zero points: they are 0. Weights are transposed here, [d, rows], as in the
solvers; scales and zero points are [groups, rows]. All may have a leading dimension: problems.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

_E4M3_MAX = 448.0


@dataclass(frozen=True)
class Grid:
    """Integers of `bits` bits, or the 8-bit floats e4m3.

    `group_size` columns share a scale; None: a row does. Without `symmetric` (integers only) they
    share a zero point too: the code that means zero.
    """

    kind: Literal["int", "float"]
    bits: int
    group_size: int | None = None
    symmetric: bool = True

    @property
    def half_range(self) -> float:
        """Return the largest weight over its scale, as in compressed-tensors: (max - min) / 2."""
        return _E4M3_MAX if self.kind == "float" else ((1 << self.bits) - 1) / 2

    @property
    def lowest(self) -> int:
        """Return the lowest code of an integer grid."""
        return -(1 << (self.bits - 1))

    @property
    def is_lopsided(self) -> bool:
        """Return whether the extra negative code is worth a search for the sign (below 8 bits)."""
        return self.kind == "int" and self.symmetric and self.bits < 8

    def groups(self, columns: int) -> int:
        """Return the number of scales of a row of `columns` weights."""
        return -(-columns // self.group_size) if self.group_size else 1

    def column_scales(self, scales: Tensor, columns: int) -> Tensor:
        """Repeat the scales [groups, rows] for every weight, [columns, rows]."""
        return scales.repeat_interleave(self.group_size or columns, dim=-2)[..., :columns, :]

    def round_(self, weight: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        """Round `weight` in place to the nearest (code - `zero`) `scale`; both broadcast."""
        return self.codes_(weight.div_(scale), zero).mul_(scale)

    def codes_(self, scaled: Tensor, zero: Tensor | None = None) -> Tensor:
        """Round weights divided by scales, in place, to code - `zero`, half to even."""
        if zero is not None:
            return self.codes_(scaled.add_(zero)).sub_(zero)
        if self.kind == "float":
            scaled.clamp_(-_E4M3_MAX, _E4M3_MAX)
            return scaled.copy_(scaled.to(torch.float8_e4m3fn))
        return scaled.clamp_(self.lowest, -self.lowest - 1).round_()


@dataclass(frozen=True)
class Steps:
    """Scales and zero points (None: symmetric): [groups, rows], or [columns, rows] if spread."""

    scale: Tensor
    zero: Tensor | None = None

    def spread(self, grid: Grid, columns: int) -> "Steps":
        """Repeat them for every weight."""
        zero = None if self.zero is None else grid.column_scales(self.zero, columns)
        return Steps(grid.column_scales(self.scale, columns), zero)

    def of(self, column: int) -> tuple[Tensor, Tensor | None]:
        """Return scale and zero point, [rows], of one column."""
        zero = None if self.zero is None else self.zero.select(-2, column)
        return self.scale.select(-2, column), zero


def stored(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to `dtype`, in which they are stored, away from 0; the sign stays."""
    sizes = scales.abs().to(dtype).clamp(min=torch.finfo(dtype).tiny).to(scales.dtype)
    return torch.where(scales < 0, -sizes, sizes)
