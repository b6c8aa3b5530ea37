"""Prune the embedded reasoner at 2:4 and see what happens to its accuracy and its thinking.

    make demo          (or: python examples/reasoner_demo.py)

Calibration on generic text, on prompts only, and on the model's own chain of thought (RAC):
the same number of tokens, the paper's solver, the same held-out problems. Then RAC once
more with the default preset, which goes beyond the paper's solver. Every model is saved
packed; the last is loaded back and compared bit by bit.
"""

import argparse
import os
import shutil
import sys
import time
from pathlib import Path

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import yaml
from llmcompressor import oneshot
from loguru import logger
from transformers import AutoModelForCausalLM, AutoTokenizer

import rac_modifier
from rac_modifier.checkpoint.inspect import inspect_checkpoint
from rac_modifier.cli.inspect import render_report
from rac_modifier.cli.options import render_results
from rac_modifier.evaluation.accuracy import evaluate
from rac_modifier.evaluation.tables import accuracy_table
from rac_modifier.problems.held_out import held_out_problems
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import SamplingSettings

RECIPE = Path(rac_modifier.recipe("rac_2of4"))
PRUNED = {  # label: kind of calibration, preset
    "2:4, generic text": ("generic", "paper"),
    "2:4, prompts only": ("prompts", "paper"),
    "2:4, RAC": ("traces", "paper"),
    "2:4, RAC, quality": ("traces", "quality"),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="a new folder")
    args = parser.parse_args()
    if args.out.exists() and args.out != parser.get_default("out"):
        parser.error(f"--out {args.out} is there, and would be removed; name a new folder")
    logger.remove()
    logger.add(sys.stderr, level="INFO", format="{message}", filter="rac_modifier")

    started = time.monotonic()
    path = rac_modifier.reasoner_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    problems = held_out_problems("arithmetic", args.problems)
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir()

    def measured(model: torch.nn.Module, label: str):
        return evaluate(
            model,
            tokenizer,
            problems,
            label=label,
            source=ProblemSource(source="arithmetic"),
            sampling=SamplingSettings(temperature=0, max_new_tokens=512, batch_size=args.problems),
            path=args.out / "answers" / f"{label}.jsonl",
        )

    # float32 computes what the stored bfloat16 weights say, and is faster on a CPU without
    # bf16 units
    results = [measured(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), "dense")]
    for label, (kind, preset) in PRUNED.items():
        recipe = yaml.safe_load(RECIPE.read_text())
        entry = recipe["pruning_stage"]["pruning_modifiers"]["ReasoningAwareSparseGPTModifier"]
        if kind == "traces":
            entry["traces"] |= {"store": str(args.out / "traces.jsonl")}
            entry["traces"]["sampling"] |= {"max_new_tokens": 512, "batch_size": 128}
        else:  # nothing is sampled
            del entry["traces"]
        entry["preset"] = preset
        entry["calibration"] = {"tokens": args.tokens, "mixture": {kind: 1.0}}
        output = args.out / f"reasoner-2of4-{kind}-{preset}"
        model = oneshot(
            model=str(path),
            recipe=yaml.safe_dump(recipe),
            precision="float32",
            output_dir=str(output),
        )
        results.append(measured(model, label))
    loaded = rac_modifier.load_model(output, dtype="float32")
    before, after = model.state_dict(), loaded.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)

    print(f"\n{render_report(inspect_checkpoint(output))}")
    print(
        f"\nThe same {args.tokens:,} calibration tokens, the same {args.problems} held-out "
        "problems, greedy:\n"
    )
    print(render_results(accuracy_table(results)))
    print(f"\npacked checkpoint: {output} (loads back bit-identical)")
    print(f"{time.monotonic() - started:.0f} s on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
