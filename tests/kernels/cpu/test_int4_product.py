"""4-bit weights, sparse and dense: the layout, exact integer products, scales and zeros in groups; on every instruction set."""

from __future__ import annotations

import struct
from itertools import product

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu.packed import (
    check_packed,
    pack_dense,
    pack_scale,
    pack_values,
    unpack,
)
from tests.kernels.cpu.kernel_helpers import (
    LEVELS,
    Packed,
    assert_expanded_panels,
    assert_integer_product,
    assert_many_lines_and_panels,
    assert_threads_change_nothing,
    bitmask_of,
    multiply,
    random_mask,
    scaled,
    unpacked,
)

DTYPES = [torch.bfloat16, torch.float32]
MANY = (1, 2, 3, 5, 8, 9, 16, 35)  # rows of x: each way of the kernels


def weight_of(
    rows: int,
    columns: int,
    density: float,
    groups: int = 1,
    asymmetric: bool = False,
    seed: int = 0,
    known: bool = True,
) -> tuple[Tensor, Packed]:
    """A random weight of 4-bit codes minus codes of zero, with stored zeros: dense int8, and packed; no masks at density 1.

    `known`: the groups are known as it is packed, so that it has the layout that is best here.
    """
    generator = torch.Generator().manual_seed(seed)
    zeros = torch.full((rows, groups), 8, dtype=torch.uint8)
    if asymmetric:
        zeros = torch.randint(0, 16, (rows, groups), dtype=torch.uint8, generator=generator)
    codes = torch.randint(0, 16, (rows, columns), dtype=torch.int8, generator=generator)
    dense = codes - zeros.to(torch.int8).repeat_interleave(columns // groups, dim=1)
    given = zeros if asymmetric else None
    if density == 1.0:
        return dense, Packed(pack_dense(dense, 4, given), rows, columns)
    mask = random_mask(rows, columns, density, seed)
    data = pack_values(
        dense[mask], bitmask_of(mask), columns, 4, given, columns // groups if known else 0
    )
    return dense.masked_fill(~mask, 0), Packed(data, rows, columns)


def layouts(kernel: str) -> tuple[bool, ...]:
    """Values of `known`: both where they make a difference."""
    return (True, False) if kernel in ("avx2", "avxvnni") else (True,)


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    rows=st.integers(1, 50),
    columns=st.integers(1, 700),
    m=st.integers(1, 40),
    density=st.sampled_from([0.0, 0.1, 0.5, 0.97, 1.0]),
    asymmetric=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    known=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_density(kernel, rows, columns, m, density, asymmetric, dtype, known, seed):
    dense, weight = weight_of(rows, columns, density, 1, asymmetric, seed, known)
    assert torch.equal(unpacked(weight), dense)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(m, columns, generator=generator).to(dtype)
    scale = torch.rand(rows, 1, generator=generator) + 0.01
    assert_integer_product(
        multiply(x, weight, None, pack_scale(scale)), x, scaled(dense, scale), scale.shape[1]
    )


@pytest.mark.parametrize("density", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("columns", [32, 37, 128, 200, 512])
def test_integer_products_are_exact(kernel, columns, density, asymmetric):
    """x of integers, the largest of them LEVELS, has a scale of 1: the result is the integer, rounded once to float32."""
    for known in layouts(kernel):
        dense, weight = weight_of(20, columns, density, 1, asymmetric, known=known)
        for m in MANY:
            x = torch.randint(-LEVELS, LEVELS + 1, (m, columns)).float()
            x[:, columns // 2] = LEVELS
            exact = x.long() @ dense.long().T
            y = multiply(x, weight, None, pack_scale(torch.ones(20, 1)))
            assert torch.equal(y, exact.float())


@pytest.mark.parametrize("density", [0.5, 1.0])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize(
    ("columns", "groups"), [(1024, 8), (768, 12), (256, 8), (1024, 2), (96, 12)]
)
def test_scales_and_zeros_in_groups(kernel, columns, groups, asymmetric, density):
    scale = torch.rand(37, groups) + 0.01
    for narrow, known in product((False, True), layouts(kernel)):
        dense, weight = weight_of(37, columns, density, groups, asymmetric, known=known)
        assert torch.equal(unpacked(weight), dense)
        scale = scale.bfloat16().float() if narrow else scale
        packed = pack_scale(scale, narrow=True)
        assert packed.dtype == (torch.bfloat16 if narrow else torch.float32)
        for m in (1, 2, 5, 16) if kernel.startswith(("emulated", "arm")) else MANY:
            x, bias = torch.randn(m, columns).to(DTYPES[m % 2]), torch.randn(37)
            assert_integer_product(
                multiply(x, weight, bias, packed), x, scaled(dense, scale), scale.shape[1], bias
            )


def test_two_of_four(kernel):
    mask = torch.rand(48, 32, 4).argsort(-1).argsort(-1).lt(2).view(48, 128)
    dense = torch.randint(-8, 8, (48, 128), dtype=torch.int8).masked_fill(~mask, 0)
    weight = Packed(pack_values(dense[mask], bitmask_of(mask), 128, 4), 48, 128)
    scale, x = torch.rand(48, 4).bfloat16().float(), torch.randn(3, 128)
    assert torch.equal(unpacked(weight), dense)
    assert (
        weight.data.numel() == 64 + 64 + 3 * 64 * 4 + 48 * 128 // 4 + 64
    )  # header, offsets, masks, codes, padding
    assert_integer_product(
        multiply(x, weight, None, pack_scale(scale, narrow=True)),
        x,
        scaled(dense, scale),
        scale.shape[1],
    )


@pytest.mark.parametrize("density", [0.5, 1.0])
@pytest.mark.parametrize("value", [1.0, -1.0])
def test_the_largest_sums_fit(kernel, value, density):
    """512 products of 15 or -15 and the largest integer in one block."""
    for code, zero in ((15, 0), (0, 15)):
        dense = torch.full((16, 1024), code - zero, dtype=torch.int8)
        zeros = torch.full((16, 1), zero, dtype=torch.uint8)
        mask = torch.ones(16, 1024, dtype=torch.bool)
        whole = density == 1.0
        for known in layouts(kernel):
            sparse = pack_values(
                dense[mask], bitmask_of(mask), 1024, 4, zeros, 1024 if known else 0
            )
            data = pack_dense(dense, 4, zeros) if whole else sparse
            for m in (1, 3, 12):
                y = multiply(
                    torch.full((m, 1024), value),
                    Packed(data, 16, 1024),
                    None,
                    pack_scale(torch.ones(16, 1)),
                )
                torch.testing.assert_close(y, torch.full((m, 16), (code - zero) * 1024 * value))


@pytest.mark.parametrize("m", [1, 5, 20])
def test_a_value_that_is_not_finite_makes_its_row_nan_and_no_other(kernel, m):
    for density in (0.5, 1.0):
        _, weight = weight_of(20, 640, density, 5, True)
        scale = pack_scale(torch.ones(20, 5))
        x = torch.randn(m + 1, 640)
        clean = multiply(x, weight, None, scale)
        for value in (float("nan"), float("inf"), -float("inf")):
            x[0, 571] = value
            y = multiply(x, weight, None, scale)
            assert not y[0].isfinite().any()
            assert torch.equal(y[1:], clean[1:])


def test_empty_rows_give_the_bias(kernel):
    mask = random_mask(40, 256, 0.5)
    mask[3:21] = False
    dense = torch.randint(-8, 8, (40, 256), dtype=torch.int8).masked_fill(~mask, 0)
    bias = torch.randn(40)
    for m, group in product((1, 4, 11), (0, 128)):
        weight = Packed(pack_values(dense[mask], bitmask_of(mask), 256, 4, group=group), 40, 256)
        y = multiply(torch.randn(m, 256), weight, bias, pack_scale(torch.rand(40, 2)))
        assert torch.equal(y[:, 3:21], bias[3:21].expand(m, -1))


def test_threads_change_nothing(kernel):
    for density in (0.5, 1.0):
        _, weight = weight_of(200, 640, density, 5, True)
        assert_threads_change_nothing(weight, pack_scale(torch.rand(200, 5)))


@pytest.mark.parametrize("density", [0.5, 1.0])
def test_chunks_of_lines_and_groups_of_panels(kernel, density):
    """More lines than AMX uses at a time, with a tail, and more panels than share them; with codes of zero."""
    dense, weight = weight_of(16 * 17 + 3, 192, density, 3, True)
    assert_many_lines_and_panels(dense, weight, 3)


@pytest.mark.parametrize("density", [0.5, 1.0])
@pytest.mark.parametrize("groups", [1, 2])
def test_expanded_panels(kernel, groups, density, monkeypatch):
    dense, weight = weight_of(90, 80, density, groups, True)
    assert_expanded_panels(kernel, monkeypatch, dense, weight, groups)


def test_the_layout_byte_by_byte(best):
    """Against the description in csrc/layout.h, in plain Python."""
    mask = random_mask(20, 40, 0.4)
    zeros = torch.randint(0, 16, (20, 5), dtype=torch.uint8)
    codes = torch.randint(0, 16, (20, 40), dtype=torch.int8)
    dense = (codes - zeros.to(torch.int8).repeat_interleave(8, dim=1)).masked_fill(~mask, 0)
    data = pack_values(dense[mask], bitmask_of(mask), 40, 4, zeros)
    words, packed, offsets = [], [], [0]
    for panel in range(2):
        for quad in range(16):
            there = {
                4 * n + k: int(codes[16 * panel + n, 4 * quad + k])
                for n in range(min(16, 20 - 16 * panel))
                for k in range(4)
                if 4 * quad + k < 40 and mask[16 * panel + n, 4 * quad + k]
            }
            bits = sum(1 << bit for bit in there)
            words += [bits & 0xFFFFFFFF, bits >> 32]
            halves = [there[bit] for bit in sorted(there)] + [0] * (len(there) % 2)
            packed += [low | high << 4 for low, high in zip(halves[::2], halves[1::2], strict=True)]
        offsets.append(len(packed))
    raw = bytes(data.tolist())
    assert struct.unpack_from("<8siiqqqqq", raw) == (
        b"RACpack1",
        4,
        0,
        20,
        40,
        int(mask.sum()),
        len(packed),
        5,
    )
    assert struct.unpack_from("<3Q", raw, 64) == tuple(offsets)
    assert list(struct.unpack_from("<64I", raw, 128)) == words
    for row in range(20):
        at = 384 + row // 16 * 5 * 16 + row % 16
        assert [raw[at + 16 * group] for group in range(5)] == zeros[row].tolist()
    assert list(raw[384 + 192 : 384 + 192 + len(packed)]) == packed
    whole = pack_dense(torch.arange(-8, 8, dtype=torch.int8).repeat(16, 1), 4)
    assert whole.numel() == 64 + 64 + 16 * 64 // 2 + 64
    row = bytes(whole.tolist())[
        128 + 4 * 3 : 128 + 4 * 3 + 4
    ]  # row 3: columns 0 to 3 are low, 4 to 7 high
    assert list(row) == [column | (column + 4) << 4 for column in range(4)]


def test_forged_data_is_refused(best):
    _, weight = weight_of(40, 64, 0.5, 2, True)
    data = weight.data

    def forged(at: int, value: int) -> Tensor:
        copy = data.clone()
        copy[at] = value
        return copy

    check_packed(data, 40, 64, torch.int8, bits=4)
    zeros_at = 64 + 64 + 3 * 32 * 4
    for at, value, message in (
        (zeros_at + 5, 16, "a code of zero is 16"),
        (48, 3, "impossible sizes"),  # groups of zeros
        (40, int(data[40]) - 1, "bytes where its header needs|last offset"),  # bytes of codes
        (72, (int(data[72]) + 1) % 256, "panel 0: its masks and its offset disagree"),
        (
            32,
            int(data[32]) ^ 1,
            "last offset is not the number",
        ),  # values, of which two share a byte
    ):
        with pytest.raises(RacError, match=message):
            check_packed(forged(at, value), 40, 64, torch.int8, bits=4)
    with pytest.raises(RacError, match="its header says"):
        check_packed(data, 40, 64, torch.int8)
    with pytest.raises(RacError, match="values are bfloat16, float32 or int8"):
        check_packed(data, 40, 64, torch.float32, bits=4)
    with pytest.raises(RacError, match="its header says"):
        unpack(data, 40, 72)


def test_what_does_not_fit_is_refused(best):
    values = torch.full((16, 64), 8, dtype=torch.int8)  # -8 to 7 fit
    with pytest.raises(RacError, match="does not fit 4 bits"):
        pack_dense(values, 4)
    mask = torch.ones(16, 64, dtype=torch.bool)
    with pytest.raises(RacError, match="does not fit 4 bits"):
        pack_values(values[mask], bitmask_of(mask), 64, 4)
    fine = values - 8
    for zeros in (
        torch.full((16, 3), 8, dtype=torch.uint8),
        torch.full((32, 1), 8, dtype=torch.uint8),
        torch.full((16, 1), 8, dtype=torch.int8),
    ):
        with pytest.raises(RacError, match=r"zeros: .* need uint8"):
            pack_dense(fine, 4, zeros)
    with pytest.raises(RacError, match=r"zeros: .* need uint8"):
        pack_dense(fine, 8, torch.full((16, 1), 8, dtype=torch.uint8))
    with pytest.raises(
        RacError, match="impossible"
    ):  # groups of zeros must have a multiple of 8 columns
        pack_dense(fine, 4, torch.full((16, 16), 8, dtype=torch.uint8))
    weight, x = (
        Packed(pack_dense(fine, 4, torch.full((16, 2), 8, dtype=torch.uint8)), 16, 64),
        torch.randn(1, 64),
    )
    with pytest.raises(RacError, match="scale: missing"):
        multiply(x, weight)
    with pytest.raises(RacError, match="1 groups, where the weight's zeros have 2"):
        multiply(x, weight, None, pack_scale(torch.ones(16, 1)))
    with pytest.raises(RacError, match="groups of 4 columns; they must have a multiple of 8"):
        multiply(x, Packed(pack_dense(fine, 4), 16, 64), None, pack_scale(torch.ones(16, 16)))
    eight = Packed(pack_dense(fine), 16, 64)
    with pytest.raises(RacError, match="an 8-bit weight needs one in fp32"):
        multiply(x, eight, None, pack_scale(torch.ones(16, 1)).bfloat16())


def test_torch_checks_the_operator(best):
    _, weight = weight_of(16, 32, 0.5)
    arguments = (
        torch.randn(2, 32),
        weight.data,
        16,
        32,
        torch.randn(16),
        pack_scale(torch.ones(16, 1), narrow=True),
    )
    torch.library.opcheck(torch.ops.rac_modifier.sparse_linear, arguments)
