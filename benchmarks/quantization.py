"""Sparse and quantized on the embedded reasoner, in one pass against one after the other: docs/results/quantization.md.

    python benchmarks/quantization.py                 # resumes from its rows
    python benchmarks/quantization.py --report-only   # the table from the rows that are there
    python benchmarks/quantization.py --recipes rac_2of4_w4a16 --methods ours "then GPTQ" --problems 1000 --out build/more

For each scheme: pruned only; quantized only (upstream's GPTQModifier on our traces); ours, in one pass; pruned by us, then
upstream's GPTQModifier on the same traces; pruned by us, then rounded to nearest (QuantizationModifier). All in float32 on the
same calibration tokens, with greedy answers to the same held-out problems. The layer error compares each linear's output with
the dense model's on held-out traces, ||W x_dense - W' x||^2 / ||W x_dense||^2, each model on its own inputs, so that what was
lost before a layer counts in it; it is the mean over all linears.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from common import fresh, machine, modifier
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from transformers import AutoTokenizer

import rac_modifier
from rac_modifier.calibration.calibration_set import build_calibration_set
from rac_modifier.evaluation.accuracy import evaluate
from rac_modifier.problems.held_out import held_out_problems
from rac_modifier.settings.calibration import CalibrationSettings
from rac_modifier.settings.traces import TraceSettings

INT8 = {
    "config_groups": {
        "w": {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}}
    }
}
SCHEMES: dict[str, dict[str, Any]] = {
    "fp8": {"scheme": "FP8_DYNAMIC"},
    "w8": INT8,
    "w4a16": {"scheme": "W4A16"},
}
# recipe: pattern and scheme; rac_gptq_w4a16 is "quantized only" of w4a16
RECIPES: dict[str, tuple[str | float, str]] = {
    "rac_2of4_w4a16": ("2:4", "w4a16"),
    "rac_2of4_w8": ("2:4", "w8"),
    "rac_2of4_fp8": ("2:4", "fp8"),
    "rac_unstructured_50_w8": (0.5, "w8"),
}
METHODS = ("ours", "then GPTQ", "then nearest")
ALL_METHODS = ("dense", "pruned only", "quantized only", *METHODS)
HELD_OUT_SEED = 9


def cells(
    patterns: dict[str, tuple[str | float, str]],
) -> list[tuple[str | float | None, str | None, str]]:
    """Pattern, scheme and method of every row."""
    found: list[tuple[str | float | None, str | None, str]] = [(None, None, "dense")]
    for pattern, scheme in patterns.values():
        for cell in ((pattern, None, "pruned only"), (None, scheme, "quantized only")):
            found += [] if cell in found else [cell]
        found += [(pattern, scheme, method) for method in METHODS]
    return found


def compress(
    cell: tuple[str | float | None, str | None, str], path: Path, args: argparse.Namespace
) -> Any:
    """A fresh model, treated as the cell says."""
    pattern, scheme, method = cell
    model = fresh(path)
    store = args.out / "traces-0.jsonl"
    shared = {
        "traces": {
            "store": str(store),
            "sampling": {"max_new_tokens": 512, "batch_size": 128, "seed": 0},
        },
        "calibration": {"tokens": args.tokens, "seed": 0},
    }
    quantization = SCHEMES[scheme] if scheme else {}
    upstream = {**quantization, "targets": ["Linear"], "ignore": ["lm_head"]}
    if pattern is not None:
        ours = modifier(pattern, "RAC", tokens=args.tokens, seed=0, store=store, variant="quality")
        if method == "ours":
            ours = type(ours)(
                **{**ours.model_dump(exclude_unset=True), "quantization": quantization}
            )
        oneshot(model=model, recipe=ours)
    if method in ("quantized only", "then GPTQ"):
        calibrate = rac_modifier.ReasoningAwareCalibrationModifier(**shared)
        if pattern is not None:  # the dense model's traces, as in the pass before
            calibrate.use_calibration_set(
                build_calibration_set(
                    fresh(path),
                    AutoTokenizer.from_pretrained(path),
                    TraceSettings(**shared["traces"]),
                    CalibrationSettings(**shared["calibration"]),
                )
            )
        oneshot(model=model, recipe=[calibrate, GPTQModifier(**upstream)])
    elif method == "then nearest":
        oneshot(model=model, recipe=QuantizationModifier(**upstream))
    return settled(model)


def settled(model: Any) -> Any:
    """The model with its weights rounded once and for all, so that a forward pass need not do it."""
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            module.weight.data = fake_quantize(
                module.weight,
                module.weight_scale,
                getattr(module, "weight_zero_point", None),
                scheme.weights,
            )
            module.quantization_enabled = scheme.input_activations is not None
    return model


def zeros_kept(model: Any, pattern: str | float | None) -> float | None:
    """2:4: the share of groups that hold two zeros; unstructured: zeros as a share of what was pruned, at most 1."""
    if pattern is None:
        return None
    weights = [
        m.weight
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and n != "lm_head"
    ]
    if isinstance(pattern, str):
        groups = torch.cat([((w.reshape(-1, 4) == 0).sum(1) >= 2) for w in weights])
        return float(groups.float().mean())
    return min(
        1.0,
        sum(int((w == 0).sum()) for w in weights) / sum(int(w.numel() * pattern) for w in weights),
    )


@torch.no_grad()
def layer_errors(model: Any, dense: Any, batches: list[torch.Tensor]) -> float:
    """The mean over linear layers of the relative error of their outputs on held-out traces."""
    outputs: dict[str, torch.Tensor] = {}
    handles = [
        module.register_forward_hook(
            lambda _, __, out, key=(which, name): outputs.__setitem__(key, out)
        )
        for which, net in (("dense", dense), ("model", model))
        for name, module in net.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    ]
    errors: dict[str, float] = {}
    totals: dict[str, float] = {}
    for ids in batches:
        dense(input_ids=ids)
        model(input_ids=ids)
        for which, name in [key for key in outputs if key[0] == "dense"]:
            a, b = outputs[which, name], outputs["model", name]
            errors[name] = errors.get(name, 0.0) + float((a - b).square().sum())
            totals[name] = totals.get(name, 0.0) + float(a.square().sum())
    for handle in handles:
        handle.remove()
    return sum(errors[name] / totals[name] for name in errors) / len(errors)


def run(args: argparse.Namespace, rows_path: Path) -> None:
    path = rac_modifier.reasoner_path()
    tokenizer = AutoTokenizer.from_pretrained(path)
    problems = held_out_problems("arithmetic", args.problems)
    dense = fresh(path)
    sampling = {"max_new_tokens": 512, "batch_size": 128, "seed": HELD_OUT_SEED}
    held_out = build_calibration_set(
        dense,
        tokenizer,
        TraceSettings(store=str(args.out / f"traces-{HELD_OUT_SEED}.jsonl"), sampling=sampling),
        CalibrationSettings(tokens=args.held_out_tokens, seed=HELD_OUT_SEED),
    )
    batches = [torch.tensor(sequence.ids).unsqueeze(0) for sequence in held_out.loader.sequences]
    done = [row["cell"] for row in read(rows_path)]
    for cell in cells({name: RECIPES[name] for name in args.recipes}):
        if list(cell) in done or cell[2] not in args.methods:
            continue
        started = time.monotonic()
        model = compress(cell, path, args)
        seconds = time.monotonic() - started
        row = {
            "cell": list(cell),
            "seconds": seconds,
            "zeros_kept": zeros_kept(model, cell[0]),
            "layer_error": layer_errors(model, dense, batches),
            **evaluate(
                model,
                tokenizer,
                problems,
                label=str(cell),
                max_new_tokens=args.cap,
                batch_size=100,
                progress=False,
            ).as_dict(),
        }
        with rows_path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(line(row), flush=True)


def read(path: Path) -> list[dict]:
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


def line(row: dict) -> str:
    pattern, scheme, method = row["cell"]
    kept = "-" if row["zeros_kept"] is None else f"{100 * row['zeros_kept']:.2f} %"
    interval = f"{row['ci_low']:.1%} to {row['ci_high']:.1%}"
    return (
        f"| {pattern or '-'} | {scheme or '-'} | {method} | {row['accuracy']:.1%} ({interval}) | "
        f"{row['mean_thinking_tokens']:.0f} | {row['unfinished_share']:.1%} | {kept} | {row['layer_error']:.5f} | "
        f"{row['seconds']:.0f} s |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("build/quantization"))
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--held-out-tokens", type=int, default=8192)
    parser.add_argument("--recipes", choices=RECIPES, nargs="+", default=list(RECIPES))
    parser.add_argument("--methods", choices=ALL_METHODS, nargs="+", default=ALL_METHODS)
    parser.add_argument("--cap", type=int, default=512)
    parser.add_argument("--report-only", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rows_path = args.out / "rows.jsonl"
    print(machine())
    if not args.report_only:
        run(args, rows_path)
    print(
        "| pattern | scheme | method | accuracy | thinking tokens | unfinished | pattern kept | layer error | compressing |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in read(rows_path):
        print(line(row))


if __name__ == "__main__":
    main()
