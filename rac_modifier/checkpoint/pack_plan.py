"""What packing a model would do: the pattern of each matrix, and why it stays dense."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.formats import (
    FORMAT_24,
    FORMAT_BITMASK,
    FORMATS,
    SparseBitmask,
    packed_modules,
    structure_of,
)
from rac_modifier.checkpoint.inspect import Matrices, ModuleRow
from rac_modifier.errors import RacError
from rac_modifier.formats.bitmask import as_integers, nonzero, row_chunks
from rac_modifier.formats.module_names import Role
from rac_modifier.formats.quantization_config import CONFIG_FILE, check_method, packed_format
from rac_modifier.formats.stored_weight import (
    PER_BLOCK,
    SCALE,
    UNSTRUCTURED,
    StoredWeight,
    check_finite,
    count_broken_groups,
    count_zeros,
    from_dense,
    is_per_block,
)
from rac_modifier.formats.words import PACKED_BITS
from rac_modifier.runtime.files import read_json

# Tensors that no symmetric scheme has: with them a zero weight is not stored as the value 0.
_ASYMMETRIC = ("weight_zero_point", "weight_g_idx", "weight_global_scale")
_TRANSPOSED = ("gpt2", "openai-gpt")  # models whose linear layers are stored [inputs, outputs]
MOST_ZEROS_24 = 0.625  # with more, 2:4 explains less than 80 % of the zeros


@dataclass(frozen=True)
class MatrixPlan(ModuleRow):
    """One weight matrix, and what packing it would do; without a `reason` it is packed."""

    negative_zeros: int = 0  # of the zeros, those that are -0.0
    values: int = 0  # that are stored when it is packed
    is_24: bool = False  # the structure is 2:4, and the 2:4 layout keeps all values
    packed_bytes: int | None = None  # with scales; None where it cannot be packed


@dataclass(frozen=True)
class PackPlan:
    """What packing a folder does; `format` of all packed modules, None if none is packed."""

    folder: Path
    format: str | None
    matrices: tuple[MatrixPlan, ...]
    keep_negative_zeros: bool = False

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
        return sorted(name for name in names if Role.of(name) is not Role.EMBEDDING)

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


def plan_packing(folder: str | Path, keep_negative_zeros: bool = False) -> PackPlan:
    """Look at every matrix of a dense-stored model; -0.0 becomes +0.0 unless kept.

    RacError: it cannot be read, is packed already, holds NaN, or is quantized by another method.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_FILE)
    check_method(config)
    with TensorFiles(folder) as files:
        check_unpacked(files, config)
        matrices = Matrices(files, config)
        rows = [_plan(matrices, row, keep_negative_zeros) for row in matrices.rows()]
        planned = {f"{row.name}.weight" for row in rows}
        for name in files.where.keys() - planned:
            if files.dtype(name).is_floating_point:
                check_finite(files.tensor(name), name)
    format, rows = _choose(rows)
    return PackPlan(folder, format, tuple(rows), keep_negative_zeros)


def check_unpacked(files: TensorFiles, config: Mapping[str, Any]) -> None:
    """Refuse a packed checkpoint (RacError)."""
    if packed_format(config) or packed_modules(files.where):
        raise RacError(f"{files.folder}: is packed already; start from the dense checkpoint")


def asymmetric_part(files: TensorFiles, module: str) -> str | None:
    """Return a part by which zeros of a module are not stored as zeros; None: they are."""
    return next((part for part in _ASYMMETRIC if f"{module}.{part}" in files), None)


def in_blocks(files: TensorFiles, module: str) -> bool:
    """Return whether a module has a scale per block of rows and columns."""
    weight, scale = f"{module}.weight", f"{module}.{SCALE}"
    if weight not in files or scale not in files:
        return False
    return is_per_block(files.shape(scale), files.shape(weight)[0])


