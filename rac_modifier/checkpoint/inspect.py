"""What a checkpoint folder holds: how each matrix is stored, its zeros and their pattern."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rac_modifier.checkpoint.bitmask import DTYPES
from rac_modifier.checkpoint.dense_codes import WORDS, WORDS_SHAPE, ZEROS, words_weight
from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.formats import (
    FORMAT_24,
    PARTS,
    check_packed,
    packed_modules,
    packed_weight,
    structure_of,
)
from rac_modifier.checkpoint.quantization_config import (
    CONFIG_FILE,
    QUANTIZATION_KEY,
    SparsityRecord,
    WeightScheme,
    packed_format,
    weight_schemes,
)
from rac_modifier.checkpoint.stored_weight import (
    SCALE,
    UNSTRUCTURED,
    StoredWeight,
    check_finite,
    check_scale_values,
    count_broken_groups,
    count_zeros,
)
from rac_modifier.errors import RacError
from rac_modifier.files import read_json

_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|wpe)$")


@dataclass(frozen=True)
class ModuleRow:
    """One weight matrix.

    stored: a packed format, "dense", "words" (int32 that hold several values each, of `dtype`),
        or "quantized" (a layout whose zeros are not counted).
    stored_bytes: bytes with masks, offsets, scales and zero points.
    dense_bytes: of the same matrix stored dense, with scales and zero points.
    scale_bytes: of the scales and zero points.
    structure: the recorded mask structure, None without a record.
    reason: why a matrix is not packed.
    problem: what is damaged, or that the zeros do not keep the recorded structure.
    """

    name: str
    rows: int
    columns: int
    dtype: str
    stored: str
    sparsity: float | None
    stored_bytes: int
    dense_bytes: int
    scale_bytes: int = 0
    structure: str | None = None
    reason: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class CheckpointReport:
    """What a folder holds.

    format: a packed format, or "dense".
    stored_bytes: of all tensors, with those that are no matrices.
    quantization: the schemes of its quantized weights.
    """

    folder: Path
    format: str
    modules: tuple[ModuleRow, ...]
    stored_bytes: int
    quantization: tuple[WeightScheme, ...] = ()

    @property
    def dense_bytes(self) -> int:
        """Return the bytes of all tensors if every matrix were dense, in its own dtype."""
        return self.stored_bytes + sum(row.dense_bytes - row.stored_bytes for row in self.modules)

    @property
    def sparse(self) -> tuple[ModuleRow, ...]:
        """Return the matrices that are packed or recorded as pruned."""
        return tuple(row for row in self.modules if row.structure is not None)

    @property
    def sparsity(self) -> float | None:
        """Return the share of zeros in the sparse matrices, None without any."""
        counted = [row for row in self.sparse if row.sparsity is not None]
        zeros = sum((row.sparsity or 0.0) * row.rows * row.columns for row in counted)
        return zeros / sum(row.rows * row.columns for row in counted) if counted else None

    @property
    def sound(self) -> bool:
        """Return whether no matrix is damaged and every recorded pattern holds."""
        return all(row.problem is None for row in self.modules)


def is_embedding(module: str) -> bool:
    """Tell whether a module is an embedding, by its name."""
    return bool(_EMBEDDING.search(module))


def inspect_checkpoint(folder: str | Path) -> CheckpointReport:
    """Read a packed, a dense-stored sparse or an ordinary checkpoint, one matrix at a time.

    A damaged matrix becomes a row with a `problem`; RacError: the whole folder is unreadable.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_FILE)
    with TensorFiles(folder) as files:
        matrices = Matrices(files, config)
        rows = [matrices.packed_row(name) for name in matrices.packed]
        rows += [matrices.dense_row(name) for name in files.by_file() if matrices.is_matrix(name)]
        total = sum(map(files.nbytes, files.where))
    rows.sort(key=natural_order)
    return CheckpointReport(folder, matrices.layout, tuple(rows), total, matrices.schemes)


def natural_order(row: ModuleRow) -> list[tuple[int, str]]:
    """Return the key that sorts rows by name, with layer 10 after layer 9."""
    # numbers by their length first: int() refuses very long ones, and digits such as "²"
    return [(len(word) if word.isdecimal() else 0, word) for word in row.name.split(".")]


