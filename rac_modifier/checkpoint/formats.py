"""The names of the packed formats, and the one place that chooses between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from rac_modifier.checkpoint import bitmask
from rac_modifier.checkpoint.int32_words import pack_words, unpack_words
from rac_modifier.errors import RacError
from rac_modifier.settings.pattern import Pattern

FORMAT_24 = "sparse-24-bitmask"
FORMAT_BITMASK = "sparse-bitmask"
UNSTRUCTURED = "unstructured"

# The tensors that replace `<module>.weight`.
PARTS = {
    FORMAT_24: ("compressed", "bitmask", "shape"),
    FORMAT_BITMASK: ("compressed", "bitmask", "row_offsets", "shape"),
}
# A tensor with such a name shows that its module is packed, even where the other parts are missing.
_MARKERS = ("compressed", "bitmask", "row_offsets")


def structure_of(value: str, name: str) -> str:
    """The mask structure of a module in the one spelling that is recorded: "N:M" (N pruned), or "unstructured".

    Raises:
        RacError: `value` is neither of them (nor "0:0", which means unstructured).
    """
    if value in (UNSTRUCTURED, "0:0"):
        return UNSTRUCTURED
    try:
        return Pattern.parse(value, None).mask_structure
    except RacError as error:
        raise RacError(f"{name}: {error}") from error


def choose_format(structures: Iterable[str]) -> str:
    """One format for a whole checkpoint: 2:4 only where every module is 2:4."""
    return FORMAT_24 if all(structure == "2:4" for structure in structures) else FORMAT_BITMASK


def pack(weight: Tensor, format: str, name: str, bits: int | None = None) -> dict[str, Tensor]:
    """The tensors of `PARTS[format]` for a dense weight [N, K].

    `bits` is 4 for an int8 weight whose values have four bits: `compressed` then holds them in int32 words
    (int32_words.py), [N, ceil(K/2/8)] for 2:4 and [ceil(nnz/8)] for unstructured; `row_offsets` still counts values.
    """
    parts = (bitmask.pack_24 if format == FORMAT_24 else bitmask.pack_unstructured)(weight, name)
    if bits == 4:
        parts["compressed"] = pack_words(parts["compressed"], 4)
    return parts


def unpack(tensors: Mapping[str, Tensor], format: str, name: str) -> Tensor:
    """The dense weight [N, K] from the tensors of `PARTS[format]`; 4-bit values are returned as int8."""
    tensors = with_values(tensors, format, name)
    return (bitmask.unpack_24 if format == FORMAT_24 else bitmask.unpack_unstructured)(
        tensors, name
    )


def with_values(tensors: Mapping[str, Tensor], format: str, name: str) -> Mapping[str, Tensor]:
    """The tensors of `PARTS[format]` with one value per element: int32 words of 4-bit values become int8, others stay.

    Raises:
        RacError: naming `{name}.compressed`, if the number of words contradicts bitmask and shape.
    """
    compressed = bitmask.part_of(tensors, name, "compressed")
    if compressed.dtype != torch.int32:
        return tensors
    mask, rows, columns = bitmask.check_mask(tensors, name)
    count, wanted = columns // 2, 2
    if format != FORMAT_24:
        count, wanted = int(bitmask.row_counts(mask).sum()), 1
    if compressed.dim() != wanted or (wanted == 2 and compressed.shape[0] != rows):
        raise RacError(
            f"{name}.compressed: shape {list(compressed.shape)} does not fit a {format} weight [{rows}, {columns}]; the "
            "checkpoint is damaged"
        )
    try:
        return {**tensors, "compressed": unpack_words(compressed, 4, count)}
    except RacError as error:
        raise RacError(f"{name}.compressed: {error}") from error


def packed_modules(tensor_names: Iterable[str]) -> list[str]:
    """The modules that are packed according to these tensor names, sorted."""
    found = set()
    for tensor_name in tensor_names:
        module, _, part = tensor_name.rpartition(".")
        if module and part in _MARKERS:
            found.add(module)
    return sorted(found)
