r"""Accuracy against served speed: the plot in docs/results/accuracy.md, from figures that two other benchmarks left.

    .venv-serve/bin/python benchmarks/serving_speed.py --sparsity 0.5 0.6 0.7 2:4 --json build/speed.json
    .venv/bin/python benchmarks/reasoner_table.py --variants paper quality --calibrations RAC --problems 500 \
        --patterns 0.5 0.6 0.7 2:4 --out build/solvers
    .venv/bin/python benchmarks/accuracy_speed.py build/speed.json build/solvers/rows-*.jsonl

Speed is that of a model of Qwen2-1.5B's shape in `vllm serve`, accuracy that of the embedded reasoner: two models, because the
one that thinks is too small to be slow, and the one that is slow has random weights. A pattern is the same in both.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from matplotlib import pyplot

STYLES = {"paper": ("#D55E00", "s", "the paper's solver"), "quality": ("#0072B2", "o", "quality")}


def speeds(path: Path, concurrency: str) -> dict[str, float]:
    """Output tokens a second over dense, by pattern: the median of the rounds' ratios."""
    runs = json.loads(path.read_text())["runs"]
    rates = {
        name: [run["speeds"][concurrency]["tokens_per_second"] for run in of]
        for name, of in runs.items()
    }
    found = {}
    for name, of in rates.items():
        pattern, _, rest = name.partition(" ")
        if rest in ("", "sparse"):
            found[pattern] = statistics.median(
                a / b for a, b in zip(of, rates["dense"], strict=True)
            )
    return found


def accuracies(paths: list[Path]) -> dict[tuple[str, str], list[float]]:
    """Percent of problems by solver and pattern, a number a calibration seed."""
    found: dict[tuple[str, str], list[float]] = {}
    for line in "".join(path.read_text() for path in paths).splitlines():
        row = json.loads(line)
        if row["calibration"] in ("RAC", "dense"):
            pattern = row["pattern"] if isinstance(row["pattern"], str) else f"{row['pattern']:.0%}"
            found.setdefault((row.get("variant", "paper"), pattern), []).append(
                100 * row["accuracy"]
            )
    return found


def main() -> None:
    """Print the table and draw the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("speed", type=Path, help="what serving_speed.py --json wrote")
    parser.add_argument("rows", type=Path, nargs="+", help="rows of reasoner_table.py")
    parser.add_argument("--concurrency", default="1")
    parser.add_argument("--plot", type=Path, default=Path("docs/accuracy_speed.png"))
    args = parser.parse_args()
    speed, accuracy = speeds(args.speed, args.concurrency), accuracies(args.rows)
    dense = statistics.mean(
        next(values for (_, pattern), values in accuracy.items() if pattern == "dense")
    )

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained", dpi=150)
    axes.axhline(dense, color="#666666", linewidth=0.8, linestyle="--")
    axes.plot([1.0], [dense], marker="D", color="#222222", linestyle="none", label="dense")
    print(
        f"| pattern | tokens/s over dense | {' | '.join(STYLES)} |\n|{'---|' * (2 + len(STYLES))}"
    )
    print(f"| dense | 1.00x | {' | '.join([f'{dense:.1f}'] * len(STYLES))} |")
    for pattern in (name for name in speed if name != "dense"):
        cells = []
        for name, (colour, marker, _) in STYLES.items():
            values = accuracy.get((name, pattern))
            cells.append(
                f"{statistics.mean(values):.1f} ({min(values):.1f}-{max(values):.1f})"
                if values
                else "-"
            )
            if values:
                mean = statistics.mean(values)
                bar = [[mean - min(values)], [max(values) - mean]]
                axes.errorbar(
                    [speed[pattern]], [mean], yerr=bar, marker=marker, color=colour, capsize=3
                )
                axes.annotate(
                    pattern,
                    (speed[pattern], mean),
                    (6, -11),
                    textcoords="offset points",
                    fontsize=8,
                )
        print(f"| {pattern} | {speed[pattern]:.2f}x | {' | '.join(cells)} |")
    for colour, marker, label in STYLES.values():
        axes.plot([], [], marker=marker, color=colour, linestyle="none", label=label)
    axes.set_xlabel(
        f"output tokens/s through vllm serve, over dense (concurrency {args.concurrency}, 1.5B shape)"
    )
    axes.set_ylabel("correct answers of the embedded reasoner, %")
    axes.set_ylim(0, 103)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower left")
    figure.savefig(args.plot)
    print(f"plot: {args.plot}")


if __name__ == "__main__":
    main()
