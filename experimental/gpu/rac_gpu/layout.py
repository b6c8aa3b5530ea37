"""Weights in the order in which the lanes of a GPU's warp read them. rac_gpu/source/*.cu describe the layouts.

Pure functions of tensors, on the device that these are on. Of 2:4 weights, a tile is 16 rows, a unit a tile's next 64 (bf16) or
128 (int8, fp8, int4) columns; rows are padded to 16 and columns to 128 or 256 (int4) with zeros. `unstructured.py` has all
others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_zeros

from rac_gpu import schedule, unstructured
from rac_modifier.errors import RacError
from rac_modifier.formats.stored_weight import FLOATS, StoredWeight

TILE = 16  # rows
GROUPS = (64, 128)  # columns that may share a scale
_ROWS_AT_ONCE = 1024  # bounds the memory that packing needs beside its result


@dataclass(frozen=True)
class Layout:
    """A packed form. `unit_columns` columns of a tile take `unit_bytes`; rows have a multiple of `units_at_once` units.

    `bits`: of a value. `group`: columns that share a scale; 0 for bf16, and for int8 and fp8 (e4m3) with one per row, which is
    `row_scales`. `source` has the kernels, compiled with the macros of `defines`; their names begin with `prefix`. `title` is for
    people. `dtype`: of the packed form. `scale_bytes`: of one of a group, 2 (bfloat16) or 4 (float32). A weight of any pattern
    has units of 128 bytes, as many as it needs, `unit_columns` 0, and `streams`.
    """

    prefix: str
    source: str
    unit_columns: int
    unit_bytes: int
    units_at_once: int
    group: int = 0
    title: str = "2:4"
    streams: schedule.Streams | None = None
    bits: int = 16
    e4m3: bool = False
    dtype: torch.dtype = torch.uint8
    scale_bytes: int = 4

    @property
    def defines(self) -> tuple[str, ...]:
        """Macros for the compiler."""
        every = {
            f"GROUP={self.group}": self.group,
            "E4M3": self.e4m3,
            "BF16_SCALES": self.scale_bytes == 2,
        }
        return tuple(macro for macro, wanted in every.items() if wanted)

    @property
    def row_scales(self) -> bool:
        """Whether a row has one scale, behind all units."""
        return self.bits == 8 and not self.group

    def padded_columns(self, columns: int) -> int:
        """Columns with their padding."""
        return (
            unstructured.padded_columns(columns)
            if self.any_pattern
            else self.units(columns) * self.unit_columns
        )

    def units(self, columns: int) -> int:
        """Units of a tile with this many columns, padding included."""
        return -(-columns // (self.unit_columns * self.units_at_once)) * self.units_at_once

    @property
    def any_pattern(self) -> bool:
        """Whether it holds weights that are not 2:4."""
        return self.streams is not None

    @property
    def tile_rows(self) -> int:
        """Rows that are packed together."""
        return unstructured.TILE if self.any_pattern else TILE

    @property
    def expanded_rows(self) -> int:
        """Rows that are expanded together."""
        return unstructured.SORTED if self.any_pattern else TILE

    def nbytes(self, rows: int, columns: int, density: float = 0.5) -> int:
        """Bytes of a packed weight [rows, columns]; where it holds any pattern, those that are expected."""
        if self.streams is not None:
            return unstructured.expected_bytes(rows, columns, density, self.streams)
        return -(-rows // TILE) * (
            self.units(columns) * self.unit_bytes + self.row_scales * TILE * 4
        )


def _scale_bytes(group: int, each: int = 4) -> int:
    """Of a unit of 128 columns; `each`: of one scale."""
    return each * TILE * 128 // group


BF16 = Layout("rac_24_bf16", "sparse24_bf16.cu", 64, 1152, 2)
_INT4 = Layout(
    "rac_24_int4", "sparse24_int4.cu", 128, 768, 2, title="2:4 int4", bits=4, scale_bytes=2
)
INT4 = {g: replace(_INT4, unit_bytes=768 + _scale_bytes(g, 2), group=g) for g in GROUPS}
_INT4_FP32 = replace(_INT4, title="2:4 int4 with fp32 scales", scale_bytes=4)
INT4_FP32_SCALES = {
    g: replace(_INT4_FP32, unit_bytes=768 + _scale_bytes(g), group=g) for g in GROUPS
}
"""For scales that bfloat16 does not hold exactly, such as those of float16."""
INT8 = Layout("rac_24_8bit", "sparse24_8bit.cu", 128, 1280, 1, title="2:4 int8", bits=8)
E4M3 = replace(INT8, title="2:4 fp8", e4m3=True, dtype=torch.uint32)
INT8_GROUPS = {
    group: replace(INT8, unit_bytes=1280 + _scale_bytes(group), group=group) for group in GROUPS
}
E4M3_GROUPS = {
    group: replace(E4M3, unit_bytes=1280 + _scale_bytes(group), group=group) for group in GROUPS
}


def _any_pattern(values: str, title: str, streams: schedule.Streams) -> Layout:
    prefix, source = f"rac_unstructured_{values}", f"unstructured_{values}.cu"
    of_e4m3, dtype = streams.dtype == torch.float8_e4m3fn, unstructured.PACKED[streams]
    bits = streams.value_bits
    return Layout(
        prefix,
        source,
        0,
        schedule.LINE,
        1,
        streams.scale_columns,
        title,
        streams,
        bits,
        of_e4m3,
        dtype,
    )


UNSTRUCTURED = _any_pattern("bf16", "unstructured", schedule.BF16)
UNSTRUCTURED_INT8 = _any_pattern("8bit", "unstructured int8", schedule.INT8)
UNSTRUCTURED_E4M3 = _any_pattern("8bit", "unstructured fp8", schedule.E4M3)
UNSTRUCTURED_INT8_GROUPS = {
    g: _any_pattern("8bit", "unstructured int8", schedule.INT8_GROUPS[g]) for g in GROUPS
}
UNSTRUCTURED_E4M3_GROUPS = {
    g: _any_pattern("8bit", "unstructured fp8", schedule.E4M3_GROUPS[g]) for g in GROUPS
}
UNSTRUCTURED_INT4 = {
    group: _any_pattern("int4", "unstructured int4", schedule.INT4[group]) for group in GROUPS
}
# By dtype of the values, and whether the weight is 2:4; then by the columns that share a scale, 0 for all.
_QUANTIZED = {
    (torch.int8, True): {0: INT8, **INT8_GROUPS},
    (torch.int8, False): {0: UNSTRUCTURED_INT8, **UNSTRUCTURED_INT8_GROUPS},
    (torch.float8_e4m3fn, True): {0: E4M3, **E4M3_GROUPS},
    (torch.float8_e4m3fn, False): {0: UNSTRUCTURED_E4M3, **UNSTRUCTURED_E4M3_GROUPS},
    (torch.int32, True): INT4,
    (torch.int32, False): UNSTRUCTURED_INT4,
}
ALL = (
    *(BF16, UNSTRUCTURED),
    *(layout for by_group in _QUANTIZED.values() for layout in by_group.values()),
    *INT4_FP32_SCALES.values(),
)
"""Every layout; the operator is told the number of one."""


def layout_of(
    stored: torch.dtype, group: int, columns: int, two_of_four: bool = True, scale_bytes: int = 2
) -> Layout | None:
    """The layout of values of this dtype (int32: of four bits) of which `group` columns share a scale; None if there is none.

    `scale_bytes`: the fewest that hold a scale exactly, 2 (bfloat16) or 4.
    """
    if stored in FLOATS:
        return BF16 if two_of_four else UNSTRUCTURED
    layouts = _QUANTIZED.get((stored, two_of_four), {})
    if layouts is INT4 and scale_bytes > 2:
        layouts = INT4_FP32_SCALES
    if group == columns and 0 in layouts:
        return layouts[0]
    return next(
        (
            layouts[g]
            for g in reversed(GROUPS)
            if g in layouts and (group % g == 0 or group == columns)
        ),
        None,
    )


def fits(layout: Layout, packed: Tensor, rows: int, columns: int) -> bool:
    """Whether a tensor has the form of what `pack` returns in this layout for a weight [rows, columns]."""
    nbytes = packed.numel() * packed.element_size()
    if packed.dim() != 1 or packed.dtype != layout.dtype:
        return False
    if layout.streams is None:
        return nbytes == layout.nbytes(rows, columns)
    enough = nbytes >= unstructured.least_bytes(rows, columns, layout.streams)
    return enough and nbytes % schedule.LINE == 0 and columns <= unstructured.MOST_COLUMNS


def units_of(layout: Layout, packed: Tensor, columns: int) -> int:
    """What a kernel is told of the size of a packed weight: units of a tile, or of all where there is any pattern."""
    return (
        packed.numel() * packed.element_size() // schedule.LINE
        if layout.any_pattern
        else layout.units(columns)
    )


def pack(weight: StoredWeight, layout: Layout) -> Tensor:
    """The packed form, 1-D, in the layout's dtype.

    Values of other float dtypes are rounded to bfloat16.

    Raises:
        RacError: a weight that is not 2:4, or values or scales that the layout does not hold.
    """
    if layout.streams is not None:
        return unstructured.pack(weight, layout.streams)
    name, group = weight.name, weight.group
    if not weight.two_of_four:
        raise RacError(
            f"{name}: more than two of four columns are stored; keep it dense, the layout is for 2:4 weights"
        )
    scaled = layout.bits < 16
    held = (torch.float8_e4m3fn,) if layout.e4m3 else (torch.int8,) if scaled else FLOATS
    if scaled == (weight.scale is None) or weight.values.dtype not in held:
        raise RacError(
            f"{name}: values of {weight.values.dtype}, which the layout {layout.title} does not hold; keep it dense"
        )
    if scaled and group != weight.columns and (layout.row_scales or group % layout.group):
        per = layout.group or "row"
        raise RacError(
            f"{name}: a scale per {group} columns, where the layout has one per {per}; keep it dense"
        )
    if weight.zeros is not None:
        raise RacError(
            f"{name}: zero points, for which there is no GPU kernel; quantize symmetrically, or keep it dense"
        )
    if layout.scale_bytes == 2 and weight.group_bytes > 2:
        raise RacError(
            f"{name}: scales that bfloat16 does not hold exactly; pack it in the layout {layout.title} with fp32 scales"
        )
    unstructured.check_values(weight, layout.bits)
    parts = [_pack_rows(part, layout) for part in _parts(weight)]
    if layout.row_scales and weight.scale is not None:
        parts.append(
            pad_zeros(weight.scale[:, 0].float(), (0, -weight.rows % TILE)).view(torch.uint8)
        )
    return torch.cat(parts).view(layout.dtype)


def _parts(weight: StoredWeight) -> list[StoredWeight]:
    numbers = torch.arange(weight.rows)
    return [weight.select_rows(rows) for rows in numbers.split(_ROWS_AT_ONCE)]


def _pack_rows(weight: StoredWeight, layout: Layout) -> Tensor:
    rows, columns = (
        -(-weight.rows // TILE) * TILE,
        layout.units(weight.columns) * layout.unit_columns,
    )
    padding = (0, columns - weight.columns, 0, rows - weight.rows)
    bits = torch.arange(8, dtype=torch.uint8, device=weight.bitmask.device)
    stored = (weight.bitmask.unsqueeze(-1) >> bits & 1).bool().flatten(1)[:, : weight.columns]
    s0, s1, _, s3 = pad_zeros(stored, padding).view(rows, -1, 4).unbind(-1)
    dense = weight.dense().view(torch.int8) if layout.e4m3 else weight.dense()
    d0, d1, d2, d3 = pad_zeros(dense, padding).view(rows, -1, 4).unbind(-1)
    # Where the two values are: i0 < i1, also where fewer than two are stored; as torch's converter for CUTLASS has it.
    last, both = s3 | ~(s0 | s1), s0 & s1
    first = torch.where(s0, d0, torch.where(s1, d1, d2))
    second = torch.where(both, d1, torch.where(last, d3, d2))
    i0 = 2 - 2 * s0.int() - (s1 & ~s0).int()
    i1 = 2 - both.int() + (last & ~both).int()
    products = columns // 32 // layout.units(weight.columns)  # of a unit
    # tile, h, g (row g + 8 h), unit, product, q, t (four t + 4 q of a product's eight)
    shape = (rows // TILE, 2, 8, -1, products, 2, 4)
    values = torch.stack([first, second], dim=-1).view(*shape, 2)
    in_order: dict[int, Callable[[Tensor], Tensor]] = {
        4: _int4_values,
        8: partial(_bytes, e4m3=layout.e4m3),
        16: _bf16_values,
    }
    parts = [in_order[layout.bits](values), _metadata((i0 | i1 << 2).view(shape))]
    if layout.group:
        parts.append(_scales(weight, layout, rows))
    return torch.cat(parts, dim=-1).flatten()


def _bf16_values(values: Tensor) -> Tensor:
    """Bytes [tiles, units, 1024]: product, lane (g, t), register (q, h), value."""
    ordered = values.to(torch.bfloat16).permute(0, 3, 4, 2, 6, 5, 1, 7).contiguous()
    return ordered.view(torch.uint8).flatten(2)


def _bytes(values: Tensor, e4m3: bool) -> Tensor:
    """Bytes [tiles, units, 1024]: pair of products, lane (g, t), product, q; byte 2 b + h, of int8 plus 128."""
    ordered = values.unflatten(4, (2, 2)).permute(0, 3, 4, 2, 7, 5, 6, 8, 1).contiguous()
    return (ordered.view(torch.uint8) ^ (0 if e4m3 else 128)).flatten(2)


def _int4_values(values: Tensor) -> Tensor:
    """Bytes [tiles, units, 512]: lane (g, t), product; nibble r + 4 b is value b of register r = h + 2 q, plus 8."""
    words = values.new_zeros(values.shape[0], *values.shape[2:5], 4, dtype=torch.int64)
    for h in range(2):
        for q in range(2):
            for b in range(2):
                words |= (values[:, h, :, :, :, q, :, b].long() + 8) << 4 * (h + 2 * q + 4 * b)
    return _bytes_of(words.permute(0, 2, 1, 4, 3))


def _metadata(nibbles: Tensor) -> Tensor:
    """Bytes [tiles, units, 64 per product]: pair of products, lane (g, 2 of the pair, q); bits 16 h + 4 t."""
    words = nibbles.new_zeros(nibbles.shape[0], *nibbles.shape[2:6], dtype=torch.int64)
    for h in range(2):
        for t in range(4):
            words |= nibbles[:, h, ..., t].long() << 16 * h + 4 * t
    return _bytes_of(words.unflatten(3, (-1, 2)).permute(0, 2, 3, 1, 4, 5))


def _scales(weight: StoredWeight, layout: Layout, rows: int) -> Tensor:
    """Bytes [tiles, units, 16 scales per group]: group, row of the tile; in bfloat16 rows g and g + 8 side by side."""
    assert weight.scale is not None
    wide = weight.scale
    if wide.shape[1] > 1 and weight.group > layout.group:
        wide = wide.repeat_interleave(weight.group // layout.group, dim=1)
    per_unit = layout.unit_columns // layout.group
    groups = layout.units(weight.columns) * per_unit
    if wide.shape[1] == 1:
        wide = wide.expand(-1, groups)
    padded = pad_zeros(wide.float(), (0, groups - wide.shape[1], 0, rows - weight.rows))
    ordered = padded.view(rows // TILE, TILE, -1, per_unit).permute(0, 2, 3, 1).contiguous()
    if layout.scale_bytes == 2:
        ordered = ordered.bfloat16().unflatten(-1, (2, 8)).transpose(-1, -2).contiguous()
    return ordered.view(torch.uint8).flatten(2)


def _bytes_of(words: Tensor) -> Tensor:
    """32-bit words as bytes; everything behind tiles and units in one dimension."""
    signed = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    return signed.contiguous().view(torch.uint8).flatten(2)
