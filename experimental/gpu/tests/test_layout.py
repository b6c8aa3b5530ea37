"""The packed layouts against references that are written here, and the metadata against torch's converter for CUTLASS."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rac_gpu.layout import (
    BF16,
    INT4,
    INT4_FP32_SCALES,
    INT8,
    INT8_GROUPS,
    layout_of,
    pack,
)
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from rac_modifier.errors import RacError
from rac_modifier.formats.stored_weight import StoredWeight, from_dense
from tests.weights import (
    bf16_weight,
    grouped_weight,
    int4_weight,
    int8_weight,
    kept_of_four,
)


def words_of(packed: Tensor) -> Tensor:
    """Little-endian 32-bit words as int64."""
    return packed.view(torch.int32).long() & 0xFFFFFFFF


def element(
    tile: int, row: int, column: int, units: int, unit_columns: int, unit_bytes: int
) -> tuple[int, int, int, int]:
    """Where a weight is: byte of its unit; product, four of eight and place in the four."""
    unit, inside = divmod(column, unit_columns)
    product, in_product = divmod(inside, 32)
    return (tile * units + unit) * unit_bytes, product, in_product // 4, in_product % 4


def unpack_slowly(
    packed: Tensor, rows: int, columns: int, group: int, fp32_scales: bool = False
) -> Tensor:
    """The dense weight in float64, read number by number as the tables in rac_gpu/source/ say where each one is."""
    of_scales = 64 if fp32_scales else 32
    unit_columns, unit_bytes = (128, 768 + of_scales * 128 // group) if group else (64, 1152)
    at_once = 2 * unit_columns
    units = -(-columns // at_once) * 2
    assert packed.numel() == -(-rows // 16) * units * unit_bytes
    words, floats = words_of(packed).tolist(), packed.view(torch.float32).tolist()
    halves = packed.view(torch.bfloat16).double().tolist()
    dense = torch.zeros(rows, columns, dtype=torch.float64)
    for row in range(rows):
        tile, in_tile = divmod(row, 16)
        g, h = in_tile % 8, in_tile // 8
        for column in range(0, columns, 4):
            start, product, four, _ = element(tile, row, column, units, unit_columns, unit_bytes)
            lane, register = 4 * g + four % 4, h + 2 * (four // 4)
            holder = 4 * g + 2 * (product % 2) + four // 4  # of the metadata
            metadata_at = start + (512 + 128 * (product // 2) if group else 1024) + 4 * holder
            places = words[metadata_at // 4] >> (16 * h + 4 * (four % 4)) & 15
            for value, place in enumerate((places & 3, places >> 2)):
                if group:
                    nibble = (
                        words[(start + 16 * lane + 4 * product) // 4] >> 4 * (register + 4 * value)
                        & 15
                    )
                    scales_at = start + 768 + of_scales * (product * 32 // group)
                    scale = (
                        floats[scales_at // 4 + in_tile]
                        if fp32_scales
                        else halves[scales_at // 2 + 2 * g + h]
                    )
                    number = scale * (nibble - 8)
                else:
                    number = halves[(start + 512 * product + 16 * lane + 4 * register) // 2 + value]
                dense[row, column + place] = number
    return dense


def exact(weight: StoredWeight) -> Tensor:
    """The dense weight, scaled in float64."""
    assert weight.scale is not None
    return weight.dense().double() * weight.scale.double().repeat_interleave(weight.group, dim=1)


@pytest.mark.parametrize(("rows", "columns"), [(16, 128), (37, 200), (5, 4), (48, 392)])
def test_bf16_is_where_the_table_says(rows, columns):
    weight = bf16_weight(rows, columns)
    assert torch.equal(
        unpack_slowly(pack(weight, BF16), rows, columns, 0), weight.dequantized(torch.float64)
    )


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize(("rows", "columns"), [(16, 256), (37, 384)])
def test_int4_is_where_the_table_says(rows, columns, group):
    weight = int4_weight(rows, columns, group)
    found = unpack_slowly(pack(weight, INT4[group]), rows, columns, group)
    assert torch.equal(found, exact(weight))
    weight = int4_weight(rows, columns, group, scales=torch.float16)
    found = unpack_slowly(
        pack(weight, INT4_FP32_SCALES[group]), rows, columns, group, fp32_scales=True
    )
    assert torch.equal(found, exact(weight))


def test_int4_takes_the_bytes_of_its_values_metadata_and_16_bit_scales():
    """A weight of 2:4: half of 4 bits, half of 2 bits, and a scale per group."""
    for group in (64, 128):
        packed = pack(int4_weight(64, 1024, group), INT4[group])
        assert packed.numel() == 64 * 1024 * (4 / 2 + 2 / 2 + 16 / group) / 8
        packed = pack(int4_weight(64, 1024, group, scales=torch.float32), INT4_FP32_SCALES[group])
        assert packed.numel() == 64 * 1024 * (4 / 2 + 2 / 2 + 32 / group) / 8


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_scales_that_bfloat16_does_not_hold_are_refused_rather_than_rounded(dtype):
    weight = int4_weight(16, 256, 128, scales=dtype)
    with pytest.raises(
        RacError,
        match="layer: scales that bfloat16 does not hold exactly; pack it in the layout 2:4 int4",
    ):
        pack(weight, INT4[128])
    one = weight.scale.bfloat16().float()
    one[3, 1] = 1 + 2.0**-8  # a single one, half a step beside a bfloat16
    with pytest.raises(RacError, match="scales that bfloat16 does not hold"):
        pack(replace(weight, scale=one), INT4[128])
    one[3, 1] = 1 + 2.0**-7
    weight = replace(weight, scale=one)
    assert torch.equal(unpack_slowly(pack(weight, INT4[128]), 16, 256, 128), exact(weight))


@pytest.mark.parametrize(("rows", "columns"), [(16, 256), (37, 392), (5, 4)])
@pytest.mark.parametrize("group", [0, 64, 128])
def test_int8_is_where_the_table_says(rows, columns, group):
    """Read number by number, as the table in rac_gpu/source/sparse24_8bit.cu says."""
    weight = int8_weight(rows, columns, kept_of_four(rows, columns).float())
    if group:
        weight = grouped_weight(
            int8_weight, group, rows, columns, kept_of_four(rows, columns).float()
        )
    columns, layout = weight.columns, INT8_GROUPS[group] if group else INT8
    packed = pack(weight, layout)
    units, tiles, unit_bytes = (
        -(-columns // 128),
        -(-rows // 16),
        1280 + (64 * 128 // group if group else 0),
    )
    assert (
        packed.numel()
        == tiles * (units * unit_bytes + (0 if group else 64))
        == layout.nbytes(rows, columns)
    )
    words, values, floats = (
        words_of(packed).tolist(),
        packed.tolist(),
        packed.view(torch.float32).tolist(),
    )
    if not group:
        scales = packed[tiles * units * 1280 :].clone().view(torch.float32)
        assert torch.equal(scales[:rows], weight.scale[:, 0])
        assert not scales[rows:].any()
    dense, scale = torch.zeros(rows, columns, dtype=torch.int8), torch.zeros(rows, columns)
    for row in range(rows):
        tile, in_tile = divmod(row, 16)
        g, h = in_tile % 8, in_tile // 8
        for column in range(0, columns, 4):
            start, product, four, _ = element(tile, row, column, units, 128, unit_bytes)
            if group:
                scale[row, column : column + 4] = floats[
                    (start + 1280 + 64 * (product * 32 // group) + 4 * in_tile) // 4
                ]
            lane, q = 4 * g + four % 4, four // 4
            holder = 4 * g + 2 * (product % 2) + q  # of the metadata
            places = (
                words[(start + 1024 + 128 * (product // 2) + 4 * holder) // 4]
                >> (16 * h + 4 * (four % 4))
                & 15
            )
            for value, place in enumerate((places & 3, places >> 2)):
                at = (
                    start
                    + 512 * (product // 2)
                    + 16 * lane
                    + 8 * (product % 2)
                    + 4 * q
                    + 2 * value
                    + h
                )
                if column + place < columns:
                    dense[row, column + place] = values[at] - 128
    assert torch.equal(dense, weight.dense())
    assert not group or torch.equal(scale, weight.scale.repeat_interleave(group, dim=1))


@pytest.mark.parametrize(("group", "groups"), [(64, 3), (128, 1), (128, 2), (64, 1)])
def test_wider_groups_and_one_scale_per_row_repeat_their_scales(group, groups):
    columns = 192 * groups if groups == 3 else 256 * groups
    weight = replace(
        int4_weight(16, columns, 64), scale=(torch.rand(16, groups) + 0.1).bfloat16().float()
    )
    assert layout_of(torch.int32, weight.group, columns) is not None
    found = unpack_slowly(pack(weight, INT4[group]), 16, columns, group)
    assert torch.equal(found, exact(weight))


@pytest.mark.parametrize("most", [0, 1, 2])
def test_metadata_is_that_of_torchs_converter(most):
    """CUTLASS loads 64 half words of metadata with one ldmatrix: lane l gets half words 2l and 2l + 1, of 32 rows and 32
    columns. Lanes with t < 2 have rows 0 to 15 (selector 0), the others rows 16 to 31 (selector 1)."""
    dense = torch.randn(32, 256).to(torch.bfloat16).masked_fill_(~kept_of_four(32, 256, most), 0.0)
    ours = words_of(pack(from_dense(dense, "w"), BF16)).view(2, 4, 288)[
        ..., 256:
    ]  # tile, unit, lane
    for tile in range(2):
        for unit in range(4):
            # The two products of a unit, one below the other, are 32 rows and 32 columns; CUTLASS wants 64 columns.
            columns = dense[16 * tile : 16 * tile + 16, 64 * unit : 64 * unit + 64]
            block = torch.zeros(32, 64, dtype=torch.bfloat16)
            block[:16, :32], block[16:, :32] = columns[:, :32], columns[:, 32:]
            _, theirs = sparse_semi_structured_from_dense_cutlass(block)
            halves = theirs.flatten()[:64].long() & 0xFFFF
            assert torch.equal(halves[0::2] | halves[1::2] << 16, ours[tile, unit])


def test_metadata_is_ordered_whatever_is_stored():
    """All sixteen patterns that four columns can have, of which those of three or four are refused."""
    for pattern in range(16):
        stored = [bool(pattern >> i & 1) for i in range(4)]
        dense = torch.tensor([stored], dtype=torch.bfloat16)
        if sum(stored) > 2:
            with pytest.raises(RacError, match="w: more than two of four columns are stored"):
                pack(from_dense(dense, "w"), BF16)
            continue
        packed = pack(from_dense(dense, "w"), BF16)
        nibble = int(packed[1024]) & 15
        assert (nibble & 3) < nibble >> 2
        assert torch.equal(unpack_slowly(packed, 1, 4, 0), dense.double())


def test_stored_zeros_and_signs_are_kept():
    dense = torch.tensor([[-0.0, 1.0, 0.0, 0.0], [0.0, -0.0, 0.0, -2.0]]).to(torch.bfloat16)
    packed = pack(from_dense(dense, "w"), BF16)
    assert torch.equal(unpack_slowly(packed, 2, 4, 0), dense.double())
    assert int((packed.view(torch.int16) == -32768).sum()) == 2  # -0.0


def test_many_rows_are_packed_in_parts():
    weight = bf16_weight(2064, 8)
    whole = pack(weight, BF16)
    parts = [
        pack(weight.select_rows(torch.arange(first, min(first + 16, 2064))), BF16)
        for first in range(0, 2064, 16)
    ]
    assert torch.equal(whole, torch.cat(parts))
