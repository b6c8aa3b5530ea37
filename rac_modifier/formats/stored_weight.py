"""A weight as a checkpoint stores it: its scales checked, cut to what a rank needs."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.formats.bitmask import (
    as_integers,
    compress,
    damaged,
    dense_blocks,
    expand,
    most_of_four,
    nonzero,
    row_chunks,
    row_counts,
)
from rac_modifier.formats.encoding import Encoding
from rac_modifier.settings.pattern import Pattern

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
SCALE = "weight_scale"
UNSTRUCTURED = "unstructured"
PER_BLOCK = "its scales are per block of rows and columns, which no sparse kernel reads"
REORDERED = "its columns are reordered (desc_act)"  # why a layer stays dense
_CHUNK = 1 << 20  # values


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A weight [N, columns]: stored `values` 1-D in row-major order, and `bitmask`.

    bitmask: uint8 [N, ceil(columns/8)], which weights are stored.
    starts: int64 [N + 1], where each row begins in `values`.
    name: the module, for messages.
    scale: float32 [N, groups] of quantized values (int8, fp8); all groups have as many columns.
    bits: 4 for int8 values of -8 to 7, or a code of 0 to 15 minus its code of zero. Dense weights
        (every value is stored) may have 3 or 2.
    zeros: codes of zero, uint8 [N, groups].
    activation_bits: bits that a kernel of integers may round the inputs of this layer to, 16 or 8.
    order: int64 [columns]; column i multiplies x[..., order[i]]. None: in the order of the inputs.
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
    order: Tensor | None = None

    @property
    def rows(self) -> int:
        """Return N."""
        return len(self.bitmask)

    @property
    def shape(self) -> tuple[int, int]:
        """Return N and columns."""
        return self.rows, self.columns

    @property
    def density(self) -> float:
        """Return the share of the weights that are stored."""
        return self.values.numel() / math.prod(self.shape)

    @property
    def per_block(self) -> bool:
        """Return whether the scales are per block of rows and columns, which are not kept."""
        return self.scale is None and self.values.dtype not in FLOATS

    @property
    def encoding(self) -> Encoding:
        """Return how its values are written."""
        group = None if self.group == self.columns else self.group
        return Encoding.of(self.values.dtype, self.bits, group, self.zeros is None)

    @property
    def group(self) -> int:
        """Return the columns that share a scale."""
        return self.columns // (1 if self.scale is None else self.scale.shape[1])

    @property
    def two_of_four(self) -> bool:
        """Return whether at most two of each four neighbouring columns are stored."""
        return self.columns % 4 == 0 and most_of_four(self.bitmask) <= 2

    @property
    def group_bytes(self) -> int:
        """Return the bytes of a group's scale, 2 (bfloat16, if exact) or 4, and zero code."""
        narrow = self.scale is not None and torch.equal(self.scale.bfloat16().float(), self.scale)
        return (2 if narrow else 4) + (self.zeros is not None)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """Return the dense weight times its scales, in float32, rounded once to `dtype`."""
        return dequantize(self.dense(), self.scale, dtype)

    def dense(self) -> Tensor:
        """Return the dense weight [N, columns]; quantized values without their scales."""
        if self.density == 1.0:
            return self.values.view(self.shape)
        return expand(self.values, self.bitmask, self.columns)

    def select_rows(self, rows: Tensor) -> "StoredWeight":
        """Return the rows of these numbers (int64) in this order; runs are copied together."""
        breaks = (torch.nonzero(rows.diff() != 1).flatten() + 1).tolist()
        runs = [
            (int(rows[a]), int(rows[b - 1]) + 1)
            for a, b in zip([0, *breaks], [*breaks, len(rows)], strict=True)
        ]
        if runs == [(0, self.rows)]:
            return self
        starts = self.starts.tolist()
        return replace(
            self,
            values=torch.cat([self.values[starts[a] : starts[b]] for a, b in runs]),
            bitmask=self.bitmask[rows],
            starts=row_starts(self.starts.diff()[rows]),
            scale=None if self.scale is None else self.scale[rows],
            zeros=None if self.zeros is None else self.zeros[rows],
        )

    def select_columns(self, first: int, count: int) -> "StoredWeight":
        """Return columns `first` to `first + count`; zeros that were stored are left out.

        RacError: some columns of a weight whose columns are reordered.
        """
        if (first, count) == (0, self.columns):
            return self
        if self.order is not None:
            raise RacError(f"{REORDERED}, and ranks share them")
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


def check_scale(
    tensors: Mapping[str, Tensor], dtype: torch.dtype, rows: int, columns: int, module: str
) -> Tensor | None:
    """Return the scales float32 [rows, groups] of a weight [rows, columns]; None of floats."""
    name, scale = f"{module}.{SCALE}", tensors.get(SCALE)
    if dtype in FLOATS:
        if scale is not None:
            raise RacError(f"{name}: unexpected, as the values are {dtype}; save the model again")
        return None
    if scale is None:
        raise RacError(
            f"{name}: missing, but its values are {dtype}; copy the checkpoint again, or restore "
            "the config.json that was saved with it"
        )
    check_scale_values(scale, name)
    if scale.numel() == 1:
        return scale.float().reshape(1, 1).expand(rows, 1).contiguous()
    scale = scale[:, None] if scale.dim() == 1 else scale
    if scale.dim() != 2 or scale.shape[0] != rows or not scale.shape[1] or columns % scale.shape[1]:
        shapes = "one scale, one per row, or one per row and group of columns"
        fault = f"shape {list(scale.shape)} does not fit a weight [{rows}, {columns}], which has"
        raise damaged(name, f"{fault} {shapes}")
    return scale.float().contiguous()


