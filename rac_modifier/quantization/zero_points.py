"""Scales and zero points of an asymmetric grid, searched together.

With codes from c_min to c_max, scale s and zero point z a group can have the values (c - z) s, from (c_min - z) s to
(c_max - z) s; 0 is always one of them, since z is stored as a code. Weights are transposed, as in grid.py.
"""

from __future__ import annotations

import torch

from rac_modifier.quantization.grid import Grid, Steps, stored

# With each zero point, the scale that covers the group is tried, and shares of it down to the least.
_LEAST_SHARE = 0.25
_STEPS = 31
# Zero points on either side of the one that covers the group with the finest steps: all four of 2 bits, 7 of others.
_NEAR = 3


def search_zero_points(
    weight: torch.Tensor, grid: Grid, importance: torch.Tensor, dtype: torch.dtype
) -> Steps:
    """Scales, exact in `dtype`, and zero points [groups, rows] with the least weighted error of rounding.

    As `grid.search_scales`, over both ends of the range: minimises sum_j importance_j (w_j - (c_j - z) s)^2 over zero points z
    near the one whose range fits that of the group, and scales s.
    """
    *several, d, rows = weight.shape
    size = grid.group_size or d
    scales, zeros = (weight.new_empty(*several, grid.groups(d), rows) for _ in range(2))
    for group, start in enumerate(range(0, d, size)):
        columns = slice(start, start + size)
        scales[..., group, :], zeros[..., group, :] = _search(
            weight[..., columns, :], grid, importance[..., columns].unsqueeze(-1), dtype
        )
    return Steps(scales, zeros)


def _search(
    part: torch.Tensor, grid: Grid, importance: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point [..., rows] of one group of columns, `part` [..., columns, rows]; `importance` [..., columns, 1]."""
    lowest, highest = grid.lowest, -grid.lowest - 1
    low, high = part.amin(dim=-2).clamp_(max=0.0), part.amax(dim=-2).clamp_(min=0.0)
    finest = (high - low) / (highest - lowest)
    finest = torch.where(finest == 0, 1.0, finest)  # a group of zeros only: any scale is right
    count = min(1 << grid.bits, 2 * _NEAR + 1)
    first = (lowest - low / finest).round_().sub_(count // 2).clamp_(lowest, highest + 1 - count)
    best_scale, best_zero = stored(finest, dtype), first.clone()
    least = torch.full_like(finest, torch.inf)
    for place in range(count):
        zero = first + place
        # the scale that covers both ends; an end with no codes on its side of zero cannot be covered
        above, below = high / (highest - zero), low / (lowest - zero)
        covering = torch.maximum(above.where(zero < highest, 0.0), below.where(zero > lowest, 0.0))
        covering = torch.where(covering == 0, finest, covering)
        for step in range(_STEPS):
            scale = stored(covering * (1 - (1 - _LEAST_SHARE) * step / (_STEPS - 1)), dtype)
            rounded = grid.round_(part.clone(), scale.unsqueeze(-2), zero.unsqueeze(-2))
            error = rounded.sub_(part).square_().mul_(importance).sum(dim=-2)
            better = error < least
            least = torch.where(better, error, least)
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
    return best_scale, best_zero
