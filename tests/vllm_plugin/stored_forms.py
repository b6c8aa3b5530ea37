"""Weights as compressed-tensors, GPTQ and AWQ store them, with their `quantization_config`."""

from typing import Any

import torch

from rac_modifier.checkpoint.formats import FORMAT_BITMASK
from rac_modifier.formats.quantization_config import with_packed
from tests.checkpoint.gptq_awq_tensors import awq, gptq, pack_quantized, rounded

_WRITTEN = with_packed({}, FORMAT_BITMASK, {"model.a": "unstructured"}, ["lm_head"])
PACKED = _WRITTEN["quantization_config"]  # as packing writes it
GROUP = 32  # columns that share a scale
Stored = tuple[dict[str, Any], torch.Tensor]  # tensors on disk, and the weight that they mean


def quantization(
    group: int | None = GROUP, symmetric: bool = True, bits: int = 4, **changes: Any
) -> dict[str, Any]:
    """The entry of compressed-tensors for dense codes; `group` None: one scale per row."""
    weights: dict[str, Any] = {"num_bits": bits, "type": "int", "symmetric": symmetric}
    weights["strategy"] = "channel" if group is None else "group"
    if group is not None:
        weights["group_size"] = group
    scheme = {"targets": ["Linear"], "weights": weights, "input_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": scheme},
        "ignore": ["lm_head"],
        **changes,
    }


def quantized_sparse(format: str, scheme: str, ignore: list[str]) -> dict[str, Any]:
    """The entry for packed sparse weights that are quantized too ("int8", "int4" or "fp8")."""
    bits = int(scheme[-1]) if scheme != "fp8" else 8
    entry = quantization(GROUP if bits == 4 else None, True, bits)
    group = entry["config_groups"]["group_0"]
    if bits == 8:
        kind = group["weights"]["type"] = "float" if scheme == "fp8" else "int"
        group["input_activations"] = {
            "num_bits": 8, "type": kind, "strategy": "token", "dynamic": True, "symmetric": True,
        }  # fmt: skip
        entry["format"] = "float-quantized" if scheme == "fp8" else "int-quantized"
    entry["ignore"] = [*ignore, "lm_head"]
    entry["sparsity_config"] = {"format": format, "targets": ["Linear"], "ignore": entry["ignore"]}
    return entry


def gptq_config(group=GROUP, symmetric=True, bits=4, version=1, **changes):
    """The entry that GPTQModel writes."""
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": -1 if group is None else group,
        "desc_act": False,
        "sym": symmetric,
        "lm_head": False,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        **changes,
    }


def awq_config(
    group: int | None = GROUP, symmetric: bool = False, **changes: Any
) -> dict[str, Any]:
    """The entry that AutoAWQ writes."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": -1 if group is None else group,
        "zero_point": not symmetric,
        "version": "gemm",
        **changes,
    }


def words_config(
    form: str, group: int | None, symmetric: bool, bits: int = 4, **changes: Any
) -> Any:
    """The entry of "gptq", "gptq_v2" or "awq"."""
    if form == "awq":
        return awq_config(group, symmetric, **changes)
    return gptq_config(group, symmetric, bits, 2 if form == "gptq_v2" else 1, **changes)


def stored_words(weight, group, symmetric, bits=4, form="gptq", order=None):
    """A weight [N, K] as "gptq", "gptq_v2" or "awq" store it. `order` [K]: of columns in groups."""
    columns = torch.arange(weight.shape[1]) if order is None else order
    numbers = rounded(weight[:, columns], group, symmetric, bits)
    meant = torch.empty_like(numbers.meant)
    meant[:, columns] = numbers.meant
    if form == "awq":
        return awq(numbers), meant
    version = 2 if form == "gptq_v2" else 1
    return gptq(numbers, version, *([] if order is None else [order])), meant


def quantize(weight: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values (int8, also for 4 bits, or fp8), scales float32 [N, groups], and what they mean."""
    rows, columns = weight.shape
    groups = columns // GROUP if scheme == "int4" else 1
    most = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}[scheme]
    scale = (weight.view(rows, groups, -1).abs().amax(-1) / most).clamp_min(1e-6)
    wide = scale.repeat_interleave(columns // groups, dim=1)
    values = weight / wide
    values = values.to(torch.float8_e4m3fn) if scheme == "fp8" else values.round().to(torch.int8)
    return values, scale, values.float() * wide


def int4(
    weight: torch.Tensor, group: int | None = GROUP, symmetric: bool = True, bits: int = 4
) -> Stored:
    """A weight [N, K] rounded to `bits`, as compressed-tensors stores it."""
    numbers = rounded(weight, group, symmetric, bits)
    return pack_quantized(numbers, symmetric), numbers.meant
