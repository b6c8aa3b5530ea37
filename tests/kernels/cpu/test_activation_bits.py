"""Products of integers with activations of 8 bits: exact, for any number of rows, and which instruction sets have them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.evaluation.activations import rounded
from rac_modifier.kernels.cpu import operator
from rac_modifier.kernels.cpu.library import BYTE_ISAS
from rac_modifier.kernels.cpu.packed import (
    block_of,
    check_packed,
    pack_scale,
    set_activation_bits,
    split_groups,
)
from rac_modifier.kernels.cpu.support import library_and_isa
from tests.kernels.cpu.kernel_helpers import (
    BLOCK,
    LEVELS,
    Packed,
    assert_integer_product,
    multiply,
    random_mask,
    scaled,
    sparse,
    threads,
)
from tests.kernels.cpu.test_few_bits import weight_of as weight_of_few_bits
from tests.kernels.cpu.test_int4_product import weight_of
from tests.kernels.cpu.test_int8_product import integers

ROWS = (
    1,
    2,
    3,
    8,
    9,
    15,
    16,
    17,
    31,
    32,
    33,
    49,
)  # of x: odd and even, and each way of the kernels


def eight_bits(
    rows: int, columns: int, density: float, bits: int, groups: int = 1, seed: int = 0
) -> tuple[Tensor, Packed]:
    """A random weight of int8, or of fewer bits with codes of zero, dense and packed, that takes activations of 8 bits.

    One of 3 or 2 bits has no zeros, whatever the density.
    """
    if bits == 8:
        dense, weight = integers(rows, columns, density, seed)
    elif bits < 4:
        dense, weight = weight_of_few_bits(rows, columns, bits, groups, True, seed)
    else:
        # zeros of groups wider than 512 are split where a layer is packed, in backend.py
        dense, weight = weight_of(
            rows, columns, density, groups, columns // groups <= 512 or groups == 1, seed
        )
    set_activation_bits(weight.data, 8)
    return dense, weight


def levels_here(weight: Packed) -> int:
    """The largest integer of x on this kernel."""
    library, isa = library_and_isa()
    return {8: 127, 16: LEVELS}[library.activation_bits(weight.data, isa)]


def test_which_instruction_sets_multiply_bytes(kernel):
    _, weight = integers(20, 64, 0.5)
    library, isa = library_and_isa()
    assert library.activation_bits(weight.data, isa) == 16
    set_activation_bits(weight.data, 8)
    assert library.activation_bits(weight.data, isa) == (8 if isa in BYTE_ISAS else 16)
    check_packed(weight.data, 20, 64, torch.int8)
    set_activation_bits(weight.data, 16)
    assert library.activation_bits(weight.data, isa) == 16


@pytest.mark.parametrize(
    ("bits", "density"), [(8, 0.5), (8, 1.0), (4, 0.5), (4, 1.0), (3, 1.0), (2, 1.0)]
)
@pytest.mark.parametrize("columns", [37, 512, 600])
def test_integer_products_are_exact(kernel, columns, density, bits):
    """x of integers, the largest of each block 127, has a scale of 1: only sums of blocks are rounded, to float32."""
    dense, weight = eight_bits(20, columns, density, bits)
    for m in ROWS:
        x = torch.randint(-127, 128, (m, columns)).float()
        x[:, 0] = x[:, -1] = 127
        exact = sum(
            (block.long() @ part.long().T).float()
            for block, part in zip(x.split(BLOCK, 1), dense.split(BLOCK, 1), strict=True)
        )
        y = multiply(x, weight, None, pack_scale(torch.ones(20, 1)))
        if levels_here(weight) == 127:
            assert torch.equal(y, exact)
        else:
            torch.testing.assert_close(y, exact, rtol=1e-3, atol=20.0)


@pytest.mark.parametrize(("bits", "density"), [(8, 0.5), (4, 0.5), (4, 1.0), (2, 1.0)])
@pytest.mark.parametrize("byte", [False, True], ids=["16 bits", "8 bits"])
def test_many_lines_times_an_odd_number_of_panels_are_exact(
    kernel, byte, density, bits, monkeypatch
):
    """So many lines that panels are multiplied in twos, with every tail; the fifth panel of 16 rows is alone, and not whole."""
    for name in ("CROSSOVER8", "CROSSOVER4"):
        monkeypatch.setattr(operator, name, dict.fromkeys(getattr(operator, name), 10**6))
    dense, weight = eight_bits(16 * 4 + 5, 600, density, bits)
    set_activation_bits(weight.data, 8 if byte else 16)
    most = levels_here(weight)
    generator = torch.Generator().manual_seed(0)
    for m in (*range(65, 82), 500):
        x = torch.randint(-most, most + 1, (m, 600), generator=generator).float()
        x[:, 0] = x[:, -1] = most
        exact = sum(
            (block.long() @ part.long().T).float()
            for block, part in zip(x.split(BLOCK, 1), dense.split(BLOCK, 1), strict=True)
        )
        assert torch.equal(
            multiply(x, weight, None, pack_scale(torch.ones(16 * 4 + 5, 1))), exact
        ), m


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 50),
    columns=st.integers(1, 700),
    m=st.integers(1, 70),
    density=st.sampled_from([0.0, 0.5, 1.0]),
    bits=st.sampled_from([8, 4, 3, 2]),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_density(kernel, rows, columns, m, density, bits, dtype, seed):
    dense, weight = eight_bits(rows, columns, density, bits, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    x, bias = (
        torch.randn(m, columns, generator=generator).to(dtype),
        torch.randn(rows, generator=generator),
    )
    scale = torch.rand(rows, 1, generator=generator) + 0.01
    y = multiply(x, weight, bias, pack_scale(scale))
    assert_integer_product(y, x, scaled(dense, scale), bias=bias, levels=levels_here(weight))


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("columns", "groups"), [(1024, 8), (768, 12), (2080, 2)])
def test_scales_in_groups_and_the_rounding_that_is_measured(kernel, columns, groups, bits):
    """`evaluation.activations.rounded` is what the kernels do: the difference is a small part of what rounding costs."""
    dense, weight = eight_bits(37, columns, 0.5, bits, groups)
    scale, group = torch.rand(37, groups) + 0.01, columns // groups
    packed = pack_scale(scale, group, narrow=bits == 4)
    block = block_of(columns, group, 8 if bits == 4 else 4)
    assert (
        packed.shape[1]
        == columns // block
        == split_groups(scale, group, 8 if bits == 4 else 4).shape[1]
    )
    wide = scaled(dense, scale)
    for m in ROWS:
        x = torch.randn(m, columns, generator=torch.Generator().manual_seed(m))
        y = multiply(x, weight, None, packed).double()
        shown = rounded(x, block, 8 if levels_here(weight) == 127 else 16).double() @ wide.T
        eight = (rounded(x, block, 8).double() - x) @ wide.T
        assert (y - shown).norm() <= 0.05 * eight.norm()


def test_one_scale_per_row_has_blocks_of_512():
    assert [block_of(columns, columns) for columns in (100, 512, 513, 8960)] == [100, 512, 512, 512]


@pytest.mark.parametrize("m", [1, 2, 5, 20, 33])
def test_a_value_that_is_not_finite_makes_its_row_nan_and_no_other(kernel, m):
    _, weight = eight_bits(20, 600, 0.5, 8)
    scale = pack_scale(torch.ones(20, 1))
    x = torch.randn(m + 1, 600)
    clean = multiply(x, weight, None, scale)
    for row in (0, m):
        for value in (float("nan"), float("inf")):
            damaged = x.clone()
            damaged[row, 571] = value
            y = multiply(damaged, weight, None, scale)
            assert not y[row].isfinite().any()
            others = torch.arange(m + 1) != row
            assert torch.equal(y[others], clean[others])


def test_the_largest_sums_fit(kernel):
    for density in (0.999999, 1.0):
        dense, weight = eight_bits(16, 1024, density, 8)
        x = dense[:3].float().sign() * 5
        y = multiply(x, weight, None, pack_scale(torch.ones(16, 1)))
        torch.testing.assert_close(y, x @ dense.float().T, rtol=1e-4, atol=2.0)


def test_threads_change_nothing(kernel):
    for bits in (8, 4):
        _, weight = eight_bits(200, 640, 0.5, bits)
        scale = pack_scale(torch.rand(200, 1))
        for m in (1, 21, 301):
            x = torch.randn(m, 640)
            with threads(1):
                one = multiply(x, weight, None, scale)
            with threads(3):
                assert torch.equal(multiply(x, weight, None, scale), one)


def test_what_cannot_be_is_refused(best):
    _, weight = integers(20, 64, 0.5)
    with pytest.raises(RacError, match="activations of 4 bits; 8 and 16 are possible"):
        set_activation_bits(weight.data, 4)
    _, floats = sparse(random_mask(20, 64, 0.5), torch.bfloat16)
    with pytest.raises(
        RacError,
        match="activations in 8 bits: activations are rounded for weights of integers only",
    ):
        set_activation_bits(floats.data, 8)
    for damaged, value in ((weight, 2), (weight, 255), (floats, 1)):
        data = damaged.data.clone()
        data[12] = value
        with pytest.raises(
            RacError, match=f"its header has {value} where activations are rounded to bytes or not"
        ):
            check_packed(data, 20, 64, torch.int8 if damaged is weight else torch.bfloat16)
