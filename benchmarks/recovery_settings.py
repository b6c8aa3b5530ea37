"""What settings of recovery are worth on SmolLM2: pruned once, then recovered by each from the same weights, on the same traces.

    python benchmarks/recovery_settings.py                                # needs what smollm2.py needs; skips rows that it has
    python benchmarks/recovery_settings.py --pattern 2:4 --tokens 98304 --variants tokens=98304,step_tokens=512
    python benchmarks/recovery_settings.py --pattern 0.5 --bits 4         # int4 in groups of 64 on the weights that are left

A variant is `setting=value,...` of `recover:`; its `tokens` are the first ones of --tokens. The first row is the pruned model
before recovery. Model, prompts and held-out samples are those of smollm2.py, in the same folder.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path
from typing import Any

import smollm2
import yaml
from common import fresh, machine
from llmcompressor import oneshot
from seeds import parse_sparsity

import rac_modifier
from rac_modifier.evaluation.divergence import divergence
from rac_modifier.llmcompressor import calibration_modifier
from rac_modifier.llmcompressor.recovery_stage import RecoveryStage
from rac_modifier.settings.recovery import RecoverySettings

INT4 = {"targets": ["Linear"], "weights": {"num_bits": 4, "strategy": "group", "group_size": 64}}


def settings_of(variant: str) -> RecoverySettings:
    """The settings that `key=value,...` names."""
    return RecoverySettings.model_validate(
        {key: yaml.safe_load(value) for key, value in pairs(variant)}
    )


def pairs(variant: str) -> list[tuple[str, str]]:
    found = [part.partition("=") for part in variant.split(",")]
    return [(key, value) for key, _, value in found]


def stage_of(variants: list[str], measure: Any) -> type[RecoveryStage]:
    """A stage that trains once per variant, each time from the pruned weights, and measures what comes out."""

    class Variants(RecoveryStage):
        def run(self, model: Any, weights: Any, quantized: Any) -> dict[str, Any]:
            pruned = copy.deepcopy(model.state_dict())
            every, self._keep, record = list(self._training), True, {}
            measure(model, "not recovered", {})
            for variant in variants:
                model.load_state_dict(pruned)
                self._settings = settings_of(variant)
                self._training = first_tokens(every, self._settings.tokens)
                record = super().run(model, weights, copy.deepcopy(quantized))
                (self.folder / "recovery.safetensors").unlink(missing_ok=True)
                measure(model, variant, record)
            return record

    return Variants


def first_tokens(sequences: list[Any], tokens: int) -> list[Any]:
    """The first sequences, up to `tokens` tokens."""
    chosen, total = [], 0
    for sequence in sequences:
        if total >= tokens:
            break
        chosen.append(sequence)
        total += len(sequence[0])
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/smollm2"))
    parser.add_argument("--pattern", type=parse_sparsity, default=0.6)
    parser.add_argument("--bits", type=int, choices=[4], help="quantize the weights that are left")
    parser.add_argument("--preset", default="quality")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--tokens", type=int, default=32768, help="of fresh traces for recovery")
    parser.add_argument("--seed", type=int, default=0, help="of the choice among the traces")
    parser.add_argument("--max-new-tokens", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=32, help="held-out sequences per kind")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=[
            "tokens=32768",
            "tokens=32768,step_tokens=512",
            "tokens=32768,step_tokens=512,passes=2",
        ],
        metavar="SETTING=VALUE,...",
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    dense_folder, rows_path = args.out / "dense", args.out / "recovery.jsonl"
    if not (dense_folder / "config.json").exists():
        smollm2.unpack(dense_folder)
    run(args, dense_folder, rows_path)
    smollm2.report(smollm2.read(rows_path))


def run(args: argparse.Namespace, dense_folder: Path, rows_path: Path) -> None:
    """Measure the variants that have no row yet."""
    method = f"preset={args.preset},recover.tokens={args.tokens}"
    cell = smollm2.Cell(args.pattern, "RAC", method, args.calibration_tokens, args.seed)
    sources, sets = smollm2.measured_on(args, dense_folder)
    pattern = cell.label.partition(",")[0] + (" + int4" if args.bits else "")
    start = f"{pattern}, {args.preset}, {cell.tokens:,} tokens, seed {cell.seed}"
    done = {row["label"] for row in smollm2.read(rows_path)}
    missing = [variant for variant in args.variants if f"{start}: {variant}" not in done]
    if not missing:
        return
    dense, model = fresh(dense_folder), fresh(dense_folder)
    cpu = time.process_time()

    def measure(model: Any, variant: str, record: dict[str, Any]) -> None:
        label = f"{start}: {variant}"
        if label in done:
            return
        spent = record.get(
            "cpu_seconds", time.process_time() - cpu
        )  # the first row: sampling what is missing, and pruning
        row = {"label": label, "cpu_seconds": spent, "recovery": record}
        row |= {
            name: divergence(dense, model, held_out, label=label, progress=False).as_dict()
            for name, held_out in sets.items()
        }
        with rows_path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            label,
            *(f"{name} {row[name]['kl']:.3f}" for name in sets),
            f"{spent:.0f} CPU s",
            flush=True,
        )
        print("   ", [(step, round(kl, 3)) for step, kl in record.get("curve", ())], flush=True)

    calibration_modifier.RecoveryStage = stage_of(missing, measure)  # type: ignore[misc]
    settings = smollm2.cell_settings(args, cell, sources)
    if args.bits:
        settings["quantization"] = {"config_groups": {"w": INT4}}
    oneshot(model=model, recipe=rac_modifier.ReasoningAwareSparseGPTModifier(**settings))


if __name__ == "__main__":
    main()
