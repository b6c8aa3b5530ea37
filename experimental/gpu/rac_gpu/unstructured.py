"""Weights of any pattern in the order in which the lanes of a GPU's warp read them.

rac_gpu/source/unstructured.h and the sources that include it have the layouts.
Pure functions of tensors, on the device that these are on. Of each 512 rows, those are neighbours that store about as much; rows
are padded to 32, columns to 128.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_zeros

from rac_gpu.schedule import (
    BF16,
    E4M3,
    E4M3_GROUPS,
    GROUP,
    INT4,
    INT8,
    INT8_GROUPS,
    LINE,
    QUAD,
    SEGMENTS,
    Streams,
    plan_of,
)
from rac_modifier.errors import RacError
from rac_modifier.formats.bitmask import row_counts
from rac_modifier.formats.stored_weight import FLOATS, StoredWeight

TILE = 32  # rows
SORTED = 512  # rows that are sorted together, so that a part of a weight, which is expanded, has whole ones of these
MOST_COLUMNS = 65536  # of all segments' steps
PACKED = {
    BF16: torch.int32,
    **dict.fromkeys((INT8, *INT8_GROUPS.values()), torch.int8),
    **dict.fromkeys((E4M3, *E4M3_GROUPS.values()), torch.uint16),
    INT4[64]: torch.int16,
    INT4[128]: torch.int64,
}
"""The dtype of what is packed."""
_WEIGHTS_AT_ONCE = 1 << 22  # bounds the memory that packing needs beside its result
# Standard deviations by which the largest of 64 or 32 normal numbers, the streams of a warp, is expected to be above their mean.
_LONGEST = {64: 2.35, 32: 2.07}


def expected_bytes(rows: int, columns: int, density: float, streams: Streams = BF16) -> int:
    """Bytes of a packed weight whose stored values are anywhere with equal probability. A weight with patterns takes more."""
    tiles, steps = -(-rows // TILE), streams.steps(columns) / SEGMENTS
    density *= rows * columns / (tiles * TILE * padded_columns(columns))  # with the padding
    places = steps * streams.places
    longest = min(
        places * density
        + _LONGEST[32 * streams.count] * math.sqrt(places * density * (1 - density)),
        places,
    )
    lines = longest / streams.per_line
    if streams.behind:  # the last value is anywhere in its line
        lines += streams.behind + (streams.per_line + 1) / (2 * streams.per_line)
    lines = lines + (GROUP - 1) / 2 if 0 < density < 1 else math.ceil(lines / GROUP) * GROUP
    of_scales = steps * streams.step / streams.scale_columns if streams.scale_columns else 0.0
    segment = LINE * (math.ceil(steps / LINE) + steps * streams.mask_lines + of_scales + lines)
    return tiles * round(_header_bytes(1, streams) + SEGMENTS * segment)


def least_bytes(rows: int, columns: int, streams: Streams = BF16) -> int:
    """Bytes of a packed weight that stores nothing: no packed weight has fewer."""
    tiles = -(-rows // TILE)
    steps = streams.steps(columns)
    of_scales = steps * streams.step // streams.scale_columns if streams.scale_columns else 0
    return _header_units(tiles, streams) * LINE + tiles * LINE * (
        steps * streams.mask_lines + of_scales
    )


def padded_columns(columns: int) -> int:
    """Columns with their padding."""
    return -(-columns // QUAD) * QUAD


def shared_bytes(token_tiles: int, streams: Streams = BF16) -> int:
    """Of shared memory, per block. A warp has the ring, its first lines again, eight lines of masks, the counts, and x.

    A ring in which lines are found by the bits of a number begins at a multiple of its size.
    """
    x = (streams.ahead + 1) * token_tiles * 8 * streams.step * 2
    size = (streams.ring + streams.repeated + 8) * LINE + streams.most_steps + x
    aligned = streams.ring * LINE if streams.behind else LINE
    return (SEGMENTS - 1) * (-(-size // aligned) * aligned) + size


def pack(weight: StoredWeight, streams: Streams = BF16) -> Tensor:
    """The packed form, 1-D, in the dtype that `PACKED` has for the streams. Values of other float dtypes are rounded to bfloat16.

    Raises:
        RacError: values that these streams do not hold, too many columns, or parts that contradict each other.
    """
    _check(weight, streams)
    rows, tiles = weight.rows, -(-weight.rows // TILE)
    counts = row_counts(weight.bitmask).split(SORTED)
    order = torch.cat(
        [SORTED * n + part.argsort(descending=True, stable=True) for n, part in enumerate(counts)]
    )
    at_once = max(1, _WEIGHTS_AT_ONCE // (weight.columns * TILE)) * TILE
    begin, entries, parts = _header_units(tiles, streams), [], []
    for part in order.split(at_once):
        index, data = _pack_rows(weight.select_rows(part), begin, streams)
        entries.append(index)
        parts.append(data)
        begin += len(data)
    if begin >= 2**31:
        raise RacError(
            f"{weight.name}: packed it has {begin} times 128 bytes, more than the kernels count; keep it dense"
        )
    sorted_rows = torch.cat([order, torch.arange(rows, tiles * TILE)]).int()
    header = [sorted_rows, torch.cat(entries).flatten()]
    if streams.row_scales and weight.scale is not None:
        header.append(
            pad_zeros(weight.scale[order, 0], (0, tiles * TILE - rows)).float().view(torch.int32)
        )
    words = torch.cat(header)
    packed = torch.cat([pad_zeros(words, (0, -len(words) % 32)), torch.cat(parts).flatten()])
    return packed.view(PACKED[streams])


def _check(weight: StoredWeight, streams: Streams) -> None:
    scaled = streams is not BF16
    if weight.values.dtype not in ((streams.dtype,) if scaled else FLOATS) or scaled == (
        weight.scale is None
    ):
        raise RacError(
            f"{weight.name}: values of {weight.values.dtype}, which the layout does not hold; keep it dense"
        )
    shared = streams.scale_columns
    fits = weight.group == weight.columns or bool(shared and weight.group % shared == 0)
    if weight.scale is not None and (not fits or weight.zeros is not None):
        each = f"a scale per row and {shared} columns" if shared else "one scale per row"
        raise RacError(
            f"{weight.name}: a scale per {weight.group} columns, or zero points, where the layout has {each}; "
            "keep it dense"
        )
    check_values(weight, streams.value_bits)
    if weight.columns > MOST_COLUMNS:
        raise RacError(
            f"{weight.name}: {weight.columns} columns; the kernel has at most {MOST_COLUMNS}; keep it dense"
        )
    counts = row_counts(weight.bitmask)
    starts = pad_zeros(counts.cumsum(0), (1, 0))
    if not torch.equal(weight.starts, starts) or weight.values.numel() != int(starts[-1]):
        raise RacError(
            f"{weight.name}: {weight.values.numel()} values in rows that start at other places than the bitmask says; the "
            "checkpoint is damaged"
        )


def check_values(weight: StoredWeight, bits: int) -> None:
    """Refuse quantized values that a kernel would multiply as other numbers.

    Raises:
        RacError: integers that so many bits do not hold, or fp8 that is NaN.
    """
    values, top = weight.values, 1 << bits - 1
    if values.dtype == torch.float8_e4m3fn and bool((values.view(torch.uint8) & 127 == 127).any()):
        raise RacError(
            f"{weight.name}: values that are NaN, which the GPU kernels do not have; the checkpoint is damaged"
        )
    if (
        values.dtype == torch.int8
        and values.numel()
        and not -top <= int(values.min()) <= int(values.max()) < top
    ):
        raise RacError(
            f"{weight.name}: values outside of {-top} to {top - 1}, which {bits} bits hold; keep it dense"
        )


def _header_bytes(tiles: int, streams: Streams) -> int:
    """The order of rows, the segments, and scales."""
    return tiles * (TILE * 4 + SEGMENTS * 16 + (TILE * 4 if streams.row_scales else 0))


def _header_units(tiles: int, streams: Streams) -> int:
    return -(-_header_bytes(tiles, streams) // LINE)


def _pack_rows(weight: StoredWeight, begin: int, streams: Streams) -> tuple[Tensor, Tensor]:
    """Entries int32 [segments, 4] and units int32 [units, 32] of sorted rows; the first unit is number `begin`."""
    bits = torch.arange(8, dtype=torch.uint8)
    stored = (weight.bitmask.unsqueeze(-1) >> bits & 1).bool().flatten(1)[:, : weight.columns]
    mask = _by_lane(stored, streams)
    plan = plan_of(mask.sum(dim=-2, dtype=torch.int32), streams)
    mask |= ~mask & ((~mask).cumsum(dim=-2, dtype=torch.int8) <= plan.extra.unsqueeze(-2))
    ends = plan.units.cumsum(0)
    starts = ends - plan.units
    data = torch.zeros(int(ends[-1]), 32, dtype=torch.int32)

    of_segment = torch.repeat_interleave(
        torch.arange(len(plan.steps)), plan.steps
    )  # [tiles x steps]
    step = torch.arange(len(of_segment)) - (plan.steps.cumsum(0) - plan.steps)[of_segment]
    copied = plan.copied[of_segment, step].to(torch.uint8)
    data.view(torch.uint8)[starts[of_segment] + step // LINE, step % LINE] = copied
    first_mask = (starts + plan.counts)[of_segment] + step * streams.mask_lines
    mask_at = first_mask[:, None] + torch.arange(streams.mask_lines)
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
    octets = _bits(mask, streams).view(len(mask_at), 32, -1, 8)
    words = (octets * weights).sum(dim=-1, dtype=torch.uint8).view(torch.int32)
    data[mask_at] = words.view(len(mask_at), streams.mask_lines, 32)
    first_scale = starts + plan.counts + plan.masks
    if streams.scale_columns:
        inside = (
            step * streams.step % streams.scale_columns == 0
        )  # steps that begin a group of columns
        line = first_scale[of_segment] + step * streams.step // streams.scale_columns
        data[line[inside]] = _scale_lines(weight, streams)

    values = (
        plan.begins.unsqueeze(-2) + mask.cumsum(dim=-2, dtype=torch.int32) - mask.int()
    )  # their numbers
    first = (first_scale + plan.scales)[of_segment].view(*mask.shape[:2], 1, 1, 1)
    line, place = first + values // streams.per_line, values % streams.per_line
    to = ((line * 32 + torch.arange(32).view(32, 1, 1)) * streams.per_line + place) * streams.count
    to = (to + torch.arange(streams.count)).masked_select(mask)
    if streams is BF16:
        dense = _by_lane(weight.dense().to(torch.bfloat16).view(torch.int16), streams)
        data.view(torch.int16).view(-1)[to] = dense.masked_select(mask)  # masks as indices are slow
    else:
        codes = _by_lane(weight.dense().view(torch.uint8), streams).masked_select(mask)
        if streams.dtype == torch.int8:  # plus `top`
            top = 1 << streams.value_bits - 1
            codes = (codes ^ top) & 2 * top - 1
        _store_codes(data, to, codes, streams.value_bits)

    before = sum(
        (plan.before[:, n] << 8 * n for n in range(streams.ahead)), torch.zeros_like(plan.first)
    )
    where = plan.first | plan.steps << 16
    return torch.stack([begin + starts, plan.groups, where, before], dim=1).int(), data


def _store_codes(data: Tensor, to: Tensor, codes: Tensor, bits: int) -> None:
    """Write uint8 `codes` at places `to`, counted in codes of so many bits, of int32 `data`."""
    if bits == 8:
        data.view(torch.uint8).view(-1)[to] = codes
        return
    halves = torch.zeros(data.numel() * 8, dtype=torch.uint8)
    halves[to] = codes
    low, high = halves.view(-1, 2).unbind(-1)
    data |= (low | high << 4).view(torch.int32).view(data.shape)


def _scale_lines(weight: StoredWeight, streams: Streams) -> Tensor:
    """Int32 [tiles x groups of columns, 32]: word 4 g + h is the scale of row 8 h + g."""
    assert weight.scale is not None
    groups = padded_columns(weight.columns) // streams.scale_columns
    wide = weight.scale.float().repeat_interleave(
        groups if weight.scale.shape[1] == 1 else weight.group // streams.scale_columns, dim=1
    )
    padded = pad_zeros(wide, (0, groups - wide.shape[1], 0, -weight.rows % TILE))
    ordered = padded.unflatten(0, (-1, 4, 8)).permute(0, 3, 2, 1).contiguous()  # tile, group, g, h
    return ordered.view(torch.int32).view(-1, 32)


def _by_lane(rows: Tensor, streams: Streams) -> Tensor:
    """[rows, columns] to [tiles, steps, lane, place, stream], padded with zeros; places in the order in which they are read."""
    padding = (0, -rows.shape[1] % QUAD, 0, -rows.shape[0] % TILE)
    # tile, i, h, g (row 16 i + 8 h + g); step, t, j, q, b (column t step / 4 + 4 j + 2 q + b)
    columns = (-1, 4, streams.step // 16, 2, 2)
    parts = pad_zeros(rows, padding).unflatten(1, columns).unflatten(0, (-1, 2, 2, 8))
    # place 8 i + 4 j + 2 q + h of stream b, or place 32 i + 8 j + 4 q + 2 b + h
    order = (0, 4, 3, 5, 1, 6, 7, 2, 8) if streams.count == 2 else (0, 4, 3, 5, 1, 6, 7, 8, 2)
    return (
        parts.permute(order)
        .flatten(2, 3)
        .reshape(*parts.shape[:1], parts.shape[4], 32, -1, streams.count)
    )


def _bits(mask: Tensor, streams: Streams) -> Tensor:
    """The order of a lane's bits: by place and stream, or, of four in a window, each in a nibble of its own."""
    return mask if streams.count == 2 else mask.unflatten(3, (4, 4, 4)).transpose(4, 5).contiguous()
