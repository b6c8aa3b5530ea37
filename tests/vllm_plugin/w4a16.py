"""Dense weights of 4 bits and fewer as compressed-tensors stores them, for the tests that need vLLM."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from tests.vllm_plugin.vllm_fixtures import save_model, saved_linears


def quantization(
    group: int | None = 32, symmetric: bool = True, bits: int = 4, **changes: Any
) -> dict[str, Any]:
    """The `quantization_config` of such a checkpoint; `group` None: one scale per row."""
    weights: dict[str, Any] = {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel",
    }
    if group is not None:
        weights |= {"strategy": "group", "group_size": group}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}
        },
        "ignore": ["lm_head"],
        **changes,
    }


def words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed values [N, K] as int32 words, bit after bit; compressed-tensors 0.17 has ten values of 3 bits in each word."""
    codes = values.long() + (1 << (bits - 1))
    stream = (codes[..., None] >> torch.arange(bits) & 1).flatten(-2)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[-1] % 32)).view(len(values), -1, 32)
    return (stream << torch.arange(32)).sum(-1).to(torch.int32)


def int4(
    weight: torch.Tensor, group: int | None = 32, symmetric: bool = True, bits: int = 4
) -> tuple[dict[str, torch.Tensor], Any]:
    """The tensors on disk of a weight [N, K] rounded to `bits`, and the weight that they mean, in float32."""
    rows, columns = weight.shape
    width = group or columns
    parts = weight.float().view(rows, columns // width, width)
    low, high = (
        (parts.amin(-1), parts.amax(-1))
        if not symmetric
        else (-parts.abs().amax(-1), parts.abs().amax(-1))
    )
    least, most = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    scale = ((high - low) / (most - least)).clamp_min(1e-6).bfloat16().float()
    zero = (
        (least - low / scale).round().clamp(least, most)
        if not symmetric
        else torch.zeros_like(scale)
    )
    codes = (parts / scale[..., None] + zero[..., None]).round().clamp(least, most)
    meant = ((codes - zero[..., None]) * scale[..., None]).view(rows, columns)
    tensors = {
        "weight_packed": words(codes.view(rows, columns), bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor([rows, columns]),
    }
    if not symmetric:
        tensors["weight_zero_point"] = words(zero.T, bits).T.contiguous()
    return tensors, meant


def rounded_here(
    weight: torch.Tensor, group: int | None = 32, symmetric: bool = True, bits: int = 4
) -> tuple[dict[str, Any], Any]:
    """As `int4`, but rounded by our own quantization, on inputs of equal size, and packed as when a model is saved."""
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
    from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
    from compressed_tensors.quantization import QuantizationScheme

    from rac_modifier.pruning.solve import Solution
    from rac_modifier.quantization.grid import Grid
    from rac_modifier.quantization.solve import quantize

    weight = weight.float()
    solution = Solution(
        name="w", weight=weight, mask=torch.ones_like(weight, dtype=torch.bool), target=weight
    )
    grid = Grid("int", bits, group, symmetric)
    (found,) = quantize([solution], torch.eye(weight.shape[1]), [grid], dtype=torch.float32)
    assert found is not None
    state = {
        "weight": found.weight,
        "weight_scale": found.scale,
        "weight_zero_point": found.zero_point,
    }
    scheme = QuantizationScheme(**quantization(group, symmetric, bits)["config_groups"]["group_0"])
    tensors = PackedQuantizationCompressor.compress(state, scheme)
    if bits == 3:
        tensors["weight_packed"] = words(
            unpack_from_int32(tensors["weight_packed"], bits, weight.shape), bits
        )
        if not symmetric:
            tensors["weight_zero_point"] = words(found.zero_point.T, bits).T.contiguous()
    return tensors, found.weight


def save_w4a16(
    folder: Path,
    meant: Path,
    group: int | None,
    symmetric: bool,
    rounding: Any = int4,
    bits: int = 4,
    **changes: Any,
) -> None:
    """A tiny Qwen3 with every linear layer but one of `bits`; `meant` gets the same weights dense in float32."""
    from safetensors.torch import load_file, save_file

    save_model(folder, "qwen3", "unstructured", packed=False, **changes)
    shutil.copytree(folder, meant)
    config = json.loads((folder / "config.json").read_text())
    del config["rac_sparsity"]
    (meant / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
    ignored = ["model.layers.0.self_attn.o_proj", "lm_head"]
    config["quantization_config"] = quantization(group, symmetric, bits, ignore=ignored)
    (folder / "config.json").write_text(json.dumps(config))
    chosen = set(saved_linears(folder)) - {*ignored}
    where = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors, dense = load_file(path), load_file(meant / path.name)
        for module in [
            name.removesuffix(".weight")
            for name in tensors
            if name.removesuffix(".weight") in chosen
        ]:
            # pruned weights make groups of few values; these are not
            weight = torch.randn(tensors.pop(f"{module}.weight").shape) * 0.2
            parts, dense[f"{module}.weight"] = rounding(weight, group, symmetric, bits)
            tensors |= {f"{module}.{part}": tensor for part, tensor in parts.items()}
        save_file(tensors, path, {"format": "pt"})
        save_file(dense, meant / path.name, {"format": "pt"})
        where |= dict.fromkeys(tensors, path.name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
