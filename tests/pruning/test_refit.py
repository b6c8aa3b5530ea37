import importlib
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rac_modifier.pruning import Pattern, linalg, solve
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


def refitted(start, kept, target, hessian, frac=0.01, **options):
    weight = start.T.clone(memory_format=torch.contiguous_format)
    aim = target.T.clone(memory_format=torch.contiguous_format)
    done = refit(weight, ~kept.T.contiguous(), aim, hessian, Dampening.of(hessian, frac), **options)
    return weight.T, done


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 70),
    share=st.floats(0.0, 1.0),
    seed=st.integers(0, 50),
)
def test_the_error_is_the_least_of_least_squares_row_by_row(rows, columns, share, seed):
    """The error above the least is g^T H^-1 g for the gradient g at the end, which the residual and H's eigenvalues bound."""
    weight, hessian = random_problem(rows, columns, 200, seed, torch.float64)
    kept = random_mask(rows, columns, share=1 - share, seed=seed)
    h = dampened(hessian, 0.01)
    best = rowwise_refit(kept, weight, h)
    ours, done = refitted(weight, kept, weight, hessian, steps=1000, tolerance=1e-6, gain=0.0)
    assert not ours[~kept].any()
    assert done.residual <= 1e-6
    scale = h.diagonal().sqrt()
    smallest = float(torch.linalg.eigvalsh(h / scale / scale[:, None])[0])
    above = done.residual**2 * float((weight * scale).square().sum()) / smallest
    rounding = quadratic_tolerance(weight, h, torch.float64)
    assert trace_error(weight - ours, h) <= trace_error(weight - best, h) + above + rounding


def test_values_equal_the_exact_ones():
    weight, hessian = random_problem(12, 48, 400)
    kept, h = random_mask(12, 48, share=0.4), dampened(hessian, 0.01)
    exact = rowwise_refit(kept, weight, h)
    ours, _ = refitted(weight, kept, weight, hessian, steps=200, tolerance=1e-7, gain=0.0)
    assert_near(ours, exact, solve_tolerance(h, torch.float32, margin=5.0))
    assert solve_tolerance(h, torch.float32, margin=5.0) < 1e-2


@pytest.mark.parametrize("frac", [0.0, 0.01])
@pytest.mark.parametrize("problem", [random_problem, correlated_problem])
def test_no_step_increases_the_error(problem, frac):
    weight, hessian = (x.double() for x in problem(7, 90, 60))  # fewer tokens than inputs
    kept = random_mask(7, 90, share=0.4, seed=1)
    h = dampened(hessian, frac)
    for start in (
        weight,
        torch.zeros_like(weight),
        rowwise_refit(kept, weight, dampened(hessian, 0.01)),
    ):
        errors = []
        for steps in range(30):
            ours, _ = refitted(
                start, kept, weight, hessian, frac, steps=steps, tolerance=0.0, gain=0.0
            )
            errors.append(trace_error(weight - ours, h))
        noise = quadratic_tolerance(weight, h, torch.float64)
        assert all(after <= before + noise for before, after in itertools.pairwise(errors))


def test_stops_when_every_row_has_converged_and_reports_what_is_left():
    weight, _ = random_problem(5, 32, 100)
    kept = random_mask(5, 32, share=0.5)
    diagonal = torch.diag(
        gaussian(32, seed=1).abs() + 0.1
    )  # where the preconditioner is the inverse
    _, done = refitted(torch.zeros(5, 32), kept, weight, diagonal)
    assert done.steps == 1
    assert done.residual < 1e-5
    _, hessian = random_problem(1, 32, 100)
    _, done = refitted(torch.zeros(5, 32), kept, weight, hessian, steps=2)
    assert done.steps == 2
    assert done.residual > 1e-3


def test_stops_when_a_step_gains_little_whatever_the_rows_sizes():
    weight, hessian = correlated_problem(20, 96, 400)
    weight[:10] *= 1000
    kept = random_mask(20, 96, share=0.5, seed=1)
    h = dampened(hessian, 0.01)

    def errors(steps):
        ours, _ = refitted(weight, kept, weight, hessian, steps=steps, gain=0.0)
        return [trace_error(w[None] - o[None], h) for w, o in zip(weight, ours, strict=True)]

    gains = [
        sum(
            (before - after) / after for before, after in zip(errors(s), errors(s + 1), strict=True)
        )
        / 20
        for s in range(15)
    ]
    assert not any(0.019 < gain < 0.021 for gain in gains)  # rounding does not decide
    _, done = refitted(weight, kept, weight, hessian, gain=0.02)
    assert 1 < done.steps == next(i for i, gain in enumerate(gains, 1) if gain < 0.02)


