"""What a checkpoint folder holds: how each matrix is stored, its zeros and their pattern."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rac_modifier.checkpoint import gptq_awq
from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.formats import PackedFiles, structure_of
from rac_modifier.errors import RacError
from rac_modifier.formats import stored_weight
from rac_modifier.formats.bitmask import DTYPES
from rac_modifier.formats.quantization_config import (
    CONFIG_FILE,
    QUANTIZATION_KEY,
    SparsityRecord,
    WeightScheme,
)
from rac_modifier.formats.stored_weight import StoredWeight
from rac_modifier.formats.words import WORDS, WORDS_SHAPE, ZEROS
from rac_modifier.runtime.files import read_json


@dataclass(frozen=True)
class ModuleRow:
    """One weight matrix.

    stored: a packed format, "gptq", "awq", "dense", or "words" (integers with several values each).
    stored_bytes: bytes with masks, offsets, scales and zero points.
    scale_bytes: of the scales and zero points.
    structure: the recorded mask structure, None without a record.
    dense_bytes: of the same matrix stored dense, with scales and zero points.
    sparsity: share of zeros, None where they are not counted.
    reason: why a matrix is not packed.
    problem: what is damaged, or that the zeros do not keep the recorded structure.
    """

    name: str
    stored: str
    stored_bytes: int
    scale_bytes: int = 0
    structure: str | None = None
    rows: int = 0
    columns: int = 0
    dtype: str = "?"
    dense_bytes: int = 0
    sparsity: float | None = None
    reason: str | None = None
    problem: str | None = None


@dataclass(frozen=True)
class CheckpointReport:
    """What a folder holds; `stored_bytes`: of all tensors.

    format: a packed one, "gptq", "awq", or "dense" for all others.
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


def is_fp4(files: TensorFiles, name: str) -> bool:
    """Tell whether a tensor holds two values per byte, as NVFP4 and MXFP4 do, without a shape."""
    module, _, part = name.rpartition(".")
    has_shape = f"{module}.{WORDS_SHAPE}" in files
    return part == WORDS and files.dtype_name(name) == "U8" and not has_shape


