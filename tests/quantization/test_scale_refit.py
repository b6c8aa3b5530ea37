"""The scales of given codes against a least squares problem written out and solved by LAPACK."""

import numpy as np
import pytest
import torch

from rac_modifier.pruning.linalg import Dampening
from rac_modifier.quantization.grid import Grid, Steps
from rac_modifier.quantization.scale_refit import refit_scales
from rac_modifier.quantization.solve import quantize
from tests.quantization.quantization_reference import error_of, problem, solved

D, ROWS, SIZE = 48, 6, 16


def coded(seed: int, largest: int = 7) -> tuple[torch.Tensor, ...]:
    """Codes [d, rows] for scales that are a fifth off, the target [d, rows], scales and Hessian."""
    _, _, target, hessian = problem(rows=ROWS, d=D, seed=seed, dtype=torch.float64)
    target = target.T.contiguous()
    best = target.reshape(D // SIZE, SIZE, ROWS).abs().amax(1) / largest
    scale = best * torch.tensor([0.8, -0.9, 1.1], dtype=torch.float64)[:, None]
    codes = (target / scale.repeat_interleave(SIZE, 0)).round().clamp(-8, 7)
    return codes, target, scale, hessian


def least_squares(codes: np.ndarray, target: np.ndarray, hessian: np.ndarray) -> np.ndarray:
    """min_s ||L^T (sum_g s_g C_g - t)||, with L L^T the Hessian, for one row."""
    root = np.linalg.cholesky(hessian).T
    columns = np.zeros((D, D // SIZE))
    for group in range(D // SIZE):
        rows = slice(group * SIZE, (group + 1) * SIZE)
        columns[rows, group] = codes[rows]
    return np.linalg.lstsq(root @ columns, root @ target, rcond=None)[0]


@pytest.mark.parametrize("seed", range(4))
def test_scales_are_the_least_squares_solution_of_the_damped_problem(seed):
    codes, target, scale, hessian = coded(seed)
    dampening = Dampening.of(hessian, 0.01)
    damped = (hessian + torch.diag(dampening.added)).numpy()
    grid = Grid("int", 4, SIZE)
    args = (grid, hessian, dampening, torch.float64)
    refitted = refit_scales(codes, target, Steps(scale), *args)
    for row in range(ROWS):
        expected = least_squares(codes[:, row].numpy(), target[:, row].numpy(), damped)
        assert refitted[:, row].numpy() == pytest.approx(expected, rel=1e-9)


def test_unusable_solutions_leave_the_scale():
    """A group without a code, and a solution of the other sign or more than thrice the size."""
    codes, target, scale, hessian = coded(0)
    dampening = Dampening.of(hessian, 0.01)
    codes[:SIZE, 0] = 0
    target[:, 1] *= -1  # the other sign
    target[:, 2] *= 5
    args = (Grid("int", 4, SIZE), hessian, dampening, torch.float64)
    refitted = refit_scales(codes, target, Steps(scale), *args)
    assert refitted[0, 0] == scale[0, 0]
    assert torch.equal(refitted[:, 1:3], scale[:, 1:3])
    assert not torch.equal(refitted[:, 3:], scale[:, 3:])


def test_a_row_whose_gain_is_lost_in_rounding_keeps_its_scales():
    """Scales that are exact already, in a dtype of 8 bits of mantissa, near the optimum."""
    codes, _, scale, hessian = coded(1)
    scale = scale.bfloat16().double()
    target = codes * (scale * 1.0005).repeat_interleave(SIZE, 0)
    dampening = Dampening.of(hessian, 0.01)
    args = (Grid("int", 4, SIZE), hessian, dampening, torch.bfloat16)
    assert torch.equal(refit_scales(codes, target, Steps(scale), *args), scale)


@pytest.mark.parametrize(("bits", "share"), [(4, 0.90), (3, 0.82), (2, 0.80)])
def test_signs_and_refits_lower_the_error_of_a_layer(bits, share, monkeypatch):
    """At least 10, 18 and 20 % at 4, 3 and 2 bits, against positive scales that stay as they are."""
    weight, keep, target, hessian = problem(rows=64, d=128, sparsity=0.0)
    grid = Grid("int", bits, 32)
    solution = solved(weight, keep, target)
    ours = quantize([solution], hessian, [grid], dtype=torch.float32)[0]
    assert bool((ours.scale < 0).any())
    monkeypatch.setattr("rac_modifier.quantization.solve._REFITS", 0)
    monkeypatch.setattr(Grid, "is_lopsided", False)
    plain = quantize([solution], hessian, [grid], dtype=torch.float32)[0]
    errors = [error_of(result.weight, target, hessian) for result in (ours, plain)]
    assert errors[0] < share * errors[1]
