"""What packing a model would do: the pattern of each matrix, and why it stays dense."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rac_modifier.checkpoint.bitmask import as_integers, nonzero, row_chunks, sums_of_four
from rac_modifier.checkpoint.dense_codes import PACKED_BITS, WORDS, WORDS_SHAPE, to_words
from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.formats import (
    FORMAT_24,
    FORMAT_BITMASK,
    packed_modules,
    packed_size,
    structure_of,
)
from rac_modifier.checkpoint.inspect import Matrices, ModuleRow, is_embedding, natural_order
from rac_modifier.checkpoint.quantization_config import CONFIG_FILE, check_method, packed_format
from rac_modifier.checkpoint.stored_weight import (
    UNSTRUCTURED,
    check_finite,
    count_broken_groups,
    count_stored,
    count_zeros,
)
from rac_modifier.errors import RacError
from rac_modifier.files import read_json

# Tensors that no symmetric scheme has: with them a zero weight is not stored as the value 0.
_ASYMMETRIC = ("weight_zero_point", "weight_g_idx", "weight_global_scale")
_SERVED_DENSE = {
    re.compile(r"(^|\.)(lm_head|embed_out)$"): "the output matrix, which is served dense",
    re.compile(r"(^|\.)(gate|router|shared_expert_gate)$"): "a router, which is served dense",
}
_TRANSPOSED = ("gpt2", "openai-gpt")  # models whose linear layers are stored [inputs, outputs]
_MOST_ZEROS_24 = 0.625  # with more, 2:4 explains less than 80 % of the zeros


@dataclass(frozen=True)
class MatrixPlan(ModuleRow):
    """One weight matrix, and what packing it would do.

    structure: "N:M", "unstructured", or None where zeros are not counted.
    reason: why it stays dense; None: it is packed.
    negative_zeros: of the zeros, those that are -0.0.
    values: how many are stored when it is packed.
    is_24: the structure is 2:4, and the 2:4 layout keeps all values.
    packed_bytes: with scales; None where it cannot be packed.
    """

    negative_zeros: int = 0
    values: int = 0
    is_24: bool = False
    packed_bytes: int | None = None


@dataclass(frozen=True)
class PackPlan:
    """What packing a folder does; `format` of all packed modules, None if none is packed."""

    folder: Path
    format: str | None
    matrices: tuple[MatrixPlan, ...]
    drop_negative_zeros: bool = False

    @property
    def packed(self) -> tuple[MatrixPlan, ...]:
        """Return the matrices that are packed."""
        return tuple(row for row in self.matrices if row.reason is None)

    @property
    def structures(self) -> dict[str, str]:
        """Mask structure by packed module."""
        return {row.name: row.structure or "" for row in self.packed}

    @property
    def ignore(self) -> list[str]:
        """Return the linear modules that stay dense."""
        names = (row.name for row in self.matrices if row.reason is not None)
        return sorted(name for name in names if not is_embedding(name))

    def check_gain(self) -> None:
        """Refuse a model without a matrix to pack (RacError names the sparsest matrix)."""
        if self.packed:
            return
        counted = [row for row in self.matrices if row.sparsity is not None]
        most = max(counted, key=lambda row: row.sparsity or 0.0, default=None)
        example = f": {most.name} has {most.sparsity:.1%} zeros ({most.reason})" if most else ""
        raise RacError(
            f"{self.folder}: nothing to pack: no module would get smaller{example}; prune the "
            "model first (rac prune), or use it as it is"
        )


def plan_packing(folder: str | Path, drop_negative_zeros: bool = False) -> PackPlan:
    """Look at every matrix of a dense-stored model; `drop_negative_zeros`: -0.0 becomes +0.0.

    Raises:
        RacError: no readable checkpoint, one that is packed already, another quantization than
            compressed-tensors, or NaN.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_FILE)
    check_method(config)
    with TensorFiles(folder) as files:
        check_unpacked(files, config)
        matrices, rows = Matrices(files, config), []
        for name in files.by_file():
            if matrices.is_matrix(name):
                rows.append(_plan(matrices, name, drop_negative_zeros))
            elif files.dtype(name).is_floating_point:
                check_finite(files.tensor(name), name)
    format, rows = _choose(sorted(rows, key=natural_order))
    return PackPlan(folder, format, tuple(rows), drop_negative_zeros)


def check_unpacked(files: TensorFiles, config: Mapping[str, Any]) -> None:
    """Refuse a packed checkpoint (RacError)."""
    if packed_format(config) or packed_modules(files.where):
        raise RacError(f"{files.folder}: is packed already; start from the dense checkpoint")


def asymmetric_part(files: TensorFiles, module: str) -> str | None:
    """Return a part by which zeros of a module are not stored as zeros; None: they are."""
    return next((part for part in _ASYMMETRIC if f"{module}.{part}" in files), None)


