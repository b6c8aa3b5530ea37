"""Factors, solves and inverses by blocks of columns, and by LAPACK where a matrix is small."""

import pytest
import torch

from rac_modifier.pruning import cholesky
from tests.pruning.pruning_reference import (
    assert_near,
    dampened,
    gaussian,
    random_problem,
    solve_tolerance,
)

SIZES = [1, 16, 33, 130]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(cholesky, "BLOCK", 16)
    monkeypatch.setattr(cholesky, "_CHUNK", 40)
    monkeypatch.setattr(cholesky, "_SMALL_TRIANGLE", 5)
    monkeypatch.setattr(cholesky, "onednn_is_faster", lambda device: True)


def problem(d: int, dampening: float = 0.01) -> torch.Tensor:
    return dampened(random_problem(3, d, 2 * d)[1], dampening)


def garbled(matrix: torch.Tensor) -> torch.Tensor:
    """In float32, with other numbers above the diagonal: by blocks, only the lower triangle is
    read."""
    if len(matrix) < 2 * cholesky.BLOCK:
        return matrix.float()
    return matrix.float().tril() + torch.full(matrix.shape, 7.0).triu(1)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("d", SIZES)
def test_factor_inverse_and_solve_by_blocks(d):
    exact, right = problem(d), gaussian(5, d).T
    tolerance = solve_tolerance(exact, torch.float32)
    matrix = garbled(exact)
    lower = cholesky.cholesky_(matrix)
    assert lower.data_ptr() == matrix.data_ptr()
    assert torch.equal(lower, lower.tril())
    rounding = solve_tolerance(torch.eye(1), torch.float32) * d
    assert_near(lower.double() @ lower.double().T, exact, rounding)
    matrix = garbled(exact)
    inverse = cholesky.inverse_(matrix)
    assert inverse.data_ptr() == matrix.data_ptr()
    assert torch.equal(inverse, inverse.T)
    assert_near(inverse, torch.linalg.inv(exact), tolerance)
    before = right.clone()
    solution = cholesky.cholesky_solve(right, torch.linalg.cholesky(exact).float())
    assert torch.equal(right, before)
    assert_near(solution, torch.linalg.solve(exact, right.double()), tolerance)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(("dtype", "margin"), [(torch.float32, 50.0), (torch.bfloat16, 1.0)])
@pytest.mark.parametrize("d", SIZES)
def test_a_solve_in_place_takes_a_factor_with_inverted_corners(d, dtype, margin):
    exact, right = problem(d), gaussian(5, d).T.contiguous().to(dtype)
    expected = torch.linalg.solve(exact, right.double())
    lower = cholesky.invert_corners_(torch.linalg.cholesky(exact).float())
    solution = cholesky.solve_with_corners_(right, lower.to(dtype))
    assert solution.data_ptr() == right.data_ptr()
    assert_near(solution, expected, solve_tolerance(exact, dtype, margin))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("at", [0, 20, 69])
def test_a_matrix_that_is_not_positive_definite_has_none(at):
    matrix = problem(70).float()
    matrix[at, at] = -1.0
    assert cholesky.cholesky_(matrix.clone()) is None
    assert cholesky.inverse_(matrix.clone()) is None


def test_the_lower_triangle_is_mirrored():
    matrix = gaussian(50, 50)
    expected = matrix.tril() + matrix.tril(-1).T
    assert torch.equal(cholesky.mirror_lower_(matrix, 16), expected)
