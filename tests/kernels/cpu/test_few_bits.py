"""Dense weights of 3 and 2 bits: the layout, exact integer products, scales and zeros in groups; on every instruction set."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu.library import DENSE2, DENSE3
from rac_modifier.kernels.cpu.packed import check_packed, pack_dense, pack_scale, unpack
from rac_modifier.kernels.cpu.support import library_and_isa
from tests.kernels.cpu.kernel_helpers import (
    LEVELS,
    Packed,
    assert_expanded_panels,
    assert_integer_product,
    assert_many_lines_and_panels,
    assert_threads_change_nothing,
    multiply,
    scaled,
    unpacked,
)

DTYPES = [torch.bfloat16, torch.float32]
MANY = (1, 2, 3, 5, 8, 9, 17, 35)  # rows of x: each way of the kernels
BITS = pytest.mark.parametrize("bits", [3, 2])


def weight_of(
    rows: int, columns: int, bits: int, groups: int = 1, asymmetric: bool = False, seed: int = 0
) -> tuple[Tensor, Packed]:
    """A random weight of codes minus codes of zero: dense int8, and packed."""
    generator = torch.Generator().manual_seed(seed)
    zeros = torch.full((rows, groups), 1 << (bits - 1), dtype=torch.uint8)
    if asymmetric:
        zeros = torch.randint(0, 1 << bits, (rows, groups), dtype=torch.uint8, generator=generator)
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.int8, generator=generator)
    dense = codes - zeros.to(torch.int8).repeat_interleave(columns // groups, dim=1)
    return dense, Packed(pack_dense(dense, bits, zeros if asymmetric else None), rows, columns)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 50),
    columns=st.integers(1, 700),
    m=st.integers(1, 40),
    bits=st.sampled_from([3, 2]),
    asymmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_any_shape(kernel, rows, columns, m, bits, asymmetric, dtype, seed):
    dense, weight = weight_of(rows, columns, bits, 1, asymmetric, seed)
    assert torch.equal(unpacked(weight), dense)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, columns, generator=generator).to(dtype)
    scale = torch.rand(rows, 1, generator=generator) + 0.01
    assert_integer_product(multiply(x, weight, None, pack_scale(scale)), x, scaled(dense, scale))


@BITS
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("columns", [32, 37, 128, 200, 512])
def test_integer_products_are_exact(kernel, columns, bits, asymmetric):
    """x of integers, the largest of them LEVELS, has a scale of 1: the result is the integer, rounded once to float32."""
    dense, weight = weight_of(20, columns, bits, 1, asymmetric)
    for m in MANY:
        x = torch.randint(-LEVELS, LEVELS + 1, (m, columns)).float()
        x[:, columns // 2] = LEVELS
        exact = x.long() @ dense.long().T
        assert torch.equal(multiply(x, weight, None, pack_scale(torch.ones(20, 1))), exact.float())


@BITS
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(
    ("columns", "groups"), [(1024, 8), (768, 12), (256, 8), (1024, 2), (96, 3), (192, 2)]
)
def test_scales_and_zeros_in_groups(kernel, columns, groups, bits, asymmetric):
    """Groups of 128, 64, 32, 512, 32 and 96 columns."""
    scale = torch.rand(37, groups) + 0.01
    for narrow in (False, True):
        dense, weight = weight_of(37, columns, bits, groups, asymmetric)
        assert torch.equal(unpacked(weight), dense)
        scale = scale.bfloat16().float() if narrow else scale
        packed = pack_scale(scale, narrow=True)
        assert packed.dtype == (torch.bfloat16 if narrow else torch.float32)
        for m in (1, 2, 5, 17) if kernel.startswith(("emulated", "arm")) else MANY:
            x, bias = torch.randn(m, columns).to(DTYPES[m % 2]), torch.randn(37)
            assert_integer_product(
                multiply(x, weight, bias, packed), x, scaled(dense, scale), groups, bias
            )


@BITS
@pytest.mark.parametrize("value", [1.0, -1.0])
def test_the_largest_sums(kernel, value, bits):
    most = (1 << bits) - 1
    for code, zero in ((most, 0), (0, most)):
        dense = torch.full((16, 1024), code - zero, dtype=torch.int8)
        weight = Packed(
            pack_dense(dense, bits, torch.full((16, 1), zero, dtype=torch.uint8)), 16, 1024
        )
        for m in (1, 3, 12):
            y = multiply(torch.full((m, 1024), value), weight, None, pack_scale(torch.ones(16, 1)))
            torch.testing.assert_close(y, torch.full((m, 16), (code - zero) * 1024 * value))


@BITS
def test_threads_change_nothing(kernel, bits):
    _, weight = weight_of(200, 640, bits, 5, True)
    assert_threads_change_nothing(weight, pack_scale(torch.rand(200, 5)))


@BITS
def test_chunks_of_lines_and_groups_of_panels(kernel, bits):
    dense, weight = weight_of(16 * 17 + 3, 192, bits, 3, True)
    assert_many_lines_and_panels(dense, weight, 3)


@BITS
@pytest.mark.parametrize("groups", [1, 3])
def test_expanded_panels(kernel, groups, bits, monkeypatch):
    dense, weight = weight_of(90, 96, bits, groups, True)
    assert_expanded_panels(kernel, monkeypatch, dense, weight, groups)


def byte_of(codes: list[int], bits: int, line: int) -> int:
    """Of a row and a column of each of the next quads, whose `codes` these are: eight of 3 bits, four of 2."""
    if bits == 2:
        return codes[0] | codes[2] << 2 | codes[1] << 4 | codes[3] << 6
    return (
        codes[2 * line]
        | (codes[6] >> line & 1) << 3
        | codes[2 * line + 1] << 4
        | (codes[7] >> line & 1) << 7
    )


@BITS
def test_the_layout_byte_by_byte(best, bits):
    """Against the description in csrc/layout.h, in plain Python; it takes the bits that it says, and a code of zero per row."""
    rows, columns = 20, 100
    zeros = torch.randint(0, 1 << bits, (rows, 1), dtype=torch.uint8)
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.int8)
    data = pack_dense(codes - zeros.to(torch.int8), bits, zeros)
    assert (
        data.numel() == 64 + 64 + 64 + 32 * 128 * bits // 8 + 64
    )  # header, offsets, zeros, codes, padding
    assert library_and_isa()[0].value_type(data) == {3: DENSE3, 2: DENSE2}[bits]
    padded = torch.zeros(32, 128, dtype=torch.int8)
    padded[:rows, :columns] = codes
    quads, lines = {3: (8, 3), 2: (4, 1)}[bits]
    expected = [
        byte_of(padded[16 * panel + n, first + k : first + 4 * quads : 4].tolist(), bits, line)
        for panel in range(2)
        for first in range(0, 128, 4 * quads)
        for line in range(lines)
        for n in range(16)
        for k in range(4)
    ]
    assert data[192:-64].tolist() == expected
    assert data[128 : 128 + rows].tolist() == zeros.flatten().tolist()


@BITS
def test_what_does_not_fit_is_refused(best, bits):
    most = 1 << (bits - 1)
    with pytest.raises(
        RacError,
        match=f"one of them does not fit {bits} bits, 0 to {2 * most - 1} with its code of zero",
    ):
        pack_dense(torch.full((16, 64), most, dtype=torch.int8), bits)
    fine = torch.full((16, 64), -most, dtype=torch.int8)
    with pytest.raises(RacError, match="impossible"):  # groups must have a multiple of 32 columns
        pack_dense(fine, bits, torch.full((16, 4), most, dtype=torch.uint8))
    weight, x = Packed(pack_dense(fine, bits), 16, 64), torch.randn(1, 64)
    with pytest.raises(RacError, match="groups of 16 columns; they must have a multiple of 32"):
        multiply(x, weight, None, pack_scale(torch.ones(16, 4)))
    check_packed(weight.data, 16, 64, torch.int8, False, bits)
    for at, value, message in (
        (128, 1 << bits, f"a code of zero is {1 << bits}, more than {2 * most - 1}"),
        (48, 0, "sizes"),
    ):
        forged = weight.data.clone()
        forged[at] = value
        with pytest.raises(RacError, match=message):
            check_packed(forged, 16, 64, torch.int8, False, bits)
    with pytest.raises(RacError, match="its header says"):
        check_packed(weight.data, 16, 64, torch.int8, False, 4)
    with pytest.raises(RacError, match="its header says"):
        unpack(weight.data, 16, 72)