class Matrices:
    """The matrices in the files of a checkpoint, and what its config.json says of them."""

    def __init__(self, files: TensorFiles, config: dict[str, Any]) -> None:
        self.files, self.config = files, config
        self.schemes = weight_schemes(config.get(QUANTIZATION_KEY))
        self.record = SparsityRecord.of(config)
        self.packed = packed_modules(files.where)
        self.layout = packed_format(config) or "dense"
        if self.layout == "dense":
            check_packed(files, None)  # refuses packed weights

    def is_matrix(self, name: str) -> bool:
        """Tell whether a tensor is a non-empty matrix that is not packed."""
        module, _, part = name.rpartition(".")
        shape = self.files.shape(name)
        matrix = part in ("weight", WORDS) and len(shape) == 2 and min(shape) > 0
        return matrix and module not in self.packed

    def packed_row(self, name: str) -> ModuleRow:
        """Check a packed module."""
        scales = self._bytes_of(name, SCALE, ZEROS)
        stored_bytes = self._bytes_of(name, *PARTS[self.layout]) + scales
        default = "2:4" if self.layout == FORMAT_24 else UNSTRUCTURED
        row = ModuleRow(name, 0, 0, "?", self.layout, None, stored_bytes, 0, scales)
        row = replace(row, structure=self.record.modules.get(name, default))
        try:
            weight = packed_weight(self.files, self.layout, name, self.schemes)
        except RacError as error:
            return replace(row, problem=str(error))
        dtype, (rows, columns) = self.files.dtype_name(f"{name}.compressed"), weight.shape
        dense_bytes = rows * columns * weight.values.itemsize
        if dtype == "I32":
            dtype, dense_bytes = "I4", dense_bytes // 2
        row = replace(row, rows=rows, columns=columns, dtype=dtype)
        return _counted(replace(row, dense_bytes=dense_bytes + scales), weight)

    def dense_row(self, tensor_name: str) -> ModuleRow:
        """Check a matrix that is not packed."""
        try:
            row, weight = self.read(tensor_name)
        except RacError as error:
            return replace(self._row(tensor_name), problem=str(error))
        row = row if weight is None else _counted(row, weight)
        return replace(row, reason=self._why_dense(row, weight is not None))

    def _row(self, tensor_name: str) -> ModuleRow:
        """Return the row of a matrix that is not packed, before its values are read."""
        name, _, part = tensor_name.rpartition(".")
        stored_bytes = self._bytes_of(name, part, WORDS_SHAPE, SCALE, ZEROS)
        rows, columns = self.files.shape(tensor_name)
        return ModuleRow(
            name,
            rows,
            columns,
            dtype=self.files.dtype_name(tensor_name),
            stored="quantized" if part == WORDS else "dense",
            sparsity=None,
            stored_bytes=stored_bytes,
            dense_bytes=stored_bytes,
            scale_bytes=self._bytes_of(name, SCALE, ZEROS),
            structure=self.record.modules.get(name),
        )

    def read(self, tensor_name: str) -> tuple[ModuleRow, Tensor | None]:
        """Return the row of a matrix that is not packed, and its weight (RacError: it is damaged).

        The weight is None where its zeros are not counted.
        """
        files, row, weight = self.files, self._row(tensor_name), None
        if row.stored == "quantized":
            tensors = files.tensors(row.name, (WORDS, WORDS_SHAPE))
            words = words_weight(tensors, row.name, self.schemes)
            if words is None:
                return row, None
            weight, bits = words
            rows, columns = weight.shape
            row = replace(row, rows=rows, columns=columns, dtype=f"I{bits}", stored="words")
        elif files.dtype(tensor_name) in DTYPES:
            weight = files.tensor(tensor_name)
            check_finite(weight, tensor_name)
        scale = f"{row.name}.{SCALE}"
        if self.schemes and weight is not None and scale in files:
            check_scale_values(files.tensor(scale), scale)
        if f"{row.name}.{ZEROS}" in files:  # which a zero weight is stored as
            return (replace(row, stored="quantized") if row.stored == "words" else row), None
        return row, weight

    @staticmethod
    def _why_dense(row: ModuleRow, countable: bool) -> str:
        if row.structure is not None:
            return "pruned, stored dense so that stock loaders read it"
        if not countable:
            return "quantized to a layout whose zeros are not counted"
        if row.stored == "dense" and row.sparsity and row.sparsity >= 0.05:
            return "has zeros, but no record of pruning"
        return "not pruned"

    def _bytes_of(self, module: str, *part_names: str) -> int:
        names = (f"{module}.{part}" for part in part_names)
        return sum(self.files.nbytes(name) for name in names if name in self.files)


def _counted(row: ModuleRow, weight: Tensor | StoredWeight) -> ModuleRow:
    """Return the row with its sparsity, and whether its zeros keep the recorded structure."""
    row = replace(row, sparsity=count_zeros(weight) / math.prod(weight.shape))
    if row.structure is None:
        return row
    try:
        structure = structure_of(row.structure, row.name)
        broken = count_broken_groups(weight, structure, row.name)
    except RacError as error:
        return replace(row, problem=str(error))
    return replace(row, problem=f"{broken} groups break {structure}") if broken else row
