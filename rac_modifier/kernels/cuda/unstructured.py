"""Weights of any pattern in the order in which the lanes of a GPU's warp read them. csrc/gpu/unstructured_bf16.cu has the layout.

Pure functions of tensors, on the device that these are on. Rows are sorted by what they store and padded to 32, columns to 128.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_zeros

from rac_modifier.checkpoint.bitmask import row_counts
from rac_modifier.checkpoint.stored_weight import FLOATS, StoredWeight
from rac_modifier.errors import RacError

TILE = 32  # rows
STEP = 32  # columns
SEGMENTS = 4  # of a tile: one per warp
LINE = 128  # bytes: a word for each lane; the unit of offsets
RING = 96  # lines of values that a warp has in shared memory
LOADS = 32  # from shared memory by a warp per step, each of 128 bytes at most
COPIED_TWICE = 1 / 12  # of the values: the ring's first of twelve groups
MOST_COLUMNS = 65536  # a segment has at most 512 steps
_GROUP = 8  # lines that are copied at a time
_AHEAD = 3  # steps between the start of a copy and its use
_PLACES = 16  # of a lane and stream in a step
_QUAD = 4  # steps; segments are cut at multiples
_MOST_QUADS = 128  # of a segment
_WEIGHTS_AT_ONCE = 1 << 22  # bounds the memory that packing needs beside its result
# Standard deviations by which the largest of 64 normal numbers is expected to be above their mean.
_LONGEST_OF_64 = 2.35


@dataclass(frozen=True)
class _Plan:
    """The segments of some tiles, in order. What has [tiles, steps] counts the steps of a whole tile.

    first, steps: [segments]. begins [tiles, steps, 32, 2]: lines that each stream has read when a step begins, `extra` alike:
    zeros that it stores in the step. groups [segments]. copied [segments, longest]: groups to copy at each step; before
    [segments, 3]: groups to copy for the first three.
    """

    first: Tensor
    steps: Tensor
    begins: Tensor
    extra: Tensor
    groups: Tensor
    copied: Tensor
    before: Tensor

    @property
    def counts(self) -> Tensor:
        """Units [segments] that `copied` takes."""
        return -(-self.steps // LINE)

    @property
    def units(self) -> Tensor:
        """Units [segments]."""
        return self.counts + self.steps + self.groups * _GROUP


def expected_bytes(rows: int, columns: int, density: float) -> int:
    """Bytes of a packed weight whose stored values are anywhere with equal probability. A weight with patterns takes more."""
    tiles, steps = -(-rows // TILE), _steps(columns) / SEGMENTS
    density *= rows * columns / (tiles * TILE * _steps(columns) * STEP)  # with the padding
    places = steps * _PLACES
    longest = places * density + _LONGEST_OF_64 * math.sqrt(places * density * (1 - density))
    lines = min(longest, places) + ((_GROUP - 1) / 2 if 0 < density < 1 else 0)
    segment = LINE * (math.ceil(steps / LINE) + steps + lines)
    return tiles * round(TILE * 4 + SEGMENTS * (16 + segment))


def least_bytes(rows: int, columns: int) -> int:
    """Bytes of a packed weight that stores nothing: no packed weight has fewer."""
    tiles = -(-rows // TILE)
    return _header_units(tiles) * LINE + tiles * LINE * _steps(columns)


def padded_columns(columns: int) -> int:
    """Columns with their padding."""
    return _steps(columns) * STEP


def shared_bytes(token_tiles: int) -> int:
    """Of shared memory, per block. A warp has the ring, its first group again, eight masks, the counts, and x of four steps."""
    return SEGMENTS * ((RING + _GROUP + 8) * LINE + 512 + (_AHEAD + 1) * token_tiles * 8 * STEP * 2)


def order_of(packed: Tensor, rows: int) -> Tensor:
    """Int64 [rows]: the row of the weight that each sorted row is."""
    return packed[:rows].long()


def pack(weight: StoredWeight) -> Tensor:
    """The packed form, int32 [bytes / 4]. Values of other float dtypes are rounded to bfloat16.

    Raises:
        RacError: quantized values, too many columns, or parts that contradict each other.
    """
    _check(weight)
    rows, tiles = weight.rows, -(-weight.rows // TILE)
    order = row_counts(weight.bitmask).argsort(descending=True, stable=True)
    at_once = max(1, _WEIGHTS_AT_ONCE // (weight.columns * TILE)) * TILE
    begin, entries, parts = _header_units(tiles), [], []
    for part in order.split(at_once):
        index, data = _pack_rows(weight.select_rows(part), begin)
        entries.append(index)
        parts.append(data)
        begin += len(data)
    if begin >= 2**31:
        raise RacError(
            f"{weight.name}: packed it has {begin} times 128 bytes, more than the kernels count; keep it dense"
        )
    sorted_rows = torch.cat([order, torch.arange(rows, tiles * TILE)]).int()
    header = torch.cat([sorted_rows, torch.cat(entries).flatten()])
    return torch.cat([pad_zeros(header, (0, -len(header) % 32)), torch.cat(parts).flatten()])


def _check(weight: StoredWeight) -> None:
    if weight.scale is not None or weight.values.dtype not in FLOATS:
        raise RacError(f"{weight.name}: values of {weight.values.dtype}, which the layout does not hold; keep it dense")
    if weight.columns > MOST_COLUMNS:
        raise RacError(f"{weight.name}: {weight.columns} columns; the kernel has at most {MOST_COLUMNS}; keep it dense")
    counts = row_counts(weight.bitmask)
    starts = pad_zeros(counts.cumsum(0), (1, 0))
    if not torch.equal(weight.starts, starts) or weight.values.numel() != int(starts[-1]):
        raise RacError(
            f"{weight.name}: {weight.values.numel()} values in rows that start at other places than the bitmask says; the "
            "checkpoint is damaged"
        )


def _steps(columns: int) -> int:
    return -(-columns // (STEP * _QUAD)) * _QUAD


def _header_units(tiles: int) -> int:
    return -(-tiles * (TILE * 4 + SEGMENTS * 16) // LINE)


def _pack_rows(weight: StoredWeight, begin: int) -> tuple[Tensor, Tensor]:
    """Entries int32 [segments, 4] and units int32 [units, 32] of sorted rows; the first unit is number `begin`."""
    bits = torch.arange(8, dtype=torch.uint8)
    stored = (weight.bitmask.unsqueeze(-1) >> bits & 1).bool().flatten(1)[:, : weight.columns]
    mask = _by_lane(stored)
    plan = _plan(mask.sum(dim=-2, dtype=torch.int32))
    mask |= ~mask & ((~mask).cumsum(dim=-2, dtype=torch.int8) <= plan.extra.unsqueeze(-2))
    ends = plan.units.cumsum(0)
    starts = ends - plan.units
    data = torch.zeros(int(ends[-1]), 32, dtype=torch.int32)

    of_segment = torch.repeat_interleave(torch.arange(len(plan.steps)), plan.steps)  # [tiles x steps]
    step = torch.arange(len(of_segment)) - (plan.steps.cumsum(0) - plan.steps)[of_segment]
    copied = plan.copied[of_segment, step].to(torch.uint8)
    data.view(torch.uint8)[starts[of_segment] + step // LINE, step % LINE] = copied
    mask_at = (starts + plan.counts)[of_segment] + step
    weights = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
    octets = mask.flatten(0, 1).flatten(2).view(-1, 32, 4, 8)
    data[mask_at] = (octets * weights).sum(dim=-1, dtype=torch.uint8).view(torch.int32).squeeze(-1)

    lines = plan.begins.unsqueeze(-2) + mask.cumsum(dim=-2, dtype=torch.int32) - mask.int()
    first = (starts + plan.counts + plan.steps)[of_segment].view(*mask.shape[:2], 1, 1, 1)
    to = ((first + lines) * 32 + torch.arange(32).view(32, 1, 1)) * 2 + torch.arange(2)
    values = _by_lane(weight.dense().to(torch.bfloat16).view(torch.int16))
    data.view(torch.int16).view(-1)[to.masked_select(mask)] = values.masked_select(mask)  # masks as indices are slow

    before = plan.before[:, 0] | plan.before[:, 1] << 8 | plan.before[:, 2] << 16
    where = plan.first | plan.steps << 16
    return torch.stack([begin + starts, plan.groups, where, before], dim=1).int(), data


def _by_lane(rows: Tensor) -> Tensor:
    """[rows, columns] to [tiles, steps, lane, place, stream], padded with zeros."""
    padding = (0, -rows.shape[1] % (STEP * _QUAD), 0, -rows.shape[0] % TILE)
    # tile, i, h, g (row 16 i + 8 h + g); step, t, j, q, b (column 8 t + 4 j + 2 q + b); place 8 i + 4 j + 2 q + h
    parts = pad_zeros(rows, padding).unflatten(1, (-1, 4, 2, 2, 2)).unflatten(0, (-1, 2, 2, 8))
    return parts.permute(0, 4, 3, 5, 1, 6, 7, 2, 8).flatten(4, 7).flatten(2, 3)


def _plan(stored: Tensor) -> _Plan:
    """Cut and schedule tiles; stored [tiles, steps, 32, 2]: values of each stream in each step."""
    tiles, all_steps = stored.shape[:2]
    cuts = _cut(stored.sum(dim=(2, 3)).unflatten(1, (-1, _QUAD)).sum(dim=2)) * _QUAD
    first, steps = cuts[:, :-1].flatten(), cuts.diff(dim=1).flatten()
    longest = int(steps.max())
    # Each segment's steps, [segments, longest, 64]; nothing is stored behind its end.
    at = first[:, None] + torch.arange(longest)
    inside = torch.arange(longest) < steps[:, None]
    tile = torch.arange(tiles).repeat_interleave(SEGMENTS)[:, None]
    values = stored.flatten(2)[tile, at.clamp(max=all_steps - 1)] * inside[:, :, None]
    begins, extra, end = _positions(values)
    lines = _groups(end.amax(dim=1)) * _GROUP
    needed = _groups((begins + values + extra).amax(dim=2)) * _GROUP  # lines that each step needs
    room = (begins.amin(dim=2) + RING) // _GROUP * _GROUP
    copied = torch.minimum(room, lines[:, None])
    started = torch.minimum(lines, torch.full_like(lines, RING))
    early = torch.stack([needed[:, 0], needed[:, 1], started], dim=1)
    zeros = torch.zeros_like(lines[:, None])
    whole, to = torch.zeros(tiles, all_steps, 64, dtype=torch.int32), (tile.expand_as(at)[inside], at[inside])
    return _Plan(
        first,
        steps,
        begins=whole.index_put(to, begins[inside]).unflatten(2, (32, 2)),
        extra=whole.index_put(to, extra[inside]).unflatten(2, (32, 2)),
        groups=lines // _GROUP,
        copied=torch.cat([started[:, None], copied], dim=1).diff(dim=1) // _GROUP,
        before=torch.cat([zeros, early], dim=1).diff(dim=1) // _GROUP,
    )


def _cut(stored: Tensor) -> Tensor:
    """Quads [tiles, 5] at which segments begin and end, of about equally many bytes; stored [tiles, quads]: values."""
    tiles, quads = stored.shape
    ends = (stored * 2 + LINE * _QUAD).cumsum(dim=1)  # bytes, with the masks
    cuts = [torch.zeros(tiles, dtype=torch.int64)]
    for segment in range(1, SEGMENTS):
        wanted = ends[:, -1:] * segment // SEGMENTS
        nearest = (ends * 2 - (stored * 2 + LINE * _QUAD) < wanted * 2).sum(dim=1)  # quads whose middle is before it
        least = torch.clamp(cuts[-1], min=quads - _MOST_QUADS * (SEGMENTS - segment))
        cuts.append(torch.minimum(torch.maximum(nearest, least), cuts[-1] + _MOST_QUADS))
    return torch.stack([*cuts, torch.full_like(cuts[0], quads)], dim=1)


def _positions(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """When each step begins, how many lines each stream has read; zeros that it stores in the step; and the end.

    values [segments, steps, 64]. A step needs all lines up to its longest stream's, and they must have been copied three
    steps earlier, when the ring had room behind its shortest stream. Streams that would be too short for that store zeros.
    They never become the longest, so what a step needs follows from the values alone.
    """
    steps = values.shape[1]
    sums = pad_zeros(values.cumsum(dim=1, dtype=torch.int32), (0, 0, 1, 0))
    now = torch.zeros_like(sums[:, 0])
    begins, extra = [], []
    for step in range(steps):
        last = sums[:, min(step + _AHEAD + 2, steps)]
        needed = _groups((now + last - sums[:, step]).amax(dim=1)) * _GROUP
        natural = now + values[:, step]
        zeros = (needed[:, None] - RING - natural).clamp(min=0)
        begins.append(now)
        extra.append(zeros)
        now = natural + zeros
    return torch.stack(begins, dim=1), torch.stack(extra, dim=1), now


def _groups(lines: Tensor) -> Tensor:
    return -(-lines // _GROUP)
