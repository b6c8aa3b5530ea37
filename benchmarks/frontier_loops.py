"""How the answers of the rows of a `rac frontier` folder end: finished, cut, or cut while they repeat themselves.

    python benchmarks/frontier_loops.py frontier

An answer loops if it was cut while its end repeated itself (`rac_modifier.traces.repeats`). Greedy answers of small models do;
where a grid samples (`evaluation.temperature`), the same is counted.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

from rac_modifier.frontier.folder import FrontierFolder
from rac_modifier.settings.grid import DENSE
from rac_modifier.traces.repeats import repeats


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
        cells = [row["label"], len(traces), len(cut), sum(repeats(trace["ids"], trace["finish"]) for trace in cut)]
        cells += [sum(trace["id"] in dense for trace in cut), round(statistics.mean(finished)) if finished else "-"]
        print(f"| {' | '.join(map(str, cells))} |")


if __name__ == "__main__":
    main()
