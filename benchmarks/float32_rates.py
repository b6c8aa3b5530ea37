"""Operations per second of float32 products by the library that torch calls, and by oneDNN; and of factors and inverses.

    OMP_NUM_THREADS=1 python benchmarks/float32_rates.py        # a minute of a core

The shapes are those of a layer of Qwen2-1.5B: forward passes on 4,096 tokens, the Hessian of q_proj, and the factor and inverse
of down_proj's, with half of its inputs, and with all of them (--large). Seconds are those of the processor.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import machine

from rac_modifier import platform
from rac_modifier.pruning import blocked, linalg

TOKENS, HIDDEN, WIDE = 4096, 1536, 8960


def seconds_of(run: Callable[[], Any], rounds: int = 1) -> float:
    """Of the processor, of one call, after a first one."""
    run()
    began = time.process_time()
    for _ in range(rounds):
        run()
    return (time.process_time() - began) / rounds


def row(what: str, operations: float, before: Callable[[], Any], now: Callable[[], Any]) -> None:
    """Print both rates, in 1e9 operations per second."""
    rates = [operations / seconds_of(run) / 1e9 for run in (before, now)]
    print(f"| {what} | {rates[0]:.0f} | {rates[1]:.0f} | {rates[1] / rates[0]:.1f} |", flush=True)


def products() -> None:
    """Forward passes, and the sums of a Hessian."""
    for rows, columns in ((WIDE, HIDDEN), (HIDDEN, WIDE)):
        x, weight = torch.randn(TOKENS, columns), torch.randn(rows, columns)
        row(
            f"linear layer {columns} -> {rows}",
            2 * TOKENS * rows * columns,
            partial(torch.matmul, x, weight.T),
            partial(platform.matmul, x, weight.T),
        )
    x, out = torch.randn(TOKENS, HIDDEN), torch.zeros(HIDDEN, HIDDEN)

    def transposed_first() -> None:  # as Hessian.add does
        by_input = x.T.contiguous()
        platform.add_matmul_(out, by_input, by_input.T)

    row("X^T X", 2 * TOKENS * HIDDEN**2, lambda: out.addmm_(x.T, x), transposed_first)


def solves(d: int) -> None:
    """Factor, inverse and solve of a matrix [d, d]; MKL's is torch's own."""
    x = torch.randn(d, d)
    matrix = (x @ x.T / d).add_(0.1 * torch.eye(d))
    right = torch.randn(d, HIDDEN)
    lower = torch.linalg.cholesky(matrix)
    row(
        f"Cholesky factor, {d}",
        d**3 / 3,
        lambda: torch.linalg.cholesky_ex(matrix),
        lambda: linalg.cholesky_(matrix.clone()),
    )
    row(
        f"inverse, {d}",
        d**3,
        lambda: torch.cholesky_inverse(torch.linalg.cholesky_ex(matrix).L),
        lambda: linalg.inverse_(matrix.clone()),
    )
    row(
        f"solve, {d}, {HIDDEN} right sides",
        2 * d**2 * HIDDEN,
        lambda: torch.cholesky_solve(right, lower),
        lambda: blocked.solve(right, lower),
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--large", action="store_true", help="factor and inverse with all 8,960 inputs too"
    )
    args = parser.parse_args()
    print(f"{machine()}; oneDNN is chosen: {platform.onednn_is_faster(torch.device('cpu'))}\n")
    print("| what | before | now | ratio |\n|---|---|---|---|")
    products()
    for d in (WIDE // 2, WIDE) if args.large else (WIDE // 2,):
        solves(d)


if __name__ == "__main__":
    main()
