"""The packed formats of a sparse weight by name, and the packed modules of a checkpoint's files.

A new format is a class with the members of `PackedFormat` and an entry of `PACKED`. transformers,
vLLM and `rac inspect` read every packed module through `check`, which takes the tensors for
untrusted input: nothing is indexed by a number from a file before it was compared with the
bitmask. compressed-tensors up to 0.14 called the layouts sparse-24-bitmask and sparse-bitmask.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from rac_modifier.checkpoint import bitmask as layout
from rac_modifier.checkpoint.bitmask import damaged, part_of
from rac_modifier.checkpoint.dense_codes import WORDS, pack_words, unpack_words, word_count
from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.checkpoint.quantization_config import FORMAT_24 as FORMAT_24
from rac_modifier.checkpoint.quantization_config import FORMAT_BITMASK as FORMAT_BITMASK
from rac_modifier.checkpoint.quantization_config import WeightScheme, int8_in_words
from rac_modifier.checkpoint.stored_weight import (
    FLOATS,
    SCALE,
    UNSTRUCTURED,
    StoredWeight,
    check_finite,
    check_scale,
    check_scale_values,
    compress_nonzero,
    row_starts,
)
from rac_modifier.errors import RacError
from rac_modifier.settings.pattern import Pattern

# A tensor with such a name shows that its module is packed, even where other parts are missing.
_MARKERS = ("compressed", "bitmask", "row_offsets")


class PackedFormat(Protocol):
    """A sparse format: its name in config.json, and the tensors that replace `<module>.weight`."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def parts(self) -> tuple[str, ...]: ...  # noqa: D102

    def pack(self, weight: Tensor, module: str, bits: int | None = None) -> dict[str, Tensor]:
        """Return the tensors of a dense weight [N, K] by part.

        `bits` 4: the weight is int8, its values have four bits, and are stored in int32 words.

        Raises:
            RacError: the weight does not fit the format.
        """

    def size(self, rows: int, columns: int, stored: int, bits: int) -> int:
        """Return the bytes of all parts of a weight with `stored` values of `bits` bits."""

    def check(
        self, tensors: Mapping[str, Tensor], module: str, scaled: bool = True
    ) -> StoredWeight:
        """Check the tensors of a module as untrusted input and return its weight.

        Args:
            tensors: by part, and `weight_scale` where the values are quantized.
            module: its name, for messages.
            scaled: False where another reader checks the scales; the result then has none.

        Raises:
            RacError: naming `{module}.{part}`, where parts are missing, malformed or contradict
                each other.
        """


