"""Does a mask that moves recover more than a fixed one? On SmolLM2, from the same pruned weights, on the same traces.

    cd build/smollm2-frontier                       # made by smollm2_frontier.py; `frontier` holds the dense model's answers
    python ../../benchmarks/moving_mask.py smollm2 frontier --rows "70 %" "2:4"

Each row of smollm2_grid.yaml is pruned once, then trained twice, in one pass with the loss and rates of `recover:`: with its mask
fixed, and with one that moves (RigL, arXiv 1911.11134, as recovery_trials.py has it). KL is measured on the frontier's answers of
the dense model. All in float32. A row that is in --out already is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import yaml
from calibration_tokens import GRID, entry
from common import fresh, machine
from frontier_answers import answers_in, read_rows
from llmcompressor import oneshot
from recovery_trials import train
from transformers import AutoTokenizer

import rac_modifier
from rac_modifier.evaluation.divergence import divergence
from rac_modifier.frontier.folder import FrontierFolder
from rac_modifier.llmcompressor import calibration_modifier
from rac_modifier.llmcompressor.recovery_stage import RecoveryStage

TRAINED = ("fixed", "moving")


def stage_of(pattern: str | float, measure: Any) -> type[RecoveryStage]:
    """A stage that trains once per kind of mask, each time from the pruned weights, and measures what comes out."""

    class BothMasks(RecoveryStage):
        def run(self, model: Any, weights: Any, quantized: Any) -> dict[str, Any]:
            measure(model, "not recovered", 0.0)
            for mask in TRAINED:
                trained, cpu = copy.deepcopy(model), time.process_time()
                train(
                    trained,
                    self._teacher,
                    self._training,
                    pattern,
                    moving=mask == "moving",
                    step_tokens=512,
                )
                measure(trained, mask, time.process_time() - cpu)
            return {}

    return BothMasks


def run(args: argparse.Namespace) -> None:
    """Prune and train the rows that are not complete."""
    grid, tokenizer = yaml.safe_load(GRID.read_text()), AutoTokenizer.from_pretrained(args.model)
    answers = answers_in(FrontierFolder.read(args.frontier), tokenizer)
    for label in args.rows:
        done = {row["mask"] for row in read_rows(args.out) if row["row"] == label}
        if done >= {"not recovered", *TRAINED}:
            continue
        settings = entry(grid, label, args.calibration_tokens, args.tokens, args.seed, [])
        dense, model = fresh(args.model), fresh(args.model)

        def measure(
            model: Any, mask: str, seconds: float, label: str = label, dense: Any = dense
        ) -> None:
            row = {"row": label, "mask": mask, "cpu_seconds": seconds}
            row["divergence"] = divergence(
                dense, model, answers, label=f"{label}, {mask}", progress=False
            ).as_dict()
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(described(row), flush=True)

        pattern = (
            settings["mask_structure"] if "mask_structure" in settings else settings["sparsity"]
        )
        calibration_modifier.RecoveryStage = stage_of(pattern, measure)  # type: ignore[misc]
        oneshot(
            model=model,
            tokenizer=tokenizer,
            recipe=rac_modifier.ReasoningAwareSparseGPTModifier(**settings),
        )


def described(row: dict[str, Any]) -> str:
    kl = row["divergence"]
    cells = [
        row["row"],
        row["mask"],
        f"{kl['kl']:.3f} ± {kl['kl_stderr']:.3f}",
        f"{kl['agreement']:.1%}",
    ]
    return f"| {' | '.join(cells)} | {row['cpu_seconds']:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("frontier", type=Path)
    parser.add_argument(
        "--rows", nargs="+", default=["70 %", "2:4"], help="labels of smollm2_grid.yaml"
    )
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=32768, help="of fresh traces to train on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("moving_mask.jsonl"))
    args = parser.parse_args()
    print(machine(), flush=True)
    run(args)
    print("| row | mask | KL | top-1 | CPU s of training |\n" + "|---" * 5 + "|")
    for row in read_rows(args.out):
        print(described(row))


if __name__ == "__main__":
    main()
