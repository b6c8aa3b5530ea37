"""A sparse weight as a checkpoint stores it, checked once, and cut to what a rank needs. Pure, tensors in and out.

Nothing is indexed by a number from a file before `check` has compared it with what the bitmask says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rac_modifier.checkpoint import bitmask as layout
from rac_modifier.checkpoint.formats import FORMAT_24
from rac_modifier.errors import RacError


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A weight [N, columns]: its stored `values` in row-major order, 1-D, and the `bitmask` uint8 [N, ceil(columns/8)].

    `starts` int64 [N + 1] says where each row begins in `values`. `name` is for messages.
    """

    values: Tensor
    bitmask: Tensor
    columns: int
    starts: Tensor
    name: str

    @property
    def rows(self) -> int:
        """N."""
        return len(self.bitmask)

    @property
    def density(self) -> float:
        """Share of the weights that is stored."""
        return self.values.numel() / (self.rows * self.columns)

    def dense(self) -> Tensor:
        """[N, columns]."""
        parts = {
            "compressed": self.values,
            "bitmask": self.bitmask,
            "row_offsets": self.starts[:-1],
            "shape": torch.tensor([self.rows, self.columns]),
        }
        return layout.unpack_unstructured(parts, self.name)

    def select_rows(self, rows: Tensor) -> StoredWeight:
        """The rows of these numbers (int64, within N) in this order; consecutive ones are copied together."""
        breaks = (torch.nonzero(rows[1:] != rows[:-1] + 1).flatten() + 1).tolist()
        runs = [(int(rows[a]), int(rows[b - 1]) + 1) for a, b in zip([0, *breaks], [*breaks, len(rows)], strict=True)]
        if runs == [(0, self.rows)]:
            return self
        return StoredWeight(
            torch.cat([self.values[int(self.starts[a]) : int(self.starts[b])] for a, b in runs]),
            torch.cat([self.bitmask[a:b] for a, b in runs]),
            self.columns,
            _starts(torch.cat([self.starts[a + 1 : b + 1] - self.starts[a:b] for a, b in runs])),
            self.name,
        )

    def select_columns(self, first: int, count: int) -> StoredWeight:
        """Columns `first` to `first + count`; what is stored as an explicit zero is dropped."""
        if (first, count) == (0, self.columns):
            return self
        return from_dense(self.dense()[:, first : first + count].contiguous(), self.name)


def check(tensors: Mapping[str, Tensor], format: str, name: str) -> StoredWeight:
    """Check the tensors of `PARTS[format]` as untrusted input against each other.

    Raises:
        RacError: naming `{name}.{part}`, where parts are missing, malformed or contradict each other.
    """
    compressed, bitmask, rows, columns = layout.check_parts(tensors, name)
    counts = layout.row_counts(bitmask)
    if format == FORMAT_24:
        if columns % 4 or tuple(compressed.shape) != (rows, columns // 2):
            raise RacError(
                f"{name}.compressed: shape {list(compressed.shape)} does not fit a 2:4 weight [{rows}, {columns}]; "
                "the checkpoint is damaged or not 2:4"
            )
        if not _two_of_four(bitmask, columns):
            raise RacError(f"{name}.bitmask: four columns do not keep exactly two; the checkpoint is damaged")
        return StoredWeight(compressed.reshape(-1), bitmask, columns, _starts(counts), name)
    starts = _starts(counts)
    if compressed.dim() != 1 or compressed.numel() != int(starts[-1]):
        raise RacError(
            f"{name}.compressed: shape {list(compressed.shape)}, but the bitmask keeps {int(starts[-1])} values; "
            "the checkpoint is damaged"
        )
    offsets = layout.part_of(tensors, name, "row_offsets")
    if offsets.dtype != torch.int64 or not torch.equal(offsets, starts[:-1]):
        raise RacError(f"{name}.row_offsets: not the row starts that the bitmask has; the checkpoint is damaged")
    return StoredWeight(compressed, bitmask, columns, starts, name)


def from_dense(weight: Tensor, name: str) -> StoredWeight:
    """The sparse form of a dense weight [N, columns]."""
    parts = layout.pack_unstructured(weight, name)
    starts = torch.cat([parts["row_offsets"], torch.tensor([parts["compressed"].numel()])])
    return StoredWeight(parts["compressed"], parts["bitmask"], weight.shape[1], starts, name)


def stack(weights: Sequence[StoredWeight], name: str) -> StoredWeight:
    """One weight with the rows of all of these, in order.

    Raises:
        RacError: they differ in columns or dtype.
    """
    first = weights[0]
    if len(weights) == 1:
        return first
    for other in weights[1:]:
        if (other.columns, other.values.dtype) != (first.columns, first.values.dtype):
            raise RacError(
                f"{other.name}: {other.columns} columns of {other.values.dtype}, which cannot be fused with {first.name}, "
                f"{first.columns} columns of {first.values.dtype}; the checkpoint does not fit this model"
            )
    counts = torch.cat([weight.starts[1:] - weight.starts[:-1] for weight in weights])
    return StoredWeight(
        torch.cat([weight.values for weight in weights]),
        torch.cat([weight.bitmask for weight in weights]),
        first.columns,
        _starts(counts),
        name,
    )


def _starts(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _two_of_four(bitmask: Tensor, columns: int) -> bool:
    """Whether every four columns, half a byte, have two bits set; `columns` is a multiple of four."""
    pairs = bitmask - ((bitmask >> 1) & 0x55)
    nibbles = (pairs & 0x33) + ((pairs >> 2) & 0x33)
    if columns % 8:
        return bool((nibbles[:, :-1] == 0x22).all()) and bool((nibbles[:, -1] == 0x02).all())
    return bool((nibbles == 0x22).all())