@pytest.mark.parametrize("bf16", [False, True])
def test_says_the_damped_error_of_each_row(bf16):
    weight, hessian = correlated_problem(6, 96, 400)
    kept, h = random_mask(6, 96, share=0.5), dampened(hessian, 0.01)
    ours, done = refitted(weight, kept, weight, hessian, bf16=bf16)
    assert done.steps > 1
    exact = torch.tensor(
        [trace_error(w[None] - o[None], h) for w, o in zip(weight, ours, strict=True)]
    )
    assert_near(done.errors, exact, float(exact.max()) * (5e-3 if bf16 else 1e-5))


def test_the_first_gradient_of_many_inputs_is_rounded(monkeypatch):
    weight, hessian = correlated_problem(24, 256, 900)
    kept = random_mask(24, 256, share=0.5)
    exact, _ = refitted(weight, kept, weight, hessian, gain=0.0)
    least, module = (
        trace_error(weight - exact, dampened(hessian, 0.01)),
        importlib.import_module(refit.__module__),
    )
    float32_products, inner = [], module.add_matmul_
    monkeypatch.setattr(
        module, "add_matmul_", lambda *args: float32_products.append(args) or inner(*args)
    )
    for large in (257, 256):
        monkeypatch.setattr(module, "LARGE", large)
        ours, done = refitted(weight, kept, weight, hessian, bf16=True, gain=0.0)
        assert len(float32_products) == 1  # that of the first round
        assert trace_error(weight - ours, dampened(hessian, 0.01)) < 1.005 * least
        assert float(done.errors.sum()) == pytest.approx(least, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["alps", "keep"])
def test_the_error_after_products_in_bfloat16_is_that_of_what_is_stored(method, dtype, monkeypatch):
    """As a refit after ALPS says it, or as a product of its own."""
    monkeypatch.setattr(linalg, "bf16_is_fast", lambda device: True)
    monkeypatch.setattr(linalg, "BLOCK", 64)
    weight, hessian = correlated_problem(24, 256, 900)
    weight = weight * (random_mask(24, 256, share=0.5) if method == "keep" else 1)
    (found,) = solve(
        method,
        [weight.to(dtype)],
        hessian,
        Pattern.n_of_m(2, 4),
        cross_moment=[0.1 * weight @ hessian],
    )
    exact = trace_error(found.target - found.weight.float(), hessian)
    assert found.error == pytest.approx(exact, rel=2e-3)
    whole = trace_error(found.target, hessian)
    assert found.relative_error == pytest.approx(exact / whole, rel=4e-3)


def test_a_row_does_not_depend_on_its_neighbours():
    weight, hessian = (x.double() for x in correlated_problem(6, 64, 300))
    kept = random_mask(6, 64, share=0.5)
    together, _ = refitted(weight, kept, weight, hessian, steps=5)
    alone, _ = refitted(weight[2:3], kept[2:3], weight[2:3], hessian, steps=5)
    assert_near(together[2:3], alone, solve_tolerance(dampened(hessian, 0.01), torch.float64))


def test_zero_target_and_indefinite_hessian_stay_finite():
    kept = torch.ones(2, 8, dtype=torch.bool)
    ours, done = refitted(torch.zeros(2, 8), kept, torch.zeros(2, 8), torch.eye(8))
    assert (done.steps, done.residual) == (0, 0.0)
    assert not ours.any()
    indefinite = torch.eye(8)
    indefinite[0, 1] = indefinite[1, 0] = 50.0
    ours, _ = refitted(gaussian(2, 8), kept, gaussian(2, 8, seed=1), indefinite)
    assert ours.isfinite().all()


@pytest.mark.parametrize("pattern", [Pattern.n_of_m(2, 4), Pattern.unstructured(0.6)])
@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_after_any_method(method, pattern):
    weight, hessian = correlated_problem(24, 128, 600)
    (plain,) = solve(method, [weight], hessian, pattern)
    (fitted,) = solve(method, [weight], hessian, pattern, refit=True)
    assert torch.equal(plain.mask, fitted.mask)
    assert not fitted.weight[~fitted.mask].any()
    assert fitted.error < 0.9 * plain.error
    assert (plain.refit_steps, plain.refit_residual) == (0, 0.0)
    assert 1 <= fitted.refit_steps <= 20
    change = weight - fitted.weight
    assert fitted.error == pytest.approx(
        trace_error(change, hessian), abs=quadratic_tolerance(change, hessian)
    )
    (none,) = solve(method, [weight], hessian, pattern, refit=True, refit_steps=0)
    assert torch.equal(none.weight, plain.weight)
