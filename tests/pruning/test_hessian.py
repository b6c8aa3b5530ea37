import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rac_modifier.errors import RacError
from rac_modifier.pruning import Hessian, Pattern, Statistics, linalg, solve
from rac_modifier.pruning import hessian as of_inputs
from tests.pruning.pruning_reference import assert_near, gaussian


def direct(x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    x = x.double().reshape(-1, x.shape[-1])
    w = (
        torch.ones(x.shape[0], dtype=torch.float64)
        if weights is None
        else weights.double().reshape(-1)
    )
    return 2 / w.sum() * torch.einsum("ti,t,tj->ij", x, w, x)


def assert_is_the_sum(
    matrix: torch.Tensor, x: torch.Tensor, weights: torch.Tensor | None = None
) -> None:
    """Within what float32 sums of as many terms may be off, entry by entry."""
    terms = x.numel() // x.shape[-1] + 4
    bound = terms * torch.finfo(torch.float32).eps * direct(x.abs(), weights)
    assert ((matrix.double() - direct(x, weights)).abs() <= bound).all()


@settings(max_examples=25, deadline=None)
@given(
    columns=st.integers(1, 300),
    tokens=st.integers(1, 60),
    batches=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_equals_the_direct_sum(columns, tokens, batches, seed):
    x = gaussian(batches, tokens, columns, seed=seed)
    hessian = Hessian(columns)
    for batch in x:
        hessian.add(batch)
    matrix = hessian.matrix()
    assert_is_the_sum(matrix, x)
    assert torch.equal(matrix, matrix.T)
    assert hessian.tokens == hessian.weight_sum == batches * tokens


def test_weights_are_repeated_tokens():
    x, counts = gaussian(50, 130), torch.arange(50) % 4
    weighted, repeated = Hessian(130), Hessian(130)
    weighted.add(x, counts.float())
    repeated.add(x.repeat_interleave(counts, dim=0))
    assert_is_the_sum(weighted.matrix(), x.repeat_interleave(counts, dim=0))
    assert_is_the_sum(repeated.matrix(), x.repeat_interleave(counts, dim=0))
    assert weighted.weight_sum == repeated.tokens == int(counts.sum())
    assert weighted.tokens == int((counts > 0).sum())


@pytest.mark.parametrize("padding", [0.0, 7.0, math.nan, math.inf])
def test_padding_never_matters(padding):
    x = gaussian(2, 9, 70)
    mask = torch.ones(2, 9)
    mask[1, 5:] = 0
    padded = x.clone()
    padded[1, 5:] = padding
    with_padding, without = Hessian(70), Hessian(70)
    with_padding.add(padded, mask)
    without.add(torch.cat([x[0], x[1, :5]]))
    assert torch.equal(with_padding.matrix(), without.matrix())
    assert with_padding.tokens == 14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_widened_first(dtype):
    x = gaussian(40, 96).to(dtype) * 1000  # squares beyond float16
    hessian = Hessian(96)
    hessian.add(x)
    assert_is_the_sum(hessian.matrix(), x)


def test_float64_accumulation_on_request():
    x, weights = gaussian(30, 65), gaussian(30, seed=1).abs().double()
    hessian = Hessian(65, dtype=torch.float64)
    hessian.add(x, weights)
    assert hessian.matrix().dtype == torch.float64
    assert_near(hessian.matrix(), direct(x, weights), 30 * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_activations_name_the_module(bad):
    x = gaussian(5, 70)
    x[3, 69] = bad
    hessian = Hessian(70)
    hessian.add(x)
    with pytest.raises(RacError, match=r"mlp\.down_proj: activations of 1 of 70 inputs"):
        hessian.matrix("mlp.down_proj")


def test_no_token_is_an_error():
    hessian = Hessian(8)
    hessian.add(gaussian(3, 8), torch.zeros(3))
    with pytest.raises(RacError, match=r"experts\.7: no calibration token"):
        hessian.matrix("experts.7")


@pytest.mark.parametrize(
    ("x", "weights"),
    [
        (torch.ones(3, 7), None),
        (torch.ones(3, 8), torch.ones(2)),
        (torch.ones(3, 8), torch.tensor([1.0, -1.0, 1.0])),
        (torch.ones(3, 8), torch.tensor([1.0, math.nan, 1.0])),
    ],
)
def test_refuses_bad_batches(x, weights):
    hessian, fresh = Hessian(8), Hessian(8)
    with pytest.raises(RacError):
        hessian.add(x, weights)
    assert hessian.tokens == 0
    for one in (hessian, fresh):  # nothing of the bad batch is left
        one.add(torch.eye(8))
    assert torch.equal(hessian.matrix(), fresh.matrix())


def test_matrix_leaves_the_sum_alone():
    hessian = Hessian(70)
    hessian.add(gaussian(5, 70))
    first = hessian.matrix()
    first.zero_()
    assert hessian.matrix().any()


@pytest.mark.parametrize(
    "rows", [(3,), (2, 4), (40, 8)]
)  # summed after W where few rows leave, before it elsewhere
def test_the_cross_moment_correlates_the_output_error_with_the_input(rows):
    weights = [gaussian(r, 16, seed=i) for i, r in enumerate(rows)]
    statistics = Statistics(16, "cpu", weights)
    batches = [
        (
            gaussian(2, 5, 16, seed=10 + i),
            gaussian(2, 5, 16, seed=20 + i),
            gaussian(2, 5, seed=30 + i).abs(),
        )
        for i in range(3)
    ]
    batches[1][2][0, 3:] = 0.0
    batches[1][0][0, 3:] = float("nan")  # padding may hold anything
    for x, dense, w in batches:
        statistics.add(x, w, dense)
    total = sum(float(w.double().sum()) for *_, w in batches)
    for weight, ours in zip(weights, statistics.cross_moment(), strict=True):
        expected, bound = (torch.zeros(weight.shape, dtype=torch.float64) for _ in range(2))
        for x, dense, w in batches:
            kept = w > 0
            x, dense, w = x[kept].double(), dense[kept].double(), w[kept].double()
            expected += weight.double() @ ((dense - x) * w.unsqueeze(1)).T @ x
            bound += weight.double().abs() @ ((dense.abs() + x.abs()) * w.unsqueeze(1)).T @ x.abs()
        terms = 30 + 16  # tokens and inputs
        assert (
            (ours - expected * 2 / total).abs()
            <= terms * torch.finfo(torch.float32).eps * bound * 2 / total
        ).all()


def test_without_the_weights_there_is_no_cross_moment():
    statistics = Statistics(4, "cpu")
    statistics.add(gaussian(1, 3, 4), torch.ones(1, 3))
    assert statistics.cross_moment() is None
    assert statistics.hessian.tokens == 3


@pytest.mark.parametrize("rows", [(64,), (600, 20)])
def test_bfloat16_products_change_the_cross_moment_less_than_other_tokens_would(rows, monkeypatch):
    x = gaussian(2, 2000, 128)
    dense = x + 0.1 * gaussian(2, 2000, 128, seed=1)
    weights = [gaussian(r, 128, seed=2 + i) for i, r in enumerate(rows)]

    def moment(part: slice) -> torch.Tensor:
        statistics = Statistics(128, x.device, weights)
        statistics.add(x[part], torch.ones(x[part].shape[:2]), dense[part])
        return torch.cat(statistics.cross_moment())

    exact, half = moment(slice(None)), moment(slice(1))
    monkeypatch.setattr(linalg, "bf16_is_fast", lambda device: True)
    rounded = moment(slice(None))
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).norm() < 0.01 * (half - exact).norm()


@pytest.mark.parametrize("weighted", [False, True])
def test_where_onednn_multiplies_it_is_given_few_numbers_of_tokens(weighted, monkeypatch):
    """Zeros are added up to one of a few sizes; the sums stay those of the tokens."""
    sizes = set()
    inner = of_inputs.add_matmul_

    def spy(out, a, b):
        sizes.add(a.shape[1])
        inner(out, a, b)

    monkeypatch.setattr(of_inputs, "onednn_is_faster", lambda device: True)
    monkeypatch.setattr(of_inputs, "add_matmul_", spy)
    for tokens in (500, 505, 511, 513, 530):
        x, w = gaussian(tokens, 70), torch.rand(tokens) if weighted else torch.ones(tokens)
        found = Hessian(70)
        found.add(x, w)
        torch.testing.assert_close(
            found.matrix(), 2 / w.sum() * (x * w.unsqueeze(1)).T @ x, rtol=1e-4, atol=1e-4
        )
    assert sizes == {512, 576}


@pytest.mark.parametrize("rows", [30, 200])
def test_so_are_bfloat16_products_of_the_cross_moment(rows, monkeypatch):
    seen = []
    inner = linalg.bf16_addmm
    monkeypatch.setattr(linalg, "bf16_is_fast", lambda device: True)
    monkeypatch.setattr(
        linalg,
        "bf16_addmm",
        lambda out, a, b, *, bf16: (seen.append(a.shape[1]), inner(out, a, b, bf16=bf16))[1],
    )
    x, dense, weight = gaussian(500, 70), gaussian(500, 70, seed=1), gaussian(rows, 70, seed=2)
    found = Statistics(70, "cpu", [weight])
    found.add(x, torch.ones(500), dense)
    (moment,) = found.cross_moment()
    expected = 2 / 500 * (weight @ (dense - x).T) @ x
    assert (moment - expected).norm() < 0.02 * expected.norm()
    assert seen == [512]


def test_a_massive_token_counts_as_a_hundred_medians():
    """Its weight is 100 median / ||x||^2, in Hessian and cross moment; padding is not looked at."""
    x, dense, weight = gaussian(2, 20, 8), gaussian(2, 20, 8, seed=1), gaussian(5, 8, seed=2)
    x[0, 0] *= 1000
    w = gaussian(2, 20, seed=3).abs() + 0.1
    w[1, 15:] = 0.0
    x[1, 15:] = float("nan")
    statistics = Statistics(8, "cpu", [weight])
    statistics.add(x, w, dense)
    squares = [float(row.double() @ row.double()) for row in x[w > 0]]
    limit = 100 * sorted(squares)[(len(squares) - 1) // 2]
    capped = w.clone()
    capped[0, 0] *= limit / squares[0]
    assert squares[0] > 100 * limit
    assert statistics.capped == 1
    plain = Hessian(8)
    plain.add(x, capped)
    assert_near(statistics.hessian.matrix().double(), plain.matrix().double(), 1e-5)
    kept = capped > 0
    a, b, share = x[kept].double(), dense[kept].double(), capped[kept].double()
    expected = 2 / share.sum() * weight.double() @ ((b - a) * share[:, None]).T @ a
    assert_near(statistics.cross_moment()[0].double(), expected, 1e-5)


def test_the_cap_keeps_the_error_of_ordinary_tokens_small():
    """One token of 10^6 times the square owns the Hessian: the solution then fits it alone."""
    x, weight = gaussian(1, 400, 32), gaussian(16, 32, seed=1)
    mixed = x @ gaussian(32, 32, seed=2)
    mixed[0, 0] = 3000 * torch.nn.functional.one_hot(torch.tensor(3), 32)
    errors = []
    for of_target in ([weight], None):
        statistics = Statistics(32, "cpu", of_target)
        statistics.add(mixed, torch.ones(1, 400), mixed)
        hessian = statistics.hessian.matrix()
        (solution,) = solve("alps", [weight], hessian, Pattern(sparsity=0.5))
        change = (solution.weight - weight).double() @ mixed[0, 1:].double().T
        errors.append(float(change.square().sum()))
    assert errors[0] < 0.7 * errors[1]


def test_without_weights_of_modules_no_token_is_capped():
    statistics = Statistics(4, "cpu")
    x = gaussian(1, 30, 4)
    x[0, 0] *= 1000
    statistics.add(x, torch.ones(1, 30))
    assert statistics.capped == 0
    assert statistics.hessian.weight_sum == 30
