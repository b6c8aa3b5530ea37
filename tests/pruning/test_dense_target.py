import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.pruning import Pattern, solve
from rac_modifier.pruning.dense_target import target_weights
from rac_modifier.pruning.linalg import Dampening, factorise
from tests.pruning.pruning_reference import (
    assert_near,
    condition,
    correlated_problem,
    dampened,
    gaussian,
    solve_tolerance,
)


def two_streams(rows=(5, 1, 8), columns=40, tokens=500):
    x_pruned = gaussian(tokens, columns, seed=0, dtype=torch.float64)
    x_pruned = x_pruned + 0.7 * x_pruned.roll(1, 1)
    x_dense = (
        x_pruned
        + 0.3 * gaussian(tokens, columns, seed=1, dtype=torch.float64)
        + 0.1 * x_pruned.roll(3, 1)
    )
    weights = [gaussian(r, columns, seed=2 + i) for i, r in enumerate(rows)]
    hessian = 2 / tokens * x_pruned.T @ x_pruned
    cross_moment = [2 / tokens * w.double() @ (x_dense - x_pruned).T @ x_pruned for w in weights]
    return weights, cross_moment, hessian, x_dense, x_pruned


def targets_of(weights, cross_moment, hessian, frac=0.01, names="abc"):
    names = list(names[: len(weights)])
    return target_weights(
        weights, cross_moment, factorise(hessian, Dampening.of(hessian, frac), "x"), names
    )


def test_equals_the_normal_equation():
    weights, cross_moment, hessian, _, _ = two_streams()
    damped = dampened(hessian, 0.01)
    inverse = torch.linalg.inv(damped)
    for dtype, margin in ((torch.float32, 5.0), (torch.float64, 50.0)):
        ours = targets_of(weights, [c.to(dtype) for c in cross_moment], hessian.to(dtype))
        for target, w, c in zip(ours, weights, cross_moment, strict=True):
            assert_near(target, w + c @ inverse, solve_tolerance(damped, dtype, margin))


def test_without_dampening_it_is_the_least_squares_fit_to_the_dense_output():
    weights, cross_moment, hessian, x_dense, x_pruned = two_streams()
    exact = targets_of(weights, cross_moment, hessian, frac=0.0)
    for target, w in zip(exact, weights, strict=True):
        best = torch.linalg.lstsq(x_pruned, x_dense @ w.double().T).solution.T
        assert_near(target, best, solve_tolerance(hessian, torch.float64))
    assert condition(hessian) > 10


def test_it_brings_a_pruned_layer_nearer_to_the_dense_output():
    weights, cross_moment, hessian, x_dense, x_pruned = two_streams((50, 40, 60))
    pattern = Pattern.n_of_m(2, 4)
    plain = solve("alps", weights, hessian.float(), pattern)
    towards = solve(
        "alps", weights, hessian.float(), pattern, cross_moment=[c.float() for c in cross_moment]
    )
    for w, a, b in zip(weights, plain, towards, strict=True):
        wanted = x_dense @ w.double().T
        far, near = ((wanted - x_pruned @ s.weight.double().T).square().sum() for s in (a, b))
        assert near < far


def test_without_an_error_before_it_and_at_dead_inputs_the_target_is_the_weight():
    weight, hessian = correlated_problem(4, 32, 200)
    hessian[3], hessian[:, 3] = 0, 0
    (same,) = targets_of([weight.bfloat16()], [torch.zeros(4, 32)], hessian)
    assert same.dtype == torch.float32
    assert torch.equal(same, weight.bfloat16().float())
    cross_moment = gaussian(4, 32) * 0.01
    cross_moment[:, 3] = 0
    (moved,) = targets_of([weight], [cross_moment], hessian, frac=0.0)
    assert torch.equal(moved[:, 3], weight[:, 3])
    assert not torch.equal(moved, weight)


def test_a_target_that_overflows_names_the_module_and_the_dampening():
    with pytest.raises(
        RacError, match=r"b: the dense target overflows; raise dampening_frac \(0\.01\)"
    ):
        targets_of(
            [torch.ones(3, 8)] * 2,
            [torch.ones(3, 8), torch.full((3, 8), 3e38)],
            torch.eye(8) * 1e-3,
        )
