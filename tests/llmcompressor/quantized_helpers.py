"""A tiny model quantized by upstream, and what a file of codes holds, read again for the tests."""

from pathlib import Path
from typing import Any

import torch
from compressed_tensors.quantization import preset_name_to_scheme
from safetensors.torch import load_file

from tests.checkpoint.checkpoint_helpers import SCHEMES as STORED
from tests.checkpoint.checkpoint_helpers import grouped, save_rounded
from tests.tiny import linears, tiny_model


def preset(name: str) -> dict[str, Any]:
    """A config group as upstream's preset has it."""
    return preset_name_to_scheme(name, ["Linear"]).model_dump(exclude={"targets", "format"})


SCHEMES: dict[str, dict[str, Any]] = {
    "int4": STORED["w4"],
    "int3": grouped(3, actorder="weight"),  # the order of rounding, not of columns
    "asymmetric int4": grouped(4, symmetric=False),
    "asymmetric int2": grouped(2, symmetric=False),
    "int8": STORED["w8a8"],
    "fp8": STORED["fp8"],
    "NVFP4": preset("NVFP4"),  # with activations
    "MXFP4": preset("MXFP4A16"),
}
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def saved(
    folder: Path, scheme: dict[str, Any], *, pruned: bool, ignore: tuple[str, ...] = ("lm_head",)
) -> Path:
    """`tiny_model()` rounded to the nearest codes by upstream, half of its weights zero before if
    `pruned`."""
    model = tiny_model().to(torch.bfloat16)
    for module in linears(model).values() if pruned else ():
        module.weight.data[module.weight.abs() < module.weight.abs().float().median()] = 0.0
    save_rounded(model, folder, scheme, ignore)
    return folder


def decoded(folder: Path, bits: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Codes and their values in float32 of every quantized module, from the file's bits; codes are
    counted from zero points."""
    tensors = load_file(folder / "model.safetensors")
    actual, least = {}, 2 ** (bits - 1)
    for key in sorted(key for key in tensors if key.endswith(".weight_scale")):
        name = key.removesuffix(".weight_scale")
        scale = tensors[key].float()
        if f"{name}.weight" in tensors:
            codes = tensors[f"{name}.weight"].float()
        elif tensors[f"{name}.weight_packed"].dtype == torch.uint8:
            codes = fp4_codes(tensors[f"{name}.weight_packed"])
            if tensors[key].dtype == torch.uint8:
                scale = 2.0 ** (scale - 127)
            else:
                scale = scale / tensors[f"{name}.weight_global_scale"]
        else:
            shape = tensors[f"{name}.weight_shape"].tolist()
            codes = (_unpacked(tensors[f"{name}.weight_packed"], *shape, bits) - least).float()
        if f"{name}.weight_zero_point" in tensors:
            zeros = tensors[f"{name}.weight_zero_point"].T
            zeros = (_unpacked(zeros, len(zeros), len(codes), bits) - least).T
            codes -= zeros.repeat_interleave(codes.shape[1] // zeros.shape[1], dim=1)
        wide = scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)
        actual[name] = codes, codes * wide
    return actual


def fp4_codes(packed: torch.Tensor) -> torch.Tensor:
    """Codes [lines, 2 n] of uint8 [lines, n]: the lower half first, its highest bit the sign."""
    halves = torch.stack([packed & 15, packed >> 4], dim=2).flatten(1).long()
    return E2M1[halves & 7] * (1 - 2 * (halves >> 3))


def _unpacked(words: torch.Tensor, lines: int, count: int, bits: int) -> torch.Tensor:
    """Unsigned values [lines, count] of a stream of bits in int32 words [lines, ...], lowest
    first."""
    words = words.to(torch.int64) & 0xFFFFFFFF
    stream = ((words[:, :, None] >> torch.arange(32)) & 1).reshape(lines, -1)[:, : count * bits]
    return (stream.view(lines, count, bits) << torch.arange(bits)).sum(-1)
