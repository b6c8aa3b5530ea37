"""KL of the rows of a `rac frontier` folder by kind of problem, with standard errors over answers.

python benchmarks/frontier_kinds.py frontier --kind instructions=instructions/held_out.jsonl     # all others: "other"
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from rac_modifier.frontier.folder import FrontierFolder
from rac_modifier.settings.grid import DENSE


def mean_and_error(parts: list[list[float]]) -> tuple[float, float]:
    """Nats per token over all answers, and its standard error where answers are drawn at random (ratio estimator)."""
    tokens = sum(map(len, parts))
    mean = sum(map(sum, parts)) / tokens
    spread = sum((sum(part) - mean * len(part)) ** 2 for part in parts)
    return mean, math.sqrt(len(parts) / (len(parts) - 1) * spread) / tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--kind",
        action="append",
        default=[],
        metavar="NAME=FILE",
        help="a .jsonl of these problems",
    )
    args = parser.parse_args()
    folder = FrontierFolder.read(args.folder)
    kind_of = {}
    for name, _, path in (kind.partition("=") for kind in args.kind):
        kind_of |= {
            json.loads(line)["problem"]: name for line in Path(path).read_text().splitlines()
        }
    kinds = [kind_of.get(trace["question"], "other") for trace in folder.traces(DENSE)]
    names = sorted(set(kinds))
    print(f"| row |{''.join(f' KL, {name} |' for name in names)}\n|{'---|' * (len(names) + 1)}")
    for row in folder.rows:
        if row["label"] == DENSE:
            continue
        traces, cells = folder.traces(row["label"]), []
        for name in names:
            mean, error = mean_and_error(
                [t["kl"] for t, kind in zip(traces, kinds, strict=True) if kind == name]
            )
            cells.append(f"{mean:.3f} ± {error:.3f}")
        print(f"| {row['label']} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
