"""When the lanes of a warp read the values of a weight of any pattern, and when these are copied.

Pure functions of tensors that count values. rac_gpu/source/unstructured.h says why: a warp reads streams of values through a ring
in shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_zeros

SEGMENTS = 4  # of a tile: one per warp
LINE = 128  # bytes: a word for each lane; the unit of offsets
GROUP = 8  # lines that are copied at a time
QUAD = 128  # columns; segments are cut at multiples


@dataclass(frozen=True)
class Streams:
    """How a kernel reads values: the same numbers as in its source.

    step: columns; a lane has as many weights in each. count: streams of a lane. per_line: values of a stream in a line.
    ring: lines in shared memory. ahead: steps between the start of a copy and its use. behind: lines that are read behind the
    one of the last value. repeated: lines of the ring that are copied twice. loads: of 128 bytes at most that a warp makes from
    shared memory per step, for values and masks. most_steps: of a segment. scale_columns: that share a line of scales behind the
    masks; 0 where there is none. dtype: of the values as a checkpoint has them; int8 also of those with four bits.
    """

    step: int
    count: int
    per_line: int
    ring: int
    ahead: int
    behind: int
    repeated: int
    loads: int
    most_steps: int
    scale_columns: int = 0
    dtype: torch.dtype = torch.int8

    @property
    def places(self) -> int:
        """Of a stream, in a step."""
        return self.step // self.count

    @property
    def mask_lines(self) -> int:
        """Of a step."""
        return self.step // 32

    @property
    def value_bits(self) -> int:
        """Bits of a value."""
        return LINE // (32 * self.count) * 8 // self.per_line

    @property
    def row_scales(self) -> bool:
        """Whether a row has one scale, beside the order of rows."""
        return self.value_bits == 8 and not self.scale_columns

    def scale_lines(self, steps: Tensor) -> Tensor:
        """Lines of scales that so many steps of a segment have."""
        return (
            steps * self.step // self.scale_columns
            if self.scale_columns
            else torch.zeros_like(steps)
        )

    def lines(self, values: Tensor) -> Tensor:
        """Lines that are there when a stream has read this many values."""
        return (
            -(-values // self.per_line)
            if not self.behind
            else values // self.per_line + 1 + self.behind
        )

    def steps(self, columns: int) -> int:
        """Steps of a tile, with its padding."""
        return -(-columns // QUAD) * (QUAD // self.step)


BF16 = Streams(
    32,
    2,
    per_line=1,
    ring=96,
    ahead=3,
    behind=0,
    repeated=8,
    loads=33,
    most_steps=512,
    dtype=torch.bfloat16,
)
INT8 = Streams(
    step=64, count=1, per_line=4, ring=64, ahead=2, behind=1, repeated=1, loads=34, most_steps=256
)
E4M3 = replace(INT8, dtype=torch.float8_e4m3fn)
INT8_GROUPS = {group: replace(INT8, scale_columns=group) for group in (64, 128)}
E4M3_GROUPS = {group: replace(E4M3, scale_columns=group) for group in (64, 128)}
INT4 = {group: replace(INT8, per_line=8, ring=32, scale_columns=group) for group in (64, 128)}


@dataclass(frozen=True)
class Plan:
    """The segments of some tiles, in order. What has [tiles, steps] counts the steps of a whole tile.

    first, steps: [segments]. extra [tiles, steps, 32, streams]: zeros that each stream stores in the step. begins alike: values
    that it has read when the step begins. groups [segments]. copied [segments, longest]: groups to copy at each step; before
    [segments, ahead]: groups to copy for the first ones.
    """

    streams: Streams
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
    def masks(self) -> Tensor:
        """Units [segments] that the masks take."""
        return self.steps * self.streams.mask_lines

    @property
    def scales(self) -> Tensor:
        """Units [segments] that scales of groups of columns take."""
        return self.streams.scale_lines(self.steps)

    @property
    def units(self) -> Tensor:
        """Units [segments]."""
        return self.counts + self.masks + self.scales + self.groups * GROUP


def plan_of(stored: Tensor, streams: Streams) -> Plan:
    """Cut and schedule tiles; stored [tiles, steps, 32, streams]: values of each stream in each step."""
    tiles, all_steps = stored.shape[:2]
    cuts = _cut(stored.sum(dim=(2, 3)).unflatten(1, (-1, QUAD // streams.step)).sum(dim=2), streams)
    cuts = cuts * (QUAD // streams.step)
    first, steps = cuts[:, :-1].flatten(), cuts.diff(dim=1).flatten()
    longest = int(steps.max())
    # Each segment's steps, [segments, longest, 32 streams]; nothing is stored behind its end.
    at = first[:, None] + torch.arange(longest)
    inside = torch.arange(longest) < steps[:, None]
    tile = torch.arange(tiles).repeat_interleave(SEGMENTS)[:, None]
    values = stored.flatten(2)[tile, at.clamp(max=all_steps - 1)] * inside[:, :, None]
    begins, extra, end = _positions(values, streams)
    lines = _whole_groups(streams.lines(end.amax(dim=1))) * (steps > 0)
    needed = _whole_groups(
        streams.lines((begins + values + extra).amax(dim=2))
    )  # lines that each step needs
    room = (begins.amin(dim=2) // streams.per_line + streams.ring) // GROUP * GROUP
    copied = torch.minimum(room, lines[:, None])
    started = torch.minimum(lines, torch.full_like(lines, streams.ring))
    early = torch.minimum(needed[:, : streams.ahead - 1], lines[:, None])
    zeros = torch.zeros_like(lines[:, None])
    to = tile.expand_as(at)[inside], at[inside]
    whole, shape = (
        torch.zeros(tiles, all_steps, values.shape[2], dtype=torch.int32),
        (32, streams.count),
    )
    return Plan(
        streams,
        first,
        steps,
        begins=whole.index_put(to, begins[inside]).unflatten(2, shape),
        extra=whole.index_put(to, extra[inside]).unflatten(2, shape),
        groups=lines // GROUP,
        copied=torch.cat([started[:, None], copied], dim=1).diff(dim=1) // GROUP,
        before=torch.cat([zeros, early, started[:, None]], dim=1).diff(dim=1) // GROUP,
    )


def _cut(stored: Tensor, streams: Streams) -> Tensor:
    """Quads [tiles, 5] at which segments begin and end, of about equally many bytes; stored [tiles, quads]: values."""
    tiles, quads = stored.shape
    most = streams.most_steps * streams.step // QUAD
    sizes = stored * streams.value_bits // 8 + LINE * QUAD // 32  # bytes, with the masks
    ends = sizes.cumsum(dim=1)
    cuts = [torch.zeros(tiles, dtype=torch.int64)]
    for segment in range(1, SEGMENTS):
        wanted = ends[:, -1:] * segment // SEGMENTS
        nearest = (ends * 2 - sizes < wanted * 2).sum(dim=1)  # quads whose middle is before it
        least = torch.clamp(cuts[-1], min=quads - most * (SEGMENTS - segment))
        cuts.append(torch.minimum(torch.maximum(nearest, least), cuts[-1] + most))
    return torch.stack([*cuts, torch.full_like(cuts[0], quads)], dim=1)


def _positions(values: Tensor, streams: Streams) -> tuple[Tensor, Tensor, Tensor]:
    """When each step begins, how many values each stream has read; zeros that it stores in the step; and the end.

    values [segments, steps, 32 streams]. A step needs all lines up to its longest stream's, and they must have been copied
    `ahead` steps earlier, when the ring had room behind its shortest stream. Streams that would be too short for that store
    zeros. They never become the longest, so what a step needs follows from the values alone.
    """
    steps = values.shape[1]
    sums = pad_zeros(values.cumsum(dim=1, dtype=torch.int32), (0, 0, 1, 0))
    now = torch.zeros_like(sums[:, 0])
    begins, extra = [], []
    for step in range(steps):
        last = sums[:, min(step + streams.ahead + 2, steps)]
        needed = _whole_groups(streams.lines((now + last - sums[:, step]).amax(dim=1)))
        natural = now + values[:, step]
        zeros = ((needed[:, None] - streams.ring) * streams.per_line - natural).clamp(min=0)
        begins.append(now)
        extra.append(zeros)
        now = natural + zeros
    return torch.stack(begins, dim=1), torch.stack(extra, dim=1), now


def _whole_groups(lines: Tensor) -> Tensor:
    return -(-lines // GROUP) * GROUP
