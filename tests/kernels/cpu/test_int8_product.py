"""8-bit weights: the layout, the product within the rounding of x to integers, scales, outliers; on every instruction set."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu import operator
from rac_modifier.kernels.cpu.packed import check_packed, pack_dense, pack_scale
from tests.kernels.cpu.kernel_helpers import (
    BLOCK,
    LEVELS,
    Packed,
    assert_integer_product,
    bitmask_of,
    expanded,
    multiply,
    pack,
    pack_whole,
    random_mask,
    scaled,
    threads,
    unpacked,
)

DTYPES = [torch.bfloat16, torch.float32]


def integers(rows: int, columns: int, density: float, seed: int = 0) -> tuple[Tensor, Packed]:
    """A random int8 weight, with -128 and zeros among the stored values: dense and packed, without masks at density 1."""
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)
    if density == 1.0:
        return dense, pack_whole(dense)
    mask = random_mask(rows, columns, density, seed)
    return dense.masked_fill(~mask, 0), pack(dense[mask], bitmask_of(mask), columns)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 50),
    columns=st.integers(1, 700),
    m=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.97, 1.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_density(kernel, rows, columns, m, density, dtype, seed):
    dense, weight = integers(rows, columns, density, seed)
    assert torch.equal(unpacked(weight), dense)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, columns, generator=generator).to(dtype)
    scale = torch.rand(rows, 1, generator=generator) + 0.01
    assert_integer_product(multiply(x, weight, None, pack_scale(scale)), x, scaled(dense, scale))


@pytest.mark.parametrize("density", [0.5, 1.0])
@pytest.mark.parametrize("columns", [37, 512, 600])
def test_integer_products_are_exact(kernel, columns, density):
    """x of integers, the largest of each block LEVELS, has a scale of 1: only sums of blocks are rounded, to float32."""
    dense, weight = integers(20, columns, density)
    for m in range(1, 9):
        x = torch.randint(-LEVELS, LEVELS + 1, (m, columns)).float()
        x[:, 0] = x[:, -1] = LEVELS
        exact = sum(
            (block.long() @ part.long().T).float()
            for block, part in zip(x.split(BLOCK, 1), dense.split(BLOCK, 1), strict=True)
        )
        assert torch.equal(multiply(x, weight, None, pack_scale(torch.ones(20, 1))), exact)


@pytest.mark.parametrize("density", [0.5, 1.0])
@pytest.mark.parametrize(
    ("columns", "groups"), [(1024, 8), (768, 12), (1024, 2), (96, 3), (96, 24)]
)
def test_scales_in_groups(kernel, columns, groups, density):
    dense, weight = integers(37, columns, density)
    scale = torch.rand(37, groups) + 0.01
    for m in (1, 2, 3, 5, 16, 35):
        for dtype in DTYPES:
            x, bias = torch.randn(m, columns).to(dtype), torch.randn(37)
            y = multiply(x, weight, bias, pack_scale(scale))
            assert_integer_product(y, x, scaled(dense, scale), groups, bias)


@pytest.mark.parametrize("density", [0.5, 1.0])
@pytest.mark.parametrize(("m", "columns"), [(9, 70), (40, 1031), (481, 515)])
def test_many_rows_of_bfloat16(kernel, m, columns, density):
    """Where the processor multiplies bfloat16, x is not rounded: the bound of floats holds too."""
    dense, weight = integers(37, columns, density)
    x, bias, scale = torch.randn(m, columns).bfloat16(), torch.randn(37), torch.rand(37, 1) + 0.01
    y = multiply(x, weight, bias, pack_scale(scale))
    assert_integer_product(y, x, scaled(dense, scale), bias=bias)


def test_groups_wider_than_a_block_are_split(best):
    dense, weight = integers(20, 2 * 1028, 0.5)
    scale = torch.rand(20, 2) + 0.01
    x = torch.randn(3, 2 * 1028)
    packed = pack_scale(scale, 1028)
    assert packed.shape == (
        2,
        514,
        16,
    )  # of 1028 columns only 4 are a multiple of 4, 512 at most, and a divisor
    assert_integer_product(multiply(x, weight, None, packed), x, scaled(dense, scale), 514)


def test_the_largest_sums_fit(kernel):
    """512 products of -128 and the largest integer in one block, and of both signs."""
    for density in (0.999999, 1.0):
        dense = torch.full((16, 1024), -128, dtype=torch.int8)
        mask = torch.ones(16, 1024, dtype=torch.bool)
        weight = pack_whole(dense) if density == 1.0 else pack(dense[mask], bitmask_of(mask), 1024)
        for value in (1.0, -1.0):
            x = torch.full((3, 1024), value)
            y = multiply(x, weight, None, pack_scale(torch.ones(16, 1)))
            torch.testing.assert_close(y, torch.full((3, 16), -128.0 * 1024 * value))


@pytest.mark.parametrize("density", [0.5, 1.0])
@pytest.mark.parametrize("columns", [1536, 8960])
def test_an_outlier_channel_costs_at_most_what_bfloat16_activations_cost(kernel, columns, density):
    """One channel x1000: the error of our integers is at most twice that of rounding x to bfloat16."""
    if "emulated" in kernel and columns > 2000:
        pytest.skip("slow where instructions are emulated; the integers are the same")
    dense, weight = integers(64, columns, density)
    scale = torch.full((64, 1), 0.01)
    x = torch.randn(4, columns, generator=torch.Generator().manual_seed(3))
    x[:, columns // 3] *= 1000
    exact = x.double() @ scaled(dense, scale).T
    ours = (multiply(x, weight, None, pack_scale(scale)).double() - exact).norm()
    bf16 = (x.bfloat16().double() @ scaled(dense, scale).T - exact).norm()
    assert ours <= 2 * bf16, (float(ours), float(bf16))
    plain_int8 = (x / (x.abs().amax(1, keepdim=True) / 127)).round() * (
        x.abs().amax(1, keepdim=True) / 127
    )
    assert (
        plain_int8.double() @ scaled(dense, scale).T - exact
    ).norm() > 4 * bf16  # what W8A8 would do


@pytest.mark.parametrize("m", [1, 5, 20])
def test_a_value_that_is_not_finite_makes_its_row_nan_and_no_other(kernel, m):
    _, weight = integers(20, 600, 0.5)
    scale = pack_scale(torch.ones(20, 1))
    x = torch.randn(m + 1, 600)
    clean = multiply(x, weight, None, scale)
    for value in (float("nan"), float("inf"), -float("inf")):
        x[0, 571] = value
        y = multiply(x, weight, None, scale)
        assert not y[0].isfinite().any()
        assert torch.equal(y[1:], clean[1:])


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-38, 1e-30, 1e30])
def test_tiny_and_huge_activations(kernel, size):
    dense, weight = integers(20, 100, 0.5)
    x = torch.randn(3, 100) * size
    y = multiply(x, weight, None, pack_scale(torch.ones(20, 1)))
    torch.testing.assert_close(y, x @ dense.float().T, rtol=1e-3, atol=max(1e-25, size / 10))


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_chunks_of_lines_and_groups_of_panels(kernel, density):
    """More lines than AMX uses at a time, with a tail, and more panels than share them."""
    dense, weight = integers(16 * 17 + 3, 192, density)
    scale = torch.rand(16 * 17 + 3, 3) + 0.01
    x, bias = torch.randn(401, 192), torch.randn(16 * 17 + 3)
    assert_integer_product(
        multiply(x, weight, bias, pack_scale(scale)), x, scaled(dense, scale), 3, bias
    )


@pytest.mark.parametrize("density", [0.5, 1.0])
@pytest.mark.parametrize("groups", [1, 2])
def test_expanded_panels(kernel, groups, density, monkeypatch):
    """The path of many rows, in several chunks with a tail: x is not rounded."""
    monkeypatch.setattr(operator, "CROSSOVER8", dict.fromkeys(operator.CROSSOVER8, 0))
    monkeypatch.setattr(operator, "SCRATCH_BYTES", 2 * 16 * 70 * 4)
    dense, weight = integers(90, 72, density)
    scale = torch.rand(90, groups) + 0.01
    for dtype in DTYPES:
        x, bias = torch.randn(130, 72).to(dtype), torch.randn(90)
        y = multiply(x, weight, bias, pack_scale(scale))
        times, plus = expanded(kernel, dtype, dense, scale, bias)
        assert_integer_product(y, x, times, groups, plus)


@pytest.mark.parametrize("weights", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 7, 40, 200])
def test_floats_take_a_scale_of_each_row(kernel, weights, m):
    mask = random_mask(37, 100, 0.5)
    dense = torch.randn(37, 100).to(weights).masked_fill(~mask, 0.0)
    weight, scale = pack(dense[mask], bitmask_of(mask), 100), torch.rand(37, 1) + 0.01
    x, bias = torch.randn(m, 100), torch.randn(37)
    y = multiply(x, weight, bias, pack_scale(scale))
    torch.testing.assert_close(
        y, torch.nn.functional.linear(x, dense.float() * scale, bias), rtol=1e-4, atol=1e-4
    )
    with pytest.raises(RacError, match="only weights of integers have scales in groups"):
        multiply(x[:1], weight, bias, pack_scale(torch.ones(37, 2)))


def test_threads_change_nothing(kernel):
    for density in (0.5, 1.0):
        _, weight = integers(200, 640, density)
        scale = pack_scale(torch.rand(200, 1))
        for m in (1, 20, 70):
            x = torch.randn(m, 640)
            with threads(1):
                one = multiply(x, weight, None, scale)
            with threads(3):
                assert torch.equal(multiply(x, weight, None, scale), one)


def test_the_layout_word_by_word(best):
    """Against the description in csrc/layout.h, in plain Python."""
    mask = random_mask(20, 37, 0.5)
    dense = torch.randint(1, 100, (20, 37), dtype=torch.int8).masked_fill(~mask, 0)
    weight = pack(dense[mask], bitmask_of(mask), 37)
    words, values, offsets = [], [], [0]
    for panel in range(2):
        for quad in range(16):
            there = {
                4 * n + k: int(dense[16 * panel + n, 4 * quad + k])
                for n in range(min(16, 20 - 16 * panel))
                for k in range(4)
                if 4 * quad + k < 37 and mask[16 * panel + n, 4 * quad + k]
            }
            bits = sum(1 << bit for bit in there)
            words += [bits & 0xFFFFFFFF, bits >> 32]
            values += [there[bit] for bit in sorted(there)]
        offsets.append(len(values))
    raw = bytes(weight.data.tolist())
    assert struct.unpack_from("<8siiqqq", raw) == (b"RACpack1", 2, 0, 20, 37, int(mask.sum()))
    assert struct.unpack_from("<3Q", raw, 64) == tuple(offsets)
    assert list(struct.unpack_from("<64I", raw, 128)) == words
    assert list(struct.unpack_from(f"<{len(values)}b", raw, 384)) == values
    whole = pack_whole(dense)
    assert whole.data.numel() == 128 + 2 * 16 * 64 + 64  # 37 columns become 64
    assert torch.equal(unpacked(whole), dense)


def test_forged_dense_data_is_refused(best):
    _, weight = integers(40, 50, 1.0)
    data = weight.data.clone()
    data[72] += 1
    with pytest.raises(RacError, match="panel 1: its offset is not that of a dense weight"):
        check_packed(data, 40, 50, torch.int8, masked=False)
    with pytest.raises(RacError, match="its header says"):
        check_packed(weight.data, 40, 50, torch.int8)
    with pytest.raises(RacError, match="values are bfloat16, float32 or int8"):
        check_packed(weight.data, 40, 50, torch.float32, masked=False)


def test_what_does_not_fit_is_refused(best):
    _, weight = integers(40, 96, 0.5)
    x = torch.randn(2, 96)
    with pytest.raises(RacError, match="scale: missing"):
        multiply(x, weight)
    with pytest.raises(RacError, match="groups of 3 columns"):
        multiply(x, weight, None, pack_scale(torch.ones(40, 32)))
    wrong = [torch.ones(40, 5), torch.ones(24, 1), torch.ones(80, 1), torch.ones(40, 96 * 2)]
    for scale in [*map(pack_scale, wrong), pack_scale(torch.ones(40, 1)).double(), torch.ones(40)]:
        with pytest.raises(RacError, match=r"scale: .* does not fit a weight \[40, 96\]"):
            multiply(x, weight, None, scale)
    for matrix in (torch.ones(4, 4), torch.ones(4, dtype=torch.int8)):
        with pytest.raises(RacError, match="an int8 matrix on the CPU is needed"):
            pack_dense(matrix)


def test_torch_checks_the_operator(best):
    _, weight = integers(16, 32, 0.5)
    arguments = (
        torch.randn(2, 32),
        weight.data,
        16,
        32,
        torch.randn(16),
        pack_scale(torch.ones(16, 1)),
    )
    torch.library.opcheck(torch.ops.rac_modifier.sparse_linear, arguments)
