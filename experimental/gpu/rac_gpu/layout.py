"""2:4 weights of int4 in the order in which the lanes of a GPU's warp read them.

Pure functions of tensors; rac_gpu/source/decode.cu describes the layout. A tile is 16 rows, a unit a tile's next 128
columns; rows are padded to 16 and columns to 256 with zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_zeros

from rac_modifier.errors import RacError
from rac_modifier.formats.stored_weight import StoredWeight

TILE = 16  # rows
UNIT = 128  # columns
GROUPS = (128, 64)  # columns that may share a scale
_UNITS_AT_ONCE = 2
_ROWS_AT_ONCE = 1024  # bounds the memory that packing needs beside its result


def group_of(group: int, columns: int) -> int | None:
    """Return the group, 128 or 64, whose kernels take `group` columns per scale; None if there is none."""
    return next((g for g in GROUPS if group % g == 0 or group == columns), None)


def unit_bytes(group: int) -> int:
    """Return the bytes of a unit: values, metadata, and scales of 2 bytes."""
    return 768 + 2 * TILE * UNIT // group


def units(columns: int) -> int:
    """Return the units of a tile with this many columns, padding included."""
    return -(-columns // (UNIT * _UNITS_AT_ONCE)) * _UNITS_AT_ONCE


def packed_bytes(rows: int, columns: int, group: int) -> int:
    """Return the bytes of a packed weight [rows, columns]."""
    return -(-rows // TILE) * units(columns) * unit_bytes(group)


def pack(weight: StoredWeight, group: int) -> Tensor:
    """Pack a weight for the kernels of `group`: uint8, 1-D.

    Raises:
        RacError: a weight that is not 2:4, or values, zero points or scales that the layout does not hold.
    """
    fits = weight.scale is not None and weight.bits == 4 and weight.zeros is None
    in_groups = weight.group % group == 0 or weight.group == weight.columns
    if not (weight.two_of_four and fits and in_groups and weight.group_bytes == 2):
        raise RacError(
            f"{weight.name}: {weight.bits} bits, {weight.group} columns per scale; the GPU kernel takes 2:4 weights of "
            f"int4 without zero points, with scales that bfloat16 holds, one per row or per multiple of {group} columns; "
            "keep the layer dense"
        )
    if weight.values.numel() and not -8 <= int(weight.values.min()) <= int(weight.values.max()) < 8:
        raise RacError(f"{weight.name}: values outside of -8 to 7; the checkpoint is damaged")
    numbers = torch.arange(weight.rows)
    return torch.cat(
        [_pack_rows(weight.select_rows(rows), group) for rows in numbers.split(_ROWS_AT_ONCE)]
    )


def _pack_rows(weight: StoredWeight, group: int) -> Tensor:
    rows, unit_count = -(-weight.rows // TILE) * TILE, units(weight.columns)
    padding = (0, unit_count * UNIT - weight.columns, 0, rows - weight.rows)
    bits = torch.arange(8, dtype=torch.uint8)
    stored = (weight.bitmask.unsqueeze(-1) >> bits & 1).bool().flatten(1)[:, : weight.columns]
    s0, s1, _, s3 = pad_zeros(stored, padding).view(rows, -1, 4).unbind(-1)
    d0, d1, d2, d3 = pad_zeros(weight.dense(), padding).view(rows, -1, 4).unbind(-1)
    # Where the two values are: i0 < i1, also where fewer than two are stored; as torch's converter for CUTLASS has it.
    last, both = s3 | ~(s0 | s1), s0 & s1
    first = torch.where(s0, d0, torch.where(s1, d1, d2))
    second = torch.where(both, d1, torch.where(last, d3, d2))
    i0 = 2 - 2 * s0.int() - (s1 & ~s0).int()
    i1 = 2 - both.int() + (last & ~both).int()
    # tile, h, g (row g + 8 h), unit, product, q, t (four t + 4 q of a product's eight)
    shape = (rows // TILE, 2, 8, -1, 4, 2, 4)
    values = torch.stack([first, second], dim=-1).view(*shape, 2)
    parts = [_values(values), _metadata((i0 | i1 << 2).view(shape)), _scales(weight, group, rows)]
    return torch.cat(parts, dim=-1).flatten()


def _values(values: Tensor) -> Tensor:
    """Bytes [tiles, units, 512]: lane (g, t), product; nibble r + 4 b is value b of register r = h + 2 q, plus 8."""
    words = values.new_zeros(values.shape[0], *values.shape[2:5], 4, dtype=torch.int64)
    for h in range(2):
        for q in range(2):
            for b in range(2):
                words |= (values[:, h, :, :, :, q, :, b].long() + 8) << 4 * (h + 2 * q + 4 * b)
    return _bytes_of(words.permute(0, 2, 1, 4, 3))


def _metadata(nibbles: Tensor) -> Tensor:
    """Bytes [tiles, units, 256]: pair of products, lane (g, 2 of the pair, q); bits 16 h + 4 t."""
    words = nibbles.new_zeros(nibbles.shape[0], *nibbles.shape[2:6], dtype=torch.int64)
    for h in range(2):
        for t in range(4):
            words |= nibbles[:, h, ..., t].long() << 16 * h + 4 * t
    return _bytes_of(words.unflatten(3, (-1, 2)).permute(0, 2, 3, 1, 4, 5))


def _scales(weight: StoredWeight, group: int, rows: int) -> Tensor:
    """Bytes [tiles, units, 16 scales per group] in bfloat16: group, rows g and g + 8 side by side."""
    assert weight.scale is not None
    count = units(weight.columns) * UNIT // group
    wide = weight.scale.repeat_interleave(max(weight.group // group, 1), dim=1)
    wide = weight.scale.expand(-1, count) if weight.scale.shape[1] == 1 else wide
    padded = pad_zeros(wide.bfloat16(), (0, count - wide.shape[1], 0, rows - weight.rows))
    ordered = padded.view(rows // TILE, 2, 8, -1, UNIT // group).permute(0, 3, 4, 2, 1)
    return ordered.contiguous().view(torch.uint8).flatten(2)


def _bytes_of(words: Tensor) -> Tensor:
    """32-bit words as bytes; everything behind tiles and units in one dimension."""
    signed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return signed.contiguous().view(torch.uint8).flatten(2)
