"""The names of the packed formats, and the one place that chooses between them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from rac_modifier.checkpoint import bitmask
from rac_modifier.checkpoint.int32_words import pack_words, unpack_words
from rac_modifier.errors import RacError

FORMAT_24 = "sparse-24-bitmask"
FORMAT_BITMASK = "sparse-bitmask"
UNSTRUCTURED = "unstructured"

# The tensors that replace `<module>.weight`.
PARTS = {
    FORMAT_24: ("compressed", "bitmask", "shape"),
    FORMAT_BITMASK: ("compressed", "bitmask", "row_offsets", "shape"),
}
# A tensor of such a name makes its module a packed one, even where the other parts were lost.
_MARKERS = ("compressed", "bitmask", "row_offsets")


def structure_of(value: str, name: str) -> str:
    """Normalise the mask structure of a module: "N:M" (N pruned), or "unstructured" (also spelt "0:0").

    Raises:
        RacError: anything else.
    """
    if value in (UNSTRUCTURED, "0:0"):
        return UNSTRUCTURED
    found = re.fullmatch(r"([1-9][0-9]{0,5}):([1-9][0-9]{0,5})", value)
    if not found or int(found[1]) >= int(found[2]):
        raise RacError(
            f'{name}: mask structure {value!r} is no pattern; use "2:4", another "N:M" with N < M, or "unstructured"'
        )
    return value


def choose_format(structures: Iterable[str]) -> str:
    """One format for a whole checkpoint: 2:4 only where every module is 2:4."""
    return FORMAT_24 if all(structure == "2:4" for structure in structures) else FORMAT_BITMASK


def pack(weight: Tensor, format: str, name: str, bits: int | None = None) -> dict[str, Tensor]:
    """The tensors of `PARTS[format]` for a dense weight [N, K].

    `bits` is 4 for an int8 weight whose values have four bits: `compressed` then holds them in int32 words (words.py), 2:4 as
    [N, ceil(K/2/8)] and unstructured as [ceil(nnz/8)]; `row_offsets` still counts values.
    """
    parts = (bitmask.pack_24 if format == FORMAT_24 else bitmask.pack_unstructured)(weight, name)
    if bits == 4:
        parts["compressed"] = pack_words(parts["compressed"], 4)
    return parts


def unpack(tensors: Mapping[str, Tensor], format: str, name: str) -> Tensor:
    """The dense weight [N, K] from the tensors of `PARTS[format]`; 4-bit values come as int8."""
    tensors = with_values(tensors, format, name)
    return (bitmask.unpack_24 if format == FORMAT_24 else bitmask.unpack_unstructured)(tensors, name)


def with_values(tensors: Mapping[str, Tensor], format: str, name: str) -> Mapping[str, Tensor]:
    """The tensors of `PARTS[format]` with a value an element: int32 words of 4-bit values become int8, others stay.

    Raises:
        RacError: naming `{name}.compressed`, where the words are not as many as bitmask and shape say.
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
    """The modules that any of these tensor names show to be packed, sorted."""
    found = set()
    for tensor_name in tensor_names:
        module, _, part = tensor_name.rpartition(".")
        if module and part in _MARKERS:
            found.add(module)
    return sorted(found)
