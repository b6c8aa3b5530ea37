"""The operator against float64, on every instruction set, and under torch.compile."""

from __future__ import annotations

import importlib
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu import operator
from rac_modifier.kernels.cpu.operator import KINDS, use_crossovers
from rac_modifier.kernels.cpu.packed import pack_scale, pack_values
from rac_modifier.kernels.cpu.support import library_and_isa
from tests.kernels.cpu.kernel_helpers import (
    Packed,
    assert_product,
    bitmask_of,
    integers,
    multiply,
    pack,
    random_mask,
    sparse,
    threads,
)

DTYPES = [torch.bfloat16, torch.float32]
SHAPES = [(1, 1), (17, 33), (16, 32), (48, 576), (5, 1000), (100, 257), (33, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("weights", DTYPES, ids=str)
def test_every_row_count_bias_and_dtype(float_kernel, shape, weights):
    dense, weight = sparse(random_mask(*shape, 0.5), weights)
    some = (0, 1, 2, 3, 4, 5, 8, 9, 16, 17, 33)
    for m in some if float_kernel.startswith("arm") else (*some, 31, 32, 49, 64, 70):
        for dtype in DTYPES:
            x = torch.randn(m, shape[1]).to(dtype)
            bias = torch.randn(shape[0]).to(DTYPES[m % 2]) if m % 3 else None
            y = multiply(x, weight, bias)
            assert y.dtype == dtype
            assert_product(y, x, dense, bias)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 70),
    columns=st.integers(1, 300),
    m=st.integers(1, 70),
    density=st.sampled_from([0.0, 0.02, 0.3, 0.5, 0.6, 0.97, 1.0]),
    weights=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_density(float_kernel, rows, columns, m, density, weights, dtype, seed):
    dense, weight = sparse(random_mask(rows, columns, density, seed), weights, seed)
    x = torch.randn(m, columns).to(dtype)
    assert_product(multiply(x, weight), x, dense)


def test_empty_and_full_rows(float_kernel):
    mask = random_mask(40, 130, 0.5)
    mask[3], mask[4], mask[16:32], mask[39] = False, True, False, True
    dense, weight = sparse(mask, torch.bfloat16)
    x = torch.randn(3, 130).bfloat16()
    y = multiply(x, weight)
    assert_product(y, x, dense)
    assert not y[:, 16:32].any()


def test_more_of_each_than_a_block_of_the_cache(float_kernel, monkeypatch):
    use_crossovers(dict.fromkeys(KINDS, 1000))
    dense, weight = sparse(
        random_mask(150, 1111, 0.5), torch.bfloat16
    )  # more panels than a group, too
    for m in (
        (1, 11) if float_kernel.startswith("arm") else (1, 11, 40, 242, 250)
    ):  # of a chunk, and a bit
        x = torch.randn(m, 1111).bfloat16()
        assert_product(multiply(x, weight), x, dense)


@pytest.mark.parametrize("m", [384, 401])
def test_chunks_of_lines_and_groups_of_panels(float_kernel, m, monkeypatch):
    """More lines than AMX and AVX512 use at a time, more panels than share them, more columns than are expanded at once."""
    if float_kernel.startswith("arm"):
        pytest.skip(
            "slow where the processor is emulated; the chunks are those of the other kernels"
        )
    use_crossovers(dict.fromkeys(KINDS, 1000))
    dense, weight = sparse(random_mask(16 * 17 + 3, 540, 0.5), torch.bfloat16)
    x, bias = torch.randn(m, 540).bfloat16(), torch.randn(16 * 17 + 3)
    assert_product(multiply(x, weight, bias), x, dense, bias)


@pytest.mark.parametrize("weights", DTYPES, ids=str)
def test_expanded_panels(float_kernel, weights, monkeypatch):
    """The path of many rows, in several chunks with a tail."""
    use_crossovers(dict.fromkeys(KINDS, 0))
    monkeypatch.setattr(operator, "SCRATCH_BYTES", 2 * 16 * 70 * 4)
    dense, weight = sparse(random_mask(90, 70, 0.5), weights)
    for dtype in DTYPES:
        x, bias = torch.randn(130, 70).to(dtype), torch.randn(90).bfloat16()
        assert_product(multiply(x, weight), x, dense)
        assert_product(multiply(x, weight, bias), x, dense, bias)


class Panels:
    """A library whose kernel has torch multiply in bf16 or not. Records what panels are expanded to, by portable code."""

    def __init__(self, library, dense_bf16):
        self.library, self.dtypes = library, set()
        kernel = replace(library.kernels["portable"], dense_bf16=dense_bf16)
        self.kernels = {"portable": kernel}

    def expand(self, *arguments):
        self.dtypes.add(arguments[5].dtype)
        self.library.expand(*arguments)

    def value_type(self, data):
        return self.library.value_type(data)


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize("kind", ["int8", "int4", "bfloat16", "bfloat16 with a scale", "float32"])
def test_dense_products_in_bf16_are_within_its_rounding(best, kind, units):
    """At most twice the error of a dense bfloat16 model, and none of its errors where the product is in float32."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(90, 1, generator=generator) / 7 + 0.01
    if kind.startswith("int"):
        dense, weight = integers(kind, 90, 640)
    else:
        dtype = torch.float32 if kind == "float32" else torch.bfloat16
        dense, weight = sparse(random_mask(90, 640, 0.5), dtype)
    scaled = kind.startswith("int") or kind.endswith("scale")
    exact_weight = dense.double() * (scale.double() if scaled else 1)
    for dtype in DTYPES:
        panels = Panels(library_and_isa()[0], units)
        x = torch.randn(130, 640, generator=generator).to(dtype)
        out, packed_scale = torch.empty(130, 90, dtype=dtype), pack_scale(scale) if scaled else None
        operator.expand_and_multiply(panels, "portable", weight.data, x, packed_scale, None, out)
        in_bf16 = (
            units and dtype == torch.bfloat16 and (kind.startswith("int") or kind == "bfloat16")
        )
        assert panels.dtypes == {torch.bfloat16 if in_bf16 else torch.float32}
        exact = x.double() @ exact_weight.T
        error = (out.double() - exact).norm()
        rounded_once = (exact.to(dtype).double() - exact).norm()
        if in_bf16 and scaled:
            model = (x.double() @ exact_weight.bfloat16().double().T).bfloat16().double()
            assert error <= 2 * (model - exact).norm()
            assert error > 1.1 * rounded_once
        else:
            assert error <= 1.05 * rounded_once + 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_nothing_that_a_dense_product_is_given(best, dtype, monkeypatch):
    """What torch makes of it may depend on the number of threads, within the rounding of its sums (docs/serving.md)."""
    use_crossovers(dict.fromkeys(KINDS, 8))
    monkeypatch.setattr(operator, "SCRATCH_BYTES", 3 * 16 * 640 * 4)  # several chunks
    mask = random_mask(200, 640, 0.5)
    dense = torch.randint(-7, 8, (200, 640), dtype=torch.int8).masked_fill(~mask, 0)
    weight = Packed(pack_values(dense[mask], bitmask_of(mask), 640), 200, 640)
    scale = 2.0 ** torch.randint(-9, -4, (200, 5))  # exact in bfloat16, as what it multiplies
    x, given, by_torch = torch.randn(9, 640).to(dtype), {1: [], 2: [], 3: []}, torch.mm
    for number in given:

        def record(x, panels, number=number):
            given[number].append(panels.clone())
            return by_torch(x, panels)

        monkeypatch.setattr(torch, "mm", record)
        with threads(number):
            y = multiply(x, weight, None, pack_scale(scale, 128))
        assert_product(y, x, dense.double() * scale.double().repeat_interleave(128, 1))
    assert len(given[1]) >= 3
    for number in (2, 3):
        assert all(torch.equal(a, b) for a, b in zip(given[1], given[number], strict=True))


def test_any_strides_and_leading_dimensions(float_kernel):
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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 30])
def test_not_a_number_and_infinity_spread_as_in_a_dense_product(float_kernel, m, dtype):
    dense, weight = sparse(random_mask(17, 40, 0.5), dtype)
    x = torch.randn(m, 40).to(dtype)
    x[0, 5], x[m - 1, 7] = float("inf"), float("nan")
    y, expected = multiply(x, weight), torch.nn.functional.linear(x.float(), dense.float())
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


@pytest.mark.parametrize("m", [1, 30])
def test_a_lower_kernel_uses_no_bfloat16_units(float_kernel, m):
    """These flush numbers below 2^-126 to zero; fp32 arithmetic keeps them."""
    if float_kernel not in ("portable", "avx2", "arm neon"):
        pytest.skip("this kernel may use bfloat16 units")
    x = torch.full((m, 40), 2.0**-130).bfloat16()
    ones = pack(torch.ones(17, 40).bfloat16(), bitmask_of(random_mask(17, 40, 1.0)), 40)
    assert torch.equal(multiply(x, ones), torch.full((m, 17), 40 * 2.0**-130).bfloat16())


def test_threads_change_nothing(float_kernel):
    _, weight = sparse(random_mask(200, 96, 0.5), torch.bfloat16)
    for m in (1, 20, 140):
        x = torch.randn(m, 96).bfloat16()
        with threads(1):
            one = multiply(x, weight)
        with threads(3):
            assert torch.equal(multiply(x, weight), one)


def test_what_does_not_fit_is_refused(best):
    _, weight = sparse(random_mask(16, 32, 0.5), torch.bfloat16)
    x = torch.randn(2, 32)
    for wrong, message in (
        (x.half(), "float16"),
        (x[:, :31], "does not end in the weight's 32 columns"),
        (torch.tensor(1.0), "does not end"),
    ):
        with pytest.raises(RacError, match=message):
            multiply(wrong, weight)
    for bias in (torch.randn(15), torch.randn(1, 16), torch.randn(16).double()):
        with pytest.raises(RacError, match="bias"):
            multiply(x, weight, bias)
    with pytest.raises(RacError, match="another shape"):
        torch.ops.rac_modifier.sparse_linear(torch.randn(1, 16), weight.data, 32, 16, None)
    with pytest.raises(RacError, match="pass what `pack_values` returned"):
        torch.ops.rac_modifier.sparse_linear(x, weight.data.view(torch.int16), 16, 32, None)
    with pytest.raises(RacError, match="another shape"):  # also where panels are expanded
        torch.ops.rac_modifier.sparse_linear(torch.randn(300, 32), weight.data, 15, 32, None)
    with pytest.raises(RacError, match="where its header needs"):
        torch.ops.rac_modifier.sparse_linear(x, weight.data[:-64], 16, 32, None)


def test_loading_the_module_again_registers_nothing_twice(best):
    importlib.reload(operator)
    dense, weight = sparse(random_mask(16, 32, 0.5), torch.float32)
    x = torch.randn(2, 32)
    assert_product(multiply(x, weight), x, dense)


def test_torch_checks_the_operator(best):
    _, weight = sparse(random_mask(16, 32, 0.5), torch.float32)
    for x in (torch.randn(2, 32), torch.randn(2, 3, 32)):
        torch.library.opcheck(
            torch.ops.rac_modifier.sparse_linear, (x, weight.data, 16, 32, torch.randn(16))
        )


def test_compiled_as_one_graph_for_any_number_of_rows(best):
    _, weight = sparse(random_mask(16, 32, 0.5), torch.float32)
    step = torch.compile(
        lambda x: multiply(x * 2, weight) + 1, fullgraph=True, backend="aot_eager", dynamic=True
    )
    for m in (1, 2, 5, 70):
        x = torch.randn(m, 32)
        assert torch.equal(step(x), multiply(x * 2, weight) + 1)
