import pytest
import torch

from rac_modifier.pruning import Pattern, broken_groups, solve
from tests.pruning.pruning_reference import (
    best_group,
    quadratic_tolerance,
    random_problem,
    trace_error,
)


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 3)])
def test_groups(method, n, m):
    weight, hessian = random_problem(5, 24, 60)
    (solution,) = solve(method, [weight], hessian, Pattern.n_of_m(n, m))
    norm = hessian.diagonal().sqrt() if method == "wanda" else torch.ones(24)
    for i in range(5):
        for g in range(0, 24, m):
            scores = (weight[i].abs() * norm)[g : g + m].tolist()
            assert tuple((~solution.mask[i, g : g + m]).nonzero()[:, 0].tolist()) == best_group(
                scores, n
            )
    assert torch.equal(solution.weight, weight * solution.mask)
    assert broken_groups(solution.weight, Pattern.n_of_m(n, m)) == 0


def test_wanda_prunes_the_same_share_of_each_row():
    weight, hessian = random_problem(6, 33, 80)
    weight[0] *= 100
    (solution,) = solve("wanda", [weight], hessian, Pattern.unstructured(0.4))
    scores = weight.abs() * hessian.diagonal().sqrt()
    assert (~solution.mask).sum(1).tolist() == [13] * 6
    for i in range(6):
        assert scores[i][~solution.mask[i]].max() < scores[i][solution.mask[i]].min()


def test_magnitude_compares_the_whole_module_and_no_other():
    weight, hessian = random_problem(6, 32, 80)
    solutions = solve("magnitude", [weight, 100 * weight], hessian, Pattern.unstructured(0.3))
    for solution, w in zip(solutions, (weight, 100 * weight), strict=True):
        assert int((~solution.mask).sum()) == int(6 * 32 * 0.3)
        assert w.abs()[~solution.mask].max() < w.abs()[solution.mask].min()


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_those_of_the_stored_weight(method, dtype):
    weight, hessian = random_problem(7, 300, 80)
    weight = weight.to(dtype)
    (solution,) = solve(method, [weight], hessian, Pattern.unstructured(0.5))
    assert solution.weight.dtype == dtype
    change = weight.double() - solution.weight.double()
    error = trace_error(change, hessian)
    tolerance = quadratic_tolerance(change, hessian)
    assert tolerance < 1e-2 * error
    assert solution.error == pytest.approx(error, abs=tolerance)
    assert solution.relative_error == pytest.approx(
        solution.error / trace_error(weight, hessian), rel=1e-4
    )
    assert (solution.dampening_used, solution.retries) == (0.0, 0)


def test_one_column_is_left_whole():
    (solution,) = solve("wanda", [torch.ones(2, 1)], torch.ones(1, 1), Pattern.unstructured(0.5))
    assert solution.mask.all()
    assert solution.error == 0.0
