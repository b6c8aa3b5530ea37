"""Dampening, the factor, products in bfloat16 (which any CPU computes and some compute faster) and quadratic forms."""

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.pruning import Pattern, linalg, solve
from rac_modifier.pruning.linalg import (
    Dampening,
    bf16_addmm,
    factorise,
    quadratic_form,
    raise_until_it_works,
    stacked,
)
from rac_modifier.pruning.masks import holds
from tests.pruning.pruning_reference import (
    assert_near,
    correlated_problem,
    dampened,
    gaussian,
    quadratic_tolerance,
    random_problem,
    solve_tolerance,
    trace_error,
)

choose = linalg.bf16_is_fast  # before a fixture replaces it


def test_dampening_is_a_share_of_the_mean_and_dead_inputs_get_the_mean_on_top():
    _, hessian = random_problem(1, 6, 50, dtype=torch.float64)
    hessian[2], hessian[:, 2] = 0, 0
    dampening = Dampening.of(hessian, 0.1, retries=3)
    torch.testing.assert_close(dampening.diagonal, dampened(hessian, 0.1).diagonal())
    torch.testing.assert_close(dampening.added, dampening.diagonal - hessian.diagonal())
    torch.testing.assert_close(dampening.uniform, 0.1 * hessian.diagonal().mean())
    assert (dampening.frac, dampening.retries) == (0.1, 3)


@pytest.mark.parametrize(
    ("start", "needed", "tried"),
    [
        (0.0, 0.0, [0.0]),
        (0.0, 2e-4, [0.0, 1e-4, 1e-3]),
        (0.01, 0.5, [0.01, 0.1, 1.0]),
        (0.3, 0.2, [0.3]),
    ],
)
def test_dampening_is_raised_tenfold_until_it_is_enough(start, needed, tried):
    seen = []

    def attempt(dampening):
        seen.append(dampening.frac)
        return "done" if dampening.frac >= needed else None

    hessian = torch.eye(3)
    result, dampening = raise_until_it_works(
        attempt, hessian, Dampening.of(hessian, start, retries=1), "x"
    )
    assert result == "done"
    assert seen == pytest.approx(tried)
    assert (dampening.frac, dampening.retries) == (seen[-1], len(tried))


def test_dampening_beyond_the_mean_of_the_diagonal_is_an_error():
    hessian = torch.eye(3)
    with pytest.raises(
        RacError,
        match=r"q_proj: the Hessian is not positive definite, even with dampening_frac 0\.3;",
    ):
        raise_until_it_works(lambda dampening: None, hessian, Dampening.of(hessian, 0.3), "q_proj")


@pytest.mark.parametrize("d", [1, 5, 70])
def test_the_factor_gives_the_damped_hessian_its_inverse_and_its_blocks(d):
    weight, hessian = random_problem(3, d, 100, dtype=torch.float64)
    damped = dampened(hessian, 0.01)
    factor = factorise(hessian, Dampening.of(hessian, 0.01), "x")
    u = factor.reversed_lower.flip(0, 1)
    assert torch.equal(u, u.triu())
    assert factor.order is None
    tolerance = solve_tolerance(damped, torch.float64)
    assert_near(u @ u.T, damped, tolerance)
    assert_near(factor.solve(weight), weight @ torch.linalg.inv(damped), tolerance)
    start, stop = d // 3, d // 3 + (d + 1) // 2
    block, inverse = factor.block(start, stop)
    assert torch.equal(block, u[start:stop, start:stop])
    assert_near(inverse, torch.linalg.inv(u)[start:stop, start:stop], tolerance)


def test_a_factor_in_the_order_of_the_largest_second_moments_gives_the_same_inverse():
    weight, hessian = random_problem(3, 30, 100, dtype=torch.float64)
    hessian[:, 7] = hessian[7] = 0.0  # an input that is 0 on every token: the mean is added to it
    damped = dampened(hessian, 0.01)
    factor = factorise(hessian, Dampening.of(hessian, 0.01), "x", largest_first=True)
    order = sorted(range(30), key=lambda j: -float(damped[j, j]))
    assert factor.order.tolist() == order
    u, tolerance = factor.reversed_lower.flip(0, 1), solve_tolerance(damped, torch.float64)
    assert_near(u @ u.T, damped[order][:, order], tolerance)
    assert_near(factor.solve(weight), weight @ torch.linalg.inv(damped), tolerance)


