"""Each kind of vLLM's linear layers, sparse or dense, and loading weights into it. Imported after `needs_vllm()`."""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from rac_modifier.vllm_plugin.quant_config import RacSparseConfig
from rac_modifier.vllm_plugin.sparse_layers import SparseLayers
from tests.checkpoint.test_stored_weight import random_weight
from tests.vllm_plugin.vllm_fixtures import quantization_config, quantize

FUSED = {"qkv": ["q", "k", "v"], "gate_up": ["gate", "up"]}
K = 96
# class, arguments, the shards that are loaded: (id, module, rows)
KINDS: dict[str, tuple[type, dict[str, Any], list[tuple[Any, str, int]]]] = {
    "column": (ColumnParallelLinear, {"input_size": K, "output_size": 64}, [(None, "a.up", 64)]),
    "row": (RowParallelLinear, {"input_size": K, "output_size": 40}, [(None, "a.down", 40)]),
    "replicated": (ReplicatedLinear, {"input_size": K, "output_size": 24}, [(None, "a.gate", 24)]),
    "merged": (
        MergedColumnParallelLinear,
        {"input_size": K, "output_sizes": [48, 16]},
        [(1, "a.up", 16), (0, "a.gate", 48)],  # in any order
    ),
    "merged on disk": (
        MergedColumnParallelLinear,
        {"input_size": K, "output_sizes": [48, 16]},
        [(None, "a.gate_up", 64)],
    ),
    "qkv": (
        QKVParallelLinear,
        {"hidden_size": K, "head_size": 8, "total_num_heads": 8, "total_num_kv_heads": 2},
        [("v", "a.v", 16), ("q", "a.q", 64), ("k", "a.k", 16)],
    ),
    "qkv on disk": (
        QKVParallelLinear,
        {"hidden_size": K, "head_size": 8, "total_num_heads": 8, "total_num_kv_heads": 4},
        [(None, "a.qkv", 128)],
    ),
}
PREFIX = {
    "merged": "a.gate_up",
    "merged on disk": "a.gate_up",
    "qkv": "a.qkv",
    "qkv on disk": "a.qkv",
}


def make(
    kind: str, config: RacSparseConfig | None, bias: bool = False, within: str = ""
) -> LinearBase:
    """A layer of vLLM. `within`: what stands before its name, as before those of a draft."""
    cls, arguments, _ = KINDS[kind]
    if config is not None:
        config.packed_modules_mapping = FUSED
    prefix = within + PREFIX.get(kind, f"a.{kind}")
    return cls(
        **arguments, bias=bias, quant_config=config, prefix=prefix, params_dtype=torch.float32
    )


def load(layer: LinearBase, shard: Any, tensors: dict[str, torch.Tensor]) -> None:
    for part, tensor in tensors.items():
        parameter = getattr(layer, part)
        parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))


def weights_of(
    kind: str, two_of_four: bool, dtype: torch.dtype = torch.float32
) -> list[tuple[Any, str, torch.Tensor]]:
    return [
        (shard, module, random_weight(rows, K, seed, two_of_four, dtype))
        for seed, (shard, module, rows) in enumerate(KINDS[kind][2])
    ]


def config_of(format: str | None, **changes: Any) -> RacSparseConfig:
    return RacSparseConfig(SparseLayers(format, **{"targets": ("Linear",), **changes}))


def finish(layer: LinearBase) -> None:
    layer.quant_method.process_weights_after_loading(layer)


def quantized_config(format: str, scheme: str = "int8") -> RacSparseConfig:
    """A config whose weights and activations are quantized too, as `from_config` makes it."""
    return RacSparseConfig.from_config(quantization_config(format, scheme, []))


def quantized(weight: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantized values, their scales, and their product in float32."""
    values, scale = quantize(weight, scheme)
    return (
        values,
        scale,
        values.float() * scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1),
    )
