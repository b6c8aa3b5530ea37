"""What packing a model would do: the pattern of each matrix, whether packing it gains, and if not, why. Writes nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rac_modifier.checkpoint import detect
from rac_modifier.checkpoint.bitmask import DTYPES, count_zeros
from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.formats import FORMAT_24, FORMAT_BITMASK, structure_of
from rac_modifier.checkpoint.inspect import is_embedding
from rac_modifier.checkpoint.packing import check_unpacked
from rac_modifier.checkpoint.quantization_config import (
    ASYMMETRIC,
    WORDS,
    WORDS_SHAPE,
    WeightScheme,
    to_words,
    weight_schemes,
    words_weight,
)
from rac_modifier.checkpoint.sparsity_config import (
    CONFIG_FILE,
    QUANTIZATION_KEY,
    check_method,
    recorded_structures,
)
from rac_modifier.checkpoint.stored_weight import count_broken_groups
from rac_modifier.errors import RacError
from rac_modifier.files import read_json

_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)$")
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)$")
_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.\d+\.")
_TRANSPOSED = ("gpt2", "openai-gpt")  # models whose linear layers are stored [inputs, outputs]


@dataclass(frozen=True)
class MatrixPlan:
    """One weight matrix [rows, columns].

    `structure` is "N:M", "unstructured", or None where zeros are not counted; `sparsity` the share of zeros, -0.0 among
    them. `stored` is how many values are kept when it is packed, and `fits_24` whether the 2:4 layout keeps all of them.
    `packed_bytes` is None where it cannot be packed. `reason`: why it stays dense; None: it is packed. `linear`: a linear layer.
    """

    name: str
    rows: int
    columns: int
    dtype: str
    dense_bytes: int
    structure: str | None = None
    sparsity: float | None = None
    negative_zeros: int = 0
    stored: int = 0
    fits_24: bool = False
    packed_bytes: int | None = None
    reason: str | None = None
    linear: bool = True


@dataclass(frozen=True)
class PackPlan:
    """What packing a folder does; `format` is that of all packed modules, None where none is packed."""

    folder: Path
    format: str | None
    matrices: tuple[MatrixPlan, ...]
    drop_negative_zeros: bool = False

    @property
    def packed(self) -> tuple[MatrixPlan, ...]:
        """The matrices that are packed."""
        return tuple(row for row in self.matrices if row.reason is None)

    @property
    def structures(self) -> dict[str, str]:
        """Mask structure by packed module."""
        return {row.name: row.structure or "" for row in self.packed}

    @property
    def ignore(self) -> list[str]:
        """The linear modules that stay dense."""
        return sorted(row.name for row in self.matrices if row.reason is not None and row.linear)

    def check_gain(self) -> None:
        """Refuse a model of which nothing would be packed.

        Raises:
            RacError: naming the matrix with the largest share of zeros.
        """
        if self.packed:
            return
        counted = [row for row in self.matrices if row.sparsity is not None]
        if not counted:
            raise RacError(
                f"{self.folder}: has no weight matrix that can be packed; give a model with linear layers"
            )
        most = max(counted, key=lambda row: row.sparsity or 0.0)
        raise RacError(
            f"{self.folder}: nothing to pack: no module would get smaller. The most zeros are in {most.name}, "
            f"{most.sparsity:.1%} ({most.reason}); prune the model first (rac prune), or use it as it is"
        )


def plan_packing(folder: str | Path, drop_negative_zeros: bool = False) -> PackPlan:
    """Look at every matrix of a dense-stored model, one at a time.

    Args:
        folder: of the model.
        drop_negative_zeros: -0.0 will be stored as +0.0.

    Raises:
        RacError: no readable checkpoint, one that is packed already, another quantization than compressed-tensors, or NaN.
    """
    folder = Path(folder)
    config = read_json(folder / CONFIG_FILE)
    check_method(config)
    with TensorFiles(folder) as files:
        check_unpacked(files, config)
        look = _Look(files, config, drop_negative_zeros)
        rows = [row for name in files.by_file() if (row := look.tensor(name)) is not None]
    format, rows = _choose(sorted(rows, key=lambda row: row.name))
    return PackPlan(folder, format, tuple(rows), drop_negative_zeros)


def packed_size(format: str, rows: int, columns: int, stored: int, bits: int) -> int:
    """Bytes of a packed weight of which `stored` values of so many bits are kept; masks, offsets and shape included."""
    values = rows * columns // 2 if format == FORMAT_24 else stored
    if bits == 4:
        words = rows * -(-columns // 2 // 8) if format == FORMAT_24 else -(-values // 8)
        size = 4 * words
    else:
        size = values * bits // 8
    offsets = 0 if format == FORMAT_24 else 8 * rows
    return size + rows * -(-columns // 8) + offsets + 16


def _is_matrix(files: TensorFiles, tensor_name: str) -> bool:
    _, _, part = tensor_name.rpartition(".")
    shape = files.shape(tensor_name)
    return part in ("weight", WORDS) and len(shape) == 2 and min(shape) > 0


@dataclass(frozen=True)
class _Look:
    files: TensorFiles
    config: dict[str, Any]
    drop: bool

    def tensor(self, name: str) -> MatrixPlan | None:
        """Read a tensor once: refuse NaN, and the row of a matrix."""
        values = self.files.tensor(name) if self.files.dtype(name).is_floating_point else None
        if values is not None and detect.has_nan(values):
            raise RacError(
                f"{name}: holds NaN in {self.files.folder / self.files.where[name]}; the model is damaged: save or copy it again"
            )
        return self._row(name, values) if _is_matrix(self.files, name) else None

    def _row(self, tensor_name: str, values: Tensor | None) -> MatrixPlan:
        """What is known of one matrix by itself, with its size in the layout of its own pattern."""
        name, _, part = tensor_name.rpartition(".")
        rows, columns = self.files.shape(tensor_name)
        row = MatrixPlan(
            name, rows, columns, self.files.dtype_name(tensor_name), self.files.nbytes(tensor_name)
        )
        schemes = weight_schemes(self.config.get(QUANTIZATION_KEY))
        if found := [part for part in ASYMMETRIC if f"{name}.{part}" in self.files]:
            return replace(
                row, reason=f"quantized with a {found[0]}: its zeros are not stored as zeros"
            )
        if part == WORDS:
            weight, bits = self._words(name, schemes)
            if weight is None:
                return replace(row, reason="quantized to a layout that cannot be stored sparse")
            dense_bytes = row.dense_bytes + self.files.nbytes(f"{name}.{WORDS_SHAPE}")
            row = replace(row, columns=weight.shape[1], dtype=f"I{bits}", dense_bytes=dense_bytes)
        elif self.files.dtype(tensor_name) not in DTYPES:
            return replace(row, reason=f"stored as {row.dtype}, which cannot be packed")
        else:
            weight = self.files.tensor(tensor_name) if values is None else values
        return self._measured(row, weight)

    def _words(self, name: str, schemes: tuple[WeightScheme, ...]) -> tuple[Tensor | None, int]:
        """Int8 values of int32 words; None where packing would not give back the very words."""
        found = words_weight(self.files, name, schemes)
        if found is None:
            return None, 0
        again = to_words(*found)
        same = all(
            self.files.dtype(f"{name}.{part}") == tensor.dtype
            and self.files.tensor(f"{name}.{part}").equal(tensor)
            for part, tensor in again.items()
        )
        return (found[0], found[1]) if same else (None, 0)

    def _measured(self, row: MatrixPlan, weight: Tensor) -> MatrixPlan:
        zeros, stored = count_zeros(weight), detect.count_stored(weight)
        negative = zeros + stored - weight.numel()
        if self.drop and negative:
            weight, stored = detect.without_negative_zeros(weight), stored - negative
        row = replace(
            row,
            structure=self._structure(row.name, weight),
            sparsity=zeros / weight.numel(),
            negative_zeros=negative,
            stored=stored,
            fits_24=detect.fits_24(weight),
        )
        if is_embedding(row.name):
            return replace(row, linear=False, reason="an embedding")
        if _HEAD.search(row.name):
            return replace(row, reason="the output matrix, which is served dense")
        if _ROUTER.search(row.name):
            return replace(row, reason="a router of experts, which is served dense")
        if self.config.get("model_type") in _TRANSPOSED:
            return replace(row, reason="stored as [inputs, outputs], which is served dense")
        return row

    def _structure(self, name: str, weight: Tensor) -> str:
        """The recorded structure where the weight keeps it, else the one that is found."""
        if (recorded := recorded_structures(self.config).get(name)) is not None:
            try:
                if count_broken_groups(weight, structure_of(recorded, name), name) == 0:
                    return structure_of(recorded, name)
            except RacError:
                pass  # a record that does not fit the weight; what the weight itself shows is stated
        return detect.find_structure(weight)


def _choose(rows: list[MatrixPlan]) -> tuple[str | None, list[MatrixPlan]]:
    """The one format of all packed matrices, and the rows with their sizes in it and the reasons of those that stay dense."""
    while True:
        packed = [row for row in rows if row.reason is None]
        if not packed:
            return None, rows
        format = (
            FORMAT_24
            if all(row.structure == "2:4" and row.fits_24 for row in packed)
            else FORMAT_BITMASK
        )
        sized = _keep_experts_alike(
            [_sized(row, format) if row.reason is None else row for row in rows]
        )
        if [row.reason for row in sized] == [row.reason for row in rows]:
            return format, sized
        rows = sized


def _sized(row: MatrixPlan, format: str) -> MatrixPlan:
    bits = (
        int(row.dtype[1:])
        if row.dtype in ("I4", "I8")
        else 8 * row.dense_bytes // (row.rows * row.columns)
    )
    size = packed_size(format, row.rows, row.columns, row.stored, bits)
    if size < row.dense_bytes:
        return replace(row, packed_bytes=size)
    why = f"would take {size:,} bytes packed, and takes {row.dense_bytes:,} dense"
    if row.negative_zeros:
        why += f", as its {row.negative_zeros:,} zeros that are -0.0 are kept (see --drop-negative-zeros)"
    return replace(row, packed_bytes=size, reason=why)


def _keep_experts_alike(rows: list[MatrixPlan]) -> list[MatrixPlan]:
    """Transformers merges the experts of a layer, so that all of them are packed or none."""
    dense: dict[str, str] = {}
    for row in rows:
        if row.reason is not None and (found := _EXPERT.match(row.name)):
            dense.setdefault(found["experts"], row.name)
    return [
        replace(
            row,
            reason=f"experts of a layer are stored alike, and {dense[found['experts']]} stays dense",
        )
        if row.reason is None and (found := _EXPERT.match(row.name)) and found["experts"] in dense
        else row
        for row in rows
    ]
