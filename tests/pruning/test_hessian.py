import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rac_modifier.errors import RacError
from rac_modifier.pruning import hessian as module
from rac_modifier.pruning import linalg
from rac_modifier.pruning.hessian import Hessian, Statistics
from tests.pruning.pruning_reference import assert_near, gaussian

EPS = torch.finfo(torch.float32).eps


def direct(x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    x = x.double().reshape(-1, x.shape[-1])
    w = torch.ones(len(x)) if weights is None else weights.reshape(-1)
    return 2 / w.double().sum() * torch.einsum("ti,t,tj->ij", x, w.double(), x)


def assert_is_the_sum(matrix, x, weights=None):
    """Within the rounding of a float32 sum of as many terms, entry by entry."""
    bound = (x.numel() // x.shape[-1] + 4) * EPS * direct(x.abs(), weights)
    assert ((matrix.double() - direct(x, weights)).abs() <= bound).all()


def accumulated(x: torch.Tensor, weights: torch.Tensor | None = None) -> Hessian:
    hessian = Hessian(x.shape[-1])
    hessian.add(x, weights)
    return hessian


@settings(max_examples=25, deadline=None)
@given(
    columns=st.integers(1, 300),
    tokens=st.integers(1, 60),
    batches=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_equals_the_direct_sum(columns, tokens, batches, seed):
    x, hessian = gaussian(batches, tokens, columns, seed=seed), Hessian(columns)
    for batch in x:
        hessian.add(batch)
    matrix = hessian.take()
    assert_is_the_sum(matrix, x)
    assert torch.equal(matrix, matrix.T)
    assert hessian.tokens == hessian.weight_sum == batches * tokens


def test_the_tokens_of_all_shards_are_counted():
    hessian = Hessian(3)
    for tokens in (2, 5):
        hessian.add(gaussian(tokens, 3), torch.full((tokens,), 0.5))
        hessian.end_shard()
    hessian.finish()
    assert (hessian.tokens, hessian.weight_sum) == (7, 3.5)


@pytest.mark.parametrize("rows", [16, 4096])
def test_weights_are_repeated_tokens(rows, monkeypatch):
    monkeypatch.setattr(module, "ROWS", rows)
    x, counts = gaussian(50, 130), torch.arange(50) % 4
    weighted = accumulated(x, counts.float())
    repeated = x.repeat_interleave(counts, dim=0)
    assert_is_the_sum(weighted.take(), repeated)
    assert_is_the_sum(accumulated(repeated).take(), repeated)
    assert weighted.weight_sum == len(repeated)
    assert weighted.tokens == int((counts > 0).sum())


@pytest.mark.parametrize("padding", [7.0, math.nan, math.inf])
def test_padding_never_matters(padding):
    x, mask = gaussian(2, 9, 70), torch.ones(2, 9)
    mask[1, 5:] = 0
    padded = x.clone()
    padded[1, 5:] = padding
    with_padding = accumulated(padded, mask)
    without = accumulated(torch.cat([x[0], x[1, :5]]))
    assert torch.equal(with_padding.take(), without.take())
    assert with_padding.tokens == 14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_widened_first(dtype):
    x = gaussian(40, 96).to(dtype) * 1000  # squares beyond float16
    assert_is_the_sum(accumulated(x).take(), x)


def test_no_token_is_an_error():
    with pytest.raises(RacError, match=r"experts\.7: no calibration token"):
        accumulated(gaussian(3, 8), torch.zeros(3)).take("experts.7")


@pytest.mark.parametrize(
    ("x", "weights", "says"),
    [
        (torch.ones(3, 7), None, r"activations \[3, 7\] and one each: a Hessian of 8"),
        (torch.ones(3, 8), torch.ones(2), r"activations \[3, 8\] and 2 token weights"),
    ],
)
def test_refuses_bad_batches_and_keeps_nothing_of_them(x, weights, says):
    hessian = accumulated(torch.eye(8))
    with pytest.raises(RacError, match=says):
        hessian.add(x, weights)
    assert torch.equal(hessian.take(), accumulated(torch.eye(8)).take())


# summed after W where few rows leave, before W elsewhere
@pytest.mark.parametrize("rows", [(3,), (2, 4), (40, 8)])
def test_the_cross_moment_correlates_the_output_error_with_the_input(rows):
    weights = [gaussian(r, 16, seed=i) for i, r in enumerate(rows)]
    statistics = Statistics(16, "cpu", weights)
    x, dense = (gaussian(3, 2, 5, 16, seed=seed) for seed in (10, 20))
    w = gaussian(3, 2, 5, seed=30).abs()
    w[1, 0, 3:] = 0.0
    x[1, 0, 3:] = math.nan  # padding may hold anything
    for batch in zip(x, w, dense, strict=True):
        statistics.add(*batch)
    kept = w > 0
    x, dense, w = x[kept].double(), dense[kept].double(), w[kept].double()
    for weight, ours in zip(weights, statistics.take_cross_moment(), strict=True):
        scaled = (2 / w.sum() * w).unsqueeze(1)
        expected = weight.double() @ ((dense - x) * scaled).T @ x
        bound = weight.double().abs() @ ((dense.abs() + x.abs()) * scaled).T @ x.abs()
        terms = 30 + 16  # tokens and inputs
        assert ((ours - expected).abs() <= terms * EPS * bound).all()


@pytest.mark.parametrize("rows", [(64,), (600, 20)])
def test_bfloat16_matmuls_change_the_cross_moment_less_than_other_tokens_would(rows, monkeypatch):
    x = gaussian(2, 2000, 128)
    dense = x + 0.1 * gaussian(2, 2000, 128, seed=1)
    weights = [gaussian(r, 128, seed=2 + i) for i, r in enumerate(rows)]

    def moment(part: slice) -> torch.Tensor:
        statistics = Statistics(128, "cpu", weights)
        statistics.add(x[part], torch.ones(x[part].shape[:2]), dense[part])
        return torch.cat(statistics.take_cross_moment())

    exact, half = moment(slice(None)), moment(slice(1))
    monkeypatch.setattr(linalg, "bf16_is_fast", lambda device: True)
    rounded = moment(slice(None))
    assert not torch.equal(rounded, exact)
    assert (rounded - exact).norm() < 0.01 * (half - exact).norm()


@pytest.mark.parametrize("weighted", [False, True])
def test_where_onednn_multiplies_it_gets_few_numbers_of_tokens(weighted, monkeypatch):
    """Zeros are added up to one of a few sizes; the sums stay those of the tokens."""
    sizes, inner = set(), module.add_matmul_

    def noted(out, a, b):
        sizes.add(a.shape[1])
        inner(out, a, b)

    monkeypatch.setattr(module, "onednn_is_faster", lambda device: True)
    monkeypatch.setattr(module, "add_matmul_", noted)
    for tokens in (500, 505, 511, 513, 530):
        x, w = gaussian(tokens, 70), torch.rand(tokens) if weighted else torch.ones(tokens)
        assert_is_the_sum(accumulated(x, w).take(), x, w)
    assert sizes == {512, 576}


def test_a_massive_token_counts_as_a_hundred_medians():
    """Its weight is 100 median / ||x||^2, in Hessian and cross moment; padding is not looked at."""
    x, dense, weight = gaussian(2, 20, 8), gaussian(2, 20, 8, seed=1), gaussian(5, 8, seed=2)
    x[0, 0] *= 1000
    w = gaussian(2, 20, seed=3).abs() + 0.1
    w[1, 15:] = 0.0
    x[1, 15:] = math.nan
    statistics = Statistics(8, "cpu", [weight])
    statistics.add(x, w, dense)
    squares = [float(row.double() @ row.double()) for row in x[w > 0]]
    limit = 100 * sorted(squares)[(len(squares) - 1) // 2]
    capped = w.clone()
    capped[0, 0] *= limit / squares[0]
    assert squares[0] > 100 * limit
    assert statistics.capped == 1
    plain = accumulated(x, capped).take()
    assert_near(statistics.hessian.take().double(), plain.double(), 1e-5)
    kept = capped > 0
    a, b, share = x[kept].double(), dense[kept].double(), capped[kept].double()
    expected = 2 / share.sum() * weight.double() @ ((b - a) * share[:, None]).T @ a
    assert_near(statistics.take_cross_moment()[0].double(), expected, 1e-5)
    uncapped = Statistics(8, "cpu")
    uncapped.add(x, w)
    assert uncapped.capped == 0
    assert torch.equal(uncapped.hessian.take(), accumulated(x, w).take())
    assert uncapped.take_cross_moment() is None


def test_no_weight_is_capped_by_a_median_of_zero_or_for_an_input_that_is_not_finite():
    """A weight of 0 would hide an input that is not finite, which `Hessian.take` refuses."""
    zeros, overflown = torch.zeros(5, 4), gaussian(5, 4)
    zeros[0], overflown[2, 1] = 3.0, torch.inf
    for x in (zeros, overflown):
        weights, capped = module._cap_weights(torch.ones(5), x)
        assert weights.tolist() == [1.0] * 5
        assert capped == 0
