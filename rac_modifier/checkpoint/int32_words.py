"""Signed values of 2, 3, 4 or 8 bits in int32 words, as compressed-tensors' format pack-quantized holds them.

A value v is stored as v + 2^(bits-1), lowest bits first, one value after the other; of 3 bits some are in two words, as of
compressed-tensors 0.19. What is packed here has 4 or 8 bits, as sparse weights do, and its last word is filled up with the value
0. compressed-tensors' own functions give the same words (a test compares them). They are not used, since importing them imports
transformers, and serving and `rac inspect` do without it; and they do not take the one-dimensional values of an unstructured
weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rac_modifier.errors import RacError

BITS = (4, 8)  # of values that are packed here
_READ = (2, 3, *BITS)


def pack_words(values: Tensor, bits: int) -> Tensor:
    """Int8 [..., n], each value of `bits` bits, to int32 [..., ceil(n * bits / 32)].

    Raises:
        RacError: another dtype, another number of bits, or a value that does not fit it.
    """
    if bits not in BITS:
        raise RacError(
            f"{bits} bits per value cannot be packed sparse; quantize to {' or '.join(map(str, BITS))} bits"
        )
    if values.dtype != torch.int8:
        raise RacError(
            f"values of {values.dtype} cannot be packed into int32 words; quantized values must be int8"
        )
    limit = 1 << (bits - 1)
    if bits < 8 and values.numel() and (int(values.min()) < -limit or int(values.max()) >= limit):
        raise RacError(
            f"a value outside [{-limit}, {limit - 1}] does not fit {bits} bits; save the model again"
        )
    count = values.shape[-1]
    padded = torch.nn.functional.pad(values, (0, word_count(count, bits) * 32 // bits - count))
    lifted = (padded.to(torch.int16) + limit).to(torch.uint8)
    if bits == 4:
        lifted = lifted[..., ::2] | (lifted[..., 1::2] << 4)
    return lifted.contiguous().view(torch.int32)


def unpack_words(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` values of int32 [..., ceil(count * bits / 32)], as int8 [..., count].

    Raises:
        RacError: another dtype, another number of bits, or not the number of words that `count` values take.
    """
    if bits not in _READ:
        raise RacError(
            f"words of {bits}-bit values are not read here; those of {', '.join(map(str, _READ))} bits are"
        )
    whole = -(-count // (32 // bits))  # words, if no value is in two
    if bits == 3 and words.dim() and words.shape[-1] == whole != word_count(count, bits):
        raise RacError(
            f"{whole} words of {count} values of 3 bits are ten in each, as compressed-tensors 0.17 packs them; save the model "
            "with 0.19 or later"
        )
    if words.dtype != torch.int32 or not words.dim() or words.shape[-1] != word_count(count, bits):
        raise RacError(
            f"{words.dtype} {list(words.shape)} does not hold {count} values of {bits} bits, which take "
            f"{word_count(count, bits)} int32; the checkpoint is damaged"
        )
    # a copy: one line of a larger or transposed matrix may count as contiguous, and cannot be viewed as bytes
    lifted = words.clone(memory_format=torch.contiguous_format).view(torch.uint8)
    if bits == 3:  # eight values in three bytes
        lifted = torch.nn.functional.pad(lifted, (0, -lifted.shape[-1] % 3))
        a, b, c = lifted[..., ::3], lifted[..., 1::3], lifted[..., 2::3]
        lifted = (
            torch.stack(
                [a, a >> 3, a >> 6 | b << 2, b >> 1, b >> 4, b >> 7 | c << 1, c >> 2, c >> 5],
                dim=-1,
            )
            & 7
        )
        lifted = lifted.flatten(-2)
    elif bits < 8:
        lifted = torch.stack([lifted >> at for at in range(0, 8, bits)], dim=-1).flatten(-2) & (
            (1 << bits) - 1
        )
    limit = 1 << (bits - 1)
    return (lifted[..., :count].to(torch.int16) - limit).to(torch.int8)


def word_count(count: int, bits: int) -> int:
    """Int32 words that `count` values of `bits` bits take."""
    return -(-count * bits // 32)
