"""The operators compared with float64 on every instruction set, in C++ and in Python."""

import importlib
import math
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu import library, operator, pack_scale
from rac_modifier.kernels.cpu.support import cpp_operator, library_and_isa
from tests.kernels.cpu.kernel_helpers import (
    assert_product,
    integers,
    multiply,
    pack_dense,
    quantize_groups,
    quantize_rows,
    random_mask,
    sparse,
    take,
    threads,
)

DTYPES = [torch.bfloat16, torch.float32]


@pytest.mark.parametrize(
    ("m", "rows", "columns", "weights"),
    [(1, 33, 257, torch.float32), (11, 150, 1111, torch.float32), (401, 275, 540, torch.bfloat16)],
)
def test_more_of_each_than_a_block_of_the_cache(
    float_kernel, monkeypatch, m, rows, columns, weights
):
    """More tokens than AMX and AVX512 use at a time, more panels than are expanded together."""
    monkeypatch.setattr(operator, "_most_tokens", lambda *arguments: math.inf)
    mask = random_mask(rows, columns, 0.5)
    mask[3], mask[4], mask[16:32] = False, True, False  # empty and full rows
    dense, weight = sparse(mask, weights)
    x, bias = torch.randn(m, columns).to(weights), torch.randn(rows)
    y = multiply(x, weight, bias)
    assert_product(y, x, dense, bias)
    with threads(3):
        assert torch.equal(multiply(x, weight, bias), y)


@pytest.mark.parametrize("weights", DTYPES, ids=str)
def test_expanded_panels(float_kernel, weights, monkeypatch):
    """The path of many tokens, in several chunks with a tail."""
    monkeypatch.setattr(operator, "_most_tokens", lambda *arguments: 0)
    monkeypatch.setattr(operator, "SCRATCH_BYTES", 2 * 16 * 70 * 4)
    dense, weight = sparse(random_mask(90, 70, 0.5), weights)
    for dtype in DTYPES:
        x, bias = torch.randn(130, 70).to(dtype), torch.randn(90).bfloat16()
        assert_product(multiply(x, weight), x, dense)
        assert_product(multiply(x, weight, bias), x, dense, bias)


def test_the_buffer_of_panels_serves_calls_in_inference_mode_and_outside(best, monkeypatch):
    monkeypatch.setattr(operator, "_most_tokens", lambda *arguments: 0)
    monkeypatch.setattr(operator, "_scratch", threading.local())
    _, weight = integers("int8", 40, 96)
    x, scale = torch.randn(9, 96), pack_scale(torch.ones(40, 1))
    with torch.inference_mode():
        inside = multiply(x, weight, None, scale)
    assert torch.equal(multiply(x, weight, None, scale), inside)


def test_any_strides_and_leading_dimensions(best):
    dense, weight = sparse(random_mask(24, 50, 0.5), torch.float32)
    transposed = torch.randn(50, 6).t()
    assert_product(multiply(transposed, weight), transposed, dense)
    every_other = torch.randn(4, 100)[:, ::2]
    bias = torch.randn(48)[::2]
    assert_product(multiply(every_other, weight, bias), every_other, dense, bias)
    batched = torch.randn(2, 3, 50)
    y = multiply(batched, weight)
    assert y.shape == (2, 3, 24)
    assert_product(y.view(6, 24), batched.view(6, 50), dense)
    assert multiply(torch.randn(50), weight).shape == (24,)
    assert multiply(torch.randn(2, 0, 50), weight).shape == (2, 0, 24)


@pytest.mark.parametrize(("dtype", "m"), zip(DTYPES, (1, 30), strict=True), ids=str)
def test_not_a_number_and_infinity_spread_as_in_a_dense_matmul(float_kernel, m, dtype):
    dense, weight = sparse(random_mask(17, 40, 0.5), dtype)
    x = torch.randn(m, 40).to(dtype)
    x[0, 5], x[m - 1, 7] = float("inf"), float("nan")
    y, expected = multiply(x, weight), torch.nn.functional.linear(x.float(), dense.float())
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


def test_what_does_not_fit_is_refused(best):
    _, (data, *_) = sparse(random_mask(16, 32, 0.5), torch.bfloat16)
    x, scale = torch.randn(2, 32), pack_scale(torch.ones(16, 1))
    for arguments, says in (
        ((x.half(), data, 16, 32), "x: torch.float16"),
        ((x[:, :31], data, 16, 32), "does not end in the weight's 32 columns"),
        ((torch.tensor(1.0), data, 16, 32), "does not end"),
        ((x, data, 16, 32, torch.randn(15)), "bias"),
        ((x, data, 16, 32, None, scale[:, :, :8]), "scale"),
        ((x[:, :16], data, 32, 16), "another shape"),
        ((torch.randn(300, 32), data, 15, 32), "another shape"),  # also where panels are expanded
        ((x, data.view(torch.int16), 16, 32), "data: torch.int16"),
        ((x, data[:-64], 16, 32), "where its header needs"),
    ):
        for call in (operator.sparse_linear, torch.ops.rac_modifier.sparse_linear):
            with pytest.raises(RacError, match=says):
                call(*arguments, *([None] * (5 - len(arguments))))