def test_a_product_is_added_as_it_is_or_rounded_to_bfloat16():
    out, a, b = gaussian(5, 7), gaussian(5, 30, seed=1), gaussian(30, 7, seed=2)
    terms = 30 * torch.finfo(torch.float32).eps
    exact = bf16_addmm(out.clone(), a, b, bf16=False)
    assert_near(exact, out.double() + a.double() @ b.double(), terms)
    rounded = bf16_addmm(out.clone(), a, b, bf16=True)
    assert rounded.dtype == torch.float32
    apart = (rounded - exact).norm() / exact.norm()
    assert 1e-4 < apart < 2 * torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize(
    "pattern", [Pattern.n_of_m(2, 4), Pattern.unstructured(0.5), Pattern.unstructured(0.8)]
)
@pytest.mark.parametrize(("method", "refit"), [("alps", False), ("sparsegpt", True)])
@pytest.mark.parametrize("scales", [0.0, 2.0])
def test_bfloat16_products_hardly_change_the_error(pattern, method, refit, scales, monkeypatch):
    weight, hessian = correlated_problem(200, 256, 1000)
    outliers = gaussian(256, seed=2).mul(scales).exp()
    hessian = hessian * outliers * outliers[:, None]  # inputs of very different sizes
    (exact,) = solve(method, [weight], hessian, pattern, refit=refit)
    monkeypatch.setattr(linalg, "bf16_is_fast", lambda device: True)
    (ours,) = solve(method, [weight], hessian, pattern, refit=refit)
    assert not torch.equal(ours.weight, exact.weight)
    # 2.1 % where inputs differ most, because the refit takes one step
    assert ours.error == pytest.approx(exact.error, rel=0.025)
    change = weight - ours.weight
    assert ours.error == pytest.approx(
        trace_error(change, hessian), abs=quadratic_tolerance(change, hessian)
    )
    assert int((~ours.mask).sum()) == weight.numel() * pattern.sparsity // 1
    assert holds(ours.weight, pattern)


def test_bfloat16_is_chosen_by_device(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True})
    assert choose(torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    assert choose(torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    assert not choose(torch.device("cpu"))
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in torch 2.10
    assert not choose(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert choose(torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert not choose(torch.device("cuda", 0))
    assert not choose(torch.device("meta"))


def test_torch_still_has_the_entry_for_bfloat16_units():
    assert (
        "avx512_bf16" in torch.cpu.get_capabilities()
        or torch.cpu.get_capabilities()["architecture"] != "x86_64"
    )


@pytest.mark.parametrize("d", [1, 127, 128, 600])
def test_quadratic_form(d, monkeypatch):
    """In several blocks, of sums and of vectors too."""
    for name, size in (("BLOCK", 128), ("_SUMMED", 200), ("VECTORS", 2)):
        monkeypatch.setattr(linalg, name, size)
    x, v = gaussian(50, d), gaussian(d, 5, seed=1)
    hessian = x.T @ x
    for column, value in enumerate(quadratic_form(v, hessian)):
        change = v[:, column : column + 1].T
        expected, tolerance = trace_error(change, hessian), quadratic_tolerance(change, hessian)
        assert float(value) == pytest.approx(expected, abs=tolerance)
        assert tolerance < 1e-2 * expected


def test_quadratic_form_by_products_in_bfloat16(monkeypatch):
    """From two blocks of inputs on, with the same sum but for rounding."""
    monkeypatch.setattr(linalg, "BLOCK", 128)
    for d, same in ((200, True), (600, False)):
        x, v = gaussian(50, d), gaussian(d, 40, seed=1)
        exact, rounded = (quadratic_form(v, x.T @ x, bf16=bf16) for bf16 in (False, True))
        assert torch.equal(exact, rounded) == same
        assert float(rounded.sum()) == pytest.approx(float(exact.sum()), rel=1e-3)
        assert float((rounded / exact - 1).abs().max()) < 1e-2


def test_weights_are_stacked_side_by_side_and_transposed():
    weights = [gaussian(2, 3).bfloat16(), gaussian(1, 3, seed=1)]
    result = stacked(weights, torch.eye(3))
    assert result.is_contiguous()
    assert torch.equal(result, torch.cat([weights[0].float(), weights[1]]).T)


@pytest.mark.parametrize("shape", [(3, 5), (600, 300)])
@pytest.mark.parametrize("by_columns", [False, True])
def test_a_matrix_is_rounded_in_its_own_memory(shape, by_columns):
    matrix = torch.randn(shape)
    matrix = matrix.mT if by_columns else matrix
    expected, memory = matrix.bfloat16(), matrix.untyped_storage().data_ptr()
    found = linalg.rounded_to_bf16_(matrix)
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()
    assert found.untyped_storage().data_ptr() == memory
