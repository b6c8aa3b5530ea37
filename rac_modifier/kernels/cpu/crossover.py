"""Measure the number of tokens above which a dense matmul beats the kernel.

Above that number, panels are expanded for a dense matmul of torch (operator.py). Each kind of weight is timed
with its activations of 16 or 8 bits. Timed on one thread: both ways are divided among threads alike. The least
of several CPU times of this thread counts: other work on the machine changes it little.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rac_modifier.checkpoint.stored_weight import from_dense
from rac_modifier.kernels.cpu.library import Library
from rac_modifier.kernels.cpu.operator import EIGHT_BITS, expand_and_multiply
from rac_modifier.kernels.cpu.packed import pack_scale, pack_values, set_activation_bits
from rac_modifier.kernels.cpu.support import library_and_isa

ROWS = (64, 256, 1024, 2048)  # tokens
# Of the weight: about as large as layers are. A smaller expanded weight stays in the nearest cache.
_SHAPE = (2048, 1536)
_REPEATS = 4
MARGIN = 1.15  # by which a dense matmul must be faster


@dataclass(frozen=True)
class Crossover:
    """The largest number of tokens that the kernel multiplies, inf for any; `kind` is of `operator.KINDS`.

    seconds: CPU time of the kernel and of the dense matmul, by tokens, as far as they were timed.
    """

    kind: str
    rows: float
    seconds: Mapping[int, tuple[float, float]]

    def describe(self) -> str:
        """One line."""
        times = ", ".join(
            f"{m} rows {1e3 * packed:.1f} / {1e3 * dense:.1f}"
            for m, (packed, dense) in self.seconds.items()
        )
        limit = f"up to {self.rows:.0f} rows, more by dense products"
        if math.isinf(self.rows):
            limit = "any number of rows"
        return f"{self.kind}: the kernel multiplies {limit} (ms of the kernel / of a dense product: {times})"


def measure_crossovers(kinds: Sequence[str]) -> list[Crossover]:
    """Time the kernel in use and the dense matmul on a 50 % sparse weight of each kind, x in bfloat16.

    Takes about a second of one core per kind.

    Raises:
        RacError: there is no compiled kernel.
    """
    library, isa = library_and_isa()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [_measure(kind, library, isa) for kind in kinds]
    finally:
        torch.set_num_threads(threads)


def rows_up_to(seconds: Mapping[int, tuple[float, float]]) -> float:
    """Tokens up to which the kernel multiplies, from times by tokens in ascending order.

    That is less than the first number with which the dense matmul was faster: between two timed numbers it
    may be slower, because expanding the weight takes as long for few tokens as for many.
    """
    faster = (m - 1 for m, (packed, dense) in seconds.items() if packed > MARGIN * dense)
    return next(faster, math.inf)


@torch.inference_mode()
def _measure(kind: str, library: Library, isa: str) -> Crossover:
    data, scale = _weight(kind)
    rows, columns = _SHAPE
    seconds: dict[int, tuple[float, float]] = {}
    for m in ROWS:
        x = torch.randn(m, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
        out = torch.empty(m, rows, dtype=x.dtype)
        times = []
        for _ in range(_REPEATS):
            start = time.thread_time()
            library.linear(data, rows, columns, x, scale, None, out, isa)
            between = time.thread_time()
            expand_and_multiply(library, isa, data, x, scale, None, out)
            times.append((between - start, time.thread_time() - between))
        packed, dense = zip(*times, strict=True)
        seconds[m] = (min(packed), min(dense))
        if not math.isinf(rows_up_to(seconds)):
            break
    return Crossover(kind, rows_up_to(seconds), seconds)


def _weight(kind: str) -> tuple[Tensor, Tensor | None]:
    """A 50 % sparse weight, packed, and its scales."""
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
