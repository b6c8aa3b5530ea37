"""Quantize pruned modules that read the same input: the one entry point of this room."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rac_modifier.errors import RacError
from rac_modifier.pruning.checks import check_hessian, check_weights, is_finite
from rac_modifier.pruning.linalg import Dampening, factorise, quadratic_form, stacked
from rac_modifier.pruning.solve import Solution
from rac_modifier.quantization.grid import Grid, search_scales
from rac_modifier.quantization.rounding import descend, gptq
from rac_modifier.quantization.zero_points import search_zero_points
from rac_modifier.settings.quantization import SWEEPS


@dataclass(frozen=True)
class Quantized:
    """A quantized module.

    Attributes:
        weight: [rows, d], (code - zero point) times scale, in the dtype of the scales; zero where pruned.
        scale: [rows, groups] (one group: one scale per row), as compressed-tensors' `weight_scale`.
        zero_point: int8 [rows, groups], as its `weight_zero_point` before it is packed; None on a symmetric grid.
        relative_error: trace((T - Q) H (T - Q)^T) / trace(T H T^T) for the target T; 0 when both are 0.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    relative_error: float
    zero_point: torch.Tensor | None = None


@torch.no_grad()
def quantize(
    solutions: Sequence[Solution],
    hessian: torch.Tensor,
    grids: Sequence[Grid | None],
    *,
    dtype: torch.dtype,
    dampening_frac: float = 0.01,
    sweeps: int = SWEEPS,
) -> list[Quantized | None]:
    """Round the pruned modules of `solutions` to their `grids`, one per module; a module with None is left as it is.

    The outputs are to stay those of the targets (rounding.py has the equations), and only weights that the masks keep
    become nonzero. `hessian` [d, d] float32 is the one that the pruning used. Scales and zero points are chosen on the weights
    and the diagonal of the Hessian (grid.py, zero_points.py). Scales are exact in `dtype`, which is the dtype of the weights
    and scales returned.

    Raises:
        RacError: shapes or numbers that cannot work, or a result that `dtype` cannot hold.
    """
    check_weights([s.weight for s in solutions], [s.name for s in solutions], hessian.shape[0])
    check_hessian(hessian, ", ".join(s.name for s in solutions))
    results: list[Quantized | None] = [None] * len(solutions)
    for grid in dict.fromkeys(grid for grid in grids if grid is not None):
        members = [i for i, other in enumerate(grids) if other == grid]
        rounded = _on_one_grid([solutions[i] for i in members], hessian, grid, dtype, dampening_frac, sweeps)
        for i, result in zip(members, rounded, strict=True):
            results[i] = result
    return results


def _on_one_grid(
    solutions: Sequence[Solution],
    hessian: torch.Tensor,
    grid: Grid,
    dtype: torch.dtype,
    dampening_frac: float,
    sweeps: int,
) -> list[Quantized]:
    names, d = [s.name for s in solutions], hessian.shape[0]
    if grid.group_size and d % grid.group_size:
        raise RacError(
            f"{names[0]}: {d} inputs are no multiple of the group_size {grid.group_size}; set a group_size "
            "that divides them (config_groups), or add the module to ignore"
        )
    factor = solutions[0].factor
    if factor is None:
        factor = factorise(hessian, Dampening.of(hessian, dampening_frac), ", ".join(names), largest_first=True)
    keep = stacked([s.mask.to(hessian.dtype) for s in solutions], hessian)
    target = stacked([s.target for s in solutions], hessian)
    working = stacked([s.weight for s in solutions], hessian).mul_(keep)
    search = search_scales if grid.symmetric else search_zero_points
    steps = search(working, grid, factor.dampening.diagonal, dtype)
    spread = steps.spread(grid, d)
    gptq(working, keep, spread, grid, factor)
    descend(working, target, keep, spread, grid, hessian, factor.dampening, sweeps)
    working.add_(0.0)  # turns -0.0 into 0.0: the sparse layouts would store -0.0, and 8-bit floats have it

    rows = [s.weight.shape[0] for s in solutions]
    totals = quadratic_form(target, hessian)
    errors = quadratic_form(target.sub_(working), hessian)
    zeros: Sequence[torch.Tensor | None] = [None] * len(rows)
    if steps.zero is not None:
        zeros = steps.zero.to(torch.int8).split(rows, 1)
    results = []
    for name, w, scale, zero, error, total in zip(
        names,
        *(x.split(rows, 1) for x in (working, steps.scale)),
        zeros,
        *(x.split(rows) for x in (errors, totals)),
        strict=True,
    ):
        weight = w.T.contiguous().to(dtype)
        if not is_finite(weight):
            raise RacError(f"{name}: the quantized weight overflows {dtype}; raise dampening_frac ({dampening_frac})")
        whole = float(total.sum())
        relative = max(float(error.sum()), 0.0) / whole if whole > 0 else 0.0
        zero_point = None if zero is None else zero.T.contiguous()
        results.append(Quantized(weight, scale.T.contiguous().to(dtype), relative, zero_point))
    return results
