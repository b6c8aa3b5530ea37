"""Recovery: divergence and accuracy by calibration tokens and recovery tokens.

python -m bench recovery --patterns 0.9 --recover 0 640000
python -m bench recovery --model smollm2 --patterns 0.6 2:4 --tokens 65536 --recover 0 131072
"""

from __future__ import annotations

import argparse
import itertools
from typing import Any

from bench.common import save
from bench.grid import COLUMNS, OURS, cells, pattern, run_grid
from bench.models import SUBJECTS

TINY: dict[str, Any] = {
    "patterns": ["0.9"],
    "tokens": [512],
    "recover": [512],
    "seeds": [0],
    "problems": 2,
    "cap": 24,
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--model", choices=SUBJECTS, default="reasoner")
    parser.add_argument("--patterns", nargs="+", default=["0.8", "0.9"])
    parser.add_argument("--bits", type=int, help="of the weights, rounded in the same pass")
    parser.add_argument("--tokens", nargs="+", type=int, default=[32768], help="of calibration")
    parser.add_argument("--recover", nargs="+", type=int, default=[0, 80000], help="0: no recovery")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--problems", type=int, help="held-out problems")
    parser.add_argument("--cap", type=int, help="most new tokens of an answer")


def run(options: argparse.Namespace) -> None:
    """Run the rows and write the table."""
    subject = SUBJECTS[options.model](options.work)
    rows = []
    for share, tokens, recover in itertools.product(
        options.patterns, options.tokens, options.recover
    ):
        entry: dict[str, Any] = pattern(share)
        if options.bits:
            weights = {"num_bits": options.bits, "strategy": "group", "group_size": 64}
            entry["quantization"] = {"config_groups": {"w": {"weights": weights}}}
        changes: dict[str, Any] = {"calibration.tokens": tokens}
        if recover:
            changes["recover"] = {"tokens": recover, "step_tokens": min(512, recover)}
        label = f"{share}, {tokens:,} + {recover:,} tokens"
        row = {"label": label, "recipe": {OURS: entry}, "set": changes, "seeds": options.seeds}
        rows.append(row)
    finished = run_grid(
        subject,
        rows,
        options.work / f"recovery-{options.model}",
        tokens=max(options.tokens),
        problems=options.problems,
        cap=options.cap,
    )

    columns = {**COLUMNS, "seconds of compressing": ".0f"}
    table = [[*cells(row), row["compressing"]] for row in finished]
    save(options.out, f"recovery_{options.model}", subject.name, columns, table)