def _plan(matrices: Matrices, row: ModuleRow, keep: bool) -> MatrixPlan:
    """Read a matrix; return its plan without `packed_bytes`. `keep`: -0.0 is a value."""
    row, stored_weight = matrices.read(row)
    reason = _unreadable(matrices.files, row, stored_weight)
    if stored_weight is None or reason is not None:
        return MatrixPlan(**vars(row) | {"structure": None, "reason": reason})
    weight = stored_weight if isinstance(stored_weight, Tensor) else stored_weight.dense()
    kept, zeros = from_dense(weight, row.name), count_zeros(weight)
    negative = zeros + kept.values.numel() - weight.numel()
    if negative and not keep:
        kept = from_dense(without_negative_zeros(weight), row.name)
    structure = _structure(row, kept, zeros)
    planned = {
        "structure": structure,
        "sparsity": zeros / weight.numel(),
        "reason": _served_dense(row.name, matrices.config),
        "negative_zeros": negative,
        "values": kept.values.numel(),
        "is_24": structure == "2:4" and kept.two_of_four,
    }
    return MatrixPlan(**vars(row) | planned)


def _unreadable(
    files: TensorFiles, row: ModuleRow, weight: StoredWeight | Tensor | None
) -> str | None:
    """Say why the zeros of a matrix cannot be left out, None where they can."""
    if part := asymmetric_part(files, row.name):
        return f"quantized with a {part}: its zeros are not stored as zeros"
    if in_blocks(files, row.name):
        return PER_BLOCK
    if row.stored == "dense":
        return f"stored as {row.dtype}, which cannot be packed" if weight is None else None
    if isinstance(weight, StoredWeight) and weight.bits in PACKED_BITS:
        return None
    return "quantized to a layout that cannot be stored sparse"


def _served_dense(name: str, config: Mapping[str, Any]) -> str | None:
    """Say why a matrix of this name stays dense, None where it need not."""
    if config.get("model_type") in _TRANSPOSED:
        return "stored as [inputs, outputs], which is served dense"
    if Role.of(name) not in (Role.LINEAR, Role.EXPERT):
        return "vLLM serves embeddings, output matrices and routers dense"
    return None


def _structure(row: ModuleRow, kept: StoredWeight, zeros: int) -> str:
    """Return the recorded structure if the weight keeps it, else "2:4" or "unstructured"."""
    if row.structure is not None:
        try:
            structure = structure_of(row.structure, row.name)
            if count_broken_groups(kept, structure, row.name) == 0:
                return structure
        except RacError:
            pass  # a record that does not fit the weight
    is_24 = zeros <= MOST_ZEROS_24 * row.rows * row.columns and kept.two_of_four
    return "2:4" if is_24 else UNSTRUCTURED


def without_negative_zeros(weight: Tensor) -> Tensor:
    """Return a copy with +0.0 instead of -0.0."""
    result = weight.clone()
    for chunk in row_chunks(*weight.shape):
        as_integers(result[chunk]).masked_fill_(~nonzero(weight[chunk]), 0)
    return result


def _choose(rows: list[MatrixPlan]) -> tuple[str | None, list[MatrixPlan]]:
    """Return the format of all packed matrices, None for none, and the rows with their sizes."""
    sized = [_sized(row, FORMATS[FORMAT_24 if row.is_24 else FORMAT_BITMASK]) for row in rows]
    packed = [row for row in sized if row.reason is None]
    if all(row.is_24 for row in packed):
        return (FORMAT_24 if packed else None), sized
    return FORMAT_BITMASK, [_sized(row, FORMATS[FORMAT_BITMASK]) for row in rows]


def _sized(row: MatrixPlan, format: SparseBitmask) -> MatrixPlan:
    if row.reason is not None:
        return row
    # of a dtype such as BF16, F8_E4M3 or I4
    bits = int(row.dtype.strip("BFUI").partition("_")[0])
    size = format.size(row.rows, row.columns, row.values, bits) + row.scale_bytes
    if size < row.dense_bytes:
        return replace(row, packed_bytes=size)
    why = f"would take {size:,} bytes packed, and takes {row.dense_bytes:,} dense"
    return replace(row, packed_bytes=size, reason=why)
