"""A tiny model quantized by upstream, and what a file of codes holds, read again for the tests."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.tiny import tiny_model

CHANNEL = {"num_bits": 8, "strategy": "channel", "symmetric": True}
TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True, "symmetric": True}


def grouped(bits: int, **changes: Any) -> dict[str, Any]:
    return {
        "weights": {
            "num_bits": bits,
            "strategy": "group",
            "group_size": 32,
            "symmetric": True,
            **changes,
        }
    }


SCHEMES: dict[str, dict[str, Any]] = {
    "int4": grouped(4),
    "int3": grouped(3, actorder="weight"),  # the order of rounding, not of columns
    "asymmetric int4": grouped(4, symmetric=False),
    "asymmetric int2": grouped(2, symmetric=False),
    "int8": {"weights": CHANNEL, "input_activations": TOKEN},
    "fp8": {
        "weights": {**CHANNEL, "type": "float"},
        "input_activations": {**TOKEN, "type": "float"},
    },
}


def saved(
    folder: Path, scheme: dict[str, Any], *, pruned: bool, ignore: tuple[str, ...] = ("lm_head",)
) -> Path:
    """`tiny_model()` rounded to the nearest codes by upstream, half of its weights zero before if
    `pruned`."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
    from compressed_tensors.quantization.utils import calculate_qparams

    model = tiny_model().to(torch.bfloat16)
    groups = {"group_0": {"targets": ["Linear"], **scheme}}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=list(ignore)))
    for module in model.modules():
        if not hasattr(module, "quantization_scheme"):
            continue
        if pruned:
            module.weight.data[module.weight.abs() < module.weight.abs().float().median()] = 0.0
        args, weight = module.quantization_scheme.weights, module.weight.float()
        parts = weight.view(len(weight), -1, args.group_size or weight.shape[1])
        scale, zero = calculate_qparams(parts.amin(dim=2), parts.amax(dim=2), args)
        scale = scale.amax() if args.strategy == "tensor" else scale
        module.weight_scale.data.copy_(scale.to(torch.bfloat16))
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(
                zero if zero.shape == module.weight_zero_point.shape else 0
            )
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))
    return folder


def decoded(folder: Path, bits: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Codes and their values in float32 of every quantized module, from the file's bits; codes are
    counted from zero points."""
    tensors = load_file(folder / "model.safetensors")
    actual = {}
    for name in sorted(
        key.removesuffix(".weight_scale") for key in tensors if key.endswith(".weight_scale")
    ):
        if f"{name}.weight" in tensors:
            codes = tensors[f"{name}.weight"].float()
        else:
            rows, columns = tensors[f"{name}.weight_shape"].tolist()
            codes = (
                _unpacked(tensors[f"{name}.weight_packed"], rows, columns, bits) - 2 ** (bits - 1)
            ).float()
        if f"{name}.weight_zero_point" in tensors:
            zeros = tensors[f"{name}.weight_zero_point"].T
            zeros = (_unpacked(zeros, len(zeros), len(codes), bits) - 2 ** (bits - 1)).T
            codes -= zeros.repeat_interleave(codes.shape[1] // zeros.shape[1], dim=1)
        scale = tensors[f"{name}.weight_scale"].float()
        actual[name] = (
            codes,
            codes * scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1),
        )
    return actual


def _unpacked(words: torch.Tensor, lines: int, count: int, bits: int) -> torch.Tensor:
    """Unsigned values [lines, count] of a stream of bits in int32 words [lines, ...], lowest
    first."""
    words = words.to(torch.int64) & 0xFFFFFFFF
    stream = ((words[:, :, None] >> torch.arange(32)) & 1).reshape(lines, -1)[:, : count * bits]
    return (stream.view(lines, count, bits) << torch.arange(bits)).sum(-1)
