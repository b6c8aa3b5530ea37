"""GPTQ and AWQ checkpoints, for the tests that need vLLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.checkpoint.gptq_awq_tensors import awq, gptq, rounded
from tests.vllm_plugin.w4a16 import save_w4a16


def gptq_config(
    group: int | None = 32, symmetric: bool = True, bits: int = 4, version: int = 1, **changes: Any
) -> Any:
    """The `quantization_config` that GPTQModel writes."""
    return {
        "quant_method": "gptq",
        "bits": bits,
        "group_size": -1 if group is None else group,
        "desc_act": False,
        "sym": symmetric,
        "lm_head": False,
        "checkpoint_format": "gptq" if version == 1 else "gptq_v2",
        "pack_dtype": "int32",
        "meta": {"quantizer": ["gptqmodel:2.0.0"], "damp_percent": 0.01},
        **changes,
    }


def awq_config(group: int | None = 32, symmetric: bool = False, **changes: Any) -> Any:
    """The `quantization_config` that AutoAWQ writes."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": -1 if group is None else group,
        "zero_point": not symmetric,
        "version": "gemm",
        "backend": "autoawq",
        "do_fuse": False,
        "modules_to_not_convert": None,
        **changes,
    }


def tensors(
    weight: torch.Tensor,
    group: int | None,
    symmetric: bool,
    bits: int = 4,
    form: str = "gptq",
    order: Any = None,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A weight [N, K] as "gptq", "gptq_v2" or "awq" store it, and what it means. `order` [K]: that of columns in groups."""
    if order is None:
        found = rounded(weight, group, symmetric, bits)
        return awq(found) if form == "awq" else gptq(
            found, 2 if form == "gptq_v2" else 1
        ), found.meant
    found = rounded(weight[:, order], group, symmetric, bits)
    meant = torch.empty_like(found.meant)
    meant[:, order] = found.meant
    return gptq(found, 2 if form == "gptq_v2" else 1, order), meant


def config_of(form: str, group: int | None, symmetric: bool, bits: int = 4, **changes: Any) -> Any:
    """The `quantization_config` beside such tensors."""
    if form == "awq":
        return awq_config(group, symmetric, **changes)
    return gptq_config(group, symmetric, bits, 2 if form == "gptq_v2" else 1, **changes)


def save(
    folder: Path,
    meant: Path,
    form: str,
    group: int | None,
    symmetric: bool,
    bits: int = 4,
    reorder: bool = False,
) -> None:
    """A tiny Qwen3 with every linear layer but one stored so; `meant` gets the same weights dense in float32."""
    orders: dict[int, torch.Tensor] = {}

    def stored(weight: torch.Tensor, group: int | None, symmetric: bool, bits: int) -> Any:
        columns = weight.shape[1]
        order = orders.setdefault(columns, torch.randperm(columns)) if reorder else None
        return tensors(weight, group, symmetric, bits, form, order)

    sizes = {"hidden_size": 128, "intermediate_size": 256} if group in (64, 128) else {}
    save_w4a16(folder, meant, group, symmetric, rounding=stored, bits=bits, **sizes)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = config_of(
        form, group, symmetric, bits, **({"desc_act": True} if reorder else {})
    )
    (folder / "config.json").write_text(json.dumps(config))
