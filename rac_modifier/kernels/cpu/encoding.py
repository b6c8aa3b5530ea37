"""In which dtype the CPU kernels keep stored values, and whether their scales stay beside them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rac_modifier.checkpoint.stored_weight import FLOATS

# By bits of values: columns that a group has a multiple of, as those of types without masks (scale_unit of csrc/format/layout.h).
UNIT = {8: 4, 4: 8, 3: 32, 2: 32}
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


@dataclass(frozen=True)
class ValueEncoding:
    """How values are packed: as `dtype`; with `scaled`, scales stay beside them, else they are multiplied in.

    `bits` 4, 3 or 2: values of int8 are kept as codes of so many bits. `note` describes it where it is not the stored form.
    """

    dtype: torch.dtype
    scaled: bool = False
    note: str = ""
    bits: int = 8


def encoding_of(
    stored: torch.dtype, group: int, columns: int, served: torch.dtype, word_bits: int = 4
) -> ValueEncoding:
    """The encoding of values of dtype `stored`, int32 for words of values of `word_bits` bits.

    `group` columns share a scale.
    """
    if stored in FLOATS:
        return ValueEncoding(kept_dtype(stored, served))
    bits = {torch.int8: "int8", torch.int32: f"int{word_bits}"}.get(stored, "fp8")
    if stored in FP8 and group == columns:
        return ValueEncoding(torch.bfloat16, True, "fp8 values as bfloat16, exactly")
    if stored in FP8 or (group < columns and group % 4):
        return ValueEncoding(
            torch.bfloat16, False, f"{bits} values in groups of {group}, rounded to bfloat16"
        )
    if stored == torch.int8:
        return ValueEncoding(torch.int8, True)
    in_groups = f"{bits} values in groups of {group}"
    if group == columns or group % UNIT[word_bits] == 0:
        return ValueEncoding(torch.int8, True, bits=word_bits)
    if group % UNIT[4] == 0:
        return ValueEncoding(torch.int8, True, f"{in_groups}, four bits each", bits=4)
    return ValueEncoding(torch.int8, True, f"{in_groups}, one byte each")


def kept_dtype(stored: torch.dtype, served: torch.dtype) -> torch.dtype:
    """The dtype of packed floats: as served, but bfloat16 values that are served in float32 stay bfloat16.

    These are the same numbers in half of the bytes.
    """
    return stored if (stored, served) == (torch.bfloat16, torch.float32) else served
