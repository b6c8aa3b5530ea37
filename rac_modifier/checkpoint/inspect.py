"""What a checkpoint folder holds: how each matrix is stored, how many zeros it has, and whether they keep the pattern."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from rac_modifier.checkpoint.bitmask import DTYPES, count_zeros
from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.formats import (
    FORMAT_24,
    FORMAT_BITMASK,
    PARTS,
    UNSTRUCTURED,
    packed_modules,
    structure_of,
    unpack,
)
from rac_modifier.checkpoint.quantization_config import (
    WORDS,
    WORDS_SHAPE,
    WeightScheme,
    weight_schemes,
    words_weight,
)
from rac_modifier.checkpoint.record import RUN_RECORD_NAME
from rac_modifier.checkpoint.sparsity_config import (
    CONFIG_FILE,
    QUANTIZATION_KEY,
    SparsityConfig,
    SparsityRecord,
)
from rac_modifier.checkpoint.stored_weight import count_broken_groups
from rac_modifier.errors import RacError
from rac_modifier.files import read_json

_SCALES = ("weight_scale", "weight_zero_point")
_EMBEDDING = re.compile(r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|wpe)$")


@dataclass(frozen=True)
class ModuleRow:
    """One weight matrix.

    `stored` is a packed format, "dense", "words" (int32 that hold several values each; `dtype` is then that of the values),
    or "quantized" (a layout whose zeros are not counted here). `stored_bytes` includes masks, offsets and scales.
    `structure` is the recorded mask structure, and `pattern_ok` is whether the zeros still keep it (None: unstructured, or
    not checked). `problem` is what is damaged, `reason` why a matrix is not packed. `read_per_token` is False for a matrix
    of which decoding reads one row per token.
    """

    name: str
    rows: int
    columns: int
    dtype: str
    stored: str
    sparsity: float | None
    stored_bytes: int
    dense_bytes: int
    structure: str | None = None
    pattern_ok: bool | None = None
    reason: str | None = None
    problem: str | None = None
    read_per_token: bool = True

    @property
    def bytes_per_weight(self) -> float:
        """Bytes on disk per weight, masks and offsets included."""
        return self.stored_bytes / (self.rows * self.columns)


@dataclass(frozen=True)
class CheckpointReport:
    """What a folder holds; `format` is a packed format or "dense", `run_record` the parsed run record or None.

    `quantization` has the schemes of its quantized weights.
    """

    folder: Path
    format: str
    modules: tuple[ModuleRow, ...]
    other_bytes: int
    run_record: dict[str, Any] | None
    quantization: tuple[WeightScheme, ...] = ()

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(row.stored_bytes for row in self.modules) + self.other_bytes

    @property
    def dense_bytes(self) -> int:
        """Bytes of all tensors if every matrix were dense, in its own dtype."""
        return sum(row.dense_bytes for row in self.modules) + self.other_bytes

    @property
    def sparse(self) -> tuple[ModuleRow, ...]:
        """The matrices that are packed or recorded as pruned."""
        return tuple(
            row for row in self.modules if row.structure is not None or row.stored in PARTS
        )

    @property
    def sparsity(self) -> float | None:
        """Share of zeros in the sparse matrices, None without any."""
        counted = [row for row in self.sparse if row.sparsity is not None]
        weights = sum(row.rows * row.columns for row in counted)
        return (
            sum((row.sparsity or 0.0) * row.rows * row.columns for row in counted) / weights
            if weights
            else None
        )

    @property
    def sound(self) -> bool:
        """No matrix is damaged and every recorded pattern holds."""
        return all(row.problem is None and row.pattern_ok is not False for row in self.modules)


@dataclass(frozen=True)
class _Config:
    """What the rows need of config.json."""

    sparsity: SparsityConfig | None
    record: SparsityRecord
    schemes: tuple[WeightScheme, ...]


def is_embedding(module: str) -> bool:
    """Whether a module is an embedding, by its name."""
    return bool(_EMBEDDING.search(module))


def inspect_checkpoint(folder: str | Path) -> CheckpointReport:
    """Read a packed, a dense-stored sparse or an ordinary checkpoint, one matrix at a time.

    A damaged packed module becomes a row with a `problem`; what makes the whole folder unreadable raises.

    Raises:
        RacError: no checkpoint, a malformed config.json, index or file, or a packing that was cut off.
    """
    folder = Path(folder)
    parsed = read_json(folder / CONFIG_FILE)
    quantization = parsed.get(QUANTIZATION_KEY)
    config = _Config(
        SparsityConfig.of(quantization), SparsityRecord.of(parsed), weight_schemes(quantization)
    )
    run_record = (
        read_json(folder / RUN_RECORD_NAME) if (folder / RUN_RECORD_NAME).exists() else None
    )
    with TensorFiles(folder) as files:
        packed = packed_modules(files.where)
        # Where config.json lost its sparsity_config, row_offsets still tell the two layouts apart.
        offsets = any(f"{name}.row_offsets" in files for name in packed)
        layout = (
            config.sparsity.format if config.sparsity else FORMAT_BITMASK if offsets else FORMAT_24
        )
        rows = [_packed_row(files, name, layout, config) for name in packed]
        rows += [
            _dense_row(files, name, config)
            for name in files.by_file()
            if _is_matrix(files, name, packed)
        ]
        parts = (*PARTS[FORMAT_BITMASK], "weight", WORDS, WORDS_SHAPE, *_SCALES)
        of_rows = {f"{row.name}.{part}" for row in rows for part in parts}
        other = sum(files.nbytes(name) for name in files.where if name not in of_rows)
    rows.sort(key=_natural_order)
    format = config.sparsity.format if config.sparsity else "dense"
    return CheckpointReport(folder, format, tuple(rows), other, run_record, config.schemes)


def _natural_order(row: ModuleRow) -> list[tuple[int, str]]:
    parts = row.name.split(".")
    # numbers by their length first: int() refuses very long ones, and digits such as "²"
    return [(len(part) if part.isdecimal() else 0, part) for part in parts]


def _is_matrix(files: TensorFiles, name: str, packed: list[str]) -> bool:
    module, _, part = name.rpartition(".")
    return part in ("weight", WORDS) and module not in packed and len(files.shape(name)) == 2


def _bytes_of(files: TensorFiles, name: str, *parts: str) -> int:
    return sum(files.nbytes(f"{name}.{part}") for part in parts if f"{name}.{part}" in files)


def _packed_row(files: TensorFiles, name: str, layout: str, config: _Config) -> ModuleRow:
    present = [part for part in PARTS[layout] if f"{name}.{part}" in files]
    stored_bytes, scales = (
        _bytes_of(files, name, *present, *_SCALES),
        _bytes_of(files, name, *_SCALES),
    )
    structure = config.record.modules.get(name, "2:4" if layout == FORMAT_24 else UNSTRUCTURED)
    try:
        weight = unpack({part: files.tensor(f"{name}.{part}") for part in present}, layout, name)
        ok, problem = _keeps(weight, structure, name)
    except RacError as error:
        return ModuleRow(
            name, 0, 0, "?", layout, None, stored_bytes, 0, structure, None, None, str(error)
        )
    if config.sparsity is None:
        problem = "packed, but config.json has no sparsity_config"
    rows, columns = weight.shape
    sparsity = count_zeros(weight) / weight.numel()
    dtype, dense_bytes = files.dtype_name(f"{name}.compressed"), weight.nbytes
    if dtype == "I32":
        dtype, dense_bytes = "I4", weight.nbytes // 2
    return ModuleRow(
        name,
        rows,
        columns,
        dtype,
        layout,
        sparsity,
        stored_bytes,
        dense_bytes + scales,
        structure,
        ok,
        None,
        problem,
    )


def _dense_row(files: TensorFiles, tensor_name: str, config: _Config) -> ModuleRow:
    name, _, part = tensor_name.rpartition(".")
    rows, columns = files.shape(tensor_name)
    dtype = files.dtype_name(tensor_name)
    structure = config.record.modules.get(name)
    weight: Tensor | None = None
    sparsity, ok, problem = None, None, None
    # a zero weight of an asymmetric scheme is stored as its zero point, so zeros are not counted
    asymmetric = f"{name}.weight_zero_point" in files
    if part == WORDS and rows * columns:
        if (unpacked := words_weight(files, name, config.schemes)) is not None:
            weight, bits = unpacked
            (rows, columns), dtype = weight.shape, f"I{bits}"
    elif rows * columns and not asymmetric and files.dtype(tensor_name) in DTYPES:
        weight = files.tensor(tensor_name)
    if asymmetric:
        weight = None
    if weight is not None:
        sparsity = count_zeros(weight) / weight.numel()
        if structure is not None:
            ok, problem = _keeps(weight, structure, name)
    embedding = is_embedding(name)
    stored_bytes = _bytes_of(files, name, part, WORDS_SHAPE, *_SCALES)
    return ModuleRow(
        name=name,
        rows=rows,
        columns=columns,
        dtype=dtype,
        stored="dense" if part == "weight" else "words" if weight is not None else "quantized",
        sparsity=sparsity,
        stored_bytes=stored_bytes,
        dense_bytes=stored_bytes,
        structure=structure,
        pattern_ok=ok,
        reason=_why_dense(name, structure, sparsity, embedding, part, weight is not None, config),
        problem=problem,
        # A tied embedding is also the output matrix, which every step reads whole.
        read_per_token=not embedding
        or not {"lm_head.weight", "lm_head.compressed"} & files.where.keys(),
    )


def _why_dense(
    name: str,
    structure: str | None,
    sparsity: float | None,
    embedding: bool,
    part: str,
    countable: bool,
    config: _Config,
) -> str:
    if structure is not None:
        stored_dense = config.record.storage == "dense"
        return (
            "pruned, stored dense so that stock loaders read it"
            if stored_dense
            else "pruned, but not packed"
        )
    if embedding:
        return "an embedding, never pruned"
    if not countable:
        return "quantized to a layout whose zeros are not counted"
    if config.sparsity is not None and name in config.sparsity.ignore:
        return "left dense when the model was packed (in ignore)"
    # Rounding to 4 bits makes a sixth of a dense weight zero, to 3 bits a third.
    rounded = part != "weight"
    if sparsity and sparsity >= (0.45 if rounded else 0.05):
        return "has zeros, but no record of pruning"
    return "quantized, not pruned" if rounded else "not pruned"


def _keeps(weight: Tensor, structure: str, name: str) -> tuple[bool | None, str | None]:
    """Whether the zeros keep the recorded structure, and what is wrong if not."""
    try:
        structure = structure_of(structure, name)
        if structure == UNSTRUCTURED:
            return None, None
        broken = count_broken_groups(weight, structure, name)
    except RacError as error:
        return False, str(error)
    return broken == 0, f"{broken} groups break {structure}" if broken else None
