import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rac_modifier.errors import RacError
from rac_modifier.pruning import Hessian


def direct(x: torch.Tensor, weights: torch.Tensor | None = None) -> torch.Tensor:
    x = x.double().reshape(-1, x.shape[-1])
    w = torch.ones(x.shape[0], dtype=torch.float64) if weights is None else weights.double().reshape(-1)
    return 2 / w.sum() * torch.einsum("ti,t,tj->ij", x, w, x)


@settings(max_examples=25, deadline=None)
@given(columns=st.integers(1, 300), tokens=st.integers(1, 60), batches=st.integers(1, 3), seed=st.integers(0, 99))
def test_equals_the_direct_sum(columns, tokens, batches, seed):
    torch.manual_seed(seed)
    x = torch.randn(batches, tokens, columns)
    hessian = Hessian(columns)
    for batch in x:
        hessian.add(batch)
    matrix = hessian.matrix()
    torch.testing.assert_close(matrix.double(), direct(x), rtol=1e-4, atol=1e-4)
    assert torch.equal(matrix, matrix.T)
    assert hessian.tokens == hessian.weight_sum == batches * tokens
    torch.testing.assert_close(hessian.sum_of_squares, x.square().sum((0, 1)), rtol=1e-4, atol=1e-4)


def test_weights_are_repeated_tokens():
    x, counts = torch.randn(50, 130), torch.randint(0, 4, (50,))
    weighted, repeated = Hessian(130), Hessian(130)
    weighted.add(x, counts.float())
    repeated.add(x.repeat_interleave(counts, dim=0))
    torch.testing.assert_close(weighted.matrix(), repeated.matrix(), rtol=1e-5, atol=1e-5)
    assert weighted.weight_sum == repeated.tokens == int(counts.sum())
    assert weighted.tokens == int((counts > 0).sum())


@pytest.mark.parametrize("padding", [0.0, 7.0, math.nan, math.inf])
def test_padding_never_matters(padding):
    x = torch.randn(2, 9, 70)
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
    x = torch.randn(40, 96).to(dtype) * 100  # squares beyond float16
    hessian = Hessian(96)
    hessian.add(x)
    torch.testing.assert_close(hessian.matrix().double(), direct(x), rtol=1e-5, atol=1e-2)


def test_float64_accumulation_on_request():
    x = torch.randn(30, 65)
    hessian = Hessian(65, dtype=torch.float64)
    hessian.add(x, torch.rand(30).double())
    assert hessian.matrix().dtype == torch.float64


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_activations_name_the_module(bad):
    x = torch.randn(5, 70)
    x[3, 69] = bad
    hessian = Hessian(70)
    hessian.add(x)
    with pytest.raises(RacError, match=r"mlp\.down_proj: activations of 1 of 70 inputs"):
        hessian.matrix("mlp.down_proj")


def test_no_token_is_an_error():
    hessian = Hessian(8)
    hessian.add(torch.randn(3, 8), torch.zeros(3))
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
    hessian = Hessian(8)
    with pytest.raises(RacError):
        hessian.add(x, weights)
    assert hessian.tokens == 0
    assert not hessian.sum_of_squares.any()


def test_matrix_leaves_the_sum_alone():
    hessian = Hessian(70)
    hessian.add(torch.randn(5, 70))
    first = hessian.matrix()
    first.zero_()
    assert hessian.matrix().any()
