"""Weights of any pattern in the order in which the lanes of a GPU's warp read them.

csrc/gpu/unstructured.h and the two sources that include it have the layouts.
Pure functions of tensors, on the device that these are on. Rows are sorted by what they store and padded to 32, columns to 128.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_zeros

from rac_modifier.checkpoint.bitmask import row_counts
from rac_modifier.checkpoint.stored_weight import FLOATS, StoredWeight
from rac_modifier.errors import RacError
from rac_modifier.kernels.cuda.schedule import BF16, GROUP, INT8, LINE, QUAD, SEGMENTS, Streams, plan_of

TILE = 32  # rows
MOST_COLUMNS = 65536  # of all segments' steps
_WEIGHTS_AT_ONCE = 1 << 22  # bounds the memory that packing needs beside its result
_ZERO = 128  # of a byte that stores an integer
# Standard deviations by which the largest of 64 or 32 normal numbers, the streams of a warp, is expected to be above their mean.
_LONGEST = {64: 2.35, 32: 2.07}


def expected_bytes(rows: int, columns: int, density: float, streams: Streams = BF16) -> int:
    """Bytes of a packed weight whose stored values are anywhere with equal probability. A weight with patterns takes more."""
    tiles, steps = -(-rows // TILE), streams.steps(columns) / SEGMENTS
    density *= rows * columns / (tiles * TILE * padded_columns(columns))  # with the padding
    places = steps * streams.places
    longest = min(places * density + _LONGEST[32 * streams.count] * math.sqrt(places * density * (1 - density)), places)
    lines = longest / streams.per_line
    if streams.behind:  # the last value is anywhere in its line
        lines += streams.behind + (streams.per_line + 1) / (2 * streams.per_line)
    lines = lines + (GROUP - 1) / 2 if 0 < density < 1 else math.ceil(lines / GROUP) * GROUP
    segment = LINE * (math.ceil(steps / LINE) + steps * streams.mask_lines + lines)
    return tiles * round(_header_bytes(1, streams) + SEGMENTS * segment)


def least_bytes(rows: int, columns: int, streams: Streams = BF16) -> int:
    """Bytes of a packed weight that stores nothing: no packed weight has fewer."""
    tiles = -(-rows // TILE)
    return _header_units(tiles, streams) * LINE + tiles * LINE * streams.steps(columns) * streams.mask_lines


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


def order_of(packed: Tensor, rows: int) -> Tensor:
    """Int64 [rows]: the row of the weight that each sorted row is."""
    return packed.view(torch.int32)[:rows].long()


def pack(weight: StoredWeight, streams: Streams = BF16) -> Tensor:
    """The packed form, 1-D: int32 of bfloat16, int8 of integers. Values of other float dtypes are rounded to bfloat16.

    Raises:
        RacError: values that these streams do not hold, too many columns, or parts that contradict each other.
    """
    _check(weight, streams)
    rows, tiles = weight.rows, -(-weight.rows // TILE)
    order = row_counts(weight.bitmask).argsort(descending=True, stable=True)
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
    if weight.scale is not None:
        header.append(pad_zeros(weight.scale[order, 0], (0, tiles * TILE - rows)).float().view(torch.int32))
    words = torch.cat(header)
    packed = torch.cat([pad_zeros(words, (0, -len(words) % 32)), torch.cat(parts).flatten()])
    return packed.view(torch.int32 if streams is BF16 else torch.int8)


def _check(weight: StoredWeight, streams: Streams) -> None:
    integers = streams is INT8
    if weight.values.dtype not in ((torch.int8,) if integers else FLOATS) or integers == (weight.scale is None):
        raise RacError(f"{weight.name}: values of {weight.values.dtype}, which the layout does not hold; keep it dense")
    if weight.scale is not None and (weight.scale.shape[1] != 1 or weight.zeros is not None):
        raise RacError(
            f"{weight.name}: a scale per {weight.group} columns, or zero points, where the layout has one scale per row; "
            "keep it dense"
        )
    if weight.columns > MOST_COLUMNS:
        raise RacError(f"{weight.name}: {weight.columns} columns; the kernel has at most {MOST_COLUMNS}; keep it dense")
    counts = row_counts(weight.bitmask)
    starts = pad_zeros(counts.cumsum(0), (1, 0))
    if not torch.equal(weight.starts, starts) or weight.values.numel() != int(starts[-1]):
        raise RacError(
            f"{weight.name}: {weight.values.numel()} values in rows that start at other places than the bitmask says; the "
            "checkpoint is damaged"
        )


def _header_bytes(tiles: int, streams: Streams) -> int:
    """The order of rows, the segments, and scales."""
    return tiles * (TILE * 4 + SEGMENTS * 16 + (TILE * 4 if streams is INT8 else 0))


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

    of_segment = torch.repeat_interleave(torch.arange(len(plan.steps)), plan.steps)  # [tiles x steps]
    step = torch.arange(len(of_segment)) - (plan.steps.cumsum(0) - plan.steps)[of_segment]
    copied = plan.copied[of_segment, step].to(torch.uint8)
    data.view(torch.uint8)[starts[of_segment] + step // LINE, step % LINE] = copied
    first_mask = (starts + plan.counts)[of_segment] + step * streams.mask_lines
    mask_at = first_mask[:, None] + torch.arange(streams.mask_lines)
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
    octets = _bits(mask, streams).view(len(mask_at), 32, -1, 8)
    words = (octets * weights).sum(dim=-1, dtype=torch.uint8).view(torch.int32)
    data[mask_at] = words.view(len(mask_at), streams.mask_lines, 32)

    values = plan.begins.unsqueeze(-2) + mask.cumsum(dim=-2, dtype=torch.int32) - mask.int()  # their numbers
    first = (starts + plan.counts + plan.masks)[of_segment].view(*mask.shape[:2], 1, 1, 1)
    line, inside = first + values // streams.per_line, values % streams.per_line
    to = ((line * 32 + torch.arange(32).view(32, 1, 1)) * streams.per_line + inside) * streams.count
    to = to + torch.arange(streams.count)
    dense = weight.dense() if weight.scale is not None else weight.dense().to(torch.bfloat16).view(torch.int16)
    dense = _by_lane(dense, streams)
    if weight.scale is not None:
        dense = dense.view(torch.uint8) ^ _ZERO  # plus 128
    flat = data.view(dense.dtype).view(-1)
    flat[to.masked_select(mask)] = dense.masked_select(mask)  # masks as indices are slow

    before = sum((plan.before[:, n] << 8 * n for n in range(streams.ahead)), torch.zeros_like(plan.first))
    where = plan.first | plan.steps << 16
    return torch.stack([begin + starts, plan.groups, where, before], dim=1).int(), data


def _by_lane(rows: Tensor, streams: Streams) -> Tensor:
    """[rows, columns] to [tiles, steps, lane, place, stream], padded with zeros; places in the order in which they are read."""
    padding = (0, -rows.shape[1] % QUAD, 0, -rows.shape[0] % TILE)
    # tile, i, h, g (row 16 i + 8 h + g); step, t, j, q, b (column t step / 4 + 4 j + 2 q + b)
    columns = (-1, 4, streams.step // 16, 2, 2)
    parts = pad_zeros(rows, padding).unflatten(1, columns).unflatten(0, (-1, 2, 2, 8))
    # place 8 i + 4 j + 2 q + h of stream b, or place 32 i + 8 j + 4 q + 2 b + h
    order = (0, 4, 3, 5, 1, 6, 7, 2, 8) if streams.count == 2 else (0, 4, 3, 5, 1, 6, 7, 8, 2)
    return parts.permute(order).flatten(2, 3).reshape(*parts.shape[:1], parts.shape[4], 32, -1, streams.count)


def _bits(mask: Tensor, streams: Streams) -> Tensor:
    """The order of a lane's bits: by place and stream, or, of four in a window, each in a nibble of its own."""
    return mask if streams.count == 2 else mask.unflatten(3, (4, 4, 4)).transpose(4, 5).contiguous()