def is_per_block(shape: Sequence[int], rows: int) -> bool:
    """Tell by their shape whether the scales of a weight of N `rows` are per block."""
    return len(shape) == 2 and math.prod(shape) > 1 and shape[0] != rows


def check_scale_values(scale: Tensor, name: str) -> None:
    """Refuse scales that are zero or not finite (RacError). AutoRound writes negative ones."""
    if scale.dtype not in FLOATS:
        raise damaged(name, f"{scale.dtype}, not floats")
    check_finite(scale, name)
    if bool((scale == 0).any()):
        raise damaged(name, "a scale is zero")


def check_finite(values: Tensor, name: str) -> None:
    """Refuse floats that are NaN or infinite (RacError)."""
    if not values.is_floating_point():
        return
    for chunk in values.reshape(-1).split(_CHUNK):
        known = chunk.float() if chunk.itemsize == 1 else chunk  # torch tests no 8-bit floats
        if not bool(known.isfinite().all()):
            raise damaged(name, "holds values that are not finite (NaN or infinite)")


def dequantize(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return [N, K] times `scale` [N, groups], in float32, as `dtype`."""
    if scale is None:
        return weight.to(dtype)
    grouped = weight.float().view(len(weight), scale.shape[1], -1)
    return (grouped * scale[:, :, None]).view(weight.shape).to(dtype)


def count_zeros(weight: Tensor | StoredWeight) -> int:
    """Count the weights that are 0.0 or -0.0."""
    values = weight if isinstance(weight, Tensor) else weight.values
    kept = sum(int(nonzero(chunk).sum()) for chunk in values.reshape(-1).split(_CHUNK))
    return math.prod(weight.shape) - kept


def count_broken_groups(weight: Tensor | StoredWeight, structure: str, module: str) -> int:
    """Count the groups of M columns with fewer than N zeros; an unstructured weight has none."""
    if structure == UNSTRUCTURED:
        return 0
    pattern = Pattern.parse(structure, None)
    pattern.check_shape(module, *weight.shape)
    blocks: Iterable[Tensor]
    if isinstance(weight, Tensor):
        blocks = (weight[rows] for rows in row_chunks(*weight.shape))
    else:
        stored = dense_blocks(weight.values, weight.bitmask, weight.columns)
        blocks = (block for _, block in stored)
    kept = (nonzero(block).view(-1, pattern.m).sum(dim=1) for block in blocks)
    return sum(int((count > pattern.m - pattern.n).sum()) for count in kept)


def from_dense(weight: Tensor, name: str) -> StoredWeight:
    """Return the sparse form of a dense weight [N, columns]: all values but +0.0 are stored."""
    chunks = row_chunks(*weight.shape)
    count = sum(int(_stored(weight[rows]).sum()) for rows in chunks)
    values, bitmask = compress(weight, count, _stored)
    starts = row_starts(row_counts(bitmask))
    return StoredWeight(values, bitmask, weight.shape[1], starts, name)


def _stored(weight: Tensor) -> Tensor:
    return as_integers(weight) != 0


def all_stored(weight: Tensor, name: str) -> StoredWeight:
    """Return a dense weight [N, columns] with every value stored, zeros too."""
    rows, columns = weight.shape
    bitmask = torch.full((rows, -(-columns // 8)), 255, dtype=torch.uint8)
    if columns % 8:
        bitmask[:, -1] = (1 << columns % 8) - 1
    return StoredWeight(weight.flatten(), bitmask, columns, torch.arange(rows + 1) * columns, name)


def stack(weights: Sequence[StoredWeight], name: str) -> StoredWeight:
    """Stack the rows of these weights, in order (RacError: they are stored in different ways)."""
    first = weights[0]
    if len(weights) == 1:
        return first
    for further in weights[1:]:
        if _kind(further) != _kind(first):
            raise RacError(
                f"{further.name} cannot be fused with {first.name}: their columns, their order, "
                "dtypes, bits, groups or zero points differ; quantize both in the same way"
            )
    scales = [weight.scale for weight in weights if weight.scale is not None]
    zeros = [weight.zeros for weight in weights if weight.zeros is not None]
    return replace(
        first,
        values=torch.cat([weight.values for weight in weights]),
        bitmask=torch.cat([weight.bitmask for weight in weights]),
        starts=row_starts(torch.cat([weight.starts.diff() for weight in weights])),
        name=name,
        scale=torch.cat(scales) if scales else None,
        zeros=torch.cat(zeros) if zeros else None,
        activation_bits=16,
    )


def _kind(weight: StoredWeight) -> tuple[object, ...]:
    order = None if weight.order is None else tuple(weight.order.tolist())
    return weight.columns, weight.values.dtype, weight.encoding, order


def row_starts(counts: Tensor) -> Tensor:
    """Return where each row starts, int64 [N + 1], from the number of values in each, int64 [N]."""
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])
