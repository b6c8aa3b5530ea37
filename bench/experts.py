"""Experts removed by REAP: right answers by calibration set, on the reasoner with 16 experts.

python -m bench experts

The model is the embedded reasoner with each MLP cut into experts of 192 neurons, four copies of
each quarter, four experts per token. It is trained for some minutes on the reasoner's problems.
Cells are medians over seeds, with the lowest and the highest value. Every seed samples traces of
its own and draws its own text; all prompts are one set.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from bench.common import ROOT, save, spread
from bench.grid import CALIBRATIONS, OURS, calibrated_on, run_grid
from bench.models import Subject, reasoner
from rac_modifier.reasoner import reasoner_path

EXPERTS, ACTIVE = 16, 4
STEPS, STEP_TOKENS, RATE = 200, 2048, 2e-4
HALVES = "half traces, half prompts"
CORRECT = "correct traces"
INT4 = {"config_groups": {"w": {"weights": {"num_bits": 4, "group_size": 64, "strategy": "group"}}}}
SPARSE = {"mask_structure": "2:4", "quantization": INT4}
AFTERWARDS: dict[str, dict[str, Any]] = {  # settings of the pruning entry, on half of the experts
    "int4": {"solver": "none", "quantization": INT4},
    "2:4 + int4": SPARSE,
    "2:4 + int4, recovered": {**SPARSE, "recover": {"tokens": 81920}},
}
COLUMNS = {
    "experts": "",
    "MB": ".1f",
    "KL": ".4f",
    "right answers, %": ".1f",
    "truncated, %": ".1f",
}
TINY = "--steps 1 --shares 0.5 --calibrations prompts --seeds 0 --tokens 512 --problems 2 --cap 24"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    kinds = [*CALIBRATIONS, HALVES, CORRECT]
    parser.add_argument("--steps", type=int, default=STEPS, help="of training the model")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.25, 0.5, 0.75])
    parser.add_argument("--calibrations", nargs="+", choices=kinds, default=kinds)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=32768, help="of calibration")
    parser.add_argument("--problems", type=int, default=300, help="held-out problems")
    parser.add_argument("--cap", type=int, default=512, help="most new tokens of an answer")


def run(options: argparse.Namespace) -> None:
    """Make the model, run the rows, and write the table."""
    folder = options.work / "experts"
    if not (folder / "config.json").exists():
        make(folder, options.steps)
    dense = reasoner(options.work)
    subject = Subject(
        "embedded reasoner with 16 experts", str(folder), dense.shared, dense.evaluation
    )
    rows = planned(options, subject)
    out = options.work / "experts-rows"
    finished = run_grid(
        subject, rows, out, tokens=options.tokens, problems=options.problems, cap=options.cap
    )
    by_label: dict[str, list[dict[str, Any]]] = {}
    for row in finished:
        by_label.setdefault(row["group"], []).append(row)
    table = []
    for label, of_seeds in by_label.items():
        kl = [row["divergence"]["kl"] for row in of_seeds if row["divergence"]]
        right = [100 * row["accuracy"]["accuracy"] for row in of_seeds]
        truncated = [100 * row["truncated"] for row in of_seeds]
        megabytes = of_seeds[0]["bytes"]["total"] / 1e6
        divergence = spread(kl) if kl else None
        table.append([label, megabytes, divergence, spread(right), spread(truncated)])
    save(options.out, "experts_reap", subject.name, COLUMNS, table)


def planned(options: argparse.Namespace, subject: Subject) -> list[dict[str, Any]]:
    """Return the rows of the grid."""
    rows = [
        {
            "label": f"{share:.0%} removed, {name}, seed {seed}",
            "group": f"{share:.0%} removed, {name}",
            "recipe": {
                "ReasoningAwareCalibrationModifier": {},
                "REAPPruningModifier": {"sparsity": share},
            },
            "set": calibration(name, seed, subject),
        }
        for share, name, seed in itertools.product(
            options.shares, options.calibrations, options.seeds
        )
        if name != "prompts" or seed == options.seeds[0]
    ]
    if "traces" in options.calibrations:
        rows += [
            {
                "label": f"50%, traces, then {name}",
                "group": f"50%, traces, then {name}",
                "recipe": {"REAPPruningModifier": {"sparsity": 0.5}, OURS: settings},
            }
            for name, settings in AFTERWARDS.items()
        ]
    return rows


def calibration(name: str, seed: int, subject: Subject) -> dict[str, Any]:
    """Return the changed settings of a calibration set."""
    sampled = {"calibration.seed": seed, "traces.sampling.seed": seed}
    if name == HALVES:
        return sampled | {"calibration.mixture": {"traces": 0.5, "prompts": 0.5}}
    if name == CORRECT:
        return sampled | {"traces.select.answers": "correct"}
    if name == "traces":
        return sampled
    return calibrated_on(name, subject) | {"calibration.seed": seed}


def make(folder: Path, steps: int) -> None:
    """Write the model; equal steps give equal weights on one kind of machine."""
    sys.path.insert(0, str(ROOT / "training"))
    from reasoner_data import IGNORED, batches

    tokenizer = AutoTokenizer.from_pretrained(reasoner_path())
    dense = AutoModelForCausalLM.from_pretrained(reasoner_path(), dtype=torch.float32)
    model = with_experts(dense)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, max(steps, 2))
    for step, ids in enumerate(itertools.islice(batches(tokenizer, 1, 0, STEP_TOKENS), steps)):
        output = model(
            input_ids=ids.clamp_min(0),
            attention_mask=(ids != IGNORED).long(),
            labels=ids,
            output_router_logits=True,
        )
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0:
            print(f"experts: step {step} of {steps}, loss {output.loss:.4f}", flush=True)
    model.generation_config = dense.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def with_experts(dense: Qwen3ForCausalLM) -> Qwen3MoeForCausalLM:
    """Return a mixture that equals the dense model while each token meets all four quarters."""
    torch.manual_seed(0)
    settings = dense.config.to_dict()
    for name in ("model_type", "architectures", "dtype"):
        settings.pop(name, None)
    width = dense.config.intermediate_size // ACTIVE
    config = Qwen3MoeConfig(
        **settings,
        num_experts=EXPERTS,
        num_experts_per_tok=ACTIVE,
        moe_intermediate_size=width,
        norm_topk_prob=True,
    )
    model = Qwen3MoeForCausalLM(config).float()
    model.load_state_dict(dense.state_dict(), strict=False)
    with torch.no_grad():
        for layer, source in zip(model.model.layers, dense.model.layers, strict=True):
            experts, mlp = layer.mlp.experts, source.mlp
            for number in range(EXPERTS):
                at = slice(width * (number % ACTIVE), width * (number % ACTIVE + 1))
                gate_up = torch.cat([mlp.gate_proj.weight[at], mlp.up_proj.weight[at]])
                experts.gate_up_proj[number] = gate_up
                # the router's weights sum to 1
                experts.down_proj[number] = ACTIVE * mlp.down_proj.weight[:, at]
    return model
