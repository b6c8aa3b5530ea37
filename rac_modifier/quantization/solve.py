"""Quantize pruned modules that read the same input: the one entry point of this package."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rac_modifier.formats.encoding import Encoding, Steps, local_scale
from rac_modifier.pruning.linalg import Dampening, Factor, check_finite, quadratic_form, stacked
from rac_modifier.pruning.solve import Solution
from rac_modifier.quantization.rounding import Rounding
from rac_modifier.quantization.scales import refit_scales, search_steps

_SWEEPS = 3  # passes of coordinate descent; six lower the error by another 0.2 %
_REFITS = 2  # fits of the scales to the codes, each with a sweep after it


@dataclass(frozen=True)
class Quantized:
    """A quantized module: `weight` [rows, d] is (code - zero point) times scale, in their dtype.

    Attributes:
        scale: [rows, groups], as compressed-tensors' `weight_scale`; per row: 1 group.
        global_scale: float32 [1], as its `weight_global_scale`, by which `scale` is divided first.
        zero_point: int8 [rows, groups], as its `weight_zero_point`; None on a symmetric grid.
        relative_error: trace((T - Q) H (T - Q)^T) / trace(T H T^T) for the target T, or 0.
    """

    weight: Tensor
    scale: Tensor
    relative_error: float
    zero_point: Tensor | None = None
    global_scale: Tensor | None = None


@torch.no_grad()
def quantize_many(
    problems: Sequence[Sequence[Solution]],
    hessians: Sequence[Tensor],
    grids: Sequence[Sequence[Encoding | None]],
    *,
    dtype: torch.dtype,
    dampening_frac: float = 0.01,
) -> list[list[Quantized | None]]:
    """Round the pruned modules of each problem to their grids; one with None is left as it is.

    A problem has pruned modules that read the same input, their Hessian [d, d] and grids. Outputs
    stay close to the targets' outputs (rounding.py has the equations), and only kept weights become
    nonzero. Problems of one shape with the same grids are rounded as a batch, with the bits that
    they get alone.

    Weights and scales are exact in `dtype`. `dampening_frac` is of a Hessian without a factor.

    Raises:
        RacError: a Hessian without a factor, or a result that `dtype` cannot hold.
    """
    results: list[list[Quantized | None]] = [[None] * len(solutions) for solutions in problems]
    numbers = range(len(problems))
    # a factor made here has its own order of inputs, one of the pruning has none
    kinds = {
        (
            *(s.weight.shape for s in solutions),
            *of_modules,
            solutions[0].factor is None or solutions[0].factor.order is not None,
        )
        for solutions, of_modules in zip(problems, grids, strict=True)
    }
    for batch in [list(numbers)] if len(kinds) == 1 else [[number] for number in numbers]:
        of_modules = grids[batch[0]]
        for grid in dict.fromkeys(grid for grid in of_modules if grid is not None):
            members = [i for i, g in enumerate(of_modules) if g == grid]
            modules = [[problems[n][i] for i in members] for n in batch]
            of_batch = [hessians[n] for n in batch]
            rounded = _on_one_grid(modules, of_batch, grid, dtype, dampening_frac)
            for number, quantized in zip(batch, rounded, strict=True):
                for i, result in zip(members, quantized, strict=True):
                    results[number][i] = result
    return results


def _on_one_grid(
    problems: Sequence[Sequence[Solution]],
    hessians: Sequence[Tensor],
    grid: Encoding,
    dtype: torch.dtype,
    dampening_frac: float,
) -> list[list[Quantized]]:
    """Round the modules of problems of one shape."""
    d = len(hessians[0])
    factors = [
        solutions[0].factor
        or Factor.of(
            hessian,
            Dampening.of(hessian, dampening_frac),
            ", ".join(s.name for s in solutions),
            largest_first=True,
        )
        for solutions, hessian in zip(problems, hessians, strict=True)
    ]

    def batch(part: Callable[[Solution], Tensor]) -> Tensor:
        """Stack a part of all solutions, [problems, d, rows]; of one problem, without a copy."""
        pairs = zip(problems, hessians, strict=True)
        tensors = [stacked([part(s) for s in solutions], h) for solutions, h in pairs]
        return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)

    keep = batch(lambda s: s.mask.to(hessians[0].dtype))
    target = batch(lambda s: s.target)
    working = batch(lambda s: s.weight).mul_(keep)  # W of the refit, zero where pruned
    importance = torch.stack([factor.dampening.diagonal for factor in factors])  # diag H'
    global_scale = grid.global_scale(working)
    steps = search_steps(working, grid, importance, dtype, global_scale)
    spread = steps.spread(grid, d)
    rounding = Rounding(working, keep, target, grid, hessians, factors)
    rounding.gptq(spread)
    # scales of 4-bit floats have too few values for a fit
    rounding.descend(spread, _SWEEPS + (_REFITS if grid.has_coarse_scales else 0))
    for _ in range(_REFITS if grid.kind == "int" else 0):
        # Q = (codes - zero) s; s <- argmin of the error for these codes (scales.py)
        codes, scale = working.div_(spread.scale).round_(), torch.empty_like(steps.scale)
        for number, (hessian, factor) in enumerate(zip(hessians, factors, strict=True)):
            args = (codes[number], target[number], steps.scale[number])
            scale[number] = refit_scales(*args, grid, hessian, factor.dampening, dtype)
        steps = Steps(scale, steps.zero)
        spread = steps.spread(grid, d)
        working.mul_(spread.scale)
        rounding.descend(spread, 1)
    working.add_(0.0)  # -0.0 becomes 0.0: the sparse layouts would store it, and e4m3 has it
    absent = [None] * len(problems)
    zeros = absent if steps.zero is None else steps.zero.to(torch.int8)
    global_scales = absent if global_scale is None else global_scale
    return [
        _results(solutions, hessian, factor.dampening, dtype, *tensors)
        for solutions, hessian, factor, *tensors in zip(
            problems,
            hessians,
            factors,
            working,
            target,
            steps.scale,
            zeros,
            global_scales,
            strict=True,
        )
    ]


def _results(
    solutions: Sequence[Solution],
    hessian: Tensor,
    dampening: Dampening,
    dtype: torch.dtype,
    working: Tensor,
    target: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    global_scale: Tensor | None,
) -> list[Quantized]:
    """Return the modules of one problem; weights and `target`, overwritten, are [d, rows]."""
    totals = quadratic_form(target, hessian)  # t H t^T of each row
    errors = quadratic_form(target.sub_(working), hessian)  # (t - q) H (t - q)^T
    results, first = [], 0
    for solution in solutions:
        rows = slice(first, first + solution.weight.shape[0])
        first = rows.stop
        weight = working[:, rows].T.contiguous().to(dtype)
        check_finite(weight, solution.name, f"quantized weight in {dtype}", dampening.larger)
        error, total = float(errors[rows].sum()), float(totals[rows].sum())
        relative = max(error, 0.0) / total if total > 0 else 0.0  # rounding may make it negative
        scale = scales[:, rows].T.contiguous()
        scale = (scale if global_scale is None else local_scale(scale, global_scale)).to(dtype)
        zero_point = None if zeros is None else zeros[:, rows].T.contiguous()
        results.append(Quantized(weight, scale, relative, zero_point, global_scale))
    return results
