"""The search against trying all candidates, the fit against least squares by LAPACK."""

import itertools

import numpy as np
import pytest
import torch

from rac_modifier.formats.encoding import Encoding
from rac_modifier.pruning.linalg import Dampening
from rac_modifier.quantization import scales
from rac_modifier.quantization.scales import refit_scales, search_steps
from rac_modifier.runtime.models import LiveBytes
from tests.quantization.quantization_reference import (
    GRIDS,
    HALF_RANGE,
    error_of,
    nearest_code,
    problem,
    quantize,
    solved,
)

D, ROWS, SIZE = 48, 6, 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", GRIDS)
def test_a_symmetric_scale_is_the_best_candidate_with_either_sign(name, dtype):
    """Shares of 0.4 to 1.2 of the largest weight; the sign counts where codes are few."""
    weight, _, _, hessian = problem(rows=5, dtype=torch.float64)
    weight[0, :16] = torch.arange(16) % 7  # in int4 the best share would be 7.5 / 6
    importance = hessian.diagonal()
    grid, size = GRIDS[name], GRIDS[name].group_size or 48
    chosen = search_steps(weight.T.contiguous(), grid, importance, dtype)
    assert chosen.zero is None
    assert torch.equal(chosen.scale, chosen.scale.to(dtype).double())
    signs = (1, -1) if name == "int4" else (1,)
    for row, group in itertools.product(range(5), range(48 // size)):
        columns = slice(group * size, (group + 1) * size)
        part, counts, errors = weight[row, columns], importance[columns], {}
        for step, sign in itertools.product(range(41), signs):
            share = sign * (0.4 + 0.02 * step)
            scale = (part.abs().max() / HALF_RANGE[name] * share).to(dtype).double()
            rounded = nearest_code(part / scale, name) * scale
            errors[float(scale)] = float((counts * (rounded - part).square()).sum())
        scale = float(chosen.scale[group, row])
        near = min(errors, key=lambda tried: abs(tried - scale))
        assert near == pytest.approx(scale, rel=1e-12)
        assert errors[near] <= min(errors.values()) * (1 + 1e-9)
    assert bool((chosen.scale < 0).any()) == (name == "int4")


def rounded(part: torch.Tensor, bits: int, scale: float, zero: int) -> torch.Tensor:
    """By unsigned codes, the zero point among them; halves to even as on signed codes."""
    offset = 2 ** (bits - 1)
    codes = torch.clamp(part / scale + zero, -offset, offset - 1).round() + offset
    return (codes - (zero + offset)) * scale


def cost(part: torch.Tensor, counts: torch.Tensor, bits: int, scale: float, zero: int) -> float:
    return float((counts * (rounded(part, bits, scale, zero) - part).square()).sum())


def best_of_all(part: torch.Tensor, counts: torch.Tensor, bits: int) -> float:
    """The least cost over each zero point and 100 scales up to the one that covers both ends."""
    offset, costs = 2 ** (bits - 1), []
    high, low = float(part.max().clamp(min=0)), float(-part.min().clamp(max=0))
    for zero in range(-offset, offset):
        above, below = offset - 1 - zero, zero + offset
        covering = max(high / above if above else 0.0, low / below if below else 0.0)
        scales = [covering * step / 100 for step in range(1, 101) if covering]
        costs += [cost(part, counts, bits, scale, zero) for scale in scales]
    return min(costs)


@pytest.mark.parametrize(
    ("bits", "dtype"), [(2, torch.bfloat16), (3, torch.float32), (4, torch.bfloat16)]
)
def test_zero_points_have_nearly_the_least_weighted_error(bits, dtype):
    """Groups lie on one side of zero, on the other, or on both."""
    weight, _, _, hessian = problem(rows=ROWS, sparsity=0.0, dtype=torch.float64)
    weight[:, :SIZE] = weight[:, :SIZE].abs() + 0.5
    weight[:, SIZE : 2 * SIZE] = -weight[:, SIZE : 2 * SIZE].exp()
    grid, importance = Encoding("int", bits, SIZE, symmetric=False), hessian.diagonal()
    steps = search_steps(weight.T.contiguous(), grid, importance, dtype)
    assert steps.scale.shape == steps.zero.shape == (3, ROWS)
    assert torch.equal(steps.scale, steps.scale.to(dtype).double())
    assert torch.equal(steps.zero, steps.zero.round())
    assert bool(((steps.zero >= grid.lowest) & (steps.zero < -grid.lowest)).all())
    ratios = []
    for row, group in itertools.product(range(ROWS), range(3)):
        columns = slice(group * SIZE, (group + 1) * SIZE)
        part, counts = weight[row, columns], importance[columns]
        scale, zero = float(steps.scale[group, row]), int(steps.zero[group, row])
        ratios.append(cost(part, counts, bits, scale, zero) / best_of_all(part, counts, bits))
    assert sum(ratios) / len(ratios) < 1.05
    assert max(ratios) < 1.25


@pytest.mark.parametrize("bits", [2, 7])
def test_weights_on_an_asymmetric_grid_are_exact(bits):
    """With every code in use, no other scale and zero point are right."""
    codes = torch.arange(2**bits).double().repeat(2)
    scales, zeros = torch.tensor([0.5, 0.25, 2.0]), torch.tensor([0.0, 1.0, 2.0**bits - 1])
    weight = ((codes[:, None] - zeros) * scales).double()
    importance = torch.ones(len(codes)).double()
    grid = Encoding("int", bits, None, symmetric=False)
    steps = search_steps(weight, grid, importance, torch.float32)
    assert (steps.zero[0] + 2 ** (bits - 1)).tolist() == zeros.tolist()
    assert torch.allclose(steps.scale[0], scales.double(), rtol=1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_of_zeros_has_a_scale(symmetric):
    grid = Encoding("int", 2, 16, symmetric=symmetric)
    steps = search_steps(torch.zeros(48, 3), grid, torch.ones(48), torch.float16)
    assert steps.scale.shape == (3, 3)
    first = torch.full((3, 3), 0.4 if symmetric else 1.0).half()
    assert torch.equal(steps.scale.half(), first), "the first of equal shares of 1"
    assert symmetric or bool(((steps.zero >= -2) & (steps.zero <= 1)).all())


def coded(seed: int) -> tuple[torch.Tensor, ...]:
    """Codes [d, rows] for scales that are a fifth off, the target, the scales and the Hessian."""
    _, _, target, hessian = problem(rows=ROWS, d=D, seed=seed, dtype=torch.float64)
    target = target.T.contiguous()
    best = target.reshape(D // SIZE, SIZE, ROWS).abs().amax(1) / 7
    scale = best * torch.tensor([0.8, -0.9, 1.1], dtype=torch.float64)[:, None]
    codes = (target / scale.repeat_interleave(SIZE, 0)).round().clamp(-8, 7)
    return codes, target, scale, hessian


def least_squares(codes: np.ndarray, target: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """min_s ||L^T (sum_g s_g C_g - t)||, with L L^T the Hessian, for a row."""
    root, columns = np.linalg.cholesky(hessian).T, np.zeros((D, D // SIZE))
    for group in range(D // SIZE):
        rows = slice(group * SIZE, (group + 1) * SIZE)
        columns[rows, group] = codes[rows]
    return np.linalg.lstsq(root @ columns, root @ target, rcond=None)[0]


@pytest.mark.parametrize(("seed", "rows"), [(0, 256), (1, 4)])
def test_fitted_scales_are_the_least_squares_solution_of_the_damped_problem(
    monkeypatch, seed, rows
):
    monkeypatch.setattr(scales, "_ROWS", rows)
    codes, target, scale, hessian = coded(seed)
    dampening = Dampening.of(hessian, 0.01)
    damped = (hessian + torch.diag(dampening.added)).numpy()
    args = (Encoding("int", 4, SIZE), hessian, dampening, torch.float64)
    refitted = refit_scales(codes, target, scale, *args)
    for row in range(ROWS):
        expected = least_squares(codes[:, row].numpy(), target[:, row].numpy(), damped)
        assert refitted[:, row].numpy() == pytest.approx(expected, rel=1e-9)


def test_the_memory_of_a_fit_does_not_grow_with_the_rows():
    codes = torch.ones(512, 4096)
    grid, identity = Encoding("int", 4, 8), torch.eye(512)
    dampening = Dampening.of(identity, 0.01)
    with LiveBytes() as live:
        refit_scales(codes, codes, torch.ones(64, 4096), grid, identity, dampening, torch.float32)
    assert live.peak < 4 * 4096 * 64 * 64  # of the matrices of all rows


def test_unusable_solutions_leave_the_scale():
    """A group without a code, and a solution of the other sign or more than thrice the size."""
    codes, target, scale, hessian = coded(0)
    codes[:SIZE, 0] = 0
    target[:, 1] *= -1
    target[:, 2] *= 5
    args = (Encoding("int", 4, SIZE), hessian, Dampening.of(hessian, 0.01), torch.float64)
    refitted = refit_scales(codes, target, scale, *args)
    assert refitted[0, 0] == scale[0, 0]
    assert torch.equal(refitted[:, 1:3], scale[:, 1:3])
    assert not torch.equal(refitted[:, 3:], scale[:, 3:])


def test_a_row_whose_gain_is_lost_in_rounding_keeps_its_scales():
    """Scales that are exact already, in a dtype of 8 bits of mantissa, near the optimum."""
    codes, _, scale, hessian = coded(1)
    scale = scale.bfloat16().double()
    target = codes * (scale * 1.0005).repeat_interleave(SIZE, 0)
    args = (Encoding("int", 4, SIZE), hessian, Dampening.of(hessian, 0.01), torch.bfloat16)
    assert torch.equal(refit_scales(codes, target, scale, *args), scale)


@pytest.mark.parametrize(("bits", "share"), [(4, 0.90), (3, 0.82), (2, 0.80)])
def test_signs_and_refits_lower_the_error_of_a_layer(bits, share, monkeypatch):
    """At least 10, 18 and 20 % at 4, 3 and 2 bits, against positive scales that stay."""
    weight, keep, target, hessian = problem(rows=64, d=128, sparsity=0.0)
    args = ([solved(weight, keep, target)], hessian, [Encoding("int", bits, 32)])
    ours = quantize(*args, dtype=torch.float32)[0]
    assert bool((ours.scale < 0).any())
    monkeypatch.setattr("rac_modifier.quantization.solve._REFITS", 0)
    monkeypatch.setattr(Encoding, "is_lopsided", False)
    plain = quantize(*args, dtype=torch.float32)[0]
    assert error_of(ours.weight, target, hessian) < share * error_of(plain.weight, target, hessian)
