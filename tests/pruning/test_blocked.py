"""Factor, solve and inverse in blocks, against float64."""

import pytest
import torch

from rac_modifier.pruning import blocked, linalg
from tests.pruning.pruning_reference import (
    assert_near,
    dampened,
    gaussian,
    random_problem,
    solve_tolerance,
)

SIZES = [1, 16, 17, 70, 130]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(blocked, "BLOCK", 16)
    monkeypatch.setattr(blocked, "_ROWS", 40)
    monkeypatch.setattr(blocked, "_SMALL", 5)


def problem(d: int) -> torch.Tensor:
    return dampened(random_problem(3, d, 2 * d)[1], 0.01)


@pytest.mark.parametrize("d", SIZES)
def test_the_factor_is_that_of_the_matrix_in_its_memory(d):
    exact = problem(d)
    matrix = exact.float()
    lower = blocked.cholesky_(matrix)
    assert lower.data_ptr() == matrix.data_ptr()
    assert torch.equal(lower, lower.tril())
    assert_near(
        lower.double() @ lower.double().T, exact, solve_tolerance(torch.eye(1), torch.float32) * d
    )


@pytest.mark.parametrize("d", SIZES)
def test_a_factor_by_products_in_bfloat16_is_near(d):
    exact = dampened(random_problem(3, d, 2 * d)[1], 0.2)
    found = [blocked.cholesky_(exact.float(), bf16=bf16).double() for bf16 in (False, True)]
    assert torch.equal(*found) == (
        d <= 32
    )  # nothing but the first block is to the left of a second one
    assert_near(
        found[1] @ found[1].T, exact, solve_tolerance(torch.eye(1), torch.bfloat16) * d**0.5
    )


def test_what_all_inputs_share_is_not_rounded():
    d = 512
    sizes = torch.rand(d, generator=torch.Generator().manual_seed(0)) + 0.5
    exact = sizes * sizes[:, None] + 0.05 * torch.diag(sizes**2)
    lower = blocked.cholesky_(exact.clone(), bf16=True)
    assert_near(lower @ lower.T, exact, 1e-3)
    apart = torch.eye(d + 16)
    apart[16:, 16:] = exact  # now the first block has nothing of it
    assert blocked.cholesky_(apart, bf16=True) is None


@pytest.mark.parametrize("d", SIZES)
def test_the_inverse_is_symmetric_and_in_its_memory(d):
    exact = problem(d)
    matrix = exact.float()
    inverse = blocked.inverse_(matrix)
    assert inverse.data_ptr() == matrix.data_ptr()
    assert torch.equal(inverse, inverse.T)
    assert_near(inverse, torch.linalg.inv(exact), solve_tolerance(exact, torch.float32))


@pytest.mark.parametrize("d", SIZES)
def test_only_the_lower_triangle_is_read(d):
    exact = problem(d)
    for of in (blocked.cholesky_, blocked.inverse_):
        garbled = exact.float().tril() + torch.full((d, d), 7.0).triu(1)
        assert torch.equal(of(garbled), of(exact.float()))


@pytest.mark.parametrize("d", SIZES)
def test_a_solve_leaves_the_right_sides_alone(d):
    exact, right = problem(d), gaussian(5, d).T
    before = right.clone()
    found = blocked.solve(right, torch.linalg.cholesky(exact).float())
    assert_near(
        found, torch.linalg.solve(exact, right.double()), solve_tolerance(exact, torch.float32)
    )
    assert torch.equal(right, before)


@pytest.mark.parametrize("d", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_solve_in_place_takes_a_factor_with_inverted_corners(d, dtype):
    exact, right = problem(d), gaussian(5, d).T.contiguous().to(dtype)
    expected = torch.linalg.solve(exact, right.double())
    lower = blocked.invert_corners_(torch.linalg.cholesky(exact).float())
    found = blocked.solve_(right, lower.to(dtype))
    assert found.data_ptr() == right.data_ptr()
    margin = (
        50.0 if dtype == torch.float32 else 1.0
    )  # rounding to bfloat16 happens to each number once
    assert_near(found, expected, solve_tolerance(exact, dtype, margin))


@pytest.mark.parametrize("at", [0, 20, 69])
def test_a_matrix_that_is_not_positive_definite_has_none(at):
    matrix = problem(70).float()
    matrix[at, at] = -1.0
    assert blocked.cholesky_(matrix.clone()) is None
    assert blocked.inverse_(matrix.clone()) is None


def test_the_lower_triangle_is_mirrored():
    matrix = gaussian(50, 50)
    expected = matrix.tril() + matrix.tril(-1).T
    assert torch.equal(blocked.mirror_lower_(matrix, 16), expected)


@pytest.mark.parametrize(
    ("faster", "dtype"), [(True, torch.float32), (True, torch.float64), (False, torch.float32)]
)
def test_large_float32_matrices_go_by_blocks_where_products_are_faster(faster, dtype, monkeypatch):
    seen = []
    for name in ("cholesky_", "inverse_", "solve"):
        inner = getattr(blocked, name)
        monkeypatch.setattr(
            blocked,
            name,
            lambda *args, name=name, inner=inner, **kw: seen.append(name) or inner(*args, **kw),
        )
    monkeypatch.setattr(linalg, "onednn_is_faster", lambda device: faster)
    for d in (31, 32):
        exact = problem(d)
        lower, right = linalg.cholesky_(exact.to(dtype, copy=True)), gaussian(d, 3, dtype=dtype)
        tolerance = solve_tolerance(exact, dtype)
        assert_near(
            linalg.cholesky_solve(right, lower),
            torch.linalg.solve(exact, right.double()),
            tolerance,
        )
        assert_near(linalg.inverse_(exact.to(dtype, copy=True)), torch.linalg.inv(exact), tolerance)
    by_blocks = ["cholesky_", "solve", "inverse_", "cholesky_"]  # an inverse begins with a factor
    assert seen == (by_blocks if faster and dtype == torch.float32 else [])
