"""Scales and zero points against trying all of them, with rounding written again here."""

import pytest
import torch

from rac_modifier.quantization.grid import Grid
from rac_modifier.quantization.zero_points import search_zero_points
from tests.quantization.quantization_reference import problem

SIZE = 16


def rounded(part: torch.Tensor, bits: int, scale: float, zero: int) -> torch.Tensor:
    """Unsigned codes from 0 to 2^bits - 1, the zero point among them; halves to even as on signed codes."""
    offset = 2 ** (bits - 1)
    codes = torch.clamp(part / scale + zero, -offset, offset - 1).round() + offset
    return (codes - (zero + offset)) * scale


def cost(part: torch.Tensor, counts: torch.Tensor, bits: int, scale: float, zero: int) -> float:
    return float((counts * (rounded(part, bits, scale, zero) - part).square()).sum())


def best_of_all(part: torch.Tensor, counts: torch.Tensor, bits: int) -> float:
    """The least cost over every zero point and 400 scales each, up to the one that covers both ends."""
    offset, costs = 2 ** (bits - 1), []
    for zero in range(-offset, offset):
        above, below = offset - 1 - zero, zero + offset
        covering = max(
            float(part.max().clamp(min=0)) / above if above else 0.0,
            float(-part.min().clamp(max=0)) / below if below else 0.0,
        )
        costs += [
            cost(part, counts, bits, covering * step / 400, zero)
            for step in range(1, 401)
            if covering
        ]
    return min(costs)


def lopsided(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [rows, d] whose groups lie on one side of zero, or more on one side; and their importance."""
    weight, _, _, hessian = problem(rows=6, seed=seed, sparsity=0.0, dtype=torch.float64)
    weight[:, :SIZE] = weight[:, :SIZE].abs() + 0.5
    weight[:, SIZE : 2 * SIZE] = -weight[:, SIZE : 2 * SIZE].exp()
    return weight, hessian.diagonal()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nearly_the_least_weighted_error_of_all_scales_and_zero_points(bits, dtype):
    weight, importance = lopsided(0)
    found = search_zero_points(
        weight.T.contiguous(), Grid("int", bits, SIZE, symmetric=False), importance, dtype
    )
    assert found.zero is not None
    assert found.scale.shape == found.zero.shape == (3, 6)
    assert torch.equal(found.scale, found.scale.to(dtype).double())
    assert torch.equal(found.zero, found.zero.round())
    ratios = []
    for row, parts in enumerate(weight):
        for group, part in enumerate(parts.split(SIZE)):
            counts = importance[group * SIZE : (group + 1) * SIZE]
            zero = int(found.zero[group, row])
            assert -(2 ** (bits - 1)) <= zero < 2 ** (bits - 1)
            ours = cost(part, counts, bits, float(found.scale[group, row]), zero)
            ratios.append(ours / best_of_all(part, counts, bits))
    assert sum(ratios) / len(ratios) < 1.05
    assert max(ratios) < 1.25


@pytest.mark.parametrize("bits", [2, 7])
def test_weights_on_the_grid_are_found_exactly(bits):
    """With every code in use, no other scale and zero point are right."""
    codes = torch.arange(2**bits).double().repeat(2)
    wanted = torch.tensor([0.5, 0.25, 2.0])
    zeros = torch.tensor([0.0, 1.0, 2.0**bits - 1])
    weight = ((codes[:, None] - zeros) * wanted).double()
    grid = Grid("int", bits, None, symmetric=False)
    found = search_zero_points(weight, grid, torch.ones(len(codes)).double(), torch.float32)
    assert found.zero is not None
    assert (found.zero[0] + 2 ** (bits - 1)).tolist() == zeros.tolist()
    assert torch.allclose(found.scale[0], wanted.double(), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_group_of_zeros_has_a_scale_and_a_zero_point(dtype):
    found = search_zero_points(
        torch.zeros(48, 3), Grid("int", 2, 16, symmetric=False), torch.ones(48), dtype
    )
    assert found.zero is not None
    assert bool((found.scale > 0).all())
    assert bool(((found.zero >= -2) & (found.zero <= 1)).all())


def test_importance_decides_which_end_is_clipped():
    part = torch.tensor([-1.0, -0.9, 0.1, 0.2, 0.3, 1.0], dtype=torch.float64)
    weight = part.repeat(1, 1).T.contiguous()
    errors = {}
    for end in (0, 5):
        importance = torch.ones(6, dtype=torch.float64)
        importance[end] = 1e4
        found = search_zero_points(
            weight, Grid("int", 2, None, symmetric=False), importance, torch.float32
        )
        assert found.zero is not None
        errors[end] = (
            rounded(part, 2, float(found.scale[0, 0]), int(found.zero[0, 0])) - part
        ).abs()
    assert errors[0][0] < 0.02
    assert errors[5][5] < 0.02
