import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rac_modifier.pruning import Pattern, solve
from rac_modifier.pruning.linalg import Dampening
from rac_modifier.pruning.refit import refit
from tests.pruning.pruning_reference import correlated_problem, dampened, random_problem, rowwise_refit, trace_error


def refitted(start, kept, target, hessian, frac=0.01, **options):
    weight = start.T.clone(memory_format=torch.contiguous_format)
    done = refit(weight, ~kept.T.contiguous(), target.T.contiguous(), hessian, Dampening.of(hessian, frac), **options)
    return weight.T, done


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 9), columns=st.integers(1, 70), share=st.floats(0.0, 1.0), seed=st.integers(0, 50))
def test_equals_least_squares_row_by_row(rows, columns, share, seed):
    weight, hessian = random_problem(rows, columns, 200, seed)
    kept = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) >= share
    h = dampened(hessian, 0.01)
    best = rowwise_refit(kept, weight, h)
    ours, done = refitted(weight, kept, weight, hessian, steps=300, tolerance=1e-5, gain=0.0)
    assert not ours[~kept].any()
    assert done.residual <= 1e-5
    least = trace_error(weight - best, h)
    assert trace_error(weight - ours, h) <= least * 1.0001 + 1e-9 * trace_error(weight, h)


def test_values_equal_the_exact_ones():
    weight, hessian = random_problem(12, 48, 400)
    kept = torch.rand(12, 48) < 0.4
    exact = rowwise_refit(kept, weight, dampened(hessian, 0.01))
    ours, _ = refitted(weight, kept, weight, hessian, steps=200, tolerance=1e-6, gain=0.0)
    torch.testing.assert_close(ours.double(), exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("frac", [0.0, 0.01])
@pytest.mark.parametrize("problem", [random_problem, correlated_problem])
def test_no_step_increases_the_error(problem, frac):
    weight, hessian = problem(7, 90, 60)  # rank-deficient
    kept = torch.rand(7, 90, generator=torch.Generator().manual_seed(1)) < 0.4
    h = dampened(hessian, frac)
    starts = weight, torch.zeros_like(weight), rowwise_refit(kept, weight, dampened(hessian, 0.01)).float()
    for start in starts:
        errors = []
        for steps in range(30):
            ours, _ = refitted(start, kept, weight, hessian, frac, steps=steps, tolerance=0.0, gain=0.0)
            errors.append(trace_error(weight - ours, h))
        noise = 1e-6 * trace_error(weight, h)
        assert all(after <= before + noise for before, after in itertools.pairwise(errors))


def test_stops_when_every_row_has_converged_and_reports_what_is_left():
    weight, _ = random_problem(5, 32, 100)
    kept = torch.rand(5, 32) < 0.5
    diagonal = torch.diag(torch.rand(32) + 0.1)  # where the preconditioner is the inverse
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
    kept = torch.rand(20, 96, generator=torch.Generator().manual_seed(1)) < 0.5
    h = dampened(hessian, 0.01)

    def errors(steps):
        ours, _ = refitted(weight, kept, weight, hessian, steps=steps, gain=0.0)
        return [trace_error(w[None] - o[None], h) for w, o in zip(weight, ours, strict=True)]

    gains = [
        sum((before - after) / after for before, after in zip(errors(s), errors(s + 1), strict=True)) / 20
        for s in range(15)
    ]
    _, done = refitted(weight, kept, weight, hessian, gain=0.02)
    assert 1 < done.steps == next(i for i, gain in enumerate(gains, 1) if gain < 0.02)


def test_a_row_does_not_depend_on_its_neighbours():
    weight, hessian = correlated_problem(6, 64, 300)
    kept = torch.rand(6, 64) < 0.5
    together, _ = refitted(weight, kept, weight, hessian, steps=5)  # before rounding has grown
    alone, _ = refitted(weight[2:3], kept[2:3], weight[2:3], hessian, steps=5)
    torch.testing.assert_close(together[2:3], alone, rtol=1e-3, atol=1e-4)


def test_zero_target_and_indefinite_hessian_stay_finite():
    kept = torch.ones(2, 8, dtype=torch.bool)
    ours, done = refitted(torch.zeros(2, 8), kept, torch.zeros(2, 8), torch.eye(8))
    assert (done.steps, done.residual) == (0, 0.0)
    assert not ours.any()
    indefinite = torch.eye(8)
    indefinite[0, 1] = indefinite[1, 0] = 50.0
    start = torch.randn(2, 8)
    ours, _ = refitted(start, kept, torch.randn(2, 8), indefinite)
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
    assert fitted.error == pytest.approx(trace_error(weight - fitted.weight, hessian), rel=1e-3)
    (none,) = solve(method, [weight], hessian, pattern, refit=True, refit_steps=0)
    torch.testing.assert_close(none.weight, plain.weight)
