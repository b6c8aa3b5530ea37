"""What limits a product with few rows of x: the memory, or the instructions of the kernel? Bytes per second, as Markdown.

    python benchmarks/kernel_limit.py --threads 1,2 --rows 1,4

The same kernel runs on weights that stay in the second-level caches, where only instructions take time, and on weights that are
read from memory. Where the first rate is below the read probe, the kernel cannot keep up with the memory, and instructions
are the limit. Where it is above, the memory is the limit, or waiting for it.

A call's own cost is not in the first rate: weights of two heights are multiplied, and the difference of their times belongs to
the difference of their bytes. What then remains of a call is printed too: its start, a parallel region, x rounded to integers.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from kernel import numbers
from peer_contenders import random_packed
from torch import Tensor

from rac_modifier.checkpoint.stored_weight import from_dense
from rac_modifier.kernels.cpu import pack
from rac_modifier.kernels.cpu.operator import sparse_linear
from rac_modifier.kernels.cpu.support import support

KINDS = {  # bits of a value, share that is pruned
    "50 % + int4": (4, 0.5),
    "70 % + int4": (4, 0.7),
    "dense int4": (4, 0.0),
    "50 % + int8": (8, 0.5),
    "dense int8": (8, 0.0),
    "50 % + bf16": (16, 0.5),
}
COLUMNS, LARGE_ROWS = 1536, 17920  # gate_up of the 1.5B shape
CACHED_BYTES = (192 << 10, 576 << 10)  # of each thread: both fit a second-level cache of 1 MiB


Weight = tuple[Tensor, Tensor | None]


def packed(kind: str, rows: int, copies: int = 1) -> Sequence[Weight]:
    """Copies of a packed weight [rows, COLUMNS] with its scales."""
    bits, pruned = KINDS[kind]
    if bits < 16:
        return random_packed(rows, COLUMNS, bits, pruned, copies)
    dense = torch.randn(rows, COLUMNS).bfloat16().masked_fill(torch.rand(rows, COLUMNS) < pruned, 0)
    stored = from_dense(dense, "benchmark")
    return [(pack(stored, torch.bfloat16)["weight_packed"], None) for _ in range(copies)]


def size_of(weight: Weight) -> int:
    """Bytes of values, masks and scales."""
    return weight[0].nbytes + (0 if weight[1] is None else weight[1].nbytes)


def call(weight: Weight, rows: int, x: Tensor) -> Callable[[], Tensor]:
    """One product."""
    return lambda: sparse_linear(x, weight[0], rows, COLUMNS, None, weight[1])


def medians(calls: list[Callable[[], object]], seconds: float) -> list[float]:
    """Median seconds of each, called in turn for about so long."""
    times: list[list[float]] = [[] for _ in calls]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 5:
        for run, of in zip(calls, times, strict=True):
            run()  # so that its weight is in the cache again, if it fits
            start = time.perf_counter()
            run()
            of.append(time.perf_counter() - start)
    return [statistics.median(of) for of in times]


def cached(kind: str, m: int, threads: int, seconds: float) -> tuple[float, float]:
    """Bytes per second in the caches, and seconds of a call without the products."""
    per_row = size_of(packed(kind, 1600)[0]) / 1600
    # whole pairs of panels for each thread
    heights = [32 * threads * max(1, round(size / per_row / 32)) for size in CACHED_BYTES]
    weights = [packed(kind, rows)[0] for rows in heights]
    x = torch.randn(m, COLUMNS).bfloat16()
    small, large = medians([call(*both, x) for both in zip(weights, heights, strict=True)], seconds)
    sizes = [size_of(weight) for weight in weights]
    speed = (sizes[1] - sizes[0]) / (large - small)
    return speed, small - sizes[0] / speed


def from_memory(kind: str, m: int, gigabytes: float, repeats: int) -> float:
    """Bytes per second where every product reads a weight that no cache holds."""
    per_row = size_of(packed(kind, 1600)[0]) / 1600
    weights = packed(kind, LARGE_ROWS, max(2, round(gigabytes * 1e9 / (per_row * LARGE_ROWS))))
    x = torch.randn(m, COLUMNS).bfloat16()
    calls = [call(weight, LARGE_ROWS, x) for weight in weights]
    return size_of(weights[0]) / median_of_each(calls, repeats)


def read_probe(repeats: int) -> float:
    """Bytes per second of sums over, or products with, parts of half a GB of float32, whichever are faster."""
    parts = list(torch.ones(32, 1 << 9, 1 << 13))
    vector = torch.ones(1 << 13)
    sums = median_of_each([part.sum for part in parts], repeats)
    products = median_of_each([lambda part=part: torch.mv(part, vector) for part in parts], repeats)
    return parts[0].nbytes / min(sums, products)


def median_of_each(calls: Sequence[Callable[[], object]], repeats: int) -> float:
    """Median seconds of a call, so that what else runs meanwhile delays single calls only. The first round is left out."""
    times = []
    for turn in range(repeats + 1):
        for run in calls:
            start = time.perf_counter()
            run()
            if turn:
                times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=numbers, default=[1], help="numbers of rows of x")
    parser.add_argument("--threads", type=numbers, default=[1])
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--gigabytes", type=float, default=0.3, help="of packed weights that are read from memory"
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="for each rate in the caches")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(
        f"{support().reason}; torch {torch.__version__}; bfloat16 activations, weights [n, {COLUMNS}]\n"
    )
    print(
        "| threads | M | weight | in the caches GB/s | from memory GB/s | read probe GB/s | of probe | limit | call us |"
    )
    print("|" + "---|" * 9)
    with torch.inference_mode():
        for threads, m, kind in itertools.product(
            arguments.threads, arguments.rows, arguments.only
        ):
            torch.set_num_threads(threads)
            probe = read_probe(arguments.repeats)
            fast, rest = cached(kind, m, threads, arguments.seconds)
            slow = from_memory(kind, m, arguments.gigabytes, arguments.repeats)
            limit = "instructions" if fast < probe else "memory"
            cells = [
                threads,
                m,
                kind,
                *(f"{speed / 1e9:.1f}" for speed in (fast, slow, probe)),
                f"{slow / probe:.0%}",
                limit,
            ]
            print("| " + " | ".join(map(str, [*cells, f"{rest * 1e6:.0f}"])) + " |", flush=True)


if __name__ == "__main__":
    main()
