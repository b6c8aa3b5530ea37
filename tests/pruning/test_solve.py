"""What holds for every method, and the steps that they share: target, refit, dampening, record."""

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.pruning import linalg
from rac_modifier.settings.pattern import Pattern
from rac_modifier.settings.solvers import SOLVERS
from tests.pruning.pruning_reference import (
    assert_near,
    correlated_problem,
    dampened,
    gaussian,
    quadratic_tolerance,
    random_problem,
    rowwise_refit,
    solve_tolerance,
    trace_error,
)
from tests.pruning.solving import solve

PATTERN = Pattern.n_of_m(2, 4)
METHODS = tuple(SOLVERS)
PRUNING = tuple(method for method in METHODS if method != "none")


def few_tokens(method: str) -> tuple[torch.Tensor, torch.Tensor]:
    """128 inputs and 60 tokens: without dampening no weight is best. "keep" has its zeros."""
    weight, hessian = correlated_problem(12, 128, 60)
    if method == "keep":
        weight.view(-1, 4)[:, :2] = 0.0
    return weight, hessian


def test_overflow_of_the_stored_dtype_is_an_error():
    # pruning the first input doubles the other's weight
    hessian = torch.tensor([[1.0, -0.99], [-0.99, 1.0]])
    weight = torch.tensor([[-5e4, 6e4]]).half()
    with pytest.raises(RacError, match=r"weight 0: the pruned weight in torch\.float16"):
        solve("sparsegpt", [weight], hessian, Pattern.n_of_m(1, 2))


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_zero(method):
    (solution,) = solve(method, [torch.zeros(2, 8)], torch.eye(8), PATTERN)
    assert (solution.error, solution.relative_error) == (0.0, 0.0)
    assert int(solution.mask.sum()) == {"keep": 0, "none": 16}.get(method, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", METHODS)
def test_errors_are_those_of_the_stored_weight_and_inputs_are_left_alone(method, dtype):
    """Fewer tokens than inputs: only the dampening makes the Hessian invertible."""
    weight, hessian = (x.clone() for x in few_tokens(method))
    before = hessian.clone()
    parameter = torch.nn.Parameter(weight.to(dtype))
    (solution,) = solve(method, [parameter], hessian, PATTERN)
    assert solution.weight.dtype == dtype
    assert solution.weight.is_contiguous()
    assert not solution.weight.requires_grad
    assert torch.equal(hessian, before)
    assert torch.equal(parameter, weight.to(dtype))
    change = weight.to(dtype).double() - solution.weight.double()
    tolerance = quadratic_tolerance(change, dampened(hessian, 0.01))
    error = trace_error(change, hessian)
    assert solution.error == pytest.approx(error, abs=tolerance)
    assert tolerance <= 0.02 * error
    whole = trace_error(weight.to(dtype), hessian)
    assert solution.relative_error == pytest.approx(solution.error / whole, rel=1e-4)


@pytest.mark.parametrize("pattern", [PATTERN, Pattern.unstructured(0.37)])
@pytest.mark.parametrize("method", ["sparsegpt", "alps", "wanda", "magnitude"])
def test_modules_that_share_a_hessian_get_what_they_would_get_alone(method, pattern):
    _, hessian = random_problem(1, 132, 300, dtype=torch.float64)
    weights = [gaussian(r, 132, seed=r, dtype=torch.float64) * 10**i for i, r in enumerate((33, 1))]
    tolerance = solve_tolerance(dampened(hessian, 0.01), torch.float64)
    for solution, weight in zip(solve(method, weights, hessian, pattern), weights, strict=True):
        (alone,) = solve(method, [weight], hessian, pattern)
        if method == "alps":  # its refit ends for all modules together
            assert (solution.mask == alone.mask).float().mean() > 0.99
            assert solution.error == pytest.approx(alone.error, rel=0.05)
        else:
            assert torch.equal(solution.mask, alone.mask)
            assert_near(solution.weight, alone.weight, tolerance)
            assert solution.error == pytest.approx(alone.error, rel=1e-9)


@pytest.mark.parametrize("pattern", [Pattern.n_of_m(1, 4), Pattern.unstructured(0.25)])
@pytest.mark.parametrize("frac", [0.0, 0.01])
@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_dead_inputs_are_zeroed_and_disturb_nothing(method, frac, pattern):
    weight, hessian = random_problem(6, 128, 400)
    dead = torch.arange(0, 128, 4)  # one of each group, and as many as the pattern prunes
    hessian[dead], hessian[:, dead] = 0, 0
    (solution,) = solve(method, [weight], hessian, pattern, dampening_frac=frac)
    assert solution.dead_inputs == 32
    assert not solution.weight[:, dead].any()
    assert not solution.mask[:, dead].any()
    alive = torch.ones(128, dtype=torch.bool).index_fill(0, dead, False)
    tolerance = solve_tolerance(dampened(hessian, frac)[alive][:, alive], torch.float32, margin=5.0)
    tolerance *= method == "alps"
    assert_near(solution.weight[:, alive], weight[:, alive], tolerance)


@pytest.mark.parametrize("method", ["sparsegpt", "alps", "keep"])
def test_dead_inputs_beyond_the_pattern_stay_zero_in_the_refit(method):
    weight, hessian = correlated_problem(6, 64, 200)
    weight[:, ::4] = 0.0
    dead = torch.arange(64) % 4 != 0  # three of each group, where the pattern prunes one
    dead[32:] = False
    hessian[dead], hessian[:, dead] = 0, 0
    (solution,) = solve(method, [weight], hessian, Pattern.n_of_m(1, 4), refit=True)
    assert solution.dead_inputs == 24
    assert not solution.mask[:, dead].any()
    assert not solution.weight[:, dead].any()
    assert solution.weight[:, 32:].any()


@pytest.mark.parametrize(("tokens", "ridge"), [(60, 128 / 60), (64000, 0.01)])
@pytest.mark.parametrize("method", METHODS)
def test_the_target_is_that_of_the_cross_moment_and_a_ridge_by_tokens(method, tokens, ridge):
    weight, hessian = (x.double() for x in few_tokens(method))
    cross_moment = gaussian(12, 128, seed=1, dtype=torch.float64)
    damped = dampened(hessian, ridge)
    settings = {"cross_moment": [cross_moment], "tokens": tokens}
    (solution,) = solve(method, [weight], hessian, PATTERN, **settings)
    assert solution.factor.dampening.frac == 0.01
    expected = weight + cross_moment @ torch.linalg.inv(damped)
    assert_near(solution.target, expected, solve_tolerance(damped, torch.float64))
    error = trace_error(solution.target - solution.weight, hessian)
    assert solution.error == pytest.approx(error, rel=1e-9)
    if method == "none":
        assert torch.equal(solution.weight, solution.target)
        assert solution.mask.all()
    elif method != "keep":  # whose zeros are those of the weight
        (plain,) = solve(method, [solution.target], hessian, PATTERN)
        assert_near(solution.weight, plain.weight, 1e-9)
    (plain,) = solve(method, [weight], hessian, PATTERN)
    assert torch.equal(plain.target, weight)


@pytest.mark.parametrize("frac", [0.01, 1.0])
@pytest.mark.parametrize("method", PRUNING)
def test_the_refit_is_on_the_damped_hessian_and_the_dampening_is_recorded(method, frac):
    """Against the normal equations of each row, which a refit nearly reaches."""
    weight, hessian = (x.double() for x in few_tokens(method))
    cross_moment = [gaussian(12, 128, seed=1, dtype=torch.float64)] if method == "keep" else None
    settings = {"refit": True, "dampening_frac": frac, "refit_steps": 500}
    (solution,) = solve(method, [weight], hessian, PATTERN, cross_moment=cross_moment, **settings)
    damped = dampened(hessian, frac)
    best = rowwise_refit(solution.mask, solution.target, damped)
    least, ours = (trace_error(solution.target - w, damped) for w in (best, solution.weight))
    assert least * 0.999 <= ours <= least * 1.05
    assert solution.dampening_used == frac
    assert solution.refit_steps > 0
    # so a refit without the dampening fails above
    little = rowwise_refit(solution.mask, solution.target, dampened(hessian, 1e-6 * frac))
    assert trace_error(solution.target - little, damped) > 5 * least


@pytest.mark.parametrize("method", METHODS)
def test_dampening_is_recorded_only_where_it_is_used(method):
    weight, hessian = correlated_problem(12, 64, 200)
    (solution,) = solve(method, [weight], hessian, PATTERN, dampening_frac=0.02)
    assert solution.dampening_used == (0.0 if method in ("wanda", "magnitude", "none") else 0.02)
    assert (solution.factor is not None) == (method == "sparsegpt")


@pytest.mark.parametrize("method", METHODS)
def test_a_dampening_that_was_raised_for_the_target_holds_for_all_steps_and_is_recorded(method):
    # smallest eigenvalue -3e-4: 1e-4 of the diagonal is too little, 1e-3 is enough
    hessian = torch.ones(64, 64).fill_diagonal_(1 - 3e-4)
    weight = gaussian(4, 64)
    weight.view(-1, 4)[:, :2] = 0.0
    settings = {"refit": True, "dampening_frac": 0.0, "cross_moment": [torch.ones(4, 64)]}
    (solution,) = solve(method, [weight], hessian, PATTERN, **settings)
    assert solution.retries == 2
    assert solution.dampening_used == pytest.approx(1e-3)
    assert solution.factor.dampening.frac == solution.dampening_used
    record = solution.record()
    assert (record["retries"], record["dampening"]) == (2, solution.dampening_used)


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_an_indefinite_hessian_is_an_error(method):
    hessian = torch.eye(16)
    hessian[0, 1] = hessian[1, 0] = 50.0
    weights, names = [torch.ones(2, 16)] * 2, ["q_proj", "k_proj"]
    says = r"q_proj, k_proj: the Hessian is not positive definite.*dampening_frac 1;"
    with pytest.raises(RacError, match=says):
        solve(method, weights, hessian, PATTERN, names=names)
    hessian[0, 1] = hessian[1, 0] = 1.5  # smallest eigenvalue -0.5
    (solution,) = solve(method, weights[:1], hessian, PATTERN)
    assert (solution.retries, solution.dampening_used) == (2, pytest.approx(1.0))


@pytest.mark.parametrize("refit_steps", [0, 10])
@pytest.mark.parametrize("method", PRUNING)
def test_no_zero_is_negative(method, refit_steps):
    """The sparse layouts would store -0.0 as a value."""
    weight, hessian = few_tokens(method)
    settings = {"cross_moment": [gaussian(12, 128, seed=1)], "refit": True}
    (solution,) = solve(method, [weight], hessian, PATTERN, refit_steps=refit_steps, **settings)
    assert (solution.weight == 0).any()
    assert not (solution.weight.signbit() & (solution.weight == 0)).any()


@pytest.mark.parametrize("pattern", [PATTERN, Pattern.unstructured(0.8)])
@pytest.mark.parametrize("method", ["alps", "sparsegpt", "keep"])
@pytest.mark.parametrize("scales", [0.0, 2.0])
def test_bfloat16_matmuls_hardly_change_the_error(pattern, method, scales, monkeypatch):
    weight, hessian = correlated_problem(200, 256, 1000)
    weight = weight * (gaussian(200, 256, seed=3) > 0) if method == "keep" else weight
    outliers = gaussian(256, seed=2).mul(scales).exp()
    hessian = hessian * outliers * outliers[:, None]  # inputs of very different sizes
    settings = {"refit": True, "cross_moment": [0.1 * weight @ hessian]}
    (exact,) = solve(method, [weight], hessian, pattern, **settings)
    monkeypatch.setattr(linalg, "bf16_is_fast", lambda device: True)
    (ours,) = solve(method, [weight], hessian, pattern, **settings)
    assert not torch.equal(ours.weight, exact.weight)
    assert ours.error == pytest.approx(exact.error, rel=0.025)
    change = ours.target - ours.weight
    tolerance = quadratic_tolerance(change, hessian)
    assert ours.error == pytest.approx(trace_error(change, hessian), abs=tolerance)
