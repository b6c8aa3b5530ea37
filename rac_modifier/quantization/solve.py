"""Quantize pruned modules that read the same input: the one entry point of this room."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from rac_modifier.errors import RacError
from rac_modifier.pruning.checks import check_hessian, check_weights, is_finite
from rac_modifier.pruning.linalg import Dampening, Factor, factorise, quadratic_form, stacked
from rac_modifier.pruning.solve import Solution
from rac_modifier.quantization.grid import Grid, Steps, search_scales
from rac_modifier.quantization.rounding import descend, gptq
from rac_modifier.quantization.scale_refit import refit_scales
from rac_modifier.quantization.zero_points import search_zero_points

SWEEPS = 3  # passes of coordinate descent; six lower the error by another 0.2 %
_REFITS = 2  # fits of the scales to the codes, each with a sweep after it


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


@dataclass(frozen=True)
class PrunedProblem:
    """A problem that was pruned: its modules, the Hessian [d, d] that the pruning used, and a grid for each module or None."""

    solutions: Sequence[Solution]
    hessian: torch.Tensor
    grids: Sequence[Grid | None]

    @property
    def kind(self) -> tuple[object, ...]:
        """Equal for problems that can be rounded at once."""
        ordered = [s.factor is None or s.factor.order is not None for s in self.solutions[:1]]
        return (
            tuple(self.hessian.shape),
            *(tuple(s.weight.shape) for s in self.solutions),
            *self.grids,
            *ordered,
        )


def quantize(
    solutions: Sequence[Solution],
    hessian: torch.Tensor,
    grids: Sequence[Grid | None],
    *,
    dtype: torch.dtype,
    dampening_frac: float = 0.01,
    sweeps: int = SWEEPS,
) -> list[Quantized | None]:
    """Round the modules of one problem; `quantize_many` says how."""
    problem = PrunedProblem(solutions, hessian, grids)
    return quantize_many([problem], dtype=dtype, dampening_frac=dampening_frac, sweeps=sweeps)[0]


@torch.no_grad()
def quantize_many(
    problems: Sequence[PrunedProblem],
    *,
    dtype: torch.dtype,
    dampening_frac: float = 0.01,
    sweeps: int = SWEEPS,
) -> list[list[Quantized | None]]:
    """Round the pruned modules of each problem to their grids; a module with None is left as it is.

    The outputs are to stay those of the targets (rounding.py has the equations), and only weights that the masks keep
    become nonzero. Scales and zero points are chosen on the weights and the diagonal of the Hessian (grid.py, zero_points.py).
    Scales are exact in `dtype`, which is the dtype of the weights and scales returned. Problems of one shape with the same grids
    are rounded at once, with the bits of one after the other.

    Raises:
        RacError: shapes or numbers that cannot work, or a result that `dtype` cannot hold.
    """
    for problem in problems:
        names = [s.name for s in problem.solutions]
        check_weights([s.weight for s in problem.solutions], names, problem.hessian.shape[0])
        check_hessian(problem.hessian, ", ".join(names))
    results: list[list[Quantized | None]] = [
        [None] * len(problem.solutions) for problem in problems
    ]
    kinds = {problem.kind for problem in problems}
    for part in (
        [range(len(problems))] if len(kinds) == 1 else [[number] for number in range(len(problems))]
    ):
        grids = problems[part[0]].grids
        for grid in dict.fromkeys(grid for grid in grids if grid is not None):
            members = [i for i, other in enumerate(grids) if other == grid]
            some = [
                replace(problems[n], solutions=[problems[n].solutions[i] for i in members])
                for n in part
            ]
            for number, rounded in zip(
                part, _on_one_grid(some, grid, dtype, dampening_frac, sweeps), strict=True
            ):
                for i, result in zip(members, rounded, strict=True):
                    results[number][i] = result
    return results


def _on_one_grid(
    problems: Sequence[PrunedProblem],
    grid: Grid,
    dtype: torch.dtype,
    dampening_frac: float,
    sweeps: int,
) -> list[list[Quantized]]:
    """The modules of problems of one shape."""
    hessians = [problem.hessian for problem in problems]
    d = hessians[0].shape[0]
    if grid.group_size and d % grid.group_size:
        raise RacError(
            f"{problems[0].solutions[0].name}: {d} inputs are no multiple of the group_size {grid.group_size}; set a group_size "
            "that divides them (config_groups), or add the module to ignore"
        )
    factors = [_factor(problem, dampening_frac) for problem in problems]
    keep = _together(problems, lambda s: s.mask.to(hessians[0].dtype))
    target = _together(problems, lambda s: s.target)
    working = _together(problems, lambda s: s.weight).mul_(keep)
    search = search_scales if grid.symmetric else search_zero_points
    steps = search(working, grid, torch.stack([f.dampening.diagonal for f in factors]), dtype)
    spread = steps.spread(grid, d)
    dampenings = [factor.dampening for factor in factors]
    gptq(working, keep, spread, grid, factors)
    descend(working, target, keep, spread, grid, hessians, dampenings, sweeps)
    for _ in range(_REFITS if grid.kind == "int" and sweeps else 0):
        steps = _refit(working, target, steps, grid, hessians, dampenings, dtype)
        spread = steps.spread(grid, d)
        descend(working, target, keep, spread, grid, hessians, dampenings, 1)
    working.add_(
        0.0
    )  # turns -0.0 into 0.0: the sparse layouts would store -0.0, and 8-bit floats have it
    zeros = [None] * len(problems) if steps.zero is None else steps.zero
    each = zip(problems, working, target, steps.scale, zeros, strict=True)
    return [_results(*one, dtype, dampening_frac) for one in each]


def _refit(
    working: torch.Tensor,
    target: torch.Tensor,
    steps: Steps,
    grid: Grid,
    hessians: Sequence[torch.Tensor],
    dampenings: Sequence[Dampening],
    dtype: torch.dtype,
) -> Steps:
    """Fit the scales to the codes of `working` [problems, d, rows], and move the weights along."""
    codes = working.div_(grid.column_scales(steps.scale, working.shape[1])).round_()
    scale = torch.empty_like(steps.scale)
    for number, (hessian, dampening) in enumerate(zip(hessians, dampenings, strict=True)):
        zero = None if steps.zero is None else steps.zero[number]
        own = Steps(steps.scale[number], zero)
        scale[number] = refit_scales(
            codes[number], target[number], own, grid, hessian, dampening, dtype
        )
    working.mul_(grid.column_scales(scale, working.shape[1]))
    return Steps(scale, steps.zero)


def _factor(problem: PrunedProblem, dampening_frac: float) -> Factor:
    """That of the pruning, where it needed one."""
    hessian, names = problem.hessian, ", ".join(s.name for s in problem.solutions)
    found = problem.solutions[0].factor
    return found or factorise(
        hessian, Dampening.of(hessian, dampening_frac), names, largest_first=True
    )


def _together(
    problems: Sequence[PrunedProblem], part: Callable[[Solution], torch.Tensor]
) -> torch.Tensor:
    """A part of all solutions [problems, d, rows]; of one problem, no second copy."""
    found = [stacked([part(s) for s in problem.solutions], problem.hessian) for problem in problems]
    return found[0].unsqueeze(0) if len(found) == 1 else torch.stack(found)


def _results(
    problem: PrunedProblem,
    working: torch.Tensor,
    target: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    dtype: torch.dtype,
    dampening_frac: float,
) -> list[Quantized]:
    """Of one problem, from its weights, targets [d, rows], scales and zero points [groups, rows]; `target` is overwritten."""
    rows = [s.weight.shape[0] for s in problem.solutions]
    totals = quadratic_form(target, problem.hessian)
    errors = quadratic_form(target.sub_(working), problem.hessian)
    of_modules: Sequence[torch.Tensor | None] = [None] * len(rows)
    if zeros is not None:
        of_modules = zeros.to(torch.int8).split(rows, 1)
    results = []
    for name, w, scale, zero, error, total in zip(
        [s.name for s in problem.solutions],
        *(x.split(rows, 1) for x in (working, scales)),
        of_modules,
        *(x.split(rows) for x in (errors, totals)),
        strict=True,
    ):
        weight = w.T.contiguous().to(dtype)
        if not is_finite(weight):
            raise RacError(
                f"{name}: the quantized weight overflows {dtype}; raise dampening_frac ({dampening_frac})"
            )
        whole = float(total.sum())
        relative = max(float(error.sum()), 0.0) / whole if whole > 0 else 0.0
        zero_point = None if zero is None else zero.T.contiguous()
        results.append(Quantized(weight, scale.T.contiguous().to(dtype), relative, zero_point))
    return results
