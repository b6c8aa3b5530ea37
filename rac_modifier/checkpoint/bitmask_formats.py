"""The two bitmask formats: the tensors that they store, checked and packed.

compressed-tensors up to 0.14 called these layouts sparse-24-bitmask and sparse-bitmask. `check`
takes the tensors for untrusted input: nothing is indexed by a number from a file before it was
compared with the bitmask.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from rac_modifier.checkpoint import bitmask as layout
from rac_modifier.checkpoint.bitmask import part_of
from rac_modifier.checkpoint.int32_words import pack_words, unpack_words
from rac_modifier.checkpoint.stored_weight import (
    StoredWeight,
    check_finite,
    check_scale,
    compress_nonzero,
    row_starts,
)
from rac_modifier.errors import RacError


class BitmaskFormat(ABC):
    """A format with `bitmask`, `shape`, and `compressed`: the values, or int32 words of 4 bits."""

    name: str
    parts: tuple[str, ...]

    @abstractmethod
    def _check_values(
        self, tensors: Mapping[str, Tensor], bitmask: Tensor, columns: int, module: str
    ) -> tuple[Tensor, Tensor]:
        """Return the values, 1-D, and row starts, int64 [N + 1]; refuse contradictions."""

    def check(
        self, tensors: Mapping[str, Tensor], module: str, scaled: bool = True
    ) -> StoredWeight:
        """Check the tensors and return their weight (`PackedFormat.check`)."""
        compressed = part_of(tensors, module, "compressed")
        bitmask, rows, columns = _check_mask(tensors, module)
        if compressed.dtype not in (torch.int32, *layout.DTYPES):
            raise RacError(
                f"{module}.compressed: no weight is packed in dtype {compressed.dtype}; "
                "the checkpoint is damaged"
            )
        values, starts = self._check_values(tensors, bitmask, columns, module)
        check_finite(values, f"{module}.compressed")
        scale = check_scale(tensors, values.dtype, rows, columns, module) if scaled else None
        bits = 4 if compressed.dtype == torch.int32 else 8
        return StoredWeight(values, bitmask, columns, starts, module, scale, bits)


class Bitmask24(BitmaskFormat):
    """2:4: `compressed` [N, K/2], two values of each four columns; `shape` int64 [2, 1].

    A group with fewer than two nonzeros stores zeros, first -0.0, then +0.0 from the left. -0.0
    that finds no place comes back as +0.0. `shape` is a column because vLLM up to 0.18 loads it
    into a [2, 1] parameter.
    """

    name = "sparse-24-bitmask"
    parts = ("compressed", "bitmask", "shape")

    def pack(self, weight: Tensor, module: str, bits: int | None = None) -> dict[str, Tensor]:  # noqa: D102
        rows, columns = _check_weight(weight, module)
        if columns % 4:
            raise RacError(
                f"{module}: {columns} columns are no multiple of 4, so it cannot be packed as 2:4; "
                "pack as unstructured"
            )

        def keep(part: Tensor, first_row: int) -> Tensor:
            return _two_of_four(part, module, first_row)

        values, bitmask = layout.compress(weight, rows * columns // 2, keep)
        values = values.view(rows, columns // 2)
        return {
            "compressed": pack_words(values, 4) if bits == 4 else values,
            "bitmask": bitmask,
            "shape": torch.tensor([[rows], [columns]], dtype=torch.int64),
        }

    def size(self, rows: int, columns: int, stored: int, bits: int) -> int:  # noqa: D102
        half = columns // 2
        per_row = 4 * -(-half // 8) if bits == 4 else half * bits // 8
        return rows * (per_row + -(-columns // 8)) + 16

    def _check_values(
        self, tensors: Mapping[str, Tensor], bitmask: Tensor, columns: int, module: str
    ) -> tuple[Tensor, Tensor]:
        compressed, rows, half = tensors["compressed"], len(bitmask), columns // 2
        in_words = compressed.dtype == torch.int32
        width = -(-half // 8) if in_words else half
        if columns % 4 or tuple(compressed.shape) != (rows, width):
            raise RacError(
                f"{module}.compressed: shape {list(compressed.shape)} does not fit a 2:4 weight "
                f"[{rows}, {columns}], which stores [{rows}, {width}]; the checkpoint is "
                "damaged or not 2:4"
            )
        if not layout.keeps_two_of_four(bitmask, columns):
            raise RacError(
                f"{module}.bitmask: a group of four columns does not keep exactly two; "
                "the checkpoint is damaged"
            )
        values = unpack_words(compressed, 4, half) if in_words else compressed
        return values.reshape(-1), torch.arange(rows + 1, device=bitmask.device) * half


class Bitmask(BitmaskFormat):
    """Unstructured: `compressed` 1-D, its row starts `row_offsets` int64 [N], `shape` int64 [2]."""

    name = "sparse-bitmask"
    parts = ("compressed", "bitmask", "row_offsets", "shape")

    def pack(self, weight: Tensor, module: str, bits: int | None = None) -> dict[str, Tensor]:  # noqa: D102
        rows, columns = _check_weight(weight, module)
        values, bitmask, starts = compress_nonzero(weight)
        return {
            "compressed": pack_words(values, 4) if bits == 4 else values,
            "bitmask": bitmask,
            "row_offsets": starts[:-1],
            "shape": torch.tensor([rows, columns], dtype=torch.int64),
        }

    def size(self, rows: int, columns: int, stored: int, bits: int) -> int:  # noqa: D102
        values = 4 * -(-stored // 8) if bits == 4 else stored * bits // 8
        return values + rows * (-(-columns // 8) + 8) + 16

    def _check_values(
        self, tensors: Mapping[str, Tensor], bitmask: Tensor, columns: int, module: str
    ) -> tuple[Tensor, Tensor]:
        starts, compressed = row_starts(layout.row_counts(bitmask)), tensors["compressed"]
        count = int(starts[-1])
        in_words = compressed.dtype == torch.int32
        if tuple(compressed.shape) != ((-(-count // 8) if in_words else count),):
            raise RacError(
                f"{module}.compressed: shape {list(compressed.shape)} does not fit the "
                f"{count} values that the bitmask keeps; the checkpoint is damaged"
            )
        offsets = part_of(tensors, module, "row_offsets")
        if offsets.dtype != torch.int64 or not torch.equal(offsets, starts[:-1]):
            raise RacError(
                f"{module}.row_offsets: not the row starts that the bitmask has; "
                "the checkpoint is damaged"
            )
        return (unpack_words(compressed, 4, count) if in_words else compressed), starts


def _check_weight(weight: Tensor, module: str) -> tuple[int, int]:
    """Return N and K of a weight that can be packed; refuse others."""
    if weight.dim() != 2 or not weight.numel():
        raise RacError(
            f"{module}: shape {list(weight.shape)}; only non-empty matrices [N, K] can be packed, "
            "so leave it dense"
        )
    if weight.dtype not in layout.DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in layout.DTYPES)
        raise RacError(
            f"{module}: dtype {weight.dtype} cannot be packed; convert it to one of {known}, "
            "or leave it dense"
        )
    return weight.shape[0], weight.shape[1]


def _check_mask(tensors: Mapping[str, Tensor], module: str) -> tuple[Tensor, int, int]:
    """Return the bitmask, N and K, which fit each other; refuse others."""
    bitmask, shape = part_of(tensors, module, "bitmask"), part_of(tensors, module, "shape")
    if shape.dtype != torch.int64 or shape.numel() != 2:
        raise RacError(
            f"{module}.shape: {shape.dtype} {list(shape.shape)} instead of two int64; "
            "the checkpoint is damaged"
        )
    rows, columns = shape.flatten().tolist()
    expected = (rows, -(-columns // 8))
    if bitmask.dtype != torch.uint8 or min(rows, columns) < 1 or bitmask.shape != expected:
        raise RacError(
            f"{module}.bitmask: {bitmask.dtype} {list(bitmask.shape)} is no uint8 bitmask of "
            f"a weight [{rows}, {columns}], the size in {module}.shape; the checkpoint is "
            "damaged"
        )
    if columns % 8 and bool((bitmask[:, -1] >> (columns % 8)).any()):
        raise RacError(
            f"{module}.bitmask: bits are set beyond column {columns}; the checkpoint is damaged"
        )
    return bitmask, rows, columns


def _two_of_four(weight: Tensor, module: str, first_row: int) -> Tensor:
    """Choose two of every four columns: first nonzeros, then -0.0, then +0.0, from the left."""
    keep = layout.nonzero(weight)
    counts = layout.group_counts(keep)
    if bool((counts == 2).all()):  # the usual case, and much cheaper than choosing
        return keep
    crowded = (counts > 2).nonzero()
    if len(crowded):
        row, group = divmod(int(crowded[0]), weight.shape[1] // 4)
        raise RacError(
            f"{module}: {len(crowded)} or more groups hold more than 2 nonzeros, the first in row "
            f"{first_row + row}, columns {4 * group}-{4 * group + 3}; the weight is not 2:4: "
            "pack it as unstructured, or prune it again"
        )
    groups, keep = layout.as_integers(weight).reshape(-1, 4), keep.view(-1, 4)
    for candidates in (groups != 0, torch.ones_like(keep)):
        free = candidates & ~keep
        keep = keep | (free & (free.cumsum(dim=1) <= 2 - keep.sum(dim=1, keepdim=True)))
    return keep.view(weight.shape)
