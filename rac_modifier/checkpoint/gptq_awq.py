"""Dense weights of 2 to 4 bits as GPTQ and AWQ checkpoints store them: checked, a value per element.

Both hold the transposed weight: K input columns by N output rows. A weight is (code - code of zero) * scale. GPTQ packs codes
along K, bit after bit; AWQ packs eight 4-bit codes of a column along N, in the order 0 2 4 6 1 3 5 7. Codes of zero are packed
along N in the same way. Format 1 of GPTQ stores them minus one, format 2 (`gptq_v2`) as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from rac_modifier.checkpoint.bitmask import part_of
from rac_modifier.checkpoint.int32_words import unpack_words, word_count
from rac_modifier.checkpoint.stored_weight import FLOATS, StoredWeight, all_stored
from rac_modifier.errors import RacError

WORDS, ZEROS, SCALES, ORDER = "qweight", "qzeros", "scales", "g_idx"
PARTS = (WORDS, ZEROS, SCALES, ORDER)
GPTQ_V1, GPTQ_V2 = "gptq", "gptq_v2"
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # where each of eight neighbouring codes lies in a word
_RESTORE = "restore the config.json that was saved with these files"
# What GPTQModel adds to the words of format 1 when it reads them. Of 3 bits it is not one per code; the three repeat.
_ADDED = {2: (0x55555555,), 3: (0x24924924, 0x92492492, 0x49249249), 4: (0x11111111,)}


class Ordered(NamedTuple):
    """A weight whose groups are of neighbouring columns, and the input column of each of its columns.

    `order` int64 [K]: column i of the weight multiplies x[..., order[i]]; None where the columns are in the order of the inputs.
    """

    weight: StoredWeight
    order: Tensor | None


def check_gptq(
    tensors: Mapping[str, Tensor],
    name: str,
    bits: int,
    group: int | None,
    symmetric: bool,
    format: str,
    reordered: bool = False,
) -> Ordered:
    """Check the tensors of a GPTQ weight as untrusted input, and return it with every value stored.

    `tensors`: `qweight` int32 [K bits / 32, N], `qzeros` int32 [K / group, N bits / 32], `scales` [K / group, N], and, if the
    writer stored it, `g_idx` [K], the group of each column. `group` None: one scale per row. `symmetric`: the code of zero is
    2^(bits-1). `format`: "gptq" or "gptq_v2". `reordered` (`desc_act`): columns may be reordered, so `g_idx` must be there.

    Raises:
        RacError: naming `{name}.{part}`, where parts are missing, malformed or contradict each other or these arguments.
    """
    words = _matrix(tensors, name, WORDS)
    columns, rows = len(words) * 32 // bits, words.shape[1]
    if columns * bits != len(words) * 32:
        raise RacError(
            f"{name}.{WORDS}: {len(words)} words per row hold no whole number of {bits}-bit codes; {_RESTORE}"
        )
    groups = _groups(columns, group, f"{name}.{WORDS}")
    codes = unpack_words(words.t(), bits, columns)
    scale = _scales(tensors, name, groups, rows)
    zeros = _matrix(tensors, name, ZEROS)
    _fits(zeros, [groups, word_count(rows, bits)], f"{name}.{ZEROS}", rows, columns)
    if symmetric:
        _check_symmetric(zeros, bits, rows, f"{name}.{ZEROS}")
    elif format == GPTQ_V1 and bits == 3:
        raise RacError(
            f"{name}.{ZEROS}: zero points of 3 bits in format {GPTQ_V1} have two meanings, since AutoGPTQ and GPTQModel subtract "
            f"different numbers from them; save the model in format {GPTQ_V2} (checkpoint_format), or symmetric"
        )
    elif format == GPTQ_V1:
        zeros = _added(
            zeros, bits
        )  # by words: a borrow between codes, which GPTQModel writes, is undone too
    if reordered and groups > 1:
        part_of(tensors, name, ORDER)
    order = _order(tensors, name, columns, groups)
    if order is not None:
        codes = codes[:, order]
    return Ordered(
        _weight(codes, scale, None if symmetric else unpack_words(zeros, bits, rows), bits, name),
        order,
    )


def check_awq(
    tensors: Mapping[str, Tensor], name: str, group: int | None, symmetric: bool
) -> Ordered:
    """Check the tensors of an AWQ weight of version gemm as untrusted input, and return it with every value stored.

    `tensors`: `qweight` int32 [K, N / 8], `qzeros` int32 [K / group, N / 8], `scales` [K / group, N]. `group` None: one scale per
    row. `symmetric` (`zero_point` false): the code of zero is 8.

    Raises:
        RacError: as `check_gptq`.
    """
    if ORDER in tensors:
        raise RacError(
            f"{name}.{ORDER}: AWQ does not reorder columns, so this is another format; {_RESTORE}"
        )
    words = _matrix(tensors, name, WORDS)
    columns, rows = len(words), words.shape[1] * 8
    groups = _groups(columns, group, f"{name}.{WORDS}")
    scale = _scales(tensors, name, groups, rows)
    zeros = _matrix(tensors, name, ZEROS)
    _fits(zeros, [groups, rows // 8], f"{name}.{ZEROS}", rows, columns)
    codes, code_of_zero = _in_order(words), _in_order(zeros)
    if symmetric and bool((code_of_zero != 0).any()):
        raise RacError(
            f"{name}.{ZEROS}: not all 8, but config.json says zero_point: false; {_RESTORE}"
        )
    return Ordered(_weight(codes.t(), scale, None if symmetric else code_of_zero, 4, name), None)


def _weight(
    codes: Tensor, scale: Tensor, zeros: Tensor | None, bits: int, name: str
) -> StoredWeight:
    """From `codes` int8 [N, K] and `zeros` int8 [K / group, N], both minus 2^(bits-1)."""
    codes = codes.contiguous()
    if zeros is not None:
        zeros = zeros.t().contiguous()
        codes.view(*zeros.shape, -1).sub_(zeros[:, :, None])
        zeros = (zeros + (1 << (bits - 1))).to(torch.uint8)
    return replace(all_stored(codes, name), scale=scale, bits=bits, zeros=zeros)


def _matrix(tensors: Mapping[str, Tensor], name: str, part: str) -> Tensor:
    words = part_of(tensors, name, part)
    if words.dtype != torch.int32 or words.dim() != 2 or not words.numel():
        raise RacError(
            f"{name}.{part}: {words.dtype} {list(words.shape)} is no matrix of int32 words; copy the checkpoint again"
        )
    return words


def _fits(tensor: Tensor, shape: list[int], name: str, rows: int, columns: int) -> None:
    if list(tensor.shape) != shape:
        raise RacError(
            f"{name}: shape {list(tensor.shape)}, but a weight of {rows} rows and {columns} columns in {shape[0]} groups has "
            f"{shape}; {_RESTORE}, or copy the checkpoint again"
        )


def _groups(columns: int, group: int | None, name: str) -> int:
    """Groups of columns per row."""
    if group is not None and columns % group:
        raise RacError(
            f"{name}: {columns} columns are no multiple of config.json's groups of {group}; {_RESTORE}"
        )
    return 1 if group is None else columns // group


def _scales(tensors: Mapping[str, Tensor], name: str, groups: int, rows: int) -> Tensor:
    """Float32 [N, K / group]."""
    scales = part_of(tensors, name, SCALES)
    if scales.dtype not in FLOATS or not bool(scales.isfinite().all()):
        raise RacError(
            f"{name}.{SCALES}: {scales.dtype}, or not finite; the checkpoint is damaged, copy it again"
        )
    if list(scales.shape) != [groups, rows]:
        raise RacError(
            f"{name}.{SCALES}: shape {list(scales.shape)}, but its {rows} rows in {groups} groups have {[groups, rows]}; "
            f"{_RESTORE}, or copy the checkpoint again"
        )
    return scales.t().float().contiguous()


def _added(zeros: Tensor, bits: int) -> Tensor:
    """Words of format 1 in format 2, as GPTQModel converts them: whole words are added, modulo 2^32."""
    added = torch.tensor(
        [number - (number >> 31 << 32) for number in _ADDED[bits]], dtype=torch.int32
    )
    return zeros + added.repeat(-(-zeros.shape[1] // len(added)))[: zeros.shape[1]]


def _check_symmetric(zeros: Tensor, bits: int, rows: int, name: str) -> None:
    """Refuse codes of zero other than 2^(bits-1), in any way in which writers store it.

    vLLM does not read them. Format 1 has one less, some writers name the wrong format, and GPTQModel has its own way of 3 bits.
    """
    found = unpack_words(zeros, bits, rows)  # minus 2^(bits-1)
    if bool((found == 0).all()) or bool((found == -1).all()):
        return
    if bits == 3 and not bool(unpack_words(_added(zeros, bits), bits, rows).any()):
        return
    raise RacError(
        f"{name}: not {1 << (bits - 1)} everywhere, but config.json says that it is symmetric (sym); {_RESTORE}"
    )


def _order(tensors: Mapping[str, Tensor], name: str, columns: int, groups: int) -> Tensor | None:
    """The columns sorted by group, int64 [K]; None where each group has neighbouring columns, in order."""
    if ORDER not in tensors:
        return None
    index = tensors[ORDER]
    if index.dtype not in (torch.int32, torch.int64) or list(index.shape) != [columns]:
        raise RacError(
            f"{name}.{ORDER}: {index.dtype} {list(index.shape)} is not the group of each of its {columns} columns; copy the "
            "checkpoint again"
        )
    index = index.long()
    in_order = torch.arange(groups).repeat_interleave(columns // groups)
    if torch.equal(index, in_order):
        return None
    order = index.argsort(stable=True)
    if not torch.equal(index[order], in_order):
        raise RacError(
            f"{name}.{ORDER}: does not give {columns // groups} columns to each of {groups} groups; {_RESTORE}, or copy the "
            "checkpoint again"
        )
    return order


def _in_order(words: Tensor) -> Tensor:
    """The 4-bit codes minus 8 of AWQ's words [lines, N / 8], int8 [lines, N]."""
    lines, count = words.shape
    return unpack_words(words, 4, count * 8).view(lines, count, 8)[..., _AWQ_PLACES].flatten(1)
