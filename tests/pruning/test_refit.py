import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rac_modifier.pruning import refit as module
from rac_modifier.pruning.linalg import Dampening
from rac_modifier.pruning.refit import refit
from tests.pruning.pruning_reference import (
    assert_near,
    correlated_problem,
    dampened,
    gaussian,
    quadratic_tolerance,
    random_mask,
    random_problem,
    rowwise_refit,
    solve_tolerance,
    trace_error,
)


def refitted(start, kept, target, hessian, frac=0.01, steps=20, bf16=False, **constants):
    """The refitted weight [rows, d], and the steps taken."""
    weight, target = (x.T.clone(memory_format=torch.contiguous_format) for x in (start, target))
    args = weight, ~kept.T.contiguous(), target, hessian, Dampening.of(hessian, frac)
    with pytest.MonkeyPatch.context() as patched:
        for name, value in constants.items():
            patched.setattr(module, name, value)
        steps = refit(*args, steps=steps, bf16=bf16)
    return weight.T, steps


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 50),
)
def test_values_are_the_least_squares_of_each_row(rows, columns, share, seed):
    weight, hessian = random_problem(rows, columns, 200, seed, torch.float64)
    kept, h = random_mask(rows, columns, share=1 - share, seed=seed), dampened(hessian, 0.01)
    best = rowwise_refit(kept, weight, h)
    residual = 1e-9  # relative: the values are then off by at most the condition times it
    exact = {"steps": 1000, "TOLERANCE": residual, "GAIN": 0.0}
    ours, _ = refitted(weight, kept, weight, hessian, **exact)
    assert not ours[~kept].any()
    if kept.any():
        margin = residual / torch.finfo(torch.float64).eps
        assert_near(ours, best, solve_tolerance(h, torch.float64, margin=margin))


@pytest.mark.parametrize("frac", [0.0, 0.01])
@pytest.mark.parametrize("problem", [random_problem, correlated_problem])
def test_no_step_increases_the_error(problem, frac):
    weight, hessian = (x.double() for x in problem(7, 90, 60))  # fewer tokens than inputs
    kept = random_mask(7, 90, share=0.4, seed=1)
    h = dampened(hessian, frac)
    noise = quadratic_tolerance(weight, h, torch.float64)
    exact = {"TOLERANCE": 0.0, "GAIN": 0.0}
    for start in (weight, torch.zeros_like(weight)):
        errors = []
        for steps in range(30):
            ours, _ = refitted(start, kept, weight, hessian, frac, steps=steps, **exact)
            errors.append(trace_error(weight - ours, h))
        assert all(after <= before + noise for before, after in itertools.pairwise(errors))


def test_it_stops_when_every_row_has_converged():
    """After one step where the preconditioner is the inverse; a residual is relative to its row."""
    weight, hessian = (x.double() for x in correlated_problem(5, 96, 400))
    weight[:2] *= 1000
    kept, h = random_mask(5, 96, share=0.5), dampened(hessian, 0.01)
    diagonal = torch.diag(gaussian(96, seed=1).abs() + 0.1).double()
    assert refitted(0 * weight, kept, weight, diagonal)[1] == 1
    assert refitted(weight, kept, weight, hessian, steps=2, TOLERANCE=0.0)[1] == 2

    def residual(steps):
        ours, _ = refitted(weight, kept, weight, hessian, steps=steps, TOLERANCE=0.0, GAIN=0.0)
        gradient = (weight - ours) @ h * kept
        root = h.diagonal().sqrt()
        return float(((gradient / root).norm(dim=1) / (weight * root).norm(dim=1)).max())

    expected = next(steps for steps in range(99) if residual(steps) <= 1e-3)
    assert refitted(weight, kept, weight, hessian, steps=99, GAIN=0.0)[1] == expected > 3


def test_finished_rows_do_not_move_and_do_not_stop_the_others():
    """A row near its best values, and one of zeros, whose error is 0."""
    weight, hessian = (x.double() for x in correlated_problem(5, 96, 400))
    weight[1] = 0.0
    kept = random_mask(5, 96, share=0.5)
    start = rowwise_refit(kept, weight, dampened(hessian, 0.01)) * (1 + 1e-6)
    start[2:] = 0.0
    ours, steps = refitted(start, kept, weight, hessian, steps=3, GAIN=0.0)
    assert steps == 3
    assert torch.equal(ours[:2], start[:2])


def test_it_stops_when_a_step_gains_little_whatever_the_rows_sizes():
    weight, hessian = correlated_problem(20, 96, 400)
    weight[:10] *= 1000
    kept, h = random_mask(20, 96, share=0.5, seed=1), dampened(hessian, 0.01)

    def errors(steps):
        ours, _ = refitted(weight, kept, weight, hessian, steps=steps, GAIN=0.0)
        return torch.tensor([trace_error(row[None], h) for row in weight - ours])

    gains = [float((errors(s) / errors(s + 1) - 1).mean()) for s in range(15)]
    assert not any(0.019 < gain < 0.021 for gain in gains)  # rounding does not decide
    _, steps = refitted(weight, kept, weight, hessian, GAIN=0.02)
    assert 1 < steps == next(i for i, gain in enumerate(gains, 1) if gain < 0.02)


def test_the_first_gradient_of_many_inputs_is_rounded(monkeypatch):
    weight, hessian = correlated_problem(24, 256, 900)
    kept, h = random_mask(24, 256, share=0.5), dampened(hessian, 0.01)
    exact, _ = refitted(weight, kept, weight, hessian, GAIN=0.0)
    for large in (257, 256):
        monkeypatch.setattr(module, "LARGE", large)
        ours, _ = refitted(weight, kept, weight, hessian, bf16=True, GAIN=0.0)
        assert trace_error(weight - ours, h) < 1.005 * trace_error(weight - exact, h)


def test_zero_target_and_indefinite_hessian_stay_finite():
    kept = torch.ones(2, 8, dtype=torch.bool)
    ours, steps = refitted(torch.zeros(2, 8), kept, torch.zeros(2, 8), torch.eye(8))
    assert steps == 0
    assert not ours.any()
    indefinite = torch.eye(8)
    indefinite[0, 1] = indefinite[1, 0] = 50.0
    ours, _ = refitted(gaussian(2, 8), kept, gaussian(2, 8, seed=1), indefinite)
    assert ours.isfinite().all()
