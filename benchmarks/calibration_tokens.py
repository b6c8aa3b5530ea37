"""How far calibration goes by itself, and what recovery adds: KL of rows of a frontier by calibration tokens, with times.

    cd build/smollm2-frontier                       # made by smollm2_frontier.py; `frontier` holds the dense model's answers
    python ../../benchmarks/calibration_tokens.py smollm2 frontier --rows "60 %" "2:4" --tokens 8192 32768 131072
    python ../../benchmarks/calibration_tokens.py smollm2 frontier --rows "60 %" --tokens 32768 --recover 65536 --seeds 0 1 2
    python ../../benchmarks/calibration_tokens.py smollm2 frontier --rows "60 %" --tokens 65536 --set refit_steps=5

KL and top-1 are measured on the frontier's answers of the dense model, so that its rows and these can be compared. A row that is
in --out already is not run again. Seeds choose among the traces of the stores, which have to hold enough of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import yaml
from common import machine
from frontier_answers import answers_in, read_rows
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer

import rac_modifier
from rac_modifier.evaluation.divergence import divergence
from rac_modifier.frontier.folder import FrontierFolder
from rac_modifier.settings.recipe import apply_overrides

GRID = Path(__file__).with_name("smollm2_grid.yaml")
MODIFIER = "ReasoningAwareSparseGPTModifier"


def entry(
    grid: dict[str, Any], label: str, tokens: int, recover: int, seed: int, changes: list[str]
) -> dict[str, Any]:
    """Settings of our modifier for the grid's row `label`, with so many tokens; `changes` as for `rac prune --set`."""
    found = [row["recipe"] for row in grid["rows"] if row["label"] == label]
    if not found or MODIFIER not in found[0]:
        raise SystemExit(f"{GRID.name} has no row {label!r} with {MODIFIER}")
    calibration = {
        **grid["shared"]["calibration"],
        "tokens": tokens,
        "seed": seed,
        "held_out_tokens": 0,
    }
    settings = {
        **found[0][MODIFIER],
        "traces": grid["shared"]["traces"],
        "calibration": calibration,
    }
    settings |= {"recover": {"tokens": recover, "step_tokens": 512}} if recover else {}
    apply_overrides(settings, changes)
    return settings


def run(args: argparse.Namespace) -> None:
    """Compress and measure what has no row yet."""
    grid = yaml.safe_load(GRID.read_text())
    load = {"pretrained_model_name_or_path": args.model, "dtype": "auto"}
    dense, tokenizer = (
        AutoModelForCausalLM.from_pretrained(**load),
        AutoTokenizer.from_pretrained(args.model),
    )
    answers = answers_in(FrontierFolder.read(args.frontier), tokenizer)
    done = {json.dumps(row["what"]) for row in read_rows(args.out)}
    for label, seed, tokens, recover in itertools.product(
        args.rows, args.seeds, args.tokens, args.recover
    ):
        what = {"row": label, "tokens": tokens, "recover": recover, "seed": seed} | (
            {"set": args.set} if args.set else {}
        )
        if json.dumps(what) in done:
            continue
        model = AutoModelForCausalLM.from_pretrained(**load)
        modifier = rac_modifier.ReasoningAwareSparseGPTModifier(
            **entry(grid, label, tokens, recover, seed, args.set)
        )
        cpu = time.process_time()
        oneshot(model=model, tokenizer=tokenizer, recipe=modifier)
        row = {"what": what, "cpu_seconds": time.process_time() - cpu}
        row["divergence"] = divergence(dense, model, answers, label=label, progress=False).as_dict()
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def report(rows: list[dict[str, Any]]) -> None:
    """One line per row; standard errors are over the answers, which are the same for all rows."""
    print(
        "| row | calibration tokens | recovery tokens | seed | KL | top-1 | CPU s |\n"
        + "|---" * 7
        + "|"
    )
    for row in sorted(
        rows, key=lambda row: [str(value).rjust(9) for value in row["what"].values()]
    ):
        what, kl = row["what"], row["divergence"]
        label = ", ".join([what["row"], *what.get("set", [])])
        print(
            f"| {label} | {what['tokens']:,} | {what['recover'] or '-'} | {what['seed']} | "
            f"{kl['kl']:.3f} ± {kl['kl_stderr']:.3f} | {kl['agreement']:.1%} | {row['cpu_seconds']:.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("frontier", type=Path)
    parser.add_argument(
        "--rows",
        nargs="+",
        default=["60 %", "2:4", "50 % + int4"],
        help="labels of smollm2_grid.yaml",
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[8192, 16384, 32768, 65536, 131072]
    )
    parser.add_argument(
        "--recover", type=int, nargs="+", default=[0], help="tokens of recovery, 0 for none"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="change a setting (repeatable)",
    )
    parser.add_argument("--out", type=Path, default=Path("calibration_tokens.jsonl"))
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    print(machine(), flush=True)
    if not args.report_only:
        run(args)
    report(read_rows(args.out))


if __name__ == "__main__":
    main()
