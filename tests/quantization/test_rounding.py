"""GPTQ and coordinate descent against slow references, in float64: rounding decides nothing."""

import pytest
import torch

from rac_modifier.formats.encoding import Encoding, Steps
from rac_modifier.pruning.linalg import Dampening, Factor
from rac_modifier.quantization.rounding import Rounding
from rac_modifier.quantization.scales import search_steps
from tests.pruning.pruning_reference import assert_near, dampened, solve_tolerance
from tests.quantization.quantization_reference import GRIDS, error_of, problem

D = 176  # more than one block of 128, and no multiple of a sub-block
WITH_ZERO_POINTS = {f"int{n} asymmetric": Encoding("int", n, 16, symmetric=False) for n in (2, 4)}
ALL = {**GRIDS, **WITH_ZERO_POINTS}


def wide_problem(name: str):
    weight, keep, target, hessian = problem(d=D, rows=5, dtype=torch.float64)
    grid = ALL[name]
    steps = search_steps(weight.T.contiguous(), grid, hessian.diagonal(), torch.float32)
    return grid, weight, keep, target, hessian, steps.spread(grid, D)


def alone(steps: Steps) -> Steps:
    """As those of one problem."""
    return Steps(steps.scale[None], None if steps.zero is None else steps.zero[None])


def point(grid: Encoding, column: torch.Tensor, steps: Steps, j: int) -> torch.Tensor:
    """The nearest points to a column [rows], by codes from 0 where there are zero points."""
    if steps.zero is None:
        return grid.round_(column.clone(), steps.scale[j])
    offset = 2 ** (grid.bits - 1)
    unsigned = steps.zero[j] + offset
    assert bool(((unsigned >= 0) & (unsigned < 2 * offset)).all())
    codes = (column / steps.scale[j] + unsigned).clamp(0, 2 * offset - 1).round()
    return (codes - unsigned) * steps.scale[j]


def slow_gptq(weight, keep, steps, grid, hessian, frac):
    """Column by column with the inverse Hessian, as in the paper; pruned weights round to zero."""
    weight = weight.clone()
    r = torch.linalg.cholesky(torch.linalg.inv(dampened(hessian, frac)), upper=True)
    for j in range(weight.shape[1]):
        column = weight[:, j].clone()
        rounded = point(grid, column, steps, j) * keep[:, j]
        weight[:, j:] -= ((column - rounded) / r[j, j]).unsqueeze(1) * r[j, j:]
        weight[:, j] = rounded
    return weight


@pytest.mark.parametrize("largest_first", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_gptq_is_the_papers_column_loop(name, largest_first):
    """Also in the order of falling second moments; scales stay those of neighbouring columns."""
    grid, weight, keep, _, hessian, steps = wide_problem(name)
    working = weight.T.clone()
    damped = dampened(hessian, 0.01)
    factor = Factor.of(hessian, Dampening.of(hessian, 0.01), "w", largest_first=largest_first)
    kept = keep.T.double()[None]
    Rounding(working[None], kept, kept, grid, [hessian], [factor]).gptq(alone(steps))
    falling = sorted(range(D), key=lambda j: -float(hessian[j, j]))
    order = falling if largest_first else list(range(D))
    ordered = Steps(steps.scale[order], None if steps.zero is None else steps.zero[order])
    slow = torch.empty_like(weight)
    inputs = (weight[:, order], keep[:, order], ordered, grid, hessian[order][:, order])
    slow[:, order] = slow_gptq(*inputs, 0.01)
    assert_near(working.T, slow, solve_tolerance(damped, torch.float64))


def slow_sweep(weight, target, keep, steps, grid, damped):
    weight = weight.clone()
    for j in range(weight.shape[1]):
        gradient = (weight - target) @ damped[:, j]
        best = weight[:, j] - gradient / damped[j, j]
        weight[:, j] = point(grid, best, steps, j) * keep[:, j]
    return weight


@pytest.mark.parametrize("name", ALL)
def test_a_sweep_is_coordinate_descent_over_the_kept_weights(name):
    grid, weight, keep, target, hessian, steps = wide_problem(name)
    start = grid.round_(weight.T.clone(), steps.scale, steps.zero)
    damped, errors = dampened(hessian, 0.01), [error_of(start.T, target, hessian)]
    slow = start.T
    for sweeps in (1, 2):
        working = start.clone()
        kept, factor = keep.T.double()[None], Factor.of(hessian, Dampening.of(hessian, 0.01), "w")
        rounding = Rounding(working[None], kept, target.T[None], grid, [hessian], [factor])
        rounding.descend(alone(steps), sweeps)
        slow = slow_sweep(slow, target, keep, steps, grid, damped)
        assert_near(working.T, slow, solve_tolerance(damped, torch.float64))
        assert not working.T[~keep].any()
        errors.append(error_of(working.T, target, damped))
    assert errors[2] < errors[1] < errors[0]
