"""Each kind of vLLM's linear layers, each form of a stored weight, and loading weights. Imported after `needs_vllm()`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from rac_modifier.checkpoint.formats import FORMAT_24, FORMAT_BITMASK, pack
from rac_modifier.checkpoint.sparsity_config import SparsityRecord
from rac_modifier.vllm_plugin.config import RacConfig
from rac_modifier.vllm_plugin.layouts import PrunedLayout
from tests.checkpoint.test_stored_weight import random_weight
from tests.vllm_plugin import gptq_awq, w4a16
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


def make(kind: str, config: RacConfig | None, bias: bool = False, within: str = "") -> LinearBase:
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


Parts = dict[str, torch.Tensor]


class Form(NamedTuple):
    """How a weight [N, K] is stored: its config, its tensors with what they mean, and its name in the report.

    two_of_four: the weight must be 2:4; order: the inputs' order of the stored columns.
    """

    config: Callable[[], RacConfig]
    store: Callable[[torch.Tensor], tuple[Parts, torch.Tensor]]
    kernel: str
    two_of_four: bool = False


def sparse(format: str, scheme: str | None = None) -> Form:
    """Packed sparse weights, quantized or not."""

    def store(weight: torch.Tensor) -> tuple[Parts, torch.Tensor]:
        if scheme is None:
            return pack(weight, format, "m"), weight
        values, scale, meant = quantized(weight, scheme)
        parts = pack(values, format, "m", bits=4 if scheme == "int4" else None)
        return {**parts, "weight_scale": scale}, meant

    config = (
        (lambda: config_of(format)) if scheme is None else lambda: quantized_config(format, scheme)
    )
    kernel = f"{scheme} kernel" if scheme in ("int8", "int4") else "sparse kernel"
    return Form(config, store, kernel, format == FORMAT_24)


def codes(group: int | None, symmetric: bool, bits: int = 4) -> Form:
    """Dense weights of few bits of compressed-tensors."""
    config = w4a16.quantization(group, symmetric, bits)
    return Form(
        lambda: RacConfig.from_config(config),
        lambda weight: w4a16.int4(weight, group, symmetric, bits),
        f"int{bits} kernel",
    )


def words(
    name: str, group: int | None, symmetric: bool, bits: int = 4, reorder: bool = False
) -> Form:
    """Dense weights of "gptq", "gptq_v2" or "awq"; `reorder`: columns in one random order."""
    order = torch.randperm(K, generator=torch.Generator().manual_seed(7)) if reorder else None
    changes = {"desc_act": True} if reorder else {}
    config = gptq_awq.config_of(name, group, symmetric, bits, **changes)
    return Form(
        lambda: RacConfig.from_config(config),
        lambda weight: gptq_awq.tensors(weight, group, symmetric, bits, name, order),
        f"int{bits} kernel",
    )


FORMS = {
    "2:4": sparse(FORMAT_24),
    "unstructured": sparse(FORMAT_BITMASK),
    "pruned": Form(
        lambda: config_of(None), lambda weight: ({"weight": weight}, weight), "sparse kernel"
    ),
    "2:4 int8": sparse(FORMAT_24, "int8"),
    "unstructured int4": sparse(FORMAT_BITMASK, "int4"),
    "unstructured fp8": sparse(FORMAT_BITMASK, "fp8"),
    "int4": codes(32, symmetric=True),
    "int4 asymmetric": codes(96, symmetric=False),
    "int4 per row": codes(None, symmetric=True),
    "int3": codes(None, symmetric=False, bits=3),
    "int2": codes(None, symmetric=True, bits=2),
    "gptq": words("gptq", 32, symmetric=True),
    "gptq asymmetric": words("gptq", 32, symmetric=False),
    "gptq_v2 int3": words("gptq_v2", None, symmetric=False, bits=3),
    "gptq int8": words("gptq", None, symmetric=True, bits=8),
    "gptq reordered": words("gptq_v2", 32, symmetric=False, reorder=True),
    "awq": words("awq", 32, symmetric=False),
    "awq symmetric": words("awq", None, symmetric=True),
}


def loaded(kind: str, form: str, bias: bool = False) -> tuple[LinearBase, LinearBase, RacConfig]:
    """A layer of vLLM with dense weights in floats, one of `form` with the same weights, and its config, both loaded."""
    config = FORMS[form].config()
    dense, ours = make(kind, None, bias), make(kind, config, bias)
    for shard, _, weight in weights_of(kind, FORMS[form].two_of_four):
        parts, meant = FORMS[form].store(weight)
        load(dense, shard, {"weight": meant})
        load(ours, shard, parts)
    return dense, ours, config


def weights_of(
    kind: str, two_of_four: bool, dtype: torch.dtype = torch.float32
) -> list[tuple[Any, str, torch.Tensor]]:
    return [
        (shard, module, random_weight(rows, K, seed, two_of_four, dtype))
        for seed, (shard, module, rows) in enumerate(KINDS[kind][2])
    ]


def config_of(format: str | None, ignore: tuple[str, ...] = ()) -> RacConfig:
    """The config of packed weights; of pruned ones that are stored dense for None."""
    if format is None:
        layout = PrunedLayout(SparsityRecord(modules={"Linear": "unstructured"}))
        return RacConfig(layout)
    sparsity = {"format": format, "targets": ["Linear"], "ignore": [*ignore]}
    return RacConfig.from_config({"quant_method": "rac", "sparsity_config": sparsity})


def finish(layer: LinearBase) -> None:
    layer.quant_method.process_weights_after_loading(layer)


def quantized_config(format: str, scheme: str = "int8") -> RacConfig:
    """A config whose weights and activations are quantized too, as `from_config` makes it."""
    return RacConfig.from_config(quantization_config(format, scheme, []))


def quantized(weight: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantized values, their scales, and their product in float32."""
    values, scale = quantize(weight, scheme)
    return (
        values,
        scale,
        values.float() * scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1),
    )
