"""The packed formats, a class each, and the packed modules of a checkpoint's files.

transformers, vLLM and `rac inspect` read a packed module through the `check` of its format. It
takes the tensors for untrusted input: nothing is indexed by a number from a file before it was
compared with the bitmask. The names are those of compressed-tensors up to 0.14.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rac_modifier.checkpoint.files import TensorFiles
from rac_modifier.errors import RacError
from rac_modifier.formats import bitmask as layout
from rac_modifier.formats.bitmask import damaged, part_of
from rac_modifier.formats.quantization_config import FORMAT_24 as FORMAT_24
from rac_modifier.formats.quantization_config import FORMAT_BITMASK as FORMAT_BITMASK
from rac_modifier.formats.quantization_config import (
    QUANTIZATION_KEY,
    SparsityRecord,
    has_block_scales,
    int8_in_words,
    packed_format,
    weight_schemes,
)
from rac_modifier.formats.stored_weight import (
    FLOATS,
    SCALE,
    UNSTRUCTURED,
    StoredWeight,
    check_finite,
    check_scale,
    check_scale_values,
    from_dense,
    is_per_block,
    row_starts,
)
from rac_modifier.formats.words import WORDS, PackQuantized, pack_words, unpack_words, word_count
from rac_modifier.settings.pattern import Pattern

# A tensor with such a name shows that its module is packed, even where other parts are missing.
_MARKERS = ("compressed", "bitmask", "row_offsets")


class SparseBitmask:
    """All values but +0.0. `parts` names the tensors of a weight [N, K]:

    `compressed`, the values, 1-D, those of 4 bits in int32 words. `bitmask`, uint8 [N, ceil(K/8)].
    `row_offsets`, int64 [N], where each row starts in the values. `shape`, int64, N and K.
    """

    name = FORMAT_BITMASK
    parts: tuple[str, ...] = ("compressed", "bitmask", "row_offsets", "shape")
    structure = UNSTRUCTURED  # of modules whose mask structure is not recorded

    def compress(self, weight: Tensor, module: str, bits: int | None = None) -> dict[str, Tensor]:
        """Return the tensors of a dense weight [N, K] by part (RacError: it does not fit).

        `bits` 4: the weight is int8, and its values have four bits.
        """
        if weight.dim() != 2 or not weight.numel():
            raise RacError(f"{module}: {list(weight.shape)} is no non-empty matrix; leave it dense")
        if weight.dtype not in layout.DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in layout.DTYPES)
            raise RacError(
                f"{module}: {weight.dtype} cannot be packed; convert to {allowed}, or leave dense"
            )
        tensors = self._compress(weight, module)
        if bits == 4:
            tensors["compressed"] = pack_words(tensors["compressed"], 4)
        return tensors

    def check(
        self, tensors: Mapping[str, Tensor], module: str, block_scales: bool = False
    ) -> StoredWeight:
        """Check the tensors of a module as untrusted input and return its weight.

        `tensors`: by part, and `weight_scale` where the values are quantized. `block_scales`: it
        may be per block of rows and columns; the result has none then. RacError names
        `{module}.{part}`, which is missing, malformed or contradicts others.
        """
        compressed = part_of(tensors, module, "compressed")
        bitmask, rows, columns = _mask_of(tensors, module)
        if compressed.dtype not in (torch.int32, *layout.DTYPES):
            fault = f"no weight is packed in dtype {compressed.dtype}"
            raise damaged(f"{module}.compressed", fault)
        starts = row_starts(layout.row_counts(bitmask))
        weight = StoredWeight(compressed, bitmask, columns, starts, module)
        self._check_mask(tensors, weight)
        *lines, count = self._values_shape(rows, columns, int(starts[-1]))
        in_words = compressed.dtype == torch.int32
        expected = [*lines, word_count(count, 4) if in_words else count]
        if list(compressed.shape) != expected:
            fault = f"shape {list(compressed.shape)} does not fit the bitmask, which keeps"
            raise damaged(f"{module}.compressed", f"{fault} {expected}")
        values = (unpack_words(compressed, 4, count) if in_words else compressed).reshape(-1)
        check_finite(values, f"{module}.compressed")
        scale = tensors.get(SCALE)
        block_scales = block_scales and values.dtype not in FLOATS
        if block_scales and scale is not None and is_per_block(scale.shape, rows):
            check_scale_values(scale, f"{module}.{SCALE}")
            scale = None
        else:
            scale = check_scale(tensors, values.dtype, rows, columns, module)
        return replace(weight, values=values, scale=scale, bits=4 if in_words else 8)

    def size(self, rows: int, columns: int, stored: int, bits: int) -> int:
        """Return the bytes of all parts of a weight with `stored` values of `bits` bits."""
        *lines, count = self._values_shape(rows, columns, stored)
        values = 4 * word_count(count, 4) if bits == 4 else count * bits // 8
        offsets = 8 * rows if "row_offsets" in self.parts else 0
        return math.prod(lines) * values + offsets + rows * -(-columns // 8) + 16

    def _compress(self, weight: Tensor, module: str) -> dict[str, Tensor]:
        stored = from_dense(weight, module)
        return {
            "compressed": stored.values,
            "bitmask": stored.bitmask,
            "row_offsets": stored.starts[:-1],
            "shape": torch.tensor(weight.shape),
        }

    def _check_mask(self, tensors: Mapping[str, Tensor], weight: StoredWeight) -> None:
        """Refuse a bitmask that does not belong to this format or to the other parts."""
        offsets = part_of(tensors, weight.name, "row_offsets")
        if offsets.dtype != torch.int64 or not torch.equal(offsets, weight.starts[:-1]):
            raise damaged(f"{weight.name}.row_offsets", "not the row starts that the bitmask has")

    def _values_shape(self, rows: int, columns: int, stored: int) -> tuple[int, ...]:
        return (stored,)


class _Sparse24Bitmask(SparseBitmask):
    """Two values of each four columns: `compressed` [N, K/2], `shape` [2, 1] as of vLLM 0.18.

    A group with fewer than two nonzeros stores zeros, first -0.0, then +0.0 from the left. A -0.0
    without a place becomes +0.0.
    """

    name = FORMAT_24
    parts = ("compressed", "bitmask", "shape")
    structure = "2:4"

    def _compress(self, weight: Tensor, module: str) -> dict[str, Tensor]:
        rows, columns = weight.shape
        if columns % 4:
            raise RacError(f"{module}: {columns} columns, no multiple of 4; pack as unstructured")
        mask = partial(_two_of_four, module=module)
        values, bitmask = layout.compress(weight, rows * columns // 2, mask)
        shape = torch.tensor([[rows], [columns]])
        return {"compressed": values.view(rows, -1), "bitmask": bitmask, "shape": shape}

    def _check_mask(self, tensors: Mapping[str, Tensor], weight: StoredWeight) -> None:
        if not weight.two_of_four or int(weight.starts[-1]) != weight.rows * weight.columns // 2:
            fault = "a group of four columns does not keep exactly two"
            raise damaged(f"{weight.name}.bitmask", fault)

    def _values_shape(self, rows: int, columns: int, stored: int) -> tuple[int, ...]:
        return (rows, columns // 2)


FORMATS = {format.name: format for format in (_Sparse24Bitmask(), SparseBitmask())}


class PackedFiles:
    """The packed modules of a checkpoint (RacError: config.json contradicts the tensor names)."""

    def __init__(self, files: TensorFiles, config: Mapping[str, Any]) -> None:
        self.files, self.modules = files, packed_modules(files.where)
        self.schemes = weight_schemes(config.get(QUANTIZATION_KEY))
        for module, structure in SparsityRecord.of(config).modules.items():
            structure_of(structure, module)
        name = packed_format(config)
        self.format = None if name is None else FORMATS[name]
        if name is None and self.modules:
            raise RacError(
                f"{files.folder}: {self.modules[0]} is packed but config.json has no "
                "sparsity_config; restore the config.json that packing wrote"
            )
        if name is not None and not self.modules:
            raise RacError(
                f"{files.folder}: config.json says {name}, but no tensor is packed; copy it again"
            )
        dense = {f"{module}.{part}" for module in self.modules for part in ("weight", WORDS)}
        if duplicates := sorted(dense & files.where.keys()):
            raise RacError(
                f"{duplicates[0]}: both dense and packed in {files.folder}; save the model again"
            )

    def weight(self, module: str) -> StoredWeight:
        """Read and check a packed module (RacError)."""
        assert self.format is not None
        tensors = self.files.tensors(module, (*self.format.parts, SCALE))
        weight = self.format.check(tensors, module, has_block_scales(self.schemes))
        if weight.values.dtype not in FLOATS:
            self.check_schemes(f"{module}.compressed")
        return weight

    def words(self, module: str) -> StoredWeight | None:
        """Read and check dense codes in words (RacError); None: of a layout not read here."""
        self.check_schemes(f"{module}.{WORDS}")
        return PackQuantized.read(
            self.files.tensors(module, PackQuantized.dtypes), module, self.schemes
        )

    def check_words(self) -> None:
        """Check all dense codes in words (RacError)."""
        for name in self.files.where:
            module, _, part = name.rpartition(".")
            if part == WORDS:
                self.words(module)

    def check_schemes(self, name: str) -> None:
        """Refuse integers where nothing says how they are scaled."""
        if not self.schemes:
            raise RacError(
                f"{name}: holds integers, but config.json quantizes no module; restore the one "
                "that was saved with the weights"
            )

    def in_words(self, module: str) -> bool:
        """Return whether upstream stores the dense form of a packed module as int32 words."""
        dtype = self.files.dtype(f"{module}.compressed")
        return dtype == torch.int32 or (dtype == torch.int8 and int8_in_words(self.schemes))

    def dense(self, module: str) -> dict[str, Tensor]:
        """Return the dense tensors of a packed module by part, as upstream stores them."""
        weight = self.weight(module)
        if self.in_words(module):
            return PackQuantized.compress(weight.dense(), weight.bits)
        return {"weight": weight.dense()}


def packed_modules(tensor_names: Iterable[str]) -> list[str]:
    """List the modules that are packed according to these tensor names, sorted."""
    split = (name.rpartition(".") for name in tensor_names)
    return sorted({module for module, _, part in split if module and part in _MARKERS})


def structure_of(value: str, module: str) -> str:
    """Return a mask structure as it is recorded: "N:M" (N pruned), or "unstructured" ("0:0")."""
    if value in (UNSTRUCTURED, "0:0"):
        return UNSTRUCTURED
    try:
        return Pattern.parse(value, None).mask_structure
    except RacError as error:
        raise RacError(f"{module}: {error}") from error


def _mask_of(tensors: Mapping[str, Tensor], module: str) -> tuple[Tensor, int, int]:
    """Return the bitmask, N and K, which fit each other; refuse others."""
    bitmask, shape = part_of(tensors, module, "bitmask"), part_of(tensors, module, "shape")
    if shape.dtype != torch.int64 or shape.numel() != 2:
        fault = f"{shape.dtype} {list(shape.shape)} instead of two int64"
        raise damaged(f"{module}.shape", fault)
    rows, columns = shape.flatten().tolist()
    expected = (rows, -(-columns // 8))
    possible = rows > 0 and 0 < columns <= layout.MOST_COLUMNS
    if bitmask.dtype != torch.uint8 or not possible or bitmask.shape != expected:
        fault = f"{bitmask.dtype} {list(bitmask.shape)} is no uint8 bitmask of a weight"
        raise damaged(f"{module}.bitmask", f"{fault} [{rows}, {columns}], the size in its shape")
    if columns % 8 and bool((bitmask[:, -1] >> (columns % 8)).any()):
        raise damaged(f"{module}.bitmask", f"bits are set beyond column {columns}")
    return bitmask, rows, columns


def _two_of_four(weight: Tensor, module: str) -> Tensor:
    """Choose two of every four columns: first nonzeros, then -0.0, then +0.0, from the left."""
    keep = layout.nonzero(weight)
    counts = layout.sums_of_four(keep.view(torch.uint8))
    if bool((counts == 2).all()):  # the usual case, and much cheaper than choosing
        return keep
    if bool((counts > 2).any()):
        raise RacError(
            f"{module}: groups of four columns hold more than 2 nonzeros, so the weight is not "
            "2:4; pack it as unstructured, or prune it again"
        )
    groups, keep = layout.as_integers(weight).reshape(-1, 4), keep.view(-1, 4)
    for candidates in (groups != 0, torch.ones_like(keep)):
        free = candidates & ~keep
        keep = keep | (free & (free.cumsum(dim=1) <= 2 - keep.sum(dim=1, keepdim=True)))
    return keep.view(weight.shape)