def test_torch_checks_the_operators_and_compiles_them_for_any_number_of_tokens(active):
    importlib.reload(operator)  # registers nothing twice
    data, scale = dense4()
    arguments = (torch.randn(2, 3, 96), data, 40, 96, torch.randn(40), scale)
    torch.library.opcheck(torch.ops.rac_modifier.sparse_linear, arguments)
    torch.library.opcheck(torch.ops.rac_modifier.native_linear, arguments)

    def step(x):
        return operator.sparse_linear(x * 2, data, 40, 96, None, scale) + 1

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for m in (1, 2, 8, 9, 70):
        x = torch.randn(m, 96)
        assert torch.equal(compiled(x), step(x))


# ---- the operator in C++


@pytest.fixture
def active(best, monkeypatch):
    """Use the library that registered the operator: torch accepts one per process."""
    if cpp_operator.registered is not None:  # perhaps another test's
        take(Path(cpp_operator.registered._calls._name), None, monkeypatch)
    library_and_isa()
    if sys.platform != "linux" and cpp_operator.refused is not None:
        pytest.skip(cpp_operator.refused)
    assert cpp_operator.refused is None  # every torch that pyproject.toml allows has the interface
    assert cpp_operator.registered.handle == library_and_isa()[0].handle


@pytest.fixture
def in_python(monkeypatch):
    """Counts the matmuls that are started from Python."""
    counted, linear = [], library.Library.linear

    def count(self, *arguments):
        counted.append(arguments)
        linear(self, *arguments)

    monkeypatch.setattr(library.Library, "linear", count)
    return counted


def dense4() -> tuple[torch.Tensor, torch.Tensor]:
    values, scale = quantize_groups(torch.randn(40, 96), 32)
    return pack_dense(values, 4), pack_scale(scale, narrow=True)


def dense8() -> tuple[torch.Tensor, torch.Tensor]:
    values, scale = quantize_rows(torch.randn(40, 96))
    return pack_dense(values), pack_scale(scale)


def floats() -> tuple[torch.Tensor, None]:
    return sparse(random_mask(40, 96, 0.5), torch.bfloat16)[1].data, None


@pytest.mark.parametrize(
    ("weight", "dtype"), zip((dense4, dense8, floats), (*DTYPES, torch.bfloat16), strict=True)
)
def test_the_same_bits_as_the_operator_in_python(active, in_python, weight, dtype):
    data, scale = weight()
    for shape in ((1,), (8,), (2, 3), (1, 1, 2), ()):
        x = torch.randn(*shape, 96).to(dtype)
        for bias in (None, torch.randn(40), torch.randn(40).bfloat16()):
            y = operator.sparse_linear(x, data, 40, 96, bias, scale)
            assert in_python == []
            expected = torch.ops.rac_modifier.sparse_linear(x, data, 40, 96, bias, scale)
            assert len(in_python) == 1
            in_python.clear()
            assert (y.dtype, y.shape) == (dtype, (*shape, 40))
            assert torch.equal(y, expected)


@pytest.mark.parametrize(
    "x",
    [torch.randn(9, 96), torch.randn(96, 2).t(), torch.randn(2, 192)[:, ::2], torch.randn(0, 96)],
    ids=["nine rows", "transposed", "every other", "none"],
)
def test_what_is_not_plain_is_left_to_python(active, in_python, x):
    data, scale = dense8()
    y = operator.sparse_linear(x, data, 40, 96, None, scale)
    assert len(in_python) == 1
    assert torch.equal(y, torch.ops.rac_modifier.sparse_linear(x, data, 40, 96, None, scale))


def test_it_keeps_no_tensor(active):
    """Neither an input nor its result: their storages are freed."""
    data, scale = dense8()
    for with_bias in (False, True):
        x, bias = torch.randn(8, 96), torch.randn(40) if with_bias else None
        y = operator.sparse_linear(x, data, 40, 96, bias, scale)
        storages = [StorageWeakRef(t.untyped_storage()) for t in (x, y, bias) if t is not None]
        del x, y, bias
        assert all(storage.expired() for storage in storages)


def test_without_it_all_is_in_python(active, in_python):
    data, scale = dense8()
    x = torch.randn(2, 96)
    expected = operator.sparse_linear(x, data, 40, 96, None, scale)
    cpp_operator.registered.use_operator(None, 0)
    for op in (operator.sparse_linear, torch.ops.rac_modifier.native_linear):
        assert torch.equal(op(x, data, 40, 96, None, scale), expected)
    assert len(in_python) == 2
