"""Accuracy and divergence of pruned models, by pattern, preset and calibration set.

    python -m bench accuracy --variants paper --calibrations traces prompts generic
    python -m bench accuracy --variants paper quality --patterns 0.5 0.7 2:4

Each seed draws its own calibration set. Three values are the median of several seeds, the lowest
and the highest; of one seed, right answers have a 95 % interval and KL has a standard error.
"""

import argparse
import itertools
from typing import Any

from bench import grid
from bench.common import save, spread
from bench.models import SUBJECTS

COLUMNS = {
    "pattern": "",
    "preset": "",
    "calibration": "",
    "KL, nats per token": ".5f",
    "right answers, %": ".1f",
    "truncated answers, %": ".1f",
}
TINY = "--variants paper --patterns 2:4 --seeds 0 --tokens 512 --problems 2 --cap 24"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--model", choices=SUBJECTS, default="reasoner")
    parser.add_argument(
        "--variants", nargs="+", choices=grid.VARIANTS, default=["paper", "quality"]
    )
    parser.add_argument("--calibrations", nargs="+", choices=grid.CALIBRATIONS, default=["traces"])
    parser.add_argument("--patterns", nargs="+", default=["0.5", "0.7", "2:4"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=32768, help="of calibration")
    parser.add_argument("--problems", type=int, help="held-out problems")
    parser.add_argument("--cap", type=int, help="most new tokens of an answer")


def run(options: argparse.Namespace) -> None:
    """Run the rows and write the table."""
    subject = SUBJECTS[options.model](options.work)
    rows = [
        {
            "label": f"{share}, {variant}, {kind}",
            "recipe": {grid.OURS: {**grid.pattern(share), **grid.VARIANTS[variant]}},
            "set": grid.calibrated_on(kind, subject),
            "seeds": options.seeds,
        }
        for share, variant, kind in itertools.product(
            options.patterns, options.variants, options.calibrations
        )
    ]
    out = options.work / f"accuracy-{options.model}"
    budgets = {name: getattr(options, name) for name in ("tokens", "problems", "cap")}
    by_row: dict[str, list[list[Any]]] = {}
    for row in grid.run_grid(subject, rows, out, **budgets):
        by_row.setdefault(row["row"], []).append(grid.cells(row))
    table = []
    for label, of_seeds in by_row.items():
        pattern, preset, calibration = label.split(", ") if ", " in label else (label, None, None)
        _, _, kl, right, truncated, _ = of_seeds[0]
        if len(of_seeds) > 1:
            kl, right = (spread([cells[at][0] for cells in of_seeds]) for at in (2, 3))
            truncated = spread([cells[4] for cells in of_seeds])
        shown = pattern if ":" in pattern or not preset else f"{float(pattern):.0%}"
        table.append([shown, preset, calibration, kl, right, truncated])
    save(options.out, f"accuracy_{options.model}", subject.name, COLUMNS, table)
