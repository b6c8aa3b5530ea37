"""What the order of GPTQ's columns is worth in our own rounding: a table of docs/results/frontier.md.

    python benchmarks/column_order.py                       # the embedded reasoner, int2 and int3 in groups of 64
    python benchmarks/column_order.py --bits 2 --kl         # the KL of both orders, too: a second run

A run rounds the embedded reasoner in float32 with `solver: none`. Each group of modules is rounded four times, with the same
targets, Hessian, scales and zero points: with GPTQ in the natural order of the columns, or from the largest diagonal of the
Hessian to the smallest (upstream's `actorder: static`: groups keep their columns, so nothing more is stored), and without or with
the three sweeps of coordinate descent after it. The layer error is the geometric mean over the modules of
trace((T - Q) H (T - Q)^T) / trace(T H T^T) towards the targets T. The run goes on with the natural order and the sweeps; with
--kl another goes on with the other order. KL is on held-out traces, in thousandths of a nat per token with one standard error.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from common import fresh, machine
from llmcompressor import oneshot

import rac_modifier
import rac_modifier.llmcompressor.solving as solving
import rac_modifier.quantization.solve as solve
from rac_modifier.pruning.linalg import Dampening, Factor, factorise
from rac_modifier.quantization.grid import Grid, Steps
from rac_modifier.quantization.rounding import gptq

ORDERS = ("natural", "by activations")
SWEEPS = (0, 3)
Errors = dict[tuple[str, int], list[float]]


def gptq_in_order(weight: torch.Tensor, keep: torch.Tensor, steps: Steps, grid: Grid, factor: Factor) -> None:
    """`gptq` from the column with the largest diagonal of the Hessian to the one with the smallest."""
    hessian = (factor.reversed_lower @ factor.reversed_lower.T).flip(0, 1)
    order = hessian.diagonal().argsort(descending=True)
    hessian = hessian[order][:, order].contiguous()
    zero = None if steps.zero is None else steps.zero[order]
    ordered = weight[order].contiguous()
    damped = factorise(hessian, Dampening.of(hessian, 0.0), "w")
    gptq(ordered, keep[order], Steps(steps.scale[order], zero), grid, damped)
    weight[order] = ordered


def rounded(bits: int, symmetric: bool, order: str, args: argparse.Namespace) -> tuple[Errors, str]:
    """The layer errors of all variants, and the KL of a run that goes on with `order` and all sweeps."""
    errors: Errors = defaultdict(list)

    def quantize(*found: Any, **settings: Any) -> Any:
        kept = None
        for each, sweeps in itertools.product(ORDERS, SWEEPS):
            solve.gptq = gptq if each == ORDERS[0] else gptq_in_order
            results = solve.quantize(*found, **{**settings, "sweeps": sweeps})
            errors[each, sweeps] += [result.relative_error for result in results if result is not None]
            kept = results if (each, sweeps) == (order, SWEEPS[-1]) else kept
        return kept

    solving.quantize = quantize
    weights = {"num_bits": bits, "strategy": "group", "group_size": 64, "symmetric": symmetric}
    recipe = rac_modifier.ReasoningAwareSparseGPTModifier(
        solver="none",
        quantization={"config_groups": {"w": {"weights": weights}}},
        traces={
            "store": str(args.out / "traces.jsonl"),
            "sampling": {"max_new_tokens": 512, "batch_size": 128, "seed": args.seed},
        },
        calibration={"tokens": args.tokens, "held_out_tokens": args.held_out_tokens, "seed": args.seed},
    )
    with tempfile.TemporaryDirectory() as folder:
        oneshot(model=fresh(rac_modifier.reasoner_path()), recipe=recipe, output_dir=folder)
        found = json.loads((Path(folder) / "rac_run.json").read_text())["divergence"]
    return errors, f"{1000 * found['kl']:.3f} ± {1000 * found['kl_stderr']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/column-order"))
    parser.add_argument("--bits", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--grids", choices=("symmetric", "asymmetric"), nargs="+", default=["symmetric", "asymmetric"])
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--held-out-tokens", type=int, default=8_192)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kl", action="store_true", help="the KL of both orders")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(machine())
    print("| bits | grid | order of columns | layer error, GPTQ alone | with sweeps | KL |")
    print("|---|---|---|---|---|---|")
    for bits, grid in itertools.product(args.bits, args.grids):
        errors, kl = rounded(bits, grid == "symmetric", ORDERS[0], args)
        other = rounded(bits, grid == "symmetric", ORDERS[1], args)[1] if args.kl else "-"
        for order, measured in zip(ORDERS, (kl, other), strict=True):
            alone, swept = (math.exp(sum(map(math.log, errors[order, n])) / len(errors[order, n])) for n in SWEEPS)
            print(f"| {bits} | {grid} | {order} | {alone:.6f} | {swept:.6f} | {measured} |", flush=True)


if __name__ == "__main__":
    main()
