"""How the answers of the rows of a `rac frontier` folder end, and KL where the dense model's answers do not repeat themselves.

    python benchmarks/frontier_loops.py frontier

An answer loops if it was cut at the cap while it repeated itself (`rac_modifier.traces.repeats`). Greedy answers of small models
do; where a grid samples (`evaluation.temperature`), the same is counted. Tokens that repeat are easy to predict, so that they
make the KL of a row small.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rac_modifier.frontier.folder import FrontierFolder
from rac_modifier.settings.grid import DENSE
from rac_modifier.traces.repeats import repeated_tokens, repeats

COLUMNS = ("row", "answers", "cut", "of them looping", "cut of the dense model too", "tokens of a finished one, mean")
COLUMNS += ("KL outside of repetitions", "KL in them")


def tail(trace: Mapping[str, Any]) -> int:
    """How many tokens at the end of an answer repeat what stands before them."""
    return repeated_tokens(trace["ids"]) if repeats(trace["ids"], trace["finish"]) else 0


def split_kl(traces: Sequence[Mapping[str, Any]], tails: Mapping[str, int]) -> list[str]:
    """Mean KL per token of the dense model's answers before their repeated tails, and in these."""
    parts: tuple[list[float], list[float]] = ([], [])
    for trace in traces:
        end = len(trace["kl"]) - tails[trace["id"]]
        parts[0].extend(trace["kl"][:end])
        parts[1].extend(trace["kl"][end:])
    return [f"{statistics.fmean(values):.3f}" if values else "-" for values in parts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = FrontierFolder.read(parser.parse_args().folder)
    tails = {trace["id"]: tail(trace) for trace in folder.traces(DENSE)}
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
        cells = [row["label"], len(traces), len(cut), sum(tail(trace) > 0 for trace in cut)]
        cells += [sum(trace["id"] in dense for trace in cut), round(statistics.mean(finished)) if finished else "-"]
        cells += ["-", "-"] if row["label"] == DENSE else split_kl(traces, tails)
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
