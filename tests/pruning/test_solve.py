import subprocess
import sys
from typing import get_args

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.pruning import Method, Pattern, solve
from tests.pruning.pruning_reference import (
    assert_near,
    correlated_problem,
    dampened,
    gaussian,
    random_problem,
    rowwise_refit,
    solve_tolerance,
    trace_error,
)

PATTERN = Pattern.n_of_m(2, 4)
METHODS = get_args(Method)
PRUNING = tuple(method for method in METHODS if method != "none")


def few_tokens(method: Method) -> tuple[torch.Tensor, torch.Tensor]:
    """128 inputs and 60 tokens: without dampening there is no one best weight. For "keep" the weight has its zeros already."""
    weight, hessian = correlated_problem(12, 128, 60)
    if method == "keep":
        weight.view(-1, 4)[:, :2] = 0.0
    return weight, hessian


def test_overflow_of_the_stored_dtype_is_an_error():
    hessian = torch.tensor(
        [[1.0, -0.99], [-0.99, 1.0]]
    )  # pruning the first input doubles the other's weight
    weight = torch.tensor([[-5e4, 6e4]]).half()
    with pytest.raises(RacError, match=r"weight 0: the pruned weight overflows torch\.float16"):
        solve("sparsegpt", [weight], hessian, Pattern.n_of_m(1, 2))


def test_large_half_weights_are_finite():
    weight = torch.full((4, 64), 6e4, dtype=torch.float16)  # whose sum is not
    (solution,) = solve("magnitude", [weight], torch.eye(64), PATTERN)
    assert int(solution.mask.sum()) == 128


@pytest.mark.parametrize("method", METHODS)
def test_weights_of_zero(method):
    (solution,) = solve(method, [torch.zeros(2, 8)], torch.eye(8), PATTERN)
    assert (solution.error, solution.relative_error) == (0.0, 0.0)
    assert int(solution.mask.sum()) == {"keep": 0, "none": 16}.get(method, 8)


@pytest.mark.parametrize("method", METHODS)
def test_the_target_is_that_of_the_cross_moment_and_the_damped_hessian(method):
    weight, hessian = (x.double() for x in few_tokens(method))
    cross_moment = gaussian(12, 128, seed=1, dtype=torch.float64)
    damped = dampened(hessian, 0.01)
    (solution,) = solve(method, [weight], hessian, PATTERN, cross_moment=[cross_moment])
    expected = weight + cross_moment @ torch.linalg.inv(damped)
    assert_near(solution.target, expected, solve_tolerance(damped, torch.float64))
    assert solution.error == pytest.approx(
        trace_error(solution.target - solution.weight, hessian), rel=1e-9
    )
    assert solution.dampening_used == 0.01
    (plain,) = solve(method, [weight], hessian, PATTERN)
    assert torch.equal(plain.target, weight)


def test_none_gives_the_target_and_keeps_every_weight():
    weight, hessian = correlated_problem(12, 64, 200)
    (plain,) = solve("none", [weight], hessian, Pattern.nothing())
    assert torch.equal(plain.weight, weight)
    (solution,) = solve(
        "none", [weight], hessian, Pattern.nothing(), cross_moment=[gaussian(12, 64, seed=1)]
    )
    assert torch.equal(solution.weight, solution.target)
    assert not torch.equal(solution.weight, weight)
    assert bool(solution.mask.all())
    assert (solution.error, solution.refit_steps) == (0.0, 0)


@pytest.mark.parametrize("frac", [0.01, 1.0])
@pytest.mark.parametrize("method", PRUNING)
def test_the_refit_is_on_the_damped_hessian_and_the_dampening_is_recorded(method, frac):
    """Against the normal equations of each row, which a refit comes close to before its steps gain too little."""
    weight, hessian = (x.double() for x in few_tokens(method))
    cross_moment = [gaussian(12, 128, seed=1, dtype=torch.float64)] if method == "keep" else None
    (solution,) = solve(
        method,
        [weight],
        hessian,
        PATTERN,
        cross_moment=cross_moment,
        refit=True,
        dampening_frac=frac,
        refit_steps=500,
    )
    damped = dampened(hessian, frac)
    best = rowwise_refit(solution.mask, solution.target, damped)
    least, ours = (trace_error(solution.target - w, damped) for w in (best, solution.weight))
    assert least * 0.999 <= ours <= least * 1.05
    assert solution.dampening_used == frac
    assert solution.refit_steps > 0
    little = rowwise_refit(solution.mask, solution.target, dampened(hessian, 1e-6 * frac))
    assert (
        trace_error(solution.target - little, damped) > 5 * least
    )  # so a refit without the dampening fails above


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
def test_an_undamped_refit_on_few_tokens_would_lose_other_tokens(method):
    """The error on the tokens that were not seen, as a user would meet it."""
    weight, _ = correlated_problem(12, 128, 60)
    directions = gaussian(32, 128, seed=5)
    seen, other = (
        gaussian(n, 32, seed=6 + i) @ directions + gaussian(n, 128, seed=8 + i)
        for i, n in enumerate((60, 4000))
    )
    hessian, held_out = (2 / len(x) * x.T @ x for x in (seen, other))
    (fitted,) = solve(method, [weight], hessian, PATTERN, refit=True, refit_steps=500)
    undamped = rowwise_refit(fitted.mask, weight, dampened(hessian, 1e-6))
    assert trace_error(weight - fitted.weight, held_out) < 0.8 * trace_error(
        weight - undamped, held_out
    )


