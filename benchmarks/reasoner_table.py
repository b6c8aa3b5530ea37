"""Accuracy and thinking of the embedded reasoner by sparsity and calibration: the tables in docs/results/accuracy.md.

    python benchmarks/reasoner_table.py                # the paper's way, all calibrations; resumes from its rows
    python benchmarks/reasoner_table.py --variants paper quality --patterns 0.6 0.7 0.8 2:4 --problems 500 --out build/solvers
    python benchmarks/reasoner_table.py --report-only  # table and plot from the rows that are there

Each cell is upstream's `oneshot` with our modifier, calibrated on the same number of tokens, then greedy answers to the
same held-out problems at the same cap. A calibration seed changes the traces, the problems prompted and the text drawn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

from common import CALIBRATIONS, VARIANTS, fresh, machine, modifier
from llmcompressor import oneshot
from seeds import Spread, parse_sparsity, plot_accuracy, summarise_seeds
from transformers import AutoTokenizer

import rac_modifier
from rac_modifier.evaluation.accuracy import evaluate
from rac_modifier.problems.held_out import held_out_problems

PATTERNS: list[str | float] = ["2:4", 0.5, 0.6, 0.4, 0.7]


def run(args: argparse.Namespace, rows_path: Path) -> None:
    path = rac_modifier.reasoner_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    problems = held_out_problems("arithmetic", args.problems)
    done = {
        (r["pattern"], r["calibration"], r["calibration_seed"], r["variant"])
        for r in read(rows_path)
    }

    def record(
        pattern: str | float,
        calibration: str,
        seed: int,
        variant: str,
        model: object,
        prune_seconds: float,
    ) -> None:
        result = evaluate(
            model,
            tokenizer,
            problems,
            label=f"{pattern} {calibration}",
            max_new_tokens=args.cap,
            batch_size=args.batch_size,
            progress=False,
        )
        row = {
            "pattern": pattern,
            "calibration": calibration,
            "variant": variant,
            "tokens": args.tokens,
            "prune_seconds": prune_seconds,
            **result.as_dict(),
            "calibration_seed": seed,
        }
        with rows_path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"{pattern!s:>5} {calibration:<13} {variant} seed {seed}: {result.accuracy:.3f}, "
            f"{result.mean_thinking_tokens:.0f} tokens, "
            f"{result.unfinished_share:.1%} unfinished, pruned in {prune_seconds:.1f} s, evaluated in {result.seconds:.0f} s",
            flush=True,
        )

    if not any(cell[0] == "dense" for cell in done):
        record("dense", "dense", 0, "paper", fresh(path), 0.0)
    for cell in itertools.product(args.patterns, args.calibrations, args.seeds, args.variants):
        if cell in done:
            continue
        pattern, calibration, seed, variant = cell
        model = fresh(path)
        store = rows_path.parent / f"traces-{seed}.jsonl"
        recipe = modifier(
            pattern, calibration, tokens=args.tokens, seed=seed, store=store, variant=variant
        )
        started = time.monotonic()
        oneshot(model=model, recipe=recipe)
        record(*cell, model, time.monotonic() - started)


def read(path: Path) -> list[dict]:
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{"variant": "paper", **row} for row in rows]


def report(rows: list[dict], plot: Path) -> None:
    dense = next(r for r in rows if r["pattern"] == "dense")
    several = len({r["variant"] for r in rows}) > 1
    pruned = [
        {
            **r,
            "sparsity": r["pattern"],
            "calibration": f"{r['calibration']}, {r['variant']}" if several else r["calibration"],
            "seed": r["calibration_seed"],
        }
        for r in rows
        if r["pattern"] != "dense"
    ]
    print("| sparsity | calibration | accuracy | unfinished | thinking tokens | pruning |")
    print("|---|---|---|---|---|---|")
    print(
        f"| dense | - | {dense['accuracy']:.1%} ({dense['ci_low']:.1%} to {dense['ci_high']:.1%}) | "
        f"{dense['unfinished_share']:.1%} | {dense['mean_thinking_tokens']:.0f} | - |"
    )
    for s in summarise_seeds(pruned):
        name = s.sparsity if isinstance(s.sparsity, str) else f"{s.sparsity:.0%}"
        times = [
            r["prune_seconds"]
            for r in pruned
            if (r["sparsity"], r["calibration"]) == (s.sparsity, s.calibration)
        ]
        print(
            f"| {name} | {s.calibration} | {spread(s.accuracy)} | {spread(s.unfinished_share)} | "
            f"{s.mean_thinking_tokens.mean:.0f} | {statistics.median(times):.0f} s |"
        )
    print(
        f"mean (lowest-highest) over {max(s.seeds for s in summarise_seeds(pruned))} calibration seeds"
    )
    plot_accuracy(pruned, dense["accuracy"], plot)
    print(f"plot: {plot}")


def spread(s: Spread) -> str:
    return f"{100 * s.mean:.1f} ({100 * s.low:.1f}-{100 * s.high:.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/reasoner_table"))
    parser.add_argument("--plot", type=Path, default=Path("docs/accuracy.png"))
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--patterns", type=parse_sparsity, nargs="+", default=PATTERNS)
    parser.add_argument(
        "--calibrations", choices=CALIBRATIONS, nargs="+", default=list(CALIBRATIONS)
    )
    parser.add_argument("--variants", choices=VARIANTS, nargs="+", default=["paper"])
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--cap", type=int, default=512)
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    # One file a set of seeds, so that several processes can share the work; the report reads all of them.
    rows_path = args.out / f"rows-{'-'.join(map(str, args.seeds))}.jsonl"
    print(machine())
    if not args.report_only:
        run(args, rows_path)
    report([row for path in sorted(args.out.glob("rows-*.jsonl")) for row in read(path)], args.plot)


if __name__ == "__main__":
    main()
