"""The packed layout against a reference that is written here, and the metadata against torch's converter for CUTLASS."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rac_gpu.check import random_weight
from rac_gpu.layout import group_of, pack
from torch import Tensor
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from rac_modifier.errors import RacError
from rac_modifier.formats.stored_weight import StoredWeight


def words_of(packed: Tensor) -> Tensor:
    """Little-endian 32-bit words as int64."""
    return packed.view(torch.int32).long() & 0xFFFFFFFF


def unpack_slowly(packed: Tensor, rows: int, columns: int, group: int) -> Tensor:
    """The dense weight in float64, read number by number as the table in rac_gpu/source/decode.cu says."""
    units, unit_bytes = -(-columns // 256) * 2, 768 + 32 * 128 // group
    assert packed.numel() == -(-rows // 16) * units * unit_bytes
    words, halves = words_of(packed).tolist(), packed.view(torch.bfloat16).double().tolist()
    dense = torch.zeros(rows, columns, dtype=torch.float64)
    for row in range(rows):
        tile, in_tile = divmod(row, 16)
        g, h = in_tile % 8, in_tile // 8
        for column in range(0, columns, 4):
            unit, inside = divmod(column, 128)
            start = (tile * units + unit) * unit_bytes
            product, four = inside // 32, inside % 32 // 4
            holder = 4 * g + 2 * (product % 2) + four // 4  # the lane that has the metadata
            metadata = words[(start + 512 + 128 * (product // 2) + 4 * holder) // 4]
            places = metadata >> (16 * h + 4 * (four % 4)) & 15
            word = words[(start + 16 * (4 * g + four % 4) + 4 * product) // 4]
            scale = halves[(start + 768 + 32 * (product * 32 // group)) // 2 + 2 * g + h]
            for value, place in enumerate((places & 3, places >> 2)):
                nibble = word >> 4 * (h + 2 * (four // 4) + 4 * value) & 15
                dense[row, column + place] = scale * (nibble - 8)
    return dense


def exact(weight: StoredWeight) -> Tensor:
    """The dense weight, scaled in float64."""
    return weight.dense().double() * weight.scale.double().repeat_interleave(weight.group, dim=1)


@pytest.mark.parametrize("group", [64, 128])
@pytest.mark.parametrize(("rows", "columns", "most"), [(16, 256, 2), (37, 384, 2), (5, 128, 1)])
def test_each_weight_is_where_the_table_says(rows, columns, most, group):
    weight = random_weight(rows, columns, group, most)
    assert torch.equal(unpack_slowly(pack(weight, group), rows, columns, group), exact(weight))


@pytest.mark.parametrize(("group", "groups"), [(64, 3), (128, 1), (128, 2), (64, 1)])
def test_wider_groups_and_one_scale_per_row_repeat_their_scales(group, groups):
    columns = 192 * groups if groups == 3 else 256 * groups
    scale = (torch.rand(16, groups) + 0.1).bfloat16().float()
    weight = replace(random_weight(16, columns, 64), scale=scale)
    assert group_of(weight.group, columns) is not None
    assert torch.equal(unpack_slowly(pack(weight, group), 16, columns, group), exact(weight))


@pytest.mark.parametrize("most", [0, 1, 2])
def test_metadata_is_that_of_torchs_converter(most):
    """CUTLASS loads 64 half words of metadata with one ldmatrix: lane l gets half words 2l and 2l + 1, of 32 rows and 32
    columns. Lanes with t < 2 have rows 0 to 15 (selector 0), the others rows 16 to 31 (selector 1)."""
    weight = random_weight(32, 256, 128, most)
    ours = words_of(pack(weight, 128)).view(2, 2, 200)[..., 128:192].unflatten(-1, (2, 32))
    dense = weight.dense().to(torch.bfloat16)
    for tile in range(2):
        for pair in range(4):  # of products
            # One below the other, they are 32 rows and 32 columns; CUTLASS wants 64 columns.
            columns = dense[16 * tile : 16 * tile + 16, 64 * pair : 64 * pair + 64]
            block = torch.zeros(32, 64, dtype=torch.bfloat16)
            block[:16, :32], block[16:, :32] = columns[:, :32], columns[:, 32:]
            _, theirs = sparse_semi_structured_from_dense_cutlass(block)
            halves = theirs.flatten()[:64].long() & 0xFFFF
            assert torch.equal(halves[0::2] | halves[1::2] << 16, ours[tile, pair // 2, pair % 2])


def test_what_the_layout_does_not_hold_is_refused():
    weight = random_weight(16, 256, 128)
    one = weight.scale.clone()
    one[3, 1] = 1 + 2.0**-8  # half a step beside a bfloat16
    for other in (
        replace(weight, scale=one),
        replace(weight, zeros=torch.ones(16, 2, dtype=torch.uint8)),
        replace(weight, bits=8),
        random_weight(16, 256, 128, most=3),
        random_weight(16, 256, 32),
    ):
        with pytest.raises(RacError, match=r"random: .* keep the layer dense"):
            pack(other, 128)
    weight.values[7] = 8
    with pytest.raises(RacError, match="random: values outside of -8 to 7"):
        pack(weight, 128)
