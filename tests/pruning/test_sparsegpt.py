from dataclasses import replace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rac_modifier.errors import RacError
from rac_modifier.pruning import Pattern, broken_groups, solve, sparsegpt
from rac_modifier.pruning.solve import Problem, solve_many
from tests.pruning.pruning_reference import (
    assert_near,
    column_loop,
    dampened,
    gaussian,
    quadratic_tolerance,
    random_problem,
    solve_tolerance,
    trace_error,
)


def same_rows(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Rows [rows] whose zeros are at the same places."""
    return ((a != 0) == (b != 0)).all(dim=1)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    groups=st.integers(1, 60),
    structure=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (1, 3), (7, 16)]),
    block=st.sampled_from([1, 16, 128]),
    seed=st.integers(0, 50),
)
@example(rows=3, groups=50, structure=(1, 3), block=128, seed=0)  # 128 is no multiple of 3
def test_groups_equal_the_column_loop(rows, groups, structure, block, seed):
    n, m = structure
    weight, hessian = random_problem(rows, groups * m, 200, seed, torch.float64)
    (solution,) = solve("sparsegpt", [weight], hessian, Pattern.n_of_m(n, m), block_size=block)
    expected = column_loop(weight, hessian, n=n, m=m, block=m)
    assert same_rows(solution.weight, expected).all()
    assert_near(solution.weight, expected, solve_tolerance(dampened(hessian, 0.01), torch.float64))
    assert (~solution.mask).view(rows, groups, m).sum(2).eq(n).all()


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 290),
    sparsity=st.floats(0.05, 0.95),
    block=st.sampled_from([1, 40, 128, 512]),
    seed=st.integers(0, 50),
)
@example(rows=9, columns=288, sparsity=0.95, block=1, seed=4)
def test_unstructured_equals_the_column_loop(rows, columns, sparsity, block, seed):
    weight, hessian = random_problem(rows, columns, 200, seed, torch.float64)
    (solution,) = solve(
        "sparsegpt", [weight], hessian, Pattern.unstructured(sparsity), block_size=block
    )
    expected = column_loop(weight, hessian, sparsity=sparsity, block=block)
    assert same_rows(solution.weight, expected).all()
    largest = max(
        1.0, float(weight.abs().max() / expected.abs().max())
    )  # with few kept weights the largest can be gone
    assert_near(
        solution.weight, expected, largest * solve_tolerance(dampened(hessian, 0.01), torch.float64)
    )
    widths = [min(block, columns - start) for start in range(0, columns, block)]
    assert int((~solution.mask).sum()) == sum(int(rows * width * sparsity) for width in widths)


@pytest.mark.parametrize("pattern", [Pattern.n_of_m(2, 4), Pattern.unstructured(0.5)])
def test_agrees_with_llmcompressor(pattern):
    upstream = pytest.importorskip("llmcompressor.modifiers.pruning.sparsegpt.sgpt_sparsify")
    rows, columns = 96, 512
    weight, hessian = random_problem(rows, columns, 2000)

    def theirs(sparsity: float) -> torch.Tensor:
        module = torch.nn.Linear(columns, rows, bias=False).requires_grad_(False)
        module.weight.data = weight.clone()
        return upstream.sparsify_weight(
            module, {module: hessian.clone()}, sparsity, pattern.n, pattern.m, 128, 0.01, False
        )[1]

    (solution,) = solve("sparsegpt", [weight], hessian, pattern)
    # with half a weight per block less, their `score <= threshold` prunes exactly our number
    expected = theirs(pattern.sparsity - 0.5 / (rows * 128))
    same = same_rows(
        solution.weight, expected
    )  # both are float32: scores that are nearly equal may change places
    assert same.float().mean() > 0.9
    tolerance = solve_tolerance(dampened(hessian, 0.01), torch.float32, margin=5.0)
    assert_near(solution.weight[same], expected[same], tolerance)
    plain = theirs(pattern.sparsity)
    assert ((solution.weight != 0) == (plain != 0)).float().mean() >= 0.999
    assert solution.error <= trace_error(weight - plain, hessian) * 1.001


@pytest.mark.parametrize("pattern", [Pattern.n_of_m(2, 4), Pattern.unstructured(0.37)])
@pytest.mark.parametrize("method", ["sparsegpt", "wanda", "magnitude"])
def test_stacked_equals_alone(method, pattern):
    _, hessian = random_problem(1, 260, 500, dtype=torch.float64)
    weights = [
        random_problem(rows, 260, 1, seed, torch.float64)[0] * 10**seed
        for seed, rows in enumerate((33, 1, 16))
    ]
    together = solve(method, weights, hessian, pattern)
    tolerance = solve_tolerance(dampened(hessian, 0.01), torch.float64)
    for solution, weight in zip(together, weights, strict=True):
        (alone,) = solve(method, [weight], hessian, pattern)
        assert torch.equal(solution.mask, alone.mask)
        assert_near(solution.weight, alone.weight, tolerance)
        assert solution.error == pytest.approx(alone.error, rel=1e-9)
        assert solution.relative_error == pytest.approx(alone.relative_error, rel=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("pattern", [Pattern.n_of_m(2, 4), Pattern.unstructured(0.02)])
def test_errors_are_those_of_the_stored_weight(dtype, pattern):
    weight, hessian = random_problem(
        40, 300, 120
    )  # fewer tokens than inputs: only the dampening makes it invertible
    weight = weight.to(dtype)
    (solution,) = solve("sparsegpt", [weight], hessian, pattern)
    assert solution.weight.dtype == dtype
    assert solution.weight.is_contiguous()
    change = weight.double() - solution.weight.double()
    error = trace_error(change, hessian)
    tolerance = quadratic_tolerance(change, dampened(hessian, 0.01))
    assert tolerance < 0.01 * error
    assert solution.error == pytest.approx(error, abs=tolerance)
    assert solution.relative_error == pytest.approx(
        solution.error / trace_error(weight, hessian), rel=1e-4
    )
    (wide,) = solve("sparsegpt", [weight.float()], hessian, pattern)
    assert torch.equal(wide.mask, solution.mask)
    assert torch.equal(wide.weight.to(dtype), solution.weight)


@pytest.mark.parametrize("pattern", [Pattern.n_of_m(2, 4), Pattern.unstructured(0.02)])
def test_its_own_errors_leave_the_share_of_the_dampening_out(pattern):
    weight, hessian = random_problem(40, 300, 120, dtype=torch.float64)
    (solution,) = solve("sparsegpt", [weight], hessian, pattern)
    assert solution.error == pytest.approx(trace_error(weight - solution.weight, hessian), rel=1e-9)


def test_better_than_wanda_and_wanda_than_magnitude():
    weight, hessian = random_problem(64, 256, 1000)
    errors = [
        solve(m, [weight], hessian, Pattern.n_of_m(2, 4))[0].error
        for m in ("sparsegpt", "wanda", "magnitude")
    ]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("pattern", [Pattern.n_of_m(2, 4), Pattern.unstructured(0.5)])
def test_scaling_the_hessian_changes_nothing(pattern):
    weight, hessian = random_problem(8, 200, 300)
    hessian[5], hessian[:, 5] = 0, 0
    (one,), (other,) = (solve("sparsegpt", [weight], hessian * c, pattern) for c in (1.0, 2.0**-20))
    assert torch.equal(one.weight, other.weight)
    assert one.relative_error == pytest.approx(other.relative_error)


@pytest.mark.parametrize("pattern", [Pattern.n_of_m(1, 4), Pattern.unstructured(0.25)])
@pytest.mark.parametrize("frac", [0.0, 0.01])
def test_dead_inputs_are_zeroed_and_disturb_nothing(pattern, frac):
    weight, hessian = random_problem(6, 128, 400)
    dead = torch.arange(0, 128, 4)  # one of each group, and as many as the pattern prunes
    hessian[dead], hessian[:, dead] = 0, 0
    (solution,) = solve("sparsegpt", [weight], hessian, pattern, dampening_frac=frac)
    assert solution.dead_inputs == 32
    assert not solution.weight[:, dead].any()
    assert not solution.mask[:, dead].any()
    alive = torch.ones(128, dtype=torch.bool).index_fill(0, dead, False)
    assert torch.equal(solution.weight[:, alive], weight[:, alive])
    assert solution.error == 0.0


def test_a_hessian_that_is_not_positive_definite_is_dampened_harder_and_the_solution_shows_it():
    hessian = torch.ones(64, 64)
    hessian.fill_diagonal_(
        1 - 3e-4
    )  # smallest eigenvalue -3e-4: 1e-4 of the diagonal is too little, 1e-3 is enough
    weight = gaussian(4, 64)
    (solution,) = solve("sparsegpt", [weight], hessian, Pattern.n_of_m(2, 4), dampening_frac=0.0)
    assert solution.retries == 2
    assert solution.dampening_used == pytest.approx(1e-3)
    (same,) = solve(
        "sparsegpt", [weight], hessian, Pattern.n_of_m(2, 4), dampening_frac=solution.dampening_used
    )
    assert torch.equal(same.weight, solution.weight)
    assert same.retries == 0


def test_indefinite_hessian_is_an_error_and_never_magnitude():
    hessian = torch.eye(16)
    hessian[0, 1] = hessian[1, 0] = 50.0
    with pytest.raises(
        RacError, match=r"q_proj, k_proj: the Hessian is not positive definite.*dampening_frac 1;"
    ):
        solve(
            "sparsegpt",
            [torch.ones(2, 16)] * 2,
            hessian,
            Pattern.n_of_m(2, 4),
            names=["q_proj", "k_proj"],
        )


def test_target_is_what_is_reconstructed():
    weight, hessian = random_problem(8, 64, 300)
    cross_moment = [gaussian(8, 64, seed=1)]
    args = (hessian, Pattern.n_of_m(2, 4))
    (solution,) = solve("sparsegpt", [weight.bfloat16()], *args, cross_moment=cross_moment)
    wanted = solution.target
    assert (wanted - weight).norm() > 0.1 * weight.norm()
    (plain,) = solve("sparsegpt", [wanted], *args)
    assert torch.equal(solution.weight, plain.weight.bfloat16())
    change = wanted - solution.weight.float()
    assert solution.error == pytest.approx(
        trace_error(change, hessian), abs=quadratic_tolerance(change, hessian)
    )


def test_inputs_are_left_alone():
    weight, hessian = random_problem(8, 64, 300)
    hessian[3], hessian[:, 3] = 0, 0
    parameter, before = torch.nn.Parameter(weight.clone()), hessian.clone()
    for method in ("sparsegpt", "wanda", "magnitude"):
        (solution,) = solve(method, [parameter], hessian, Pattern.n_of_m(2, 4))
        assert torch.equal(parameter, weight)
        assert torch.equal(hessian, before)
        assert not solution.weight.requires_grad
        assert broken_groups(solution.weight, Pattern.n_of_m(2, 4)) == 0


def problems_with_a_hessian_each(patterns: list[Pattern]) -> list[Problem]:
    """Two modules each; the second has a dead input, and the third needs more dampening than the others."""
    found = []
    for seed in range(4):
        weight, hessian = random_problem(20, 72, 200, seed, torch.float64)
        if seed == 1:
            hessian[5], hessian[:, 5] = 0.0, 0.0
        if seed == 2:
            hessian[0, 1] = hessian[1, 0] = (
                1.05 * (hessian[0, 0] * hessian[1, 1]).sqrt()
            )  # not positive definite
        names = [f"{seed}.gate", f"{seed}.up"]
        found.append(
            Problem(
                [weight[:12], weight[12:]],
                hessian,
                patterns,
                names,
                [0.01 * weight[:12], -0.02 * weight[12:]],
            )
        )
    return found


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize(
    "patterns",
    [
        [Pattern.n_of_m(2, 4)] * 2,
        [Pattern.n_of_m(1, 3)] * 2,
        [Pattern.unstructured(0.6)] * 2,
        [Pattern.unstructured(0.5), Pattern.unstructured(0.8)],
    ],
)
def test_problems_that_are_solved_at_once_get_what_they_would_get_alone(
    patterns, refit, monkeypatch
):
    problems, inner, calls = problems_with_a_hessian_each(patterns), sparsegpt.prune, []

    def counted(weight, *args):
        calls.append(weight.shape)
        return inner(weight, *args)

    monkeypatch.setattr(sparsegpt, "prune", counted)
    together = solve_many("sparsegpt", problems, block_size=40, refit=refit)
    assert calls == [(4, 72, 20)]
    retries = [found[0].retries for found in together]
    assert retries[2] > 0 == retries[0]
    for problem, found in zip(problems, together, strict=True):
        (alone,) = solve_many("sparsegpt", [problem], block_size=40, refit=refit)
        for one, other in zip(found, alone, strict=True):
            assert torch.equal(one.mask, other.mask)
            torch.testing.assert_close(one.weight, other.weight, rtol=1e-9, atol=1e-12)
            assert one.relative_error == pytest.approx(other.relative_error, rel=1e-6)
            assert (one.name, one.retries, one.dead_inputs) == (
                other.name,
                other.retries,
                other.dead_inputs,
            )
            assert one.dampening_used == other.dampening_used


def test_problems_of_other_shapes_or_patterns_are_solved_one_after_the_other():
    first, second, *_ = problems_with_a_hessian_each([Pattern.unstructured(0.5)] * 2)
    other = replace(second, patterns=[Pattern.unstructured(0.5), Pattern.unstructured(0.7)])
    found = solve_many("sparsegpt", [first, other])
    for problem, solved in zip((first, other), found, strict=True):
        (alone,) = solve_many("sparsegpt", [problem])
        assert all(torch.equal(a.weight, b.weight) for a, b in zip(alone, solved, strict=True))
    assert [round(float((s.weight == 0).double().mean()), 1) for s in found[1]] == [0.5, 0.7]


def test_as_many_small_problems_at_once_as_stay_in_caches():
    cpu = torch.device("cpu")
    assert sparsegpt.at_once(256, 512, cpu) == 16
    assert sparsegpt.at_once(768, 2048, cpu) == 1
    assert sparsegpt.at_once(1 << 16, 1 << 16, cpu) == 1
    assert sparsegpt.at_once(768, 2048, torch.device("cuda")) > 16
