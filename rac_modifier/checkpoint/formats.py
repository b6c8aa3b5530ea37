"""The two packed formats of a sparse weight, and the packed modules of a checkpoint's files.

- sparse-24-bitmask: `compressed` [N, K/2], two values of each four columns, and `shape` int64
  [2, 1], which vLLM up to 0.18 loads into such a parameter. A group with fewer than two nonzeros
  stores zeros, first -0.0, then +0.0 from the left. A -0.0 without a place becomes +0.0.
- sparse-bitmask: `compressed` 1-D, its row starts `row_offsets` int64 [N], `shape` int64 [2].

Both have `bitmask` uint8 [N, ceil(K/8)]. Values of 4 bits are in int32 words. transformers, vLLM
and `rac inspect` read every packed module through `check`, which takes the tensors for untrusted
input: nothing is indexed by a number from a file before it was compared with the bitmask. The
names are those of compressed-tensors up to 0.14.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from rac_modifier.checkpoint import bitmask as layout
from rac_modifier.checkpoint.bitmask import damaged, part_of
from rac_modifier.checkpoint.dense_codes import (
    WORDS,
    pack_words,
    to_words,
    unpack_words,
    word_count,
)
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
    from_dense,
    row_starts,
)
from rac_modifier.errors import RacError
from rac_modifier.settings.pattern import Pattern

# A tensor with such a name shows that its module is packed, even where other parts are missing.
_MARKERS = ("compressed", "bitmask", "row_offsets")


PARTS = {
    FORMAT_24: ("compressed", "bitmask", "shape"),
    FORMAT_BITMASK: ("compressed", "bitmask", "row_offsets", "shape"),
}


def pack(weight: Tensor, format: str, module: str, bits: int | None = None) -> dict[str, Tensor]:
    """Return the tensors of a dense weight [N, K] by part.

    `bits` 4: the weight is int8, its values have four bits, and are stored in int32 words.

    Raises:
        RacError: the weight does not fit the format.
    """
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
    shape = torch.tensor(weight.shape, dtype=torch.int64)
    if format == FORMAT_24:
        values, bitmask = _compress_24(weight, module)
        index = {"bitmask": bitmask, "shape": shape[:, None]}
    else:
        stored = from_dense(weight, module)
        values, starts = stored.values, stored.starts
        index = {"bitmask": stored.bitmask, "row_offsets": starts[:-1], "shape": shape}
    return {"compressed": pack_words(values, 4) if bits == 4 else values, **index}


def packed_size(format: str, rows: int, columns: int, stored: int, bits: int) -> int:
    """Return the bytes of all parts of a weight with `stored` values of `bits` bits."""

    def values(count: int) -> int:
        return 4 * word_count(count, 4) if bits == 4 else count * bits // 8

    masks = rows * -(-columns // 8) + 16  # and the shape
    if format == FORMAT_24:
        return rows * values(columns // 2) + masks
    return values(stored) + 8 * rows + masks


def check(
    tensors: Mapping[str, Tensor], format: str, module: str, scaled: bool = True
) -> StoredWeight:
    """Check the tensors of a module as untrusted input and return its weight.

    `tensors`: by part, and `weight_scale` where the values are quantized. Not `scaled`: the caller
    checks the scales, and the result has none.

    Raises:
        RacError: naming `{module}.{part}`, which is missing, malformed or contradicts the others.
    """
    compressed = part_of(tensors, module, "compressed")
    bitmask, rows, columns = _check_mask(tensors, module)
    if compressed.dtype not in (torch.int32, *layout.DTYPES):
        fault = f"no weight is packed in dtype {compressed.dtype}"
        raise damaged(f"{module}.compressed", fault)
    shape: tuple[int, ...]
    if format == FORMAT_24:
        if columns % 4 or not layout.keeps_two_of_four(bitmask, columns):
            fault = "a group of four columns does not keep exactly two"
            raise damaged(f"{module}.bitmask", fault)
        shape, starts = (
            (rows, columns // 2),
            torch.arange(rows + 1, device=bitmask.device) * (columns // 2),
        )
    else:
        starts = row_starts(layout.row_counts(bitmask))
        offsets = part_of(tensors, module, "row_offsets")
        if offsets.dtype != torch.int64 or not torch.equal(offsets, starts[:-1]):
            raise damaged(f"{module}.row_offsets", "not the row starts that the bitmask has")
        shape = (int(starts[-1]),)
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
    """Read a packed module; check its weight and scales; return it without scales (RacError)."""
    tensors = files.tensors(module, (*PARTS[format], SCALE))
    weight, dtype = check(tensors, format, module, scaled=False), tensors["compressed"].dtype
    # scales of blocks of rows and columns have another shape, which vLLM and transformers check
    if dtype not in FLOATS and SCALE in tensors and any(s.strategy == "block" for s in schemes):
        check_scale_values(tensors[SCALE], f"{module}.{SCALE}")
    else:
        check_scale(tensors, dtype, weight.rows, weight.columns, module)
    return weight


def unpacked(weight: StoredWeight, in_words: bool) -> dict[str, Tensor]:
    """Return the dense tensors of a weight by part, as upstream stores them.

    `in_words`: upstream stores this weight as int32 words (`check_packed` lists such modules).
    """
    return to_words(weight.dense(), weight.bits) if in_words else {"weight": weight.dense()}


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


def _compress_24(weight: Tensor, module: str) -> tuple[Tensor, Tensor]:
    """Return the values [N, K/2] of a 2:4 weight, and its bitmask."""
    rows, columns = weight.shape
    if columns % 4:
        raise RacError(
            f"{module}: {columns} columns are no multiple of 4, so it cannot be packed as 2:4; "
            "pack as unstructured"
        )
    mask = partial(_two_of_four, module=module)
    values, bitmask = layout.compress(weight, rows * columns // 2, mask)
    return values.view(rows, columns // 2), bitmask


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