class Matrices:
    """The matrices in the files of a checkpoint, and what its config.json says of them."""

    def __init__(self, files: TensorFiles, config: dict[str, Any]) -> None:
        self.files, self.config = files, config
        self.packed = PackedFiles(files, config)
        self.record = SparsityRecord.of(config)
        self.format = "dense" if self.packed.format is None else self.packed.format.name
        self.of_words = gptq_awq.format_of(config.get(QUANTIZATION_KEY))
        if self.of_words is not None:
            self.format = self.of_words.method

    def rows(self) -> list[ModuleRow]:
        """List all matrices, before their values are read; layer 10 comes after layer 9."""
        rows = []
        if self.packed.format is not None:
            format = self.packed.format
            for module in self.packed.modules:
                rows.append(self._row(module, format.name, format.parts, format.structure))
        kinds = {"weight": ("dense", ("weight",)), WORDS: ("words", (WORDS, WORDS_SHAPE))}
        if self.of_words is not None:
            kinds[gptq_awq.WORDS] = (self.format, gptq_awq.PARTS)
        for name in self.files.where:
            module, _, part = name.rpartition(".")
            shape = self.files.shape(name)
            if part in kinds and len(shape) == 2 and min(shape) > 0:
                row = self._row(module, *kinds[part])
                dtype, columns = self.files.dtype_name(name), shape[1]
                if is_fp4(self.files, name):
                    dtype, columns = "F4", 2 * columns
                row = replace(row, rows=shape[0], columns=columns, dtype=dtype)
                rows.append(replace(row, dense_bytes=row.stored_bytes))
        return sorted(rows, key=_natural_order)

    def read(self, row: ModuleRow) -> tuple[ModuleRow, StoredWeight | Tensor | None]:
        """Return the row with its shape, and the weight (RacError), None where it is not read."""
        weight: StoredWeight | Tensor | None = None
        if row.stored == "words":
            weight = self.packed.words(row.name)
            if weight is not None:
                rows, columns = weight.shape
                row = replace(row, rows=rows, columns=columns, dtype=f"I{weight.bits}")
        elif self.of_words is not None and row.stored == self.format:
            weight = self.of_words.check(self.files.tensors(row.name, gptq_awq.PARTS), row.name)
            rows, columns = weight.shape
            row = replace(row, rows=rows, columns=columns, dtype=f"I{weight.bits}")
        elif row.stored != "dense":
            weight = self.packed.weight(row.name)
            (rows, columns), bits = weight.shape, weight.bits
            dtype = "I4" if bits == 4 else self.files.dtype_name(f"{row.name}.compressed")
            nbytes = rows * columns * weight.values.itemsize // (2 if bits == 4 else 1)
            size = nbytes + row.scale_bytes
            row = replace(row, rows=rows, columns=columns, dtype=dtype, dense_bytes=size)
        elif self.files.dtype(f"{row.name}.weight") in DTYPES:
            weight = self.files.tensor(f"{row.name}.weight")
            stored_weight.check_finite(weight, f"{row.name}.weight")
            scale = f"{row.name}.{stored_weight.SCALE}"
            if self.packed.schemes and scale in self.files:
                stored_weight.check_scale_values(self.files.tensor(scale), scale)
            if f"{row.name}.{ZEROS}" in self.files:  # which a zero weight is stored as
                weight = None
        return row, weight

    def _row(
        self, module: str, stored: str, parts: Iterable[str], structure: str | None = None
    ) -> ModuleRow:
        structure = self.record.modules.get(module, structure)
        scales = self._bytes_of(module, (stored_weight.SCALE, ZEROS))
        return ModuleRow(module, stored, self._bytes_of(module, parts) + scales, scales, structure)

    def _bytes_of(self, module: str, parts: Iterable[str]) -> int:
        names = (f"{module}.{part}" for part in parts)
        return sum(self.files.nbytes(name) for name in names if name in self.files)


def inspect_checkpoint(
    folder: str | Path, visit: Callable[[StoredWeight], object] = lambda weight: None
) -> CheckpointReport:
    """Read any checkpoint, matrix by matrix; `visit` gets each packed weight, if it is sound.

    A damaged matrix is a row with a `problem` (RacError: the whole folder is unreadable).
    """
    folder = Path(folder)
    with TensorFiles(folder) as files:
        matrices = Matrices(files, read_json(folder / CONFIG_FILE))
        rows = [_inspected(matrices, row, visit) for row in matrices.rows()]
        total = sum(map(files.nbytes, files.where))
    return CheckpointReport(folder, matrices.format, tuple(rows), total, matrices.packed.schemes)


def _inspected(
    matrices: Matrices, row: ModuleRow, visit: Callable[[StoredWeight], object]
) -> ModuleRow:
    """Return a row with its sparsity, or with what is damaged."""
    try:
        row, weight = matrices.read(row)
        if isinstance(weight, StoredWeight):
            visit(weight)
        if weight is None or (isinstance(weight, StoredWeight) and weight.zeros is not None):
            return replace(row, reason="quantized to a layout whose zeros are not counted")
        row = replace(row, sparsity=stored_weight.count_zeros(weight) / math.prod(weight.shape))
        if row.structure is None:
            return row
        structure = structure_of(row.structure, row.name)
        broken = stored_weight.count_broken_groups(weight, structure, row.name)
    except RacError as error:
        return replace(row, problem=str(error))
    return replace(row, problem=f"{broken} groups break {structure}") if broken else row


def _natural_order(row: ModuleRow) -> list[tuple[int, str]]:
    # numbers by their length first: int() refuses very long ones, and digits such as "²"
    return [(len(word) if word.isdecimal() else 0, word) for word in row.name.split(".")]
