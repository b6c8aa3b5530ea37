"""How many instructions does a kernel need for a weight? Counted one by one, as Markdown.

    RAC_KERNEL=avx2 python benchmarks/kernel_instructions.py --rows 1,4

A process that is traced makes one product, and its parent lets it run one instruction at a time (ptrace; Linux only). So this
needs no counters of the processor, which virtual machines often lack, and other programs that run meanwhile do not change the
numbers. Weights of two heights are multiplied, and the difference of their counts belongs to the difference of their rows: what
a call costs beside its products is not in it. Times are processor time, with weights that stay in a second-level cache.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import os
import signal
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from kernel import numbers
from peer_contenders import packed_integers
from torch import Tensor

from rac_modifier.kernels.cpu.operator import sparse_linear
from rac_modifier.kernels.cpu.support import support

COLUMNS = 1536  # as in the 1.5B shape
COUNTED, TIMED = (16, 80), (64, 192)  # rows of the two weights
# bits, and the share that is pruned
KINDS = {
    "dense int4": (4, 0.0),
    "dense int3": (3, 0.0),
    "dense int2": (2, 0.0),
    "50 % + int4": (4, 0.5),
    "60 % + int4": (4, 0.6),
    "70 % + int4": (4, 0.7),
}
PTRACE_TRACEME, PTRACE_CONT, PTRACE_SINGLESTEP = 0, 7, 9
UNIT = 64  # weights that counts and times are given for


def product(
    bits: int, pruned: float, rows: int, m: int, group: int
) -> tuple[Callable[[], Tensor], int]:
    """A product with a random weight [rows, COLUMNS], and the bytes of this weight with its scales."""
    ((data, scale),) = packed_integers(rows, COLUMNS, bits, pruned, group=group)
    x = torch.randn(m, COLUMNS).bfloat16()
    return lambda: sparse_linear(x, data, rows, COLUMNS, None, scale), data.nbytes + scale.nbytes


def instructions(call: Callable[[], object]) -> int:
    """Instructions of one call, with what Python does for it.

    Raises:
        OSError: this system does not let a process trace its child.
    """
    ptrace = ctypes.CDLL(None, use_errno=True).ptrace
    ptrace.argtypes = [ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    child = os.fork()
    if child == 0:
        try:
            ptrace(PTRACE_TRACEME, 0, None, None)
            for _ in range(3):
                call()
            os.kill(os.getpid(), signal.SIGSTOP)
            call()
            os.kill(os.getpid(), signal.SIGSTOP)
        finally:
            os._exit(0)
    counted = 0
    try:
        _, status = os.waitpid(child, 0)
        if not os.WIFSTOPPED(status):
            raise OSError("the traced process ended before its product; is ptrace allowed here?")
        while True:
            if ptrace(PTRACE_SINGLESTEP, child, None, None):
                raise OSError(ctypes.get_errno(), "ptrace")
            _, status = os.waitpid(child, 0)
            if not os.WIFSTOPPED(status):
                raise OSError("the traced process ended within its product")
            if os.WSTOPSIG(status) == signal.SIGSTOP:
                return counted
            counted += 1
    finally:
        os.kill(child, signal.SIGKILL)
        if os.WIFSTOPPED(status):
            os.waitpid(child, 0)


def per_unit(of_both: Sequence[float], rows: Sequence[int]) -> float:
    """The difference of two weights, for each UNIT of weights."""
    return (of_both[1] - of_both[0]) / ((rows[1] - rows[0]) * COLUMNS / UNIT)


def seconds(calls: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median processor time of each, called in turn."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, of in zip(calls, times, strict=True):
            call()  # so that its weight is in the cache again
            start = time.thread_time()
            call()
            of.append(time.thread_time() - start)
    return [statistics.median(of) for of in times]


def main() -> None:
    """Count and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=numbers, default=[1], help="numbers of rows of x")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--group", type=int, default=64, help="columns that share a scale")
    parser.add_argument("--repeats", type=int, default=400, help="of the timed products")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(
        f"{support().reason}; one thread; weights [n, {COLUMNS}], groups of {arguments.group} columns\n"
    )
    print(
        f"| M | weight | bytes per weight | instructions for {UNIT} weights | ns for {UNIT} weights |"
    )
    print("|" + "---|" * 5)
    with torch.inference_mode():
        for m, kind in itertools.product(arguments.rows, arguments.only):
            calls = {
                rows: product(*KINDS[kind], rows, m, arguments.group) for rows in (*COUNTED, *TIMED)
            }
            counted = [instructions(calls[rows][0]) for rows in COUNTED]
            times = seconds([calls[rows][0] for rows in TIMED], arguments.repeats)
            sizes = [calls[rows][1] for rows in TIMED]
            cells = [
                m,
                kind,
                f"{(sizes[1] - sizes[0]) / (TIMED[1] - TIMED[0]) / COLUMNS:.3f}",
                f"{per_unit(counted, COUNTED):.1f}",
                f"{1e9 * per_unit(times, TIMED):.2f}",
            ]
            print("| " + " | ".join(map(str, cells)) + " |", flush=True)


if __name__ == "__main__":
    main()
