import pytest
import torch

from rac_modifier.settings.pattern import Pattern
from tests.pruning.pruning_reference import best_group, random_problem
from tests.pruning.solving import solve


@pytest.mark.parametrize("method", ["wanda", "magnitude"])
@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 3)])
def test_groups(method, n, m):
    weight, hessian = random_problem(5, 24, 60)
    (solution,) = solve(method, [weight], hessian, Pattern.n_of_m(n, m))
    norm = hessian.diagonal().sqrt() if method == "wanda" else torch.ones(24)
    groups = zip((weight.abs() * norm).view(-1, m), solution.mask.view(-1, m), strict=True)
    for scores, mask in groups:
        pruned = tuple((~mask).nonzero()[:, 0].tolist())
        assert pruned == best_group(scores.tolist(), n)
    assert torch.equal(solution.weight, weight * solution.mask)


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
    patterns = [Pattern.unstructured(0.3), Pattern.unstructured(0.6)]
    weights = [weight, 100 * weight]
    solutions = solve("magnitude", weights, hessian, patterns)
    for solution, w, pattern in zip(solutions, weights, patterns, strict=True):
        assert int((~solution.mask).sum()) == int(6 * 32 * pattern.sparsity)
        assert w.abs()[~solution.mask].max() < w.abs()[solution.mask].min()
        assert solution.dampening_used == 0.0