def _plan(matrices: Matrices, tensor_name: str, drop: bool) -> MatrixPlan:
    """Read a matrix; return its row, without `packed_bytes`. `drop`: store -0.0 as +0.0."""
    row, weight = matrices.read(tensor_name)
    reason = _unreadable(matrices.files, row, weight)
    if weight is None or reason is not None:
        return MatrixPlan(**vars(row) | {"structure": None, "reason": reason})
    zeros, stored = count_zeros(weight), count_stored(weight)
    negative = zeros + stored - weight.numel()
    if drop and negative:
        weight, stored = without_negative_zeros(weight), stored - negative
    structure = _structure(row, weight, zeros)
    is_24 = structure == "2:4" and _most_of_four(weight, lambda w: as_integers(w) != 0) <= 2
    planned = {
        "structure": structure,
        "sparsity": zeros / weight.numel(),
        "reason": _never_packed(row.name, matrices.config),
        "negative_zeros": negative,
        "values": stored,
        "is_24": is_24,
    }
    return MatrixPlan(**vars(row) | planned)


def _unreadable(files: TensorFiles, row: ModuleRow, weight: Tensor | None) -> str | None:
    """Say why the zeros of a matrix cannot be left out, None where they can.

    Int32 words that unpacking would not make again, bit for bit, stay as they are.
    """
    if part := asymmetric_part(files, row.name):
        return f"quantized with a {part}: its zeros are not stored as zeros"
    if row.stored == "dense":
        return f"stored as {row.dtype}, which cannot be packed" if weight is None else None
    bits, reason = _bits_of(row.dtype), "quantized to a layout that cannot be stored sparse"
    if weight is None or bits not in PACKED_BITS:
        return reason
    stored = files.tensors(row.name, (WORDS, WORDS_SHAPE))
    for part, tensor in to_words(weight, bits).items():
        if stored[part].dtype != tensor.dtype or not stored[part].equal(tensor):
            return reason
    return None


def _never_packed(name: str, config: Mapping[str, Any]) -> str | None:
    """Say why a matrix of this name is served dense, None where it is not."""
    if is_embedding(name):
        return "an embedding"
    for pattern, reason in _SERVED_DENSE.items():
        if pattern.search(name):
            return reason
    transposed = config.get("model_type") in _TRANSPOSED
    return "stored as [inputs, outputs], which is served dense" if transposed else None


def _structure(row: ModuleRow, weight: Tensor, zeros: int) -> str:
    """Return the recorded structure if the weight keeps it, else "2:4" or "unstructured"."""
    if row.structure is not None:
        try:
            structure = structure_of(row.structure, row.name)
            if count_broken_groups(weight, structure, row.name) == 0:
                return structure
        except RacError:
            pass  # a record that does not fit the weight
    is_24 = zeros <= _MOST_ZEROS_24 * weight.numel() and _most_of_four(weight, nonzero) <= 2
    return "2:4" if is_24 else UNSTRUCTURED


def _most_of_four(weight: Tensor, mask: Callable[[Tensor], Tensor]) -> int:
    """Return the most weights in the mask of four neighbouring columns, 4 without such columns."""
    if weight.shape[1] % 4:
        return 4
    chunks = row_chunks(*weight.shape)
    counts = (sums_of_four(mask(weight[rows]).view(torch.uint8)) for rows in chunks)
    return max(int(count.max()) for count in counts)


def without_negative_zeros(weight: Tensor) -> Tensor:
    """Return a copy with +0.0 instead of -0.0."""
    result = weight.clone()
    for chunk in row_chunks(*weight.shape):
        as_integers(result[chunk]).masked_fill_(~nonzero(weight[chunk]), 0)
    return result


def _choose(rows: list[MatrixPlan]) -> tuple[str | None, list[MatrixPlan]]:
    """Return the format of all packed matrices, None for none, and the rows with their sizes."""
    sized = [_sized(row, FORMAT_24 if row.is_24 else FORMAT_BITMASK) for row in rows]
    packed = [row for row in sized if row.reason is None]
    if all(row.is_24 for row in packed):
        return (FORMAT_24 if packed else None), sized
    return FORMAT_BITMASK, [_sized(row, FORMAT_BITMASK) for row in rows]


def _sized(row: MatrixPlan, format: str) -> MatrixPlan:
    if row.reason is not None:
        return row
    size = packed_size(format, row.rows, row.columns, row.values, _bits_of(row.dtype))
    size += row.scale_bytes
    if size < row.dense_bytes:
        return replace(row, packed_bytes=size)
    why = f"would take {size:,} bytes packed, and takes {row.dense_bytes:,} dense"
    if row.negative_zeros:
        why += (
            f", as its {row.negative_zeros:,} zeros that are -0.0 are kept "
            "(see --drop-negative-zeros)"
        )
    return replace(row, packed_bytes=size, reason=why)


def _bits_of(dtype: str) -> int:
    """Return the bits of a value by the name of its dtype: BF16, F8_E4M3, I4, ..."""
    return int(dtype.strip("BFUI").partition("_")[0])
