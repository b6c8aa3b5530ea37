"""What the model's own traces are worth to quantization on SmolLM2: one scheme, calibrated on traces, generic text and prompts.

    cd build/smollm2-frontier                # made by smollm2_frontier.py; `frontier` holds the dense model's answers
    python ../../benchmarks/quantization_traces.py smollm2 frontier --rows "GPTQ int3" "GPTQ int2" --tokens 16384

Rows are those of smollm2_grid.yaml. KL and top-1 are measured on the frontier's answers of the dense model, to problems of other
templates and operands; the differences between two calibrations are paired over these answers. A row that is in --out already is
not run again.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import yaml
from common import machine
from frontier_answers import answers_in, read_rows
from llmcompressor import oneshot
from transformers import AutoModelForCausalLM, AutoTokenizer

import rac_modifier  # noqa: F401 - registers the modifiers
from rac_modifier.evaluation.divergence import divergence_per_token
from rac_modifier.frontier.folder import FrontierFolder

GRID = Path(__file__).with_name("smollm2_grid.yaml")
CALIBRATIONS = ("traces", "generic text", "prompts")


def recipe_of(
    grid: dict[str, Any], label: str, calibration: str, tokens: int, seed: int
) -> dict[str, Any]:
    """The grid's row `label` as a whole recipe, with so many tokens of this kind."""
    found = [row["recipe"] for row in grid["rows"] if row["label"] == label]
    if not found:
        raise SystemExit(f"{GRID.name} has no row {label!r}")
    modifiers = copy.deepcopy(found[0])
    entry = next(values for name, values in modifiers.items() if name.startswith("ReasoningAware"))
    budget: dict[str, Any] = {"tokens": tokens, "seed": seed}
    if calibration == "generic text":
        budget["mixture"] = {"generic": 1.0}
    elif calibration == "prompts":
        sources = grid["shared"]["traces"]["sources"]
        entry["traces"] = {
            "sources": {name: {"problems": source["problems"]} for name, source in sources.items()}
        }
        budget["mixture"] = {f"prompts:{name}": 1 / len(sources) for name in sources}
    else:
        entry["traces"] = grid["shared"]["traces"]
        budget |= {"mixture": grid["shared"]["calibration"]["mixture"], "held_out_tokens": 0}
    entry["calibration"] = budget
    return {"quantization_stage": {"quantization_modifiers": modifiers}}


def run(args: argparse.Namespace) -> None:
    """Quantize and measure what has no row yet."""
    grid = yaml.safe_load(GRID.read_text())
    load = {"pretrained_model_name_or_path": args.model, "dtype": "auto"}
    dense, tokenizer = (
        AutoModelForCausalLM.from_pretrained(**load),
        AutoTokenizer.from_pretrained(args.model),
    )
    answers = answers_in(FrontierFolder.read(args.frontier), tokenizer)[:: args.every]
    done = [row["what"] for row in read_rows(args.out)]
    for label, calibration in itertools.product(args.rows, args.calibrations):
        what = {"row": label, "calibration": calibration, "tokens": args.tokens, "seed": args.seed}
        what["answers"] = len(answers)
        if what in done:
            continue
        model = AutoModelForCausalLM.from_pretrained(**load)
        recipe = yaml.safe_dump(
            recipe_of(grid, label, calibration, args.tokens, args.seed), sort_keys=False
        )
        cpu = time.process_time()
        oneshot(model=model, tokenizer=tokenizer, recipe=recipe)
        row: dict[str, Any] = {"what": what, "cpu_seconds": time.process_time() - cpu}
        found = divergence_per_token(dense, model, answers, label=label)
        row["kl"] = [[fmean(each.kl), len(each.kl)] for each in found]
        row["top1"] = [fmean(each.agrees) for each in found]
        with args.out.open("a") as file:
            file.write(json.dumps(row) + "\n")


def report(rows: list[dict[str, Any]]) -> None:
    """One line per row; the difference is that of KL from the row on traces, with one standard error over answers."""
    print(
        "| row | calibrated on | KL | top-1 | more KL than on traces | CPU s |\n" + "|---" * 6 + "|"
    )
    on_traces = {key(row): row for row in rows if row["what"]["calibration"] == "traces"}
    for row in rows:
        mean, error = weighted(row)
        more = ""
        if (other := on_traces.get(key(row))) is not None and other is not row:
            more = "{:+.3f} ± {:.3f}".format(*weighted(row, other))
        tokens = [count for _, count in row["kl"]]
        top1 = np.average(row["top1"], weights=tokens)
        print(
            f"| {row['what']['row']} | {row['what']['calibration']} | {mean:.3f} ± {error:.3f} | {top1:.1%} | {more or '-'} | "
            f"{row['cpu_seconds']:.0f} |"
        )


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """Equal for rows that differ in their calibration alone."""
    return tuple(row["what"][name] for name in ("row", "tokens", "seed", "answers"))


def weighted(row: dict[str, Any], other: dict[str, Any] | None = None) -> tuple[float, float]:
    """KL per token, or how much more it is than the other row's, with its standard error over answers (a ratio of sums)."""
    tokens = np.array([count for _, count in row["kl"]], dtype=float)
    values = np.array([kl for kl, _ in row["kl"]])
    if other is not None:
        values = values - np.array([kl for kl, _ in other["kl"]])
    mean = float(np.average(values, weights=tokens))
    count = len(tokens)
    spread = float(np.sum((tokens * (values - mean)) ** 2)) * count / (count - 1)
    return mean, spread**0.5 / float(tokens.sum())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("frontier", type=Path)
    parser.add_argument(
        "--rows", nargs="+", default=["GPTQ int3", "GPTQ int2"], help="labels of smollm2_grid.yaml"
    )
    parser.add_argument("--calibrations", nargs="+", choices=CALIBRATIONS, default=CALIBRATIONS)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--every", type=int, default=1, help="measure on every n-th answer of the frontier alone"
    )
    parser.add_argument("--out", type=Path, default=Path("quantization_traces.jsonl"))
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    print(machine(), flush=True)
    if not args.report_only:
        run(args)
    report(read_rows(args.out))


if __name__ == "__main__":
    main()
