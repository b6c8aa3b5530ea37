"""Products of integer weights with activations in 8 bits against 16: milliseconds and their ratio, as Markdown.

    python benchmarks/kernel_activations.py --rows 1,8,16,32 --threads 1

Weights [17920, 1536] of random values, read from memory: every product reads another one. Both ways run in turn on the same
weights; the median of all products of a turn, then the median of the turns. Beside them vLLM's own int8 linear (oneDNN, W8A8) on
dense weights of the same shape, where vLLM is installed. With one thread, its processor time is measured, so that programs
beside it change less.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from kernel import numbers
from kernel_int8 import vllm_int8
from kernel_limit import COLUMNS, KINDS, LARGE_ROWS, Weight, packed, size_of
from torch import Tensor

from rac_modifier.kernels.cpu.operator import sparse_linear
from rac_modifier.kernels.cpu.packed import set_activation_bits
from rac_modifier.kernels.cpu.support import support

INTEGERS = [kind for kind in KINDS if "bf16" not in kind]
Linear = Callable[[Tensor], Tensor]


def ours(weight: Weight) -> Linear:
    """The product with a packed weight."""
    data, scale = weight
    return lambda x: sparse_linear(x, data, LARGE_ROWS, COLUMNS, None, scale)


def median(linears: Sequence[Linear], x: Tensor, threads: int) -> float:
    """Seconds of a product, each computed once."""
    clock = time.thread_time if threads == 1 else time.perf_counter
    times = []
    for linear in linears:
        start = clock()
        linear(x)
        times.append(clock() - start)
    return statistics.median(times)


def compare(
    weights: Sequence[Weight], dense: Sequence[Linear], m: int, threads: int, repeats: int
) -> list[float]:
    """Milliseconds of 16 bits, of 8 bits, and of `dense` if there are any."""
    x = torch.randn(m, COLUMNS).bfloat16()
    linears = [ours(weight) for weight in weights]
    times: list[list[float]] = [[] for _ in range(3 if dense else 2)]
    for turn in range(repeats + 1):
        seconds = []
        for bits in (16, 8):
            for data, _ in weights:
                set_activation_bits(data, bits)
            seconds.append(median(linears, x, threads))
        if dense:
            seconds.append(median(dense, x, threads))
        for of, found in zip(times, seconds, strict=True):
            of.extend([found] if turn else [])  # the first turn warms up
    return [1e3 * statistics.median(of) for of in times]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=numbers, default=[1, 4, 8, 16, 32, 64], help="numbers of rows of x"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=INTEGERS, default=INTEGERS)
    parser.add_argument("--gigabytes", type=float, default=0.1, help="of packed weights of a kind")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    vllm = importlib.util.find_spec("vllm") is not None
    print(
        f"{support().reason}; {arguments.threads} threads; bfloat16 activations, weights [{LARGE_ROWS}, {COLUMNS}]\n"
    )
    print(
        "| weight | M | 16 bits ms | 8 bits ms | ratio |"
        + (" vLLM int8 ms | over 8 bits |" if vllm else "")
    )
    print("|" + "---|" * (7 if vllm else 5))
    with torch.inference_mode():
        dense = [
            vllm_int8(torch.randn(LARGE_ROWS, COLUMNS).bfloat16()) for _ in range(4 if vllm else 0)
        ]
        for kind in arguments.only:
            per_row = size_of(packed(kind, 1600)[0]) / 1600
            copies = max(3, round(arguments.gigabytes * 1e9 / (per_row * LARGE_ROWS)))
            weights = packed(kind, LARGE_ROWS, copies)
            for m in arguments.rows:
                sixteen, eight, *others = compare(
                    weights, dense, m, arguments.threads, arguments.repeats
                )
                cells = [kind, str(m), f"{sixteen:.2f}", f"{eight:.2f}", f"{sixteen / eight:.2f}x"]
                for other in others:
                    cells += [f"{other:.2f}", f"{other / eight:.2f}x"]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
