"""Master weights of a quantized weight: inside the cell of their code, on the side of the dense weight.

The cell of a code c holds all values that round to it: (c - 1/2) s to (c + 1/2) s on an integer grid. A
master weight in the middle moves half a step of the grid before its code changes, which takes many steps
of training. So a weight whose code is far from the dense weight starts near the border that faces it.
"""

from __future__ import annotations

import torch

from rac_modifier.quantization.grid import Grid

_WIDTH = 0.45  # of a step of the grid to each side: a border itself may round either way
_MANTISSA, _LEAST_EXPONENT = 3, -6  # of e4m3


def spread_scales(scale: torch.Tensor, grid: Grid, columns: int) -> torch.Tensor:
    """Repeat scales [rows, groups] to [rows, columns]."""
    return grid.column_scales(scale.T, columns).T


def codes_of(
    weight: torch.Tensor, scale: torch.Tensor, grid: Grid, zero: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the codes [rows, columns], float32, of code times scale.

    Exact also for weights that were rounded to bfloat16 or float16, by less than half a step of the grid.

    Args:
        weight: code times scale, [rows, columns].
        scale: of either sign, [rows, groups].
        zero: zero points [rows, groups] of an asymmetric grid; codes are counted from them.
    """
    spread = None if zero is None else spread_scales(zero.float(), grid, weight.shape[1])
    return grid.codes_(weight.float() / spread_scales(scale.float(), grid, weight.shape[1]), spread)


def master_in_cell(
    codes: torch.Tensor, scale: torch.Tensor, grid: Grid, target: torch.Tensor
) -> torch.Tensor:
    """Return the float32 weight nearest to `target` [rows, columns] that rounds to `codes`.

    `scale` is [rows, groups].
    """
    spread = spread_scales(scale.float(), grid, codes.shape[1])
    reach = _WIDTH * _step(codes, grid)
    return torch.clamp(target.float() / spread, codes - reach, codes + reach) * spread


def pruned_share(
    codes: torch.Tensor, scale: torch.Tensor, grid: Grid, dense: torch.Tensor
) -> float:
    """Return the share of zeros whose dense weight is above 3/4 of a step: pruned, not rounded."""
    least = 0.75 * spread_scales(scale.float().abs(), grid, codes.shape[1]) * _step(codes, grid)
    return float(((codes == 0) & (dense.float().abs() > least)).float().mean())


def _step(codes: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return the distance from each code to its nearest neighbour."""
    if grid.kind == "int":
        return torch.ones_like(codes)
    mantissa, exponent = torch.frexp(codes.abs())  # 0.5 <= mantissa < 1
    exponent = (
        torch.where(mantissa == 0.5, exponent - 1, exponent) - 1
    )  # below a power of two the step is half as large
    exponent = exponent.clamp(min=_LEAST_EXPONENT).masked_fill(codes == 0, _LEAST_EXPONENT)
    return torch.exp2((exponent - _MANTISSA).float())
