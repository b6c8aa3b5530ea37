"""Measure the number of tokens above which a dense matmul beats the kernel (operator.py).

Timed on one thread: both ways are divided among threads alike. The least of several CPU times of
this thread counts: other work on the machine changes it little.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from rac_modifier.checkpoint.stored_weight import from_dense
from rac_modifier.kernels.cpu.library import Library
from rac_modifier.kernels.cpu.operator import EIGHT_BITS, expand_and_multiply
from rac_modifier.kernels.cpu.packed import pack_scale, pack_values, set_activation_bits
from rac_modifier.kernels.cpu.support import library_and_isa

TOKENS = (64, 256, 1024, 2048)
_SHAPE = (2048, 1536)  # a smaller expanded weight would stay in the nearest cache
_REPEATS = 4
MARGIN = 1.15  # by which a dense matmul must be faster


def measure_crossovers(kinds: Sequence[str]) -> dict[str, float]:
    """Return the most tokens that the kernel multiplies, by kind (`operator.KINDS`); inf: any.

    Times the kernel in use and the dense matmul on a 50 % sparse weight of each kind, x in
    bfloat16: about a second of one core per kind.

    Raises:
        RacError: there is no compiled kernel.
    """
    library, isa = library_and_isa()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return {kind: _measure(kind, library, isa) for kind in kinds}
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def _measure(kind: str, library: Library, isa: str) -> float:
    """Return one token less than the first timed number with which the dense matmul is faster.

    Between two timed numbers it may be slower: expanding takes as long for few tokens as for many.
    """
    data, scale = _weight(kind)
    rows, columns = _SHAPE
    for tokens in TOKENS:
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
        out = torch.empty(tokens, rows, dtype=x.dtype)
        times = []
        for _ in range(_REPEATS):
            start = time.thread_time()
            library.linear(data, rows, columns, x, scale, None, out, isa)
            between = time.thread_time()
            expand_and_multiply(library, isa, data, x, scale, None, out)
            times.append((between - start, time.thread_time() - between))
        packed, dense = map(min, zip(*times, strict=True))
        if packed > MARGIN * dense:
            return tokens - 1
    return math.inf


def _weight(kind: str) -> tuple[Tensor, Tensor | None]:
    """Return a packed 50 % sparse weight and its scales."""
    generator = torch.Generator().manual_seed(0)
    pruned = torch.rand(_SHAPE, generator=generator) >= 0.5
    if kind == "floats":
        dense = torch.randn(_SHAPE, generator=generator).bfloat16().masked_fill(pruned, 0)
        stored = from_dense(dense, kind)
        return pack_values(stored.values, stored.bitmask, stored.columns), None
    values = torch.randint(1, 8, _SHAPE, dtype=torch.int8, generator=generator)
    stored = from_dense(values.masked_fill(pruned, 0), kind)
    bits, groups = (8, 1) if kind.startswith("int8") else (4, _SHAPE[1] // 128)
    data = pack_values(stored.values, stored.bitmask, stored.columns, bits)
    if kind.endswith(EIGHT_BITS):
        set_activation_bits(data, 8)
    return data, pack_scale(torch.full((_SHAPE[0], groups), 0.01), _SHAPE[1] // groups)
