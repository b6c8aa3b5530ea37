"""How the answers of the rows of a `rac frontier` folder end: finished, cut, or cut while they repeat themselves.

    python benchmarks/frontier_loops.py frontier

An answer loops if its last 200 tokens repeat a stretch of at most 100. Greedy answers of small models do; where a grid samples
(`evaluation.temperature`), the same is counted.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

from rac_modifier.frontier.folder import FrontierFolder
from rac_modifier.settings.grid import DENSE

TAIL, LONGEST = 200, 100  # tokens


def period(ids: Sequence[int]) -> int:
    """The length of the stretch that the last `TAIL` tokens repeat; 0 if there is none of at most `LONGEST`."""
    tail = ids[-TAIL:]
    lengths = range(1, min(LONGEST, len(tail) // 2) + 1)
    return next((n for n in lengths if tail[n:] == tail[:-n]), 0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = FrontierFolder.read(parser.parse_args().folder)
    dense = {trace["id"] for trace in folder.traces(DENSE) if trace["finish"] == "length"}
    print("| row | answers | cut | of them looping | cut of the dense model too | tokens of a finished one, mean |")
    print("|" + "---|" * 6)
    for row in folder.rows:
        traces = folder.traces(row["label"])
        cut = [trace for trace in traces if trace["finish"] == "length"]
        finished = [len(trace["ids"]) for trace in traces if trace["finish"] != "length"]
        cells = [row["label"], len(traces), len(cut), sum(period(trace["ids"]) > 0 for trace in cut)]
        cells += [sum(trace["id"] in dense for trace in cut), round(statistics.mean(finished)) if finished else "-"]
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
