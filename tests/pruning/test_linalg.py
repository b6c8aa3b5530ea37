"""Dampening, the factor, which devices take bfloat16, and quadratic forms."""

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.pruning import linalg
from rac_modifier.pruning.linalg import Dampening, Factor, quadratic_form
from tests.pruning.pruning_reference import (
    assert_near,
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
        (0.3, 2.0, None),
    ],
)
def test_dampening_is_raised_tenfold_up_to_the_mean_of_the_diagonal(start, needed, tried):
    seen, hessian = [], torch.eye(3)

    def attempt(dampening):
        seen.append(dampening.frac)
        return "result" if dampening.frac >= needed else None

    first = Dampening.of(hessian, start, retries=1)
    if tried is None:
        with pytest.raises(RacError, match=r"q_proj: .*, even with dampening_frac 0\.3;"):
            first.raise_until(attempt, hessian, "q_proj")
        return
    result, dampening = first.raise_until(attempt, hessian, "q_proj")
    assert result == "result"
    assert seen == pytest.approx(tried)
    assert (dampening.frac, dampening.retries) == (seen[-1], len(tried))


@pytest.mark.parametrize("largest_first", [False, True])
@pytest.mark.parametrize("d", [1, 5, 70])
def test_the_factor_gives_the_damped_hessian_its_inverse_and_its_blocks(d, largest_first):
    weight, hessian = random_problem(3, d, 100, dtype=torch.float64)
    if d > 1:  # an input that is 0 on every token: the mean is added to it
        hessian[d // 2], hessian[:, d // 2] = 0.0, 0.0
    damped = dampened(hessian, 0.01)
    factor = Factor.of(hessian, Dampening.of(hessian, 0.01), "x", largest_first=largest_first)
    order = list(range(d))
    if largest_first:
        order.sort(key=lambda j: -float(damped[j, j]))
        assert factor.order.tolist() == order
    u, tolerance = factor.reversed_lower.flip(0, 1), solve_tolerance(damped, torch.float64)
    assert torch.equal(u, u.triu())
    assert_near(u @ u.T, damped[order][:, order], tolerance)
    assert_near(factor.solve(weight), weight @ torch.linalg.inv(damped), tolerance)
    start, stop = d // 3, d // 3 + (d + 1) // 2
    block, inverse = Factor.diagonal_blocks(factor.reversed_lower, start, stop)
    assert torch.equal(block, u[start:stop, start:stop])
    assert_near(inverse, torch.linalg.inv(u)[start:stop, start:stop], tolerance)


def test_bfloat16_is_chosen_by_device(monkeypatch):
    for capabilities, fast in (({"avx512_bf16": 1}, 1), ({"amx_bf16": 1}, 1), ({"avx2": 1}, 0)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda c=capabilities: c)
        assert choose(torch.device("cpu")) == bool(fast)
    monkeypatch.delattr(torch.cpu, "get_capabilities")  # as in torch 2.10
    assert not choose(torch.device("cpu"))
    for capability in ((8, 0), (7, 5)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert choose(torch.device("cuda", 0)) == (capability[0] == 8)
    assert not choose(torch.device("meta"))


@pytest.mark.parametrize(("device", "rows"), [("cpu", 9), ("meta", 99)])
def test_slices_are_whole_groups_that_stay_in_the_caches(device, rows, monkeypatch):
    for name, size in (("CACHED_ON_CPU", 100), ("_CACHED_ON_GPU", 1000)):
        monkeypatch.setattr(linalg, name, size)
    matrix = torch.empty(205, 10, device=device)
    expected = [slice(start, min(start + rows, 205)) for start in range(0, 205, rows)]
    assert linalg.cached_slices(matrix, group=3) == expected
    assert linalg.cached_slices(matrix.view(10, 205), group=5) == [slice(0, 5), slice(5, 10)]


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


def test_quadratic_form_by_matmuls_in_bfloat16(monkeypatch):
    """From two blocks of inputs on, with the same sum but for rounding."""
    monkeypatch.setattr(linalg, "BLOCK", 128)
    for d, same in ((255, True), (256, False), (600, False)):
        x, v = gaussian(50, d), gaussian(d, 40, seed=1)
        exact, rounded = (quadratic_form(v, x.T @ x, bf16=bf16) for bf16 in (False, True))
        assert torch.equal(exact, rounded) == same
        assert float((rounded / exact - 1).abs().max()) < 1e-2
