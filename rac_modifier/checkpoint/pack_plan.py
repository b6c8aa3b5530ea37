"""What packing a model would do: the pattern of each matrix, and why it stays dense."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from rac_modifier.checkpoint import detect
from rac_modifier.checkpoint.bitmask import DTYPES
from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.formats import FORMAT_24, FORMAT_BITMASK, PACKED, structure_of
from rac_modifier.checkpoint.inspect import is_embedding
from rac_modifier.checkpoint.int32_words import BITS
from rac_modifier.checkpoint.packing import check_unpacked
from rac_modifier.checkpoint.quantization_config import (
    ASYMMETRIC,
    WORDS,
    WORDS_SHAPE,
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
from rac_modifier.checkpoint.stored_weight import (
    check_finite,
    count_broken_groups,
    count_stored,
    count_zeros,
)
from rac_modifier.errors import RacError
from rac_modifier.files import read_json

_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)$")
_ROUTER = re.compile(r"(^|\.)(gate|router|shared_expert_gate)$")
_EXPERT = re.compile(r"(?P<experts>.*\.experts)\.\d+\.")
_TRANSPOSED = ("gpt2", "openai-gpt")  # models whose linear layers are stored [inputs, outputs]


@dataclass(frozen=True)
class MatrixPlan:
    """One weight matrix [rows, columns].

    `structure` is "N:M", "unstructured", or None where zeros are not counted; `sparsity` the
    share of zeros, -0.0 among them. `stored` is how many values are kept when it is packed, and
    `fits_24` whether the 2:4 layout keeps all of them. `packed_bytes` is None where it cannot
    be packed. `reason`: why it stays dense; None: it is packed. `linear`: a linear layer.
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
    """What packing a folder does; `format` of all packed modules, None if none is packed."""

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

    Args:
        folder: of the model.
        drop_negative_zeros: -0.0 will be stored as +0.0.

    Raises:
        RacError: no readable checkpoint, one that is packed already, another quantization than
            compressed-tensors, or NaN.
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


class _Look:
    """The files of a checkpoint and what its config.json says of them."""

    def __init__(self, files: TensorFiles, config: dict[str, Any], drop: bool) -> None:
        self.files, self.drop = files, drop
        self.schemes = weight_schemes(config.get(QUANTIZATION_KEY))
        self.recorded = recorded_structures(config)
        self.transposed = config.get("model_type") in _TRANSPOSED

    def tensor(self, tensor_name: str) -> MatrixPlan | None:
        """Read a tensor, refuse NaN, and return the row of a matrix; None for other tensors."""
        files = self.files
        floats = files.dtype(tensor_name).is_floating_point
        values = files.tensor(tensor_name) if floats else None
        if values is not None:
            check_finite(values, tensor_name)
        name, _, part = tensor_name.rpartition(".")
        shape = files.shape(tensor_name)
        if part not in ("weight", WORDS) or len(shape) != 2 or min(shape) < 1:
            return None
        row = MatrixPlan(name, *shape, files.dtype_name(tensor_name), files.nbytes(tensor_name))
        if asymmetric := [part for part in ASYMMETRIC if f"{name}.{part}" in files]:
            reason = f"quantized with a {asymmetric[0]}: its zeros are not stored as zeros"
            return replace(row, reason=reason)
        if part == WORDS:
            return self._words(row)
        if files.dtype(tensor_name) not in DTYPES:
            return replace(row, reason=f"stored as {row.dtype}, which cannot be packed")
        return self._measured(row, files.tensor(tensor_name) if values is None else values)

    def _words(self, row: MatrixPlan) -> MatrixPlan:
        """Return the row of a matrix in int32 words; dense if the words would not come back."""
        stored = words_weight(self.files, row.name, self.schemes)
        unreadable = replace(row, reason="quantized to a layout that cannot be stored sparse")
        if stored is None or stored[1] not in BITS:
            return unreadable
        weight, bits = stored
        for part, tensor in to_words(weight, bits).items():
            name = f"{row.name}.{part}"
            if self.files.dtype(name) != tensor.dtype or not self.files.tensor(name).equal(tensor):
                return unreadable
        dense_bytes = row.dense_bytes + self.files.nbytes(f"{row.name}.{WORDS_SHAPE}")
        columns = weight.shape[1]
        row = replace(row, columns=columns, dtype=f"I{bits}", dense_bytes=dense_bytes)
        return self._measured(row, weight)

    def _measured(self, row: MatrixPlan, weight: Tensor) -> MatrixPlan:
        zeros, stored = count_zeros(weight), count_stored(weight)
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
        if self.transposed:
            return replace(row, reason="stored as [inputs, outputs], which is served dense")
        return row

    def _structure(self, name: str, weight: Tensor) -> str:
        """Return the recorded structure if the weight keeps it, else the detected one."""
        if (recorded := self.recorded.get(name)) is not None:
            try:
                structure = structure_of(recorded, name)
                if count_broken_groups(weight, structure, name) == 0:
                    return structure
            except RacError:
                pass  # a record that does not fit the weight
        return detect.find_structure(weight)


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
    in_words = row.dtype in ("I4", "I8")
    bits = int(row.dtype[1:]) if in_words else 8 * row.dense_bytes // (row.rows * row.columns)
    size = PACKED[format].size(row.rows, row.columns, row.stored, bits)
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
        if row.reason is None and expert and (other := dense.get(expert["experts"])):
            why = f"experts of a layer are stored alike, and {other} stays dense"
            row = replace(row, reason=why)
        alike.append(row)
    return alike
