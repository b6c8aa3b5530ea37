"""Accuracy, divergence and bytes of pruned models, by pattern, preset and calibration set.

python -m bench accuracy --variants paper quality --patterns 0.5 0.7 2:4
"""

import argparse
import itertools

from bench import grid
from bench.common import save
from bench.models import SUBJECTS

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
    table = [grid.cells(row) for row in grid.run_grid(subject, rows, out, **budgets)]
    save(options.out, f"accuracy_{options.model}", subject.name, grid.COLUMNS, table)