class BitmaskFormat(ABC):
    """A format with `bitmask`, `shape`, and `compressed`: the values, or int32 words of 4 bits."""

    @abstractmethod
    def _compress(self, weight: Tensor, module: str) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the stored values, and the other parts."""

    @abstractmethod
    def _layout(
        self, tensors: Mapping[str, Tensor], bitmask: Tensor, columns: int, module: str
    ) -> tuple[tuple[int, ...], Tensor]:
        """Return the shape of the values, and row starts, int64 [N + 1]; refuse contradictions."""

    def pack(self, weight: Tensor, module: str, bits: int | None = None) -> dict[str, Tensor]:  # noqa: D102
        if weight.dim() != 2 or not weight.numel():
            raise RacError(
                f"{module}: shape {list(weight.shape)}; only non-empty matrices [N, K] can be "
                "packed, so leave it dense"
            )
        if weight.dtype not in layout.DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in layout.DTYPES)
            raise RacError(
                f"{module}: dtype {weight.dtype} cannot be packed; convert it to one of {allowed}, "
                "or leave it dense"
            )
        values, index = self._compress(weight, module)
        return {"compressed": pack_words(values, 4) if bits == 4 else values, **index}

    def check(  # noqa: D102
        self, tensors: Mapping[str, Tensor], module: str, scaled: bool = True
    ) -> StoredWeight:
        compressed = part_of(tensors, module, "compressed")
        bitmask, rows, columns = _check_mask(tensors, module)
        if compressed.dtype not in (torch.int32, *layout.DTYPES):
            fault = f"no weight is packed in dtype {compressed.dtype}"
            raise damaged(f"{module}.compressed", fault)
        shape, starts = self._layout(tensors, bitmask, columns, module)
        in_words = compressed.dtype == torch.int32
        expected = (*shape[:-1], word_count(shape[-1], 4)) if in_words else shape
        if tuple(compressed.shape) != expected:
            fault = f"shape {list(compressed.shape)} does not fit the bitmask, which keeps"
            raise damaged(f"{module}.compressed", f"{fault} {list(expected)}")
        values = (unpack_words(compressed, 4, shape[-1]) if in_words else compressed).reshape(-1)
        check_finite(values, f"{module}.compressed")
        scale = check_scale(tensors, values.dtype, rows, columns, module) if scaled else None
        bits = 4 if in_words else 8
        return StoredWeight(values, bitmask, columns, starts, module, scale, bits)


class Bitmask24(BitmaskFormat):
    """2:4: `compressed` [N, K/2], two values of each four columns; `shape` int64 [2, 1].

    A group with fewer than two nonzeros stores zeros, first -0.0, then +0.0 from the left. A -0.0
    without a place comes back as +0.0. `shape` is a column because vLLM up to 0.18 loads it into
    a [2, 1] parameter.
    """

    name = FORMAT_24
    parts = ("compressed", "bitmask", "shape")

    def _compress(self, weight: Tensor, module: str) -> tuple[Tensor, dict[str, Tensor]]:
        rows, columns = weight.shape
        if columns % 4:
            raise RacError(
                f"{module}: {columns} columns are no multiple of 4, so it cannot be packed as 2:4; "
                "pack as unstructured"
            )

        def keep(part: Tensor, first_row: int) -> Tensor:
            return _two_of_four(part, module, first_row)

        values, bitmask = layout.compress(weight, rows * columns // 2, keep)
        shape = torch.tensor([[rows], [columns]], dtype=torch.int64)
        return values.view(rows, columns // 2), {"bitmask": bitmask, "shape": shape}

    def _layout(
        self, tensors: Mapping[str, Tensor], bitmask: Tensor, columns: int, module: str
    ) -> tuple[tuple[int, ...], Tensor]:
        if columns % 4 or not layout.keeps_two_of_four(bitmask, columns):
            fault = "a group of four columns does not keep exactly two"
            raise damaged(f"{module}.bitmask", fault)
        rows, half = len(bitmask), columns // 2
        return (rows, half), torch.arange(rows + 1, device=bitmask.device) * half

    def size(self, rows: int, columns: int, stored: int, bits: int) -> int:  # noqa: D102
        half = columns // 2
        per_row = 4 * word_count(half, 4) if bits == 4 else half * bits // 8
        return rows * (per_row + -(-columns // 8)) + 16


class Bitmask(BitmaskFormat):
    """Unstructured: `compressed` 1-D, its row starts `row_offsets` int64 [N], `shape` int64 [2]."""

    name = FORMAT_BITMASK
    parts = ("compressed", "bitmask", "row_offsets", "shape")

    def _compress(self, weight: Tensor, module: str) -> tuple[Tensor, dict[str, Tensor]]:
        values, bitmask, starts = compress_nonzero(weight)
        shape = torch.tensor(weight.shape, dtype=torch.int64)
        return values, {"bitmask": bitmask, "row_offsets": starts[:-1], "shape": shape}

    def _layout(
        self, tensors: Mapping[str, Tensor], bitmask: Tensor, columns: int, module: str
    ) -> tuple[tuple[int, ...], Tensor]:
        starts = row_starts(layout.row_counts(bitmask))
        offsets = part_of(tensors, module, "row_offsets")
        if offsets.dtype != torch.int64 or not torch.equal(offsets, starts[:-1]):
            raise damaged(f"{module}.row_offsets", "not the row starts that the bitmask has")
        return (int(starts[-1]),), starts

    def size(self, rows: int, columns: int, stored: int, bits: int) -> int:  # noqa: D102
        values = 4 * word_count(stored, 4) if bits == 4 else stored * bits // 8
        return values + rows * (-(-columns // 8) + 8) + 16


_FORMATS: tuple[PackedFormat, ...] = (Bitmask24(), Bitmask())
PACKED = {form.name: form for form in _FORMATS}
PARTS = {name: form.parts for name, form in PACKED.items()}


def pack(weight: Tensor, format: str, module: str, bits: int | None = None) -> dict[str, Tensor]:
    """Return the tensors of a dense weight [N, K] in a format (`PackedFormat.pack`)."""
    return PACKED[format].pack(weight, module, bits)


def check(
    tensors: Mapping[str, Tensor], format: str, module: str, scaled: bool = True
) -> StoredWeight:
    """Check the tensors of a module in the packed format of this name (`PackedFormat.check`)."""
    return PACKED[format].check(tensors, module, scaled)


def choose_format(structures: Iterable[str]) -> str:
    """Choose one format for a whole checkpoint: 2:4 only where every module is 2:4."""
    return FORMAT_24 if all(structure == "2:4" for structure in structures) else FORMAT_BITMASK


def structure_of(value: str, module: str) -> str:
    """Return a mask structure as it is recorded: "N:M" (N pruned), or "unstructured" ("0:0")."""
    if value in (UNSTRUCTURED, "0:0"):
        return UNSTRUCTURED
    try:
        return Pattern.parse(value, None).mask_structure
    except RacError as error:
        raise RacError(f"{module}: {error}") from error


def packed_modules(tensor_names: Iterable[str]) -> list[str]:
    """List the modules that are packed according to these tensor names, sorted."""
    split = (name.rpartition(".") for name in tensor_names)
    return sorted({module for module, _, part in split if module and part in _MARKERS})


def check_packed(
    files: TensorFiles, format: str | None, schemes: tuple[WeightScheme, ...] = ()
) -> list[str]:
    """Check names and dtypes of packed tensors; list the modules whose dense form is int32 words.

    `format` and `schemes` come from config.json; `format` is None for dense weights.

    Raises:
        RacError: config.json and the tensors contradict each other, or a part is missing.
    """
    modules = packed_modules(files.where)
    if format is None:
        if modules:
            raise RacError(
                f"{files.folder}: {modules[0]} is packed but config.json has no sparsity_config; "
                "restore the config.json that packing wrote"
            )
        return []
    if not modules:
        raise RacError(
            f"{files.folder}: config.json says {format}, but no tensor is packed; "
            "copy the whole model again"
        )
    tensor_names = {f"{module}.{part}" for module in modules for part in PARTS[format]}
    if lost := sorted(tensor_names - files.where.keys()):
        raise RacError(f"{lost[0]}: missing from {files.folder}; copy or save the checkpoint again")
    dense = {f"{module}.{part}" for module in modules for part in ("weight", WORDS)}
    if duplicates := sorted(dense & files.where.keys()):
        raise RacError(
            f"{duplicates[0]}: stored both dense and packed in {files.folder}; save the model again"
        )
    in_words = (torch.int32, torch.int8) if int8_in_words(schemes) else (torch.int32,)
    return [module for module in modules if files.dtype(f"{module}.compressed") in in_words]


def packed_weight(
    files: TensorFiles, format: str, module: str, schemes: tuple[WeightScheme, ...] = ()
) -> StoredWeight:
    """Read and check the weight of a packed module and its scales (RacError)."""
    stored_parts = [part for part in PARTS[format] if f"{module}.{part}" in files]
    tensors = {part: files.tensor(f"{module}.{part}") for part in stored_parts}
    weight = check(tensors, format, module, scaled=False)
    check_scale_of(files, module, weight.rows, weight.columns, schemes)
    return weight


def check_scale_of(
    files: TensorFiles,
    module: str,
    rows: int,
    columns: int,
    schemes: tuple[WeightScheme, ...],
) -> None:
    """Check the scales of a packed module [rows, columns] (RacError names them)."""
    name, dtype = f"{module}.{SCALE}", files.dtype(f"{module}.compressed")
    tensors = {SCALE: files.tensor(name)} if name in files else {}
    # scales of blocks of rows and columns have another shape, which vLLM and transformers check
    if dtype not in FLOATS and tensors and any(s.strategy == "block" for s in schemes):
        check_scale_values(tensors[SCALE], name)
    else:
        check_scale(tensors, dtype, rows, columns, module)


def _check_mask(tensors: Mapping[str, Tensor], module: str) -> tuple[Tensor, int, int]:
    """Return the bitmask, N and K, which fit each other; refuse others."""
    bitmask, shape = part_of(tensors, module, "bitmask"), part_of(tensors, module, "shape")
    if shape.dtype != torch.int64 or shape.numel() != 2:
        fault = f"{shape.dtype} {list(shape.shape)} instead of two int64"
        raise damaged(f"{module}.shape", fault)
    rows, columns = shape.flatten().tolist()
    expected = (rows, -(-columns // 8))
    if bitmask.dtype != torch.uint8 or min(rows, columns) < 1 or bitmask.shape != expected:
        fault = f"{bitmask.dtype} {list(bitmask.shape)} is no uint8 bitmask of a weight"
        raise damaged(f"{module}.bitmask", f"{fault} [{rows}, {columns}], the size in its shape")
    if columns % 8 and bool((bitmask[:, -1] >> (columns % 8)).any()):
        raise damaged(f"{module}.bitmask", f"bits are set beyond column {columns}")
    return bitmask, rows, columns


def _two_of_four(weight: Tensor, module: str, first_row: int) -> Tensor:
    """Choose two of every four columns: first nonzeros, then -0.0, then +0.0, from the left."""
    keep = layout.nonzero(weight)
    counts = layout.column_sums(keep.view(torch.uint8), 4)
    if bool((counts == 2).all()):  # the usual case, and much cheaper than choosing
        return keep
    crowded = (counts > 2).nonzero()
    if len(crowded):
        row, group = crowded[0].tolist()
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
