"""GPTQ and coordinate descent against slow references, in float64, so that no weight is rounded another way by chance."""

import pytest
import torch

from rac_modifier.pruning.linalg import Dampening, factorise
from rac_modifier.quantization.grid import search_scales
from rac_modifier.quantization.rounding import descend, gptq
from tests.pruning.pruning_reference import assert_near, dampened, solve_tolerance
from tests.quantization.quantization_reference import GRIDS, error_of, problem

D = 176  # more than one block of 128, and no multiple of a sub-block


def wide_problem(name: str):
    weight, keep, target, hessian = problem(d=D, rows=5, dtype=torch.float64)
    grid = GRIDS[name]
    scales = grid.column_scales(search_scales(weight.T, grid, hessian.diagonal(), torch.float32), D)
    return grid, weight, keep, target, hessian, scales


def slow_gptq(weight, keep, scales, grid, hessian, frac):
    """Column by column with the inverse Hessian, as in the paper; pruned columns round to zero. All [rows, d]."""
    weight = weight.clone()
    r = torch.linalg.cholesky(torch.linalg.inv(dampened(hessian, frac)), upper=True)
    for j in range(weight.shape[1]):
        column = weight[:, j].clone()
        rounded = grid.round_(column.clone(), scales[:, j]) * keep[:, j]
        weight[:, j:] -= ((column - rounded) / r[j, j]).unsqueeze(1) * r[j, j:]
        weight[:, j] = rounded
    return weight


@pytest.mark.parametrize("name", GRIDS)
def test_gptq_is_the_papers_column_loop(name):
    grid, weight, keep, _, hessian, scales = wide_problem(name)
    working = weight.T.clone()
    gptq(working, keep.T.double(), scales, grid, factorise(hessian, Dampening.of(hessian, 0.01), "w"))
    slow = slow_gptq(weight, keep, scales.T, grid, hessian, 0.01)
    assert_near(working.T, slow, solve_tolerance(dampened(hessian, 0.01), torch.float64))


def slow_sweep(weight, target, keep, scales, grid, damped):
    weight = weight.clone()
    for j in range(weight.shape[1]):
        gradient = (weight - target) @ damped[:, j]
        best = weight[:, j] - gradient / damped[j, j]
        weight[:, j] = grid.round_(best, scales[:, j]) * keep[:, j]
    return weight


@pytest.mark.parametrize("name", GRIDS)
def test_a_sweep_is_coordinate_descent_over_the_kept_weights(name):
    grid, weight, keep, target, hessian, scales = wide_problem(name)
    start = grid.round_(weight.T.clone(), scales)
    damped, errors = dampened(hessian, 0.01), [error_of(start.T, target, hessian)]
    slow = start.T
    for sweeps in (1, 2):
        working = start.clone()
        descend(working, target.T, keep.T.double(), scales, grid, hessian, Dampening.of(hessian, 0.01), sweeps)
        slow = slow_sweep(slow, target, keep, scales.T, grid, damped)
        assert_near(working.T, slow, solve_tolerance(damped, torch.float64))
        assert not working.T[~keep].any()
        errors.append(error_of(working.T, target, damped))
    assert errors[2] < errors[1] < errors[0]


def test_no_sweep_changes_nothing():
    grid, weight, keep, target, hessian, scales = wide_problem("int8")
    start = grid.round_(weight.T.clone(), scales)
    working = start.clone()
    descend(working, target.T, keep.T.double(), scales, grid, hessian, Dampening.of(hessian, 0.01), 0)
    assert torch.equal(working, start)
