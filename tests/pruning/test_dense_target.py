import math

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.pruning import Pattern, solve
from rac_modifier.pruning.dense_target import target_weights
from rac_modifier.pruning.sparsegpt import factorise
from tests.pruning.pruning_reference import correlated_problem, dampened


def two_streams(rows=(5, 1, 8), columns=40, tokens=500):
    g = torch.Generator().manual_seed(0)
    x_pruned = torch.randn(tokens, columns, generator=g, dtype=torch.float64)
    x_pruned = x_pruned + 0.7 * x_pruned.roll(1, 1)
    x_dense = (
        x_pruned + 0.3 * torch.randn(tokens, columns, generator=g, dtype=torch.float64) + 0.1 * x_pruned.roll(3, 1)
    )
    weights = [torch.randn(r, columns, generator=g) for r in rows]
    hessian = 2 / tokens * x_pruned.T @ x_pruned
    drift = [2 / tokens * w.double() @ (x_dense - x_pruned).T @ x_pruned for w in weights]
    return weights, drift, hessian, x_dense, x_pruned


def test_equals_the_normal_equation():
    weights, drift, hessian, x_dense, x_pruned = two_streams()
    names = ["q", "k", "v"]
    ours = target_weights(weights, [d.float() for d in drift], hessian.float(), 0.01, names)
    damped = dampened(hessian, 0.01)
    for target, w, d in zip(ours, weights, drift, strict=True):
        torch.testing.assert_close(target.double(), w + d @ torch.linalg.inv(damped), rtol=1e-4, atol=1e-5)
    exact = target_weights(weights, drift, hessian, 0.0, names)
    for target, w in zip(exact, weights, strict=True):
        best = torch.linalg.lstsq(x_pruned, x_dense @ w.double().T).solution.T
        torch.testing.assert_close(target, best, rtol=1e-6, atol=1e-8)


def test_it_brings_a_pruned_layer_nearer_to_the_dense_output():
    weights, drift, hessian, x_dense, x_pruned = two_streams((50, 40, 60))
    targets = target_weights(weights, [d.float() for d in drift], hessian.float(), 0.01, list("abc"))
    pattern = Pattern.n_of_m(2, 4)
    plain = solve("alps", weights, hessian.float(), pattern)
    towards = solve("alps", weights, hessian.float(), pattern, target=targets)
    for w, a, b in zip(weights, plain, towards, strict=True):
        wanted = x_dense @ w.double().T
        far, near = ((wanted - x_pruned @ s.weight.double().T).square().sum() for s in (a, b))
        assert near < far


def test_no_drift_and_dead_inputs_leave_the_weights():
    weight, hessian = correlated_problem(4, 32, 200)
    hessian[3], hessian[:, 3] = 0, 0
    (same,) = target_weights([weight.bfloat16()], [torch.zeros(4, 32)], hessian, 0.01, ["x"])
    assert same.dtype == torch.float32
    assert torch.equal(same, weight.bfloat16().float())
    drift = torch.randn(4, 32) * 0.01
    drift[:, 3] = 0
    (moved,) = target_weights([weight], [drift], hessian, 0.0, ["x"])
    assert torch.equal(moved[:, 3], weight[:, 3])


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_a_shared_factor_records_its_retries(method):
    hessian = 2 * torch.ones(64, 64)  # rank one
    weight, drift = torch.randn(4, 64), torch.ones(4, 64)
    factor = factorise(hessian, 0.0, "x")
    assert factor.retries >= 1
    target = target_weights([weight], [drift], hessian, 0.0, ["x"], factor=factor)
    assert torch.equal(target[0], target_weights([weight], [drift], hessian, 0.0, ["x"])[0])
    arguments = {"target": target, "dampening_frac": 0.0}
    (solution,) = solve(method, [weight], hessian, Pattern.n_of_m(2, 4), factor=factor, **arguments)
    assert (solution.retries, solution.dampening_used) == (factor.retries, factor.dampening_frac)
    if method == "sparsegpt":
        (alone,) = solve(method, [weight], hessian, Pattern.n_of_m(2, 4), **arguments)
        assert torch.equal(alone.weight, solution.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drift": [torch.ones(2, 8)]}, r"x: weight \[3, 8\], target \[2, 8\]"),
        ({"drift": [torch.full((3, 8), math.nan)]}, "x: the target holds values that are not finite"),
        ({"drift": []}, "0 targets"),
        ({"dampening_frac": -1.0}, "dampening_frac -1"),
        ({"hessian": torch.zeros(8, 8)}, "diagonal runs from 0 to 0"),
        (
            {"hessian": torch.eye(8) + 50 * torch.eye(8).roll(1, 0) + 50 * torch.eye(8).roll(1, 1)},
            "not positive definite",
        ),
        ({"drift": [torch.full((3, 8), 3e38)], "hessian": torch.eye(8) * 1e-3}, "x: the dense target overflows"),
    ],
)
def test_refuses(change, message):
    arguments = {
        "weights": [torch.ones(3, 8)],
        "drift": [torch.ones(3, 8)],
        "hessian": torch.eye(8),
        "dampening_frac": 0.01,
        "names": ["x"],
        **change,
    }
    with pytest.raises(RacError, match=message):
        target_weights(**arguments)
