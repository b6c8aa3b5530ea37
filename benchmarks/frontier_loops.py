"""How the answers of the rows of a `rac frontier` folder end, and KL where the dense model's answers do not repeat themselves.

    python benchmarks/frontier_loops.py frontier
    python benchmarks/frontier_loops.py frontier --beside "60 %, recovered"     # and each row beside that one, problem by problem

An answer loops if it was cut at the cap while it repeated itself (`rac_modifier.traces.selection`). Greedy answers of small
models do; where a grid samples (`evaluation.temperature`), the same is counted. Tokens that repeat are easy to predict, so they
make the KL of a row small.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rac_modifier.evaluation.divergence import mean_over_tokens
from rac_modifier.evaluation.paired import mcnemar
from rac_modifier.frontier.folder import FrontierFolder
from rac_modifier.settings.grid import DENSE
from rac_modifier.traces.selection import repeated_tail

COLUMNS = (
    "row",
    "answers",
    "cut",
    "of them looping",
    "cut of the dense model too",
    "tokens of a finished one, mean",
)
COLUMNS += ("KL outside of repetitions", "KL in them")


def split_kl(traces: Sequence[Mapping[str, Any]], tails: Mapping[str, int]) -> list[str]:
    """Mean KL per token of the dense model's answers before their repeated tails, and in these."""
    parts: tuple[list[float], list[float]] = ([], [])
    for trace in traces:
        end = len(trace["kl"]) - tails[trace["id"]]
        parts[0].extend(trace["kl"][:end])
        parts[1].extend(trace["kl"][end:])
    return [f"{statistics.fmean(values):.3f}" if values else "-" for values in parts]


def paired(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> tuple[float, float | None]:
    """How much more KL per token `second` has on the same answers, with one standard error over these."""
    before = {trace["id"]: trace["kl"] for trace in first}
    return mean_over_tokens(
        [[b - a for a, b in zip(before[trace["id"]], trace["kl"], strict=True)] for trace in second]
    )


def cut_beside(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> str:
    """How many answers are cut in one of two rows alone, with McNemar's exact test of both being cut as often."""
    before, after = (
        {trace["id"] for trace in traces if trace["finish"] == "length"}
        for traces in (first, second)
    )
    less, more = len(before - after), len(after - before)
    return (
        f"{more} answers cut here alone, {less} there alone (McNemar p = {mcnemar(less, more):.2g})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--beside",
        metavar="LABEL",
        help="a row that the others are compared with, answer by answer: KL, and which are cut",
    )
    args = parser.parse_args()
    folder = FrontierFolder.read(args.folder)
    tails = {
        trace["id"]: repeated_tail(trace["ids"], trace["finish"]) for trace in folder.traces(DENSE)
    }
    dense = {trace["id"] for trace in folder.traces(DENSE) if trace["finish"] == "length"}
    tokens = sum(len(trace["ids"]) for trace in folder.traces(DENSE))
    print(
        f"{sum(tails.values()):,} of the {tokens:,} tokens of the dense model's answers repeat what stands before them.\n"
    )
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for row in folder.rows:
        traces = folder.traces(row["label"])
        cut = [trace for trace in traces if trace["finish"] == "length"]
        finished = [len(trace["ids"]) for trace in traces if trace["finish"] != "length"]
        cells = [
            row["label"],
            len(traces),
            len(cut),
            sum(repeated_tail(trace["ids"], trace["finish"]) > 0 for trace in cut),
        ]
        cells += [
            sum(trace["id"] in dense for trace in cut),
            round(statistics.mean(finished)) if finished else "-",
        ]
        cells += ["-", "-"] if row["label"] == DENSE else split_kl(traces, tails)
        print(f"| {' | '.join(map(str, cells))} |")
    for row in folder.rows if args.beside else ():
        if row["label"] == args.beside:
            continue
        first, second = folder.traces(args.beside), folder.traces(row["label"])
        parts = [cut_beside(first, second)]
        if DENSE not in (row["label"], args.beside):
            more, error = paired(first, second)
            parts.insert(0, f"KL {more:+.4f} ± {error:.4f}")
        print(f"{row['label']} beside {args.beside}: {'; '.join(parts)}")


if __name__ == "__main__":
    main()
