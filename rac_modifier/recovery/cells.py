"""Where training of a quantized weight starts: inside the cell of its code, on the side of the dense weight.

The cell of a code c is everything that rounds to it: (c - 1/2) s to (c + 1/2) s on an integer grid. A float32 master weight in
its middle has to move half a step of the grid before its code changes, which is many steps of training. Here weights whose code
is far from the dense weight start near the border that faces it, and all codes start as they are stored.
"""

from __future__ import annotations

import torch

from rac_modifier.quantization.grid import Grid

_WIDTH = 0.45  # of a step of the grid to each side: a border itself may round either way
_MANTISSA, _LEAST_EXPONENT = 3, -6  # of e4m3


def spread_scales(scale: torch.Tensor, grid: Grid, columns: int) -> torch.Tensor:
    """[rows, groups] to [rows, columns]: the scale of every weight."""
    return grid.column_scales(scale.T, columns).T


def codes_of(
    weight: torch.Tensor, scale: torch.Tensor, grid: Grid, zero: torch.Tensor | None = None
) -> torch.Tensor:
    """The codes [rows, columns], float32, of code times scale; `scale` and `zero` are [rows, groups].

    On an asymmetric grid they are counted from the zero points `zero`, so that 0 means zero and code times scale the weight.
    Exact for weights that were rounded to bfloat16 or float16 too: half a step of the grid is larger than that.
    """
    spread = None if zero is None else spread_scales(zero.float(), grid, weight.shape[1])
    return grid.codes_(weight.float() / spread_scales(scale.float(), grid, weight.shape[1]), spread)


def master_in_cell(
    codes: torch.Tensor, scale: torch.Tensor, grid: Grid, target: torch.Tensor
) -> torch.Tensor:
    """The float32 weight nearest to `target` [rows, columns] that still rounds to `codes`; `scale` is [rows, groups]."""
    spread = spread_scales(scale.float(), grid, codes.shape[1])
    reach = _WIDTH * _step(codes, grid)
    return torch.clamp(target.float() / spread, codes - reach, codes + reach) * spread


def pruned_share(
    codes: torch.Tensor, scale: torch.Tensor, grid: Grid, dense: torch.Tensor
) -> float:
    """The share of weights that are zero and were not rounded to it: their dense weight is above 3/4 of a step of the grid."""
    least = 0.75 * spread_scales(scale.float().abs(), grid, codes.shape[1]) * _step(codes, grid)
    return float(((codes == 0) & (dense.float().abs() > least)).float().mean())


def _step(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """From each code to its nearest neighbour."""
    if grid.kind == "int":
        return torch.ones_like(codes)
    mantissa, exponent = torch.frexp(codes.abs())  # 0.5 <= mantissa < 1
    exponent = (
        torch.where(mantissa == 0.5, exponent - 1, exponent) - 1
    )  # below a power of two the step is half as large
    exponent = exponent.clamp(min=_LEAST_EXPONENT).masked_fill(codes == 0, _LEAST_EXPONENT)
    return torch.exp2((exponent - _MANTISSA).float())
