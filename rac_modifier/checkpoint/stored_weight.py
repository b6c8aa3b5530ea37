"""A sparse weight as a checkpoint stores it: checked once, cut to what a rank needs. Pure functions of tensors.

Nothing is indexed by a number from a file before `check` has compared it with what the bitmask says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rac_modifier.checkpoint import bitmask as layout
from rac_modifier.checkpoint.formats import FORMAT_24, UNSTRUCTURED, with_values
from rac_modifier.errors import RacError
from rac_modifier.settings.pattern import Pattern

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SCALE = "weight_scale"


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A weight [N, columns]: its stored `values` in row-major order, 1-D, and the `bitmask` uint8 [N, ceil(columns/8)].

    `starts` int64 [N + 1] is where each row begins in `values`. `name` is for messages. Quantized values (int8, fp8; 4-bit
    values are int8 too) have a `scale` float32 [N, groups], one per row and group of equally many columns. `bits` is 4 for
    4-bit values, -8 to 7, or a code of 0 to 15 minus its code of zero, `zeros` uint8 [N, groups]; where all are stored it may
    be 3 or 2, too.
    activation_bits: what a kernel of integers may round the inputs of this layer to, 16 or 8.
    """

    values: Tensor
    bitmask: Tensor
    columns: int
    starts: Tensor
    name: str
    scale: Tensor | None = None
    bits: int = 8
    zeros: Tensor | None = None
    activation_bits: int = 16

    @property
    def rows(self) -> int:
        """N."""
        return len(self.bitmask)

    @property
    def density(self) -> float:
        """Share of the weights that is stored."""
        return self.values.numel() / (self.rows * self.columns)

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.columns // (1 if self.scale is None else self.scale.shape[1])

    @property
    def two_of_four(self) -> bool:
        """Whether at most two of each four neighbouring columns are stored."""
        if self.columns % 4:
            return False
        counts = _stored_of_four(self.bitmask)
        return bool((counts & 0x0F <= 2).all()) and bool((counts >> 4 <= 2).all())

    @property
    def group_bytes(self) -> int:
        """The fewest bytes that hold the scale of a group exactly, 2 (bfloat16) or 4, and its code of zero."""
        narrow = self.scale is not None and torch.equal(self.scale.bfloat16().float(), self.scale)
        return (2 if narrow else 4) + (self.zeros is not None)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """[N, columns], dense, multiplied by the scales in float32 and rounded once to `dtype`."""
        return dequantize(self.dense(), self.scale, dtype)

    def floats(self, dtype: torch.dtype) -> StoredWeight:
        """The same weight with values of `dtype` and no scale."""
        return from_dense(self.dequantized(dtype), self.name)

    def dense(self) -> Tensor:
        """[N, columns], dense; quantized values as they are stored, without their scales."""
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
        runs = [
            (int(rows[a]), int(rows[b - 1]) + 1)
            for a, b in zip([0, *breaks], [*breaks, len(rows)], strict=True)
        ]
        if runs == [(0, self.rows)]:
            return self
        return replace(
            self,
            values=torch.cat(
                [self.values[int(self.starts[a]) : int(self.starts[b])] for a, b in runs]
            ),
            bitmask=torch.cat([self.bitmask[a:b] for a, b in runs]),
            starts=_starts(
                torch.cat([self.starts[a + 1 : b + 1] - self.starts[a:b] for a, b in runs])
            ),
            scale=None if self.scale is None else torch.cat([self.scale[a:b] for a, b in runs]),
            zeros=None if self.zeros is None else torch.cat([self.zeros[a:b] for a, b in runs]),
        )

    def select_columns(self, first: int, count: int) -> StoredWeight:
        """Columns `first` to `first + count`; zeros that were stored as values are left out."""
        if (first, count) == (0, self.columns):
            return self
        dense = self.dense()[:, first : first + count].contiguous()
        cut = all_stored(dense, self.name) if self.density == 1.0 else from_dense(dense, self.name)
        cut = replace(cut, bits=self.bits)
        if self.scale is None or self.scale.shape[1] == 1:
            return replace(cut, scale=self.scale, zeros=self.zeros)
        group = math.gcd(self.group, first, count)  # smaller where a group is cut

        def groups(of_columns: Tensor) -> Tensor:
            repeated = of_columns.repeat_interleave(self.group // group, dim=1)
            return repeated[:, first // group : (first + count) // group].contiguous()

        return replace(
            cut, scale=groups(self.scale), zeros=None if self.zeros is None else groups(self.zeros)
        )


def check(
    tensors: Mapping[str, Tensor], format: str, name: str, scaled: bool = True
) -> StoredWeight:
    """Check the tensors of `PARTS[format]`, and the `weight_scale` of quantized values, as untrusted input.

    `scaled` False: another loader reads the scales, and the result has none.

    Raises:
        RacError: naming `{name}.{part}`, where parts are missing, malformed or contradict each other.
    """
    bits = 4 if layout.part_of(tensors, name, "compressed").dtype == torch.int32 else 8
    tensors = with_values(tensors, format, name)
    compressed, bitmask, rows, columns = layout.check_parts(tensors, name)
    scale = check_scale(tensors, compressed.dtype, rows, columns, name) if scaled else None
    counts = layout.row_counts(bitmask)
    if format == FORMAT_24:
        if columns % 4 or tuple(compressed.shape) != (rows, columns // 2):
            raise RacError(
                f"{name}.compressed: shape {list(compressed.shape)} does not fit a 2:4 weight [{rows}, {columns}]; "
                "the checkpoint is damaged or not 2:4"
            )
        if not _two_of_four(bitmask, columns):
            raise RacError(
                f"{name}.bitmask: four columns do not keep exactly two; the checkpoint is damaged"
            )
        return StoredWeight(
            compressed.reshape(-1), bitmask, columns, _starts(counts), name, scale, bits
        )
    starts = _starts(counts)
    if compressed.dim() != 1 or compressed.numel() != int(starts[-1]):
        raise RacError(
            f"{name}.compressed: shape {list(compressed.shape)}, but the bitmask keeps {int(starts[-1])} values; "
            "the checkpoint is damaged"
        )
    offsets = layout.part_of(tensors, name, "row_offsets")
    if offsets.dtype != torch.int64 or not torch.equal(offsets, starts[:-1]):
        raise RacError(
            f"{name}.row_offsets: not the row starts that the bitmask has; the checkpoint is damaged"
        )
    return StoredWeight(compressed, bitmask, columns, starts, name, scale, bits)


def check_scale(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, rows: int, columns: int, name: str
) -> Tensor | None:
    """The scales of a weight [rows, columns] of `dtype`, float32 [rows, groups]; None where it needs none.

    Raises:
        RacError: quantized values without scales, floats with them, or scales that do not fit.
    """
    scale = tensors.get(SCALE)
    if dtype in FLOATS:
        if scale is not None:
            raise RacError(
                f"{name}.{SCALE}: must not be there, since the values are {dtype}; save the model again"
            )
        return None
    if scale is None:
        raise RacError(
            f"{name}.{SCALE}: missing, but its values are {dtype}; copy the checkpoint again, or restore the config.json "
            "that was saved with it, whose config_groups describe the quantization"
        )
    if scale.dtype not in FLOATS or not bool(scale.isfinite().all()):
        raise RacError(f"{name}.{SCALE}: {scale.dtype}, or not finite; the checkpoint is damaged")
    if scale.numel() == 1:
        return scale.float().reshape(1, 1).expand(rows, 1).contiguous()
    scale = scale[:, None] if scale.dim() == 1 else scale
    if scale.dim() != 2 or scale.shape[0] != rows or not scale.shape[1] or columns % scale.shape[1]:
        raise RacError(
            f"{name}.{SCALE}: shape {list(scale.shape)} does not fit a weight [{rows}, {columns}], which has one scale, one "
            "per row, or one per row and group of columns; the checkpoint is damaged"
        )
    return scale.float().contiguous()


def dequantize(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """[N, K] times `scale` [N, groups], in float32, then `dtype`."""
    if scale is None:
        return weight.to(dtype)
    groups = scale.shape[1]
    return (
        (weight.float().view(len(weight), groups, -1) * scale[:, :, None])
        .view(weight.shape)
        .to(dtype)
    )


def count_broken_groups(weight: Tensor, structure: str, name: str) -> int:
    """Groups of M columns of `weight` [rows, columns] with fewer than N zeros; an unstructured weight has none.

    Raises:
        RacError: columns that are no multiple of M.
    """
    if structure == UNSTRUCTURED:
        return 0
    pattern = Pattern.parse(structure, None)
    rows, columns = weight.shape
    pattern.check_shape(name, rows, columns)
    zeros = (
        (~layout.nonzero(weight[part])).view(-1, pattern.m).sum(dim=1)
        for part in layout.row_chunks(rows, columns)
    )
    return sum(int((count < pattern.n).sum()) for count in zeros)


def from_dense(weight: Tensor, name: str) -> StoredWeight:
    """The sparse form of a dense weight [N, columns]."""
    parts = layout.pack_unstructured(weight, name)
    starts = torch.cat([parts["row_offsets"], torch.tensor([parts["compressed"].numel()])])
    return StoredWeight(parts["compressed"], parts["bitmask"], weight.shape[1], starts, name)


def all_stored(weight: Tensor, name: str) -> StoredWeight:
    """A dense weight [N, columns] with every value stored, zeros too."""
    rows, columns = weight.shape
    bitmask = torch.full((rows, -(-columns // 8)), 255, dtype=torch.uint8)
    if columns % 8:
        bitmask[:, -1] = (1 << columns % 8) - 1
    return StoredWeight(weight.flatten(), bitmask, columns, torch.arange(rows + 1) * columns, name)


def stack(weights: Sequence[StoredWeight], name: str) -> StoredWeight:
    """One weight with the rows of all of these, in order.

    Raises:
        RacError: they differ in columns or dtype.
    """
    first = weights[0]
    if len(weights) == 1:
        return first
    for other in weights[1:]:
        if _kind(other) != _kind(first):
            raise RacError(
                f"{other.name}: {other.columns} columns of {other.values.dtype}, which cannot be fused with {first.name}, "
                f"{first.columns} columns of {first.values.dtype}; the checkpoint does not fit this model"
            )
    scales = [weight.scale for weight in weights if weight.scale is not None]
    zeros = [weight.zeros for weight in weights if weight.zeros is not None]
    counts = torch.cat([weight.starts[1:] - weight.starts[:-1] for weight in weights])
    return StoredWeight(
        torch.cat([weight.values for weight in weights]),
        torch.cat([weight.bitmask for weight in weights]),
        first.columns,
        _starts(counts),
        name,
        torch.cat(scales) if scales else None,
        first.bits,
        torch.cat(zeros) if zeros else None,
    )


def _kind(weight: StoredWeight) -> tuple[int, torch.dtype, int, int, bool]:
    return weight.columns, weight.values.dtype, weight.group, weight.bits, weight.zeros is None


def _starts(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _two_of_four(bitmask: Tensor, columns: int) -> bool:
    """Whether two bits are set in every half byte (four columns); `columns` is a multiple of four."""
    counts = _stored_of_four(bitmask)
    if columns % 8:
        return bool((counts[:, :-1] == 0x22).all()) and bool((counts[:, -1] == 0x02).all())
    return bool((counts == 0x22).all())


def _stored_of_four(bitmask: Tensor) -> Tensor:
    """How many bits are set in each half of each byte, in that half."""
    pairs = bitmask - ((bitmask >> 1) & 0x55)
    return (pairs & 0x33) + ((pairs >> 2) & 0x33)
