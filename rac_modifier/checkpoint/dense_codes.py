"""A dense weight of 2 to 4 bits as compressed-tensors' format pack-quantized stores it (W4A16): checked, a value per element.

A weight is (code - code of zero) * scale. Codes, of four bits 0 to 15, are in int32 words along the columns; the codes of zero,
one per row and group of columns, are in int32 words along the rows. `check_int8` reads what heads and embeddings of 8 bits have.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rac_modifier.checkpoint.bitmask import part_of
from rac_modifier.checkpoint.int32_words import unpack_words
from rac_modifier.checkpoint.quantization_config import PACK_QUANTIZED, WORDS, WORDS_SHAPE
from rac_modifier.checkpoint.stored_weight import SCALE, StoredWeight, all_stored, check_scale
from rac_modifier.errors import RacError

ZEROS, ORDER = "weight_zero_point", "weight_g_idx"
PARTS = (WORDS, SCALE, WORDS_SHAPE, ZEROS, ORDER)
BITS = (2, 3, 4)
# In the name of a head or an embedding, or of a target for these.
OF_VOCABULARY = re.compile("lm_head|embed", re.IGNORECASE)


def check_codes(
    tensors: Mapping[str, Tensor],
    name: str,
    group: int | None = None,
    symmetric: bool = True,
    bits: int = 4,
) -> StoredWeight:
    """Check the tensors of a dense weight of 2, 3 or 4 `bits` as untrusted input, and return it with every value stored.

    `tensors`: `weight_packed` int32 [N, ceil(K bits / 32)], `weight_scale` [N, K / group], `weight_shape` [2]; without
    `symmetric` also `weight_zero_point` int32 [ceil(N bits / 32), K / group]. `group` None: one scale per row.

    Raises:
        RacError: naming `{name}.{part}`, where parts are missing, malformed or contradict each other or these arguments.
    """
    assert bits in BITS
    if ORDER in tensors:
        raise RacError(
            f"{name}.{ORDER}: its columns were reordered (actorder: group), and the kernels read groups of neighbouring "
            "columns; leave out --quantization rac, or quantize with actorder: static"
        )
    rows, columns = _shape(tensors, name)
    codes = _unpacked(part_of(tensors, name, WORDS), rows, columns, f"{name}.{WORDS}", bits)
    scale = _check_groups(tensors, codes, name, group)
    groups = scale.shape[1]
    zeros = None
    if symmetric and ZEROS in tensors:
        raise RacError(
            f"{name}.{ZEROS}: must not be there, since config.json quantizes it symmetrically; restore the config.json that was "
            "saved with these files"
        )
    if not symmetric:
        zeros = (
            _unpacked(part_of(tensors, name, ZEROS), groups, rows, f"{name}.{ZEROS}", bits, along=0)
            .t()
            .contiguous()
        )
        codes.view(rows, groups, -1).sub_(zeros[:, :, None])
        zeros = (zeros + (1 << (bits - 1))).to(torch.uint8)
    return replace(all_stored(codes, name), scale=scale, bits=bits, zeros=zeros)


def why_not_codes(
    kind: str, bits: int, strategy: str, format: str | None, *, activations: bool
) -> str | None:
    """Why no kernel reads dense weights of a scheme; None where one does.

    `kind` int or float; `strategy`: what shares a scale; `activations`: whether the scheme quantizes these too.
    """
    if kind != "int" or bits not in BITS:
        return f"its weights are {kind}{bits}"
    if activations:
        return "its activations are quantized too"
    if format != PACK_QUANTIZED:
        return f"its format is {format}, not {PACK_QUANTIZED}"
    if strategy not in ("group", "channel"):
        return f"its scales are per {strategy}"
    return None


def check_int8(tensors: Mapping[str, Tensor], name: str, group: int | None = None) -> StoredWeight:
    """Check the tensors of a symmetric dense int8 weight as untrusted input, and return it with every value stored.

    `tensors`: `weight` int8 [N, K], or `weight_packed` int32 [N, ceil(K/4)] and `weight_shape` [2]; and `weight_scale`
    [N, K / group]. `group` None: one scale per row, or one for all.

    Raises:
        RacError: as `check_codes`.
    """
    for part in (ZEROS, ORDER):
        if part in tensors:
            raise RacError(
                f"{name}.{part}: the int8 kernels read symmetric weights with neighbouring columns in a group; quantize it so, "
                "or to int4"
            )
    if "weight" in tensors:
        values = tensors["weight"]
        if values.dtype != torch.int8 or values.dim() != 2 or not values.numel():
            raise RacError(
                f"{name}.weight: {values.dtype} {list(values.shape)}, but config.json says that it is int8; restore the "
                "config.json that was saved with these files"
            )
    else:
        rows, columns = _shape(tensors, name)
        values = _unpacked(part_of(tensors, name, WORDS), rows, columns, f"{name}.{WORDS}", 8)
    return replace(all_stored(values, name), scale=_check_groups(tensors, values, name, group))


def _check_groups(
    tensors: Mapping[str, Tensor], codes: Tensor, name: str, group: int | None
) -> Tensor:
    """The scales float32 [N, K / group] of codes [N, K]; `group` None: [N, 1]."""
    rows, columns = codes.shape
    scale = check_scale(tensors, codes.dtype, rows, columns, name)
    assert scale is not None  # since the values are integers
    groups = 1 if group is None else columns // group
    if scale.shape[1] != groups or groups * (group or columns) != columns:
        raise RacError(
            f"{name}.{SCALE}: {scale.shape[1]} per row of {columns} columns, but config.json has "
            f"{'one per row' if group is None else f'groups of {group} columns'}; restore the config.json that was saved "
            "with these files"
        )
    return scale


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, int]:
    """N and K; both are compared with the other parts before anything is sized by them."""
    shape = part_of(tensors, name, WORDS_SHAPE)
    if (
        shape.dtype not in (torch.int64, torch.int32)
        or shape.shape != (2,)
        or bool((shape < 1).any())
    ):
        raise RacError(
            f"{name}.{WORDS_SHAPE}: {shape.dtype} {shape.flatten()[:4].tolist()} is not the shape of a matrix; the checkpoint is "
            "damaged, copy it again"
        )
    return int(shape[0]), int(shape[1])


def _unpacked(
    words: Tensor, lines: int, count: int, name: str, bits: int, along: int = 1
) -> Tensor:
    """The codes minus 2^(bits-1), int8 [lines, count], of matrix `words`, whose dimension `along` is packed."""
    if words.dim() != 2 or words.shape[1 - along] != lines:
        raise RacError(
            f"{name}: shape {list(words.shape)}, where dimension {1 - along} must be {lines}; the checkpoint is damaged, copy it "
            "again"
        )
    try:
        return unpack_words(words if along else words.t(), bits, count)
    except RacError as error:
        raise RacError(f"{name}: {error}") from error
