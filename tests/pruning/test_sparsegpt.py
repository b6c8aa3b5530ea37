from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rac_modifier.pruning import sparsegpt
from rac_modifier.pruning.problem import Problem, SolverOptions
from rac_modifier.pruning.solve import solve_many
from rac_modifier.settings.pattern import Pattern
from tests.pruning.pruning_reference import (
    assert_near,
    column_loop,
    dampened,
    random_problem,
    solve_tolerance,
    trace_error,
)
from tests.pruning.solving import solve

TWO, HALF = Pattern.n_of_m(2, 4), Pattern.unstructured(0.5)


def same_rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Rows [rows] whose zeros are at the same places."""
    return ((a != 0) == (b != 0)).all(dim=1)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 60),
    structure=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (1, 3), (7, 16)]),
    seed=st.integers(0, 50),
)
@example(rows=3, groups=50, structure=(1, 3), seed=0)  # blocks of 128, no multiple of 3
def test_groups_equal_the_column_loop(rows, groups, structure, seed):
    n, m = structure
    weight, hessian = random_problem(rows, groups * m, 200, seed, torch.float64)
    (solution,) = solve("sparsegpt", [weight], hessian, Pattern.n_of_m(n, m))
    expected = column_loop(weight, hessian, n=n, m=m, block=m)
    assert same_rows(solution.weight, expected).all()
    assert_near(solution.weight, expected, solve_tolerance(dampened(hessian, 0.01), torch.float64))
    assert (~solution.mask).view(rows, groups, m).sum(2).eq(n).all()


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 290),
    sparsity=st.floats(0.05, 0.95),
    seed=st.integers(0, 50),
)
@example(rows=9, columns=288, sparsity=0.95, seed=4)
def test_unstructured_equals_the_column_loop(rows, columns, sparsity, seed):
    weight, hessian = random_problem(rows, columns, 200, seed, torch.float64)
    (solution,) = solve("sparsegpt", [weight], hessian, Pattern.unstructured(sparsity))
    expected = column_loop(weight, hessian, sparsity=sparsity, block=128)
    assert same_rows(solution.weight, expected).all()
    # with few kept weights the largest can be gone
    largest = max(1.0, float(weight.abs().max() / expected.abs().max()))
    tolerance = largest * solve_tolerance(dampened(hessian, 0.01), torch.float64)
    assert_near(solution.weight, expected, tolerance)
    widths = [min(128, columns - start) for start in range(0, columns, 128)]
    assert int((~solution.mask).sum()) == sum(int(rows * width * sparsity) for width in widths)


@pytest.mark.parametrize("pattern", [TWO, HALF])
def test_agrees_with_llmcompressor(pattern):
    upstream = pytest.importorskip("llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify")
    rows, columns = 96, 512
    weight, hessian = random_problem(rows, columns, 2000)

    def theirs(sparsity: float) -> torch.Tensor:
        module = torch.nn.Linear(columns, rows, bias=False).requires_grad_(False)
        module.weight.data = weight.clone()
        hessians = {module: hessian.clone()}
        args = (hessians, sparsity, pattern.n, pattern.m, 128, 0.01, False)
        return upstream.sparsify_weight(module, *args)[1]

    (solution,) = solve("sparsegpt", [weight], hessian, pattern)
    # with half a weight per block less, their `score <= threshold` prunes exactly our number
    expected = theirs(pattern.sparsity - 0.5 / (rows * 128))
    same = same_rows(solution.weight, expected)  # float32: scores that are nearly equal may swap
    assert same.float().mean() > 0.9
    tolerance = solve_tolerance(dampened(hessian, 0.01), torch.float32, margin=5.0)
    assert_near(solution.weight[same], expected[same], tolerance)
    plain = theirs(pattern.sparsity)
    assert ((solution.weight != 0) == (plain != 0)).float().mean() >= 0.999
    assert solution.error <= trace_error(weight - plain, hessian) * 1.001


def problems_with_a_hessian_each(patterns: list[Pattern]) -> list[Problem]:
    """Two modules each; the second has a dead input, the third needs more dampening."""
    problems = []
    for seed in range(4):
        weight, hessian = random_problem(20, 144, 400, seed, torch.float64)
        if seed == 1:
            hessian[5], hessian[:, 5] = 0.0, 0.0
        if seed == 2:  # not positive definite
            size = (hessian[0, 0] * hessian[1, 1]).sqrt()
            hessian[0, 1] = hessian[1, 0] = 1.05 * size
        weights = [weight[:12], weight[12:]]
        moments = [0.01 * weight[:12], -0.02 * weight[12:]]
        names = [f"{seed}.gate", f"{seed}.up"]
        problems.append(Problem(weights, hessian, patterns, names, moments))
    return problems


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize(
    "patterns", [[Pattern.n_of_m(1, 3)] * 2, [HALF, Pattern.unstructured(0.8)]], ids=str
)
def test_a_batch_of_problems_gets_what_each_would_get_alone(patterns, refit, monkeypatch):
    problems, inner, calls = problems_with_a_hessian_each(patterns), sparsegpt._prune_columns, []

    def counted(weight, *args):
        calls.append(weight.shape)
        return inner(weight, *args)

    monkeypatch.setattr(sparsegpt, "_prune_columns", counted)
    batch = solve_many(problems, SolverOptions("sparsegpt", refit=refit))
    assert calls == [(4, 144, 20)]
    assert batch[2][0].retries > 0 == batch[0][0].retries
    for problem, solutions in zip(problems, batch, strict=True):
        (alone,) = solve_many([problem], SolverOptions("sparsegpt", refit=refit))
        for a, b in zip(solutions, alone, strict=True):
            assert torch.equal(a.mask, b.mask)
            torch.testing.assert_close(a.weight, b.weight, rtol=1e-9, atol=1e-12)
            assert a.relative_error == pytest.approx(b.relative_error, rel=1e-6)
            for field in ("name", "retries", "dead_inputs", "dampening_used"):
                assert getattr(a, field) == getattr(b, field)
    assert calls[1:] == [(144, 20)] * 4, "one problem is not a batch"


def test_problems_of_other_shapes_or_patterns_are_solved_one_after_the_other():
    first, second, *_ = problems_with_a_hessian_each([HALF] * 2)
    other = replace(second, patterns=[HALF, Pattern.unstructured(0.7)])
    solved = solve_many([first, other], SolverOptions("sparsegpt"))
    for problem, solutions in zip((first, other), solved, strict=True):
        (alone,) = solve_many([problem], SolverOptions("sparsegpt"))
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(alone, solutions, strict=True))