@pytest.mark.parametrize("method", METHODS)
def test_dampening_is_recorded_only_where_it_is_used(method):
    weight, hessian = correlated_problem(12, 64, 200)
    (solution,) = solve(method, [weight], hessian, PATTERN, dampening_frac=0.02)
    assert solution.dampening_used == (0.0 if method in ("wanda", "magnitude", "none") else 0.02)
    assert (solution.factor is not None) == (method == "sparsegpt")
    assert solution.record()["dampening"] == solution.dampening_used


@pytest.mark.parametrize("method", METHODS)
def test_a_dampening_that_was_raised_for_the_target_holds_for_all_steps_and_is_recorded(method):
    hessian = torch.ones(64, 64)
    hessian.fill_diagonal_(
        1 - 3e-4
    )  # smallest eigenvalue -3e-4: 1e-4 of the diagonal is too little, 1e-3 is enough
    weight = gaussian(4, 64)
    weight.view(-1, 4)[:, :2] = 0.0
    (solution,) = solve(
        method,
        [weight],
        hessian,
        PATTERN,
        cross_moment=[torch.ones(4, 64)],
        refit=True,
        dampening_frac=0.0,
    )
    assert solution.retries == 2
    assert solution.dampening_used == pytest.approx(1e-3)
    assert solution.factor.dampening.frac == solution.dampening_used
    assert (solution.record()["retries"], solution.record()["dampening"]) == (
        2,
        solution.dampening_used,
    )


def test_keep_prunes_what_is_zero_already_and_fits_the_rest_to_the_target():
    weight, hessian = random_problem(3, 16, 200, dtype=torch.float64)
    weight[:, ::2] = 0.0
    (same,) = solve("keep", [weight], hessian, PATTERN)
    assert torch.equal(same.weight, weight)
    cross_moment = [0.1 * gaussian(3, 16, seed=2) @ hessian.float()]
    (fitted,) = solve(
        "keep",
        [weight],
        hessian,
        PATTERN,
        cross_moment=cross_moment,
        dampening_frac=0.0,
        refit_steps=500,
    )
    assert torch.equal(fitted.mask, weight != 0)
    assert torch.equal(fitted.weight != 0, fitted.mask)
    best = rowwise_refit(fitted.mask, fitted.target, hessian)
    least, ours = (trace_error(fitted.target - w, hessian) for w in (best, fitted.weight))
    assert least * 0.999 <= ours <= least * 1.05
    assert trace_error(fitted.target - weight, hessian) > 1.2 * least


@pytest.mark.parametrize("method", ["sparsegpt", "alps", "keep"])
def test_dead_inputs_are_pruned_beyond_the_pattern_and_the_refit_leaves_them_zero(method):
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


@pytest.mark.parametrize("refit_steps", [0, 10])
@pytest.mark.parametrize("method", PRUNING)
def test_no_zero_is_negative(method, refit_steps):
    """The sparse layouts would store -0.0 as a value."""
    weight, hessian = few_tokens(method)
    cross_moment = [gaussian(12, 128, seed=1)]
    (solution,) = solve(
        method,
        [weight],
        hessian,
        PATTERN,
        cross_moment=cross_moment,
        refit=True,
        refit_steps=refit_steps,
    )
    assert (solution.weight == 0).any()
    assert not (solution.weight.signbit() & (solution.weight == 0)).any()


def test_the_residual_of_the_refit_is_what_is_left_of_the_gradient():
    """The largest ||D^-1/2 g|| / ||D^1/2 t|| of a row, from the definition."""
    weight, hessian = (x.double() for x in correlated_problem(12, 64, 200))
    (solution,) = solve("wanda", [weight], hessian, PATTERN, refit=True, refit_steps=2)
    damped = dampened(hessian, 0.01)
    gradient = (weight - solution.weight) @ damped * solution.mask
    rows = (gradient / damped.diagonal().sqrt()).norm(dim=1) / (
        weight * damped.diagonal().sqrt()
    ).norm(dim=1)
    assert solution.refit_steps == 2
    assert solution.refit_residual == pytest.approx(float(rows.max()), rel=1e-6)


def test_the_record_names_what_a_reader_of_a_run_looks_for():
    weight, hessian = correlated_problem(12, 64, 200)
    hessian[3], hessian[:, 3] = 0, 0
    (solution,) = solve("alps", [weight], hessian, PATTERN, names=["q_proj"])
    assert solution.record() == {
        "name": "q_proj",
        "shape": [12, 64],
        "sparsity": float((solution.weight == 0).sum()) / (12 * 64),
        "relative_error": solution.relative_error,
        "dampening": 0.01,
        "retries": 0,
        "refit_steps": solution.refit_steps,
        "dead_inputs": 1,
    }
    assert solution.relative_error == pytest.approx(
        solution.error / trace_error(weight, hessian), rel=1e-3
    )
    assert solution.refit_steps > 0


def test_import_brings_no_compressor():
    code = (
        "import sys, rac_modifier.pruning as p; p.solve; p.Hessian; p.Pattern; "
        "assert not {'llmcompressor', 'vllm', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
