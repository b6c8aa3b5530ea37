"""The rows of a `rac frontier` folder as the tables of docs/results/frontier.md.

python benchmarks/frontier_table.py contenders --scale 1000     # KL in thousandths
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rac_modifier.frontier.folder import FrontierFolder

COLUMNS = ("row", "group", "MB", "bits per weight", "values", "bitmask", "scales", "apart")
COLUMNS += ("KL", "top-1", "accuracy (95 %)", "thinking", "cut")


def cells(row: dict[str, Any], scale: float) -> list[str]:
    """One row; bytes in MB, the divergence times `scale`."""
    size, divergence, accuracy = row["bytes"], row["divergence"], row["accuracy"]
    parts = [
        size["total"],
        size["bitmask"] + size["offsets"],
        size["scales"] + size["zero_points"] + size["order"],
        size["head"] + size["embeddings"] + size["other"],
    ]
    total, masks, scales, apart = (f"{part / 1e6:.2f}" for part in parts)
    found = "- | -"
    if divergence is not None:
        kl, error = divergence["kl"] * scale, divergence["kl_stderr"] * scale
        found = f"{kl:.3f} ± {error:.3f} | {divergence['agreement']:.2%}"
    right = "-"
    if accuracy is not None:
        right = f"{accuracy['accuracy']:.1%} ({100 * accuracy['ci_low']:.1f} to {100 * accuracy['ci_high']:.1f})"
    return [
        *(
            row["label"],
            row["group"],
            total,
            f"{size['bits_per_weight']:.2f}",
            f"{size['values'] / 1e6:.2f}",
        ),
        *(masks, scales, apart, found, right),
        *(f"{row['length']['mean']:.0f}", f"{row['length']['cut_share']:.1%}"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="of KL and its error")
    args = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for row in FrontierFolder.read(args.folder).rows:
        print(f"| {' | '.join(cells(row, args.scale))} |")


if __name__ == "__main__":
    main()
