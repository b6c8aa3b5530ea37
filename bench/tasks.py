"""Right answers of compressed models on held-out problems, each paired with the dense model.

    python -m bench formats --model qwen15b --labels int4     # makes the model
    python -m bench tasks --labels int4

`rac eval` asks the dense model and each row of `bench formats` the same problems, greedily, through
`vllm serve`. The file of a finished model is read and not made again.
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

from bench.common import RAC, save
from bench.formats import folder_of
from bench.models import SUBJECTS, float32_copy

COLUMNS = {
    "model": "",
    "right answers, %": ".1f",
    "points against dense": "",
    "right, dense alone and row alone": "",
    "McNemar p": ".2g",
    "truncated, %": ".1f",
    "completion tokens": ".0f",
    "token inflation, both finish": ".2f",
}
TINY = "--model reasoner --labels --problems 2 --cap 16"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--model", default="qwen15b", choices=SUBJECTS)
    parser.add_argument("--labels", nargs="*", default=["int4"], help="finished bench formats rows")
    parser.add_argument("--source", default="reasoning-gym:gsm_symbolic", help="of problems")
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--cap", type=int, default=512, help="most tokens of an answer")
    parser.add_argument("--concurrency", type=int, default=32, help="answers in progress")


def run(options: argparse.Namespace) -> None:
    """Ask the models that are missing, and write the table."""
    subject = float32_copy(options.model, options.work, options.cap)
    task = options.source.rpartition(":")[2]
    work = options.work.resolve() / "tasks" / options.model / task
    work.mkdir(parents=True, exist_ok=True)
    folders = {"dense": Path(subject.model)}
    folders |= {label: folder_of(options, label) for label in options.labels}
    rows = []
    for label, folder in folders.items():
        report = work / f"{label.replace(' ', '-')}.json"
        if not report.exists():
            command = [*RAC, "eval", str(folder.resolve()), "--serve", "--json", str(report)]
            command += ["--baseline", str(work / "dense.json")] if label != "dense" else []
            for name in ("source", "problems", "cap", "concurrency"):
                command += [f"--{name}", str(getattr(options, name))]
            subprocess.run(command, check=True, cwd=work)
        rows.append(row_of(label, json.loads(report.read_text()), options))
    save(options.out, f"tasks_{options.model}_{task}", subject.name, COLUMNS, rows)


def row_of(label: str, report: dict[str, Any], options: argparse.Namespace) -> list[Any]:
    """Return a row of the table (SystemExit: the report is of other problems)."""
    (result,), (pair,) = report["results"], report.get("paired", [{}])
    if (result["problems"], result["cap"]) != (options.problems, options.cap):
        raise SystemExit(f"{label} was asked other problems; remove its report, or give --work")
    shares = [100 * result[key] for key in ("accuracy", "ci_low", "ci_high")]
    alone = [pair.get(f"only_{which}") for which in ("first", "second")]
    points = [100 * pair.get(key, 0) for key in ("difference", "ci_low", "ci_high")]
    inflation = pair.get("inflation", {}).get("both_finish")
    return [
        label,
        shares,
        "{:+.1f} ({:+.1f} to {:+.1f})".format(*points) if pair else None,
        "{}, {}".format(*alone) if pair else None,
        pair.get("p_value"),
        100 * result["unfinished_share"],
        result["mean_completion_tokens"],
        inflation and [inflation[key] for key in ("ratio", "ci_low", "ci_high")],
    ]
