"""What packing a model would do: the pattern of each matrix, and why it stays dense."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rac_modifier.checkpoint.bitmask import as_integers, column_sums, nonzero, row_chunks
from rac_modifier.checkpoint.dense_codes import PACKED_BITS, to_words
from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.formats import (
    FORMAT_24,
    FORMAT_BITMASK,
    PACKED,
    packed_modules,
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
ASYMMETRIC = ("weight_zero_point", "weight_g_idx", "weight_global_scale")
_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)$")
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)$")
_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.\d+\.")
_TRANSPOSED = ("gpt2", "openai-gpt")  # models whose linear layers are stored [inputs, outputs]
_GROUPS = (4, 8, 16)  # the M of N:M, each twice the one before
# Of all zeros: with fewer in the pattern, it is what a broken pattern of smaller groups leaves.
_LEAST_SHARE = 0.8


@dataclass(frozen=True)
class MatrixPlan(ModuleRow):
    """One weight matrix, and what packing it would do.

    structure: "N:M", "unstructured", or None where zeros are not counted.
    reason: why it stays dense; None: it is packed.
    negative_zeros: of the zeros, those that are -0.0.
    values: how many are stored when it is packed.
    fits_24: whether the 2:4 layout keeps all of them.
    packed_bytes: with scales; None where it cannot be packed.
    """

    negative_zeros: int = 0
    values: int = 0
    fits_24: bool = False
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
        if not counted:
            raise RacError(
                f"{self.folder}: has no weight matrix that can be packed; give a model with "
                "linear layers"
            )
        most = max(counted, key=lambda row: row.sparsity or 0.0)
        raise RacError(
            f"{self.folder}: nothing to pack: no module would get smaller. The most zeros "
            f"are in {most.name}, {most.sparsity:.1%} ({most.reason}); prune the model first "
            "(rac prune), or use it as it is"
        )


def plan_packing(folder: str | Path, drop_negative_zeros: bool = False) -> PackPlan:
    """Look at every matrix of a dense-stored model, one at a time.

    `drop_negative_zeros`: -0.0 will be stored as +0.0.

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
    planned = {
        "structure": _structure(row.name, weight, row.structure),
        "sparsity": zeros / weight.numel(),
        "reason": _never_packed(row.name, matrices.config),
        "negative_zeros": negative,
        "values": stored,
        "fits_24": fits_24(weight),
    }
    return MatrixPlan(**vars(row) | planned)


def _unreadable(files: TensorFiles, row: ModuleRow, weight: Tensor | None) -> str | None:
    """Say why the zeros of a matrix cannot be left out, None where they can.

    Int32 words that unpacking would not make again, bit for bit, stay as they are.
    """
    for part in ASYMMETRIC:
        if f"{row.name}.{part}" in files:
            return f"quantized with a {part}: its zeros are not stored as zeros"
    if row.stored == "dense":
        return f"stored as {row.dtype}, which cannot be packed" if weight is None else None
    bits, reason = _bits_of(row.dtype), "quantized to a layout that cannot be stored sparse"
    if weight is None or bits not in PACKED_BITS:
        return reason
    words = {f"{row.name}.{part}": tensor for part, tensor in to_words(weight, bits).items()}
    for name, tensor in words.items():
        if files.dtype(name) != tensor.dtype or not files.tensor(name).equal(tensor):
            return reason
    return None


def _never_packed(name: str, config: Mapping[str, Any]) -> str | None:
    """Say why a matrix of this name is served dense, None where it is not."""
    if is_embedding(name):
        return "an embedding"
    if _HEAD.search(name):
        return "the output matrix, which is served dense"
    if _ROUTER.search(name):
        return "a router of experts, which is served dense"
    transposed = config.get("model_type") in _TRANSPOSED
    return "stored as [inputs, outputs], which is served dense" if transposed else None


def _structure(name: str, weight: Tensor, recorded: str | None) -> str:
    """Return the recorded structure if the weight keeps it, else the detected one."""
    if recorded is not None:
        try:
            structure = structure_of(recorded, name)
            if count_broken_groups(weight, structure, name) == 0:
                return structure
        except RacError:
            pass  # a record that does not fit the weight
    return find_structure(weight)


def find_structure(weight: Tensor) -> str:
    """Return the strongest pattern "N:M" (N pruned) of a weight [rows, columns], or "unstructured".

    M is 4, 8 or 16. -0.0 counts as zero. A pattern is stated only if it accounts for 80 % of the
    zeros, and a larger M only if it prunes at least 1/16 more.
    """
    rows, columns = weight.shape
    least = {m: m for m in _GROUPS if columns % m == 0}
    zeros = 0
    for chunk in row_chunks(rows, columns):
        zero = ~nonzero(weight[chunk])
        zeros += int(zero.sum())
        counts = zero.view(torch.uint8)
        for m in least:  # ascending
            counts = column_sums(counts, m * counts.shape[1] // columns)
            least[m] = min(least[m], int(counts.min()))
    best, pruned = UNSTRUCTURED, 0.0
    for m, n in least.items():
        share = n / m
        if share >= pruned + 1 / 16 and n < m and share >= _LEAST_SHARE * zeros / weight.numel():
            best, pruned = f"{n}:{m}", share
    return best


def fits_24(weight: Tensor) -> bool:
    """Tell whether the 2:4 layout keeps all bits: at most two of four values are not +0.0."""
    if weight.shape[1] % 4:
        return False
    stored = (as_integers(weight[chunk]) != 0 for chunk in row_chunks(*weight.shape))
    return all(int(column_sums(mask.view(torch.uint8), 4).max()) <= 2 for mask in stored)


def without_negative_zeros(weight: Tensor) -> Tensor:
    """Return a copy with +0.0 instead of -0.0."""
    result = weight.clone()
    for chunk in row_chunks(*weight.shape):
        as_integers(result[chunk]).masked_fill_(~nonzero(weight[chunk]), 0)
    return result


def _choose(rows: list[MatrixPlan]) -> tuple[str | None, list[MatrixPlan]]:
    """Return the format of all packed matrices, None for none, and the rows with their sizes."""
    while True:
        packed = [row for row in rows if row.reason is None]
        if not packed:
            return None, rows
        all_24 = all(row.structure == "2:4" and row.fits_24 for row in packed)
        format = FORMAT_24 if all_24 else FORMAT_BITMASK
        sized = [_sized(row, format) if row.reason is None else row for row in rows]
        sized = _keep_experts_alike(sized)
        if [row.reason for row in sized] == [row.reason for row in rows]:
            return format, sized
        rows = sized


def _sized(row: MatrixPlan, format: str) -> MatrixPlan:
    size = PACKED[format].size(row.rows, row.columns, row.values, _bits_of(row.dtype))
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


def _keep_experts_alike(rows: list[MatrixPlan]) -> list[MatrixPlan]:
    """Pack all experts of a layer or none, since transformers merges them."""
    dense: dict[str, str] = {}
    for row in rows:
        if row.reason is not None and (expert := _EXPERT.match(row.name)):
            dense.setdefault(expert["experts"], row.name)
    alike = []
    for row in rows:
        expert = _EXPERT.match(row.name)
        if row.reason is None and expert and (dense_expert := dense.get(expert["experts"])):
            why = f"experts of a layer are stored alike, and {dense_expert} stays dense"
            row = replace(row, reason=why)
        alike.append(row)
    return alike


def _bits_of(dtype: str) -> int:
    """Return the bits of a value by the name of its dtype: BF16, F8_E4M3, I4, ..."""
    return int(dtype.strip("BFUI").partition("_")[0])
