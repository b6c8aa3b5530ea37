"""Time and memory of pruning one expert of a large mixture, and the whole model estimated from it. Processor time, one thread.

    python benchmarks/expert_shape.py                    # OLMoE-1B-7B: 1.3 billion of 6.9 billion weights per token
    python benchmarks/expert_shape.py --hidden 2048 --width 768 --experts 128 --layers 48    # Qwen3-30B-A3B

Random weights and inputs, `preset: quality` (ALPS towards the dense outputs), 2:4. The estimate is of the experts alone, by
multiplication, without forward passes and attention.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
from common import machine

from rac_modifier.pruning.hessian import Statistics
from rac_modifier.pruning.solve import solve
from rac_modifier.settings.pattern import Pattern

PATTERN = Pattern.parse("2:4", None)


def pruned(columns: int, rows: list[int], tokens: int) -> tuple[float, float]:
    """Processor seconds for the statistics of a group, and for solving it."""
    weights = [torch.randn(count, columns) / columns**0.5 for count in rows]
    mixing = torch.randn(columns, columns) / columns**0.5  # inputs of real models are correlated
    x = torch.randn(tokens, columns) @ mixing
    began = time.process_time()
    statistics = Statistics(columns, "cpu", weights)
    for part in x.split(1024):
        statistics.add(part, torch.ones(len(part)), part + 0.05 * torch.randn_like(part))
    gathered = time.process_time()
    solve("alps", weights, statistics.hessian.matrix(), PATTERN, cross_moment=statistics.cross_moment())
    return gathered - began, time.process_time() - gathered


def peak() -> float:
    """GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4096, help="that an expert is calibrated on")
    args = parser.parse_args()
    torch.manual_seed(0)
    print(machine())
    before, total = peak(), 0.0
    print("| group | inputs | rows | statistics | solving | peak memory over the start |\n|---|---|---|---|---|---|")
    for name, columns, rows in (("down", args.width, [args.hidden]), ("gate and up", args.hidden, [args.width] * 2)):
        collecting, solving = pruned(columns, rows, args.tokens)
        total += collecting + solving
        print(
            f"| {name} | {columns:,} | {sum(rows):,} | {collecting:.1f} s | {solving:.1f} s | {peak() - before:.2f} GiB |",
            flush=True,
        )
    hours = total * args.experts * args.layers / 3600
    print(f"\nestimated for {args.layers} layers of {args.experts} experts: {hours:.1f} hours of one core")


if __name__ == "__main__":
    main()
