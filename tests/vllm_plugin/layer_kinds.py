"""Each kind of vLLM's linear layers, each form of a stored weight, and loading weights."""

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

from rac_modifier.checkpoint.formats import FORMAT_24, FORMAT_BITMASK, FORMATS
from rac_modifier.formats.quantization_config import with_packed
from rac_modifier.vllm_plugin.config import RacConfig
from tests.formats.test_stored_weight import random_weight
from tests.vllm_plugin import stored_forms
from tests.vllm_plugin.stored_forms import Stored, quantize, quantized_sparse

FUSED = {"qkv": ["q", "k", "v"], "gate_up": ["gate", "up"]}
K = 96
QKV = {"hidden_size": K, "head_size": 8, "total_num_heads": 8}
MERGED = {"input_size": K, "output_sizes": [48, 16]}
# class, arguments, the shards that are loaded: (id, module, rows)
KINDS: dict[str, tuple[type, dict[str, Any], list[tuple[Any, str, int]]]] = {
    "column": (ColumnParallelLinear, {"input_size": K, "output_size": 64}, [(None, "a.up", 64)]),
    "row": (RowParallelLinear, {"input_size": K, "output_size": 40}, [(None, "a.down", 40)]),
    "replicated": (ReplicatedLinear, {"input_size": K, "output_size": 24}, [(None, "a.gate", 24)]),
    # in any order
    "merged": (MergedColumnParallelLinear, MERGED, [(1, "a.up", 16), (0, "a.gate", 48)]),
    "merged on disk": (MergedColumnParallelLinear, MERGED, [(None, "a.gate_up", 64)]),
    "qkv": (
        QKVParallelLinear,
        {**QKV, "total_num_kv_heads": 2},
        [("v", "a.v", 16), ("q", "a.q", 64), ("k", "a.k", 16)],
    ),
    "qkv on disk": (QKVParallelLinear, {**QKV, "total_num_kv_heads": 4}, [(None, "a.qkv", 128)]),
}


def make(kind: str, config: RacConfig | None, bias: bool = False, within: str = "") -> LinearBase:
    """A layer of vLLM; `within` precedes its name, as in a draft."""
    cls, arguments, _ = KINDS[kind]
    if config is not None:
        config.packed_modules_mapping = FUSED
    name = {"merged": "gate_up", "qkv": "qkv"}.get(kind.removesuffix(" on disk"), kind)
    options = {"quant_config": config, "prefix": f"{within}a.{name}", "params_dtype": torch.float32}
    return cls(**arguments, bias=bias, **options)


def load(layer: LinearBase, shard: Any, tensors: dict[str, torch.Tensor]) -> None:
    for part, tensor in tensors.items():
        parameter = getattr(layer, part)
        parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))


class Form(NamedTuple):
    """How a weight [N, K] is stored: its config, tensors and meaning, and the kernel's name."""

    config: Callable[[], RacConfig]
    store: Callable[[torch.Tensor], Stored]
    kernel: str
    two_of_four: bool = False  # what the weight must be


def sparse(format: str, scheme: str | None = None) -> Form:
    """Packed sparse weights, quantized or not."""

    def store(weight: torch.Tensor) -> Stored:
        if scheme is None:
            return FORMATS[format].compress(weight, "m"), weight
        values, scale, meant = quantize(weight, scheme)
        parts = FORMATS[format].compress(values, "m", 4 if scheme == "int4" else None)
        return {**parts, "weight_scale": scale}, meant

    kernel = f"{scheme} kernel" if scheme in ("int8", "int4") else "sparse kernel"
    return Form(lambda: config_of(format, scheme), store, kernel, format == FORMAT_24)


def codes(group: int | None, symmetric: bool, bits: int = 4) -> Form:
    """Dense weights of few bits of compressed-tensors."""
    config = stored_forms.quantization(group, symmetric, bits)
    return Form(
        lambda: RacConfig.from_config(config),
        lambda weight: stored_forms.int4(weight, group, symmetric, bits),
        f"int{bits} kernel",
    )


def words(
    name: str, group: int | None, symmetric: bool, bits: int = 4, reorder: bool = False
) -> Form:
    """Dense weights of "gptq", "gptq_v2" or "awq"; `reorder`: columns in one random order."""
    order = torch.randperm(K, generator=torch.Generator().manual_seed(7)) if reorder else None
    changes = {"desc_act": True} if reorder else {}
    config = stored_forms.words_config(name, group, symmetric, bits, **changes)
    return Form(
        lambda: RacConfig.from_config(config),
        lambda weight: stored_forms.stored_words(weight, group, symmetric, bits, name, order),
        f"int{bits} kernel",
    )


FORMS = {
    "2:4": sparse(FORMAT_24),
    "unstructured": sparse(FORMAT_BITMASK),
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


def loaded(
    kind: str, form: str | Form, bias: bool = False
) -> tuple[LinearBase, LinearBase, RacConfig]:
    """A layer of vLLM with dense weights in floats, one of `form` with the same weights."""
    form = FORMS[form] if isinstance(form, str) else form
    config = form.config()
    dense, ours = make(kind, None, bias), make(kind, config, bias)
    for shard, _, weight in weights_of(kind, form.two_of_four):
        parts, meant = form.store(weight)
        load(dense, shard, {"weight": meant})
        load(ours, shard, parts)
    return dense, ours, config


def weights_of(kind: str, two_of_four: bool) -> list[tuple[Any, str, torch.Tensor]]:
    return [
        (shard, module, random_weight(rows, K, seed, two_of_four, torch.float32))
        for seed, (shard, module, rows) in enumerate(KINDS[kind][2])
    ]


def config_of(format: str, scheme: str | None = None) -> RacConfig:
    """The config of packed weights, quantized or not."""
    if scheme is not None:
        return RacConfig.from_config(quantized_sparse(format, scheme, []))
    return RacConfig.from_config(with_packed({}, format, {}, [])["quantization_config"])


def finish(*layers: LinearBase) -> None:
    for layer in layers:
        layer.quant_method.process_weights_after_loading(layer)
