"""Each kind of vLLM's linear layers, on every rank, against vLLM's own sharding of the dense weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.checkpoint.test_stored_weight import random_weight
from tests.vllm_plugin.vllm_fixtures import needs_vllm, on_rank, quantization_config, quantize

needs_vllm()

from vllm.model_executor.layers.linear import (  # noqa: E402
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

from rac_modifier.checkpoint.formats import FORMAT_24, FORMAT_BITMASK, pack  # noqa: E402
from rac_modifier.errors import RacError  # noqa: E402
from rac_modifier.vllm_plugin import kernels  # noqa: E402
from rac_modifier.vllm_plugin.quant_config import RacSparseConfig  # noqa: E402
from rac_modifier.vllm_plugin.sparse_layers import SparseLayers  # noqa: E402

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
PREFIX = {"merged": "a.gate_up", "merged on disk": "a.gate_up", "qkv": "a.qkv", "qkv on disk": "a.qkv"}


def make(kind: str, config: RacSparseConfig | None, bias: bool = False) -> LinearBase:
    cls, arguments, _ = KINDS[kind]
    if config is not None:
        config.packed_modules_mapping = FUSED
    return cls(
        **arguments, bias=bias, quant_config=config, prefix=PREFIX.get(kind, f"a.{kind}"), params_dtype=torch.float32
    )


def load(layer: LinearBase, shard: Any, tensors: dict[str, torch.Tensor]) -> None:
    for part, tensor in tensors.items():
        parameter = getattr(layer, part)
        parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))


def weights_of(kind: str, two_of_four: bool, dtype: torch.dtype = torch.float32) -> list[tuple[Any, str, torch.Tensor]]:
    return [
        (shard, module, random_weight(rows, K, seed, two_of_four, dtype))
        for seed, (shard, module, rows) in enumerate(KINDS[kind][2])
    ]


def config_of(format: str | None, **changes: Any) -> RacSparseConfig:
    return RacSparseConfig(SparseLayers(format, **{"targets": ("Linear",), **changes}))


@pytest.mark.parametrize("isa", ["best", "off"])
@pytest.mark.parametrize("format", [FORMAT_24, FORMAT_BITMASK, None])
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2), (1, 4), (3, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_gets_what_vllm_would_give_it(monkeypatch, kind, rank, size, format, isa):
    if isa == "off":
        monkeypatch.setattr(kernels, "support", lambda: kernels.Support(None, "switched off by a test"))
    on_rank(monkeypatch, rank, size)
    dense, sparse = make(kind, None), make(kind, config_of(format))
    for shard, module, weight in weights_of(kind, format == FORMAT_24):
        load(dense, shard, {"weight": weight})
        load(sparse, shard, {"weight": weight} if format is None else pack(weight, format, module))
    expected = dense.weight.data.clone()
    sparse.quant_method.process_weights_after_loading(sparse)
    packed = hasattr(sparse, "weight_packed")
    assert packed == (isa == "best" and kernels.support().isa is not None)
    if packed:
        n, k = expected.shape
        found = kernels.unpack(kernels.SparseWeight(n, k, torch.float32, sparse.weight_packed.data))
        assert torch.equal(found, expected)
        assert not hasattr(sparse, "weight")  # no dense copy beside it
    dense.quant_method.process_weights_after_loading(dense)
    x = torch.randn(5, expected.shape[1], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(sparse.quant_method.apply(sparse, x), dense.quant_method.apply(dense, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bias_and_dtypes(monkeypatch, dtype):
    on_rank(monkeypatch, 0, 1)
    layer = make("column", config_of(FORMAT_BITMASK), bias=True)
    (_, module, weight), *_ = weights_of("column", False, torch.bfloat16)
    weight[:, ::2] = 0  # float16 is packed as float32, so half of the weights would not gain anything
    layer.quant_method.dtype = dtype
    load(layer, None, pack(weight, FORMAT_BITMASK, module))
    finish(layer)
    x, bias = torch.randn(6, K).to(dtype), torch.randn(64).to(dtype)
    found = layer.quant_method.apply(layer, x, bias)
    assert (found.dtype, found.shape) == (dtype, (6, 64))
    expected = torch.nn.functional.linear(x.float(), weight.float(), bias.float()).to(dtype)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_nothing_is_left_of_loading(monkeypatch):
    """What a layer keeps is what memory accounting and torch.compile see."""
    on_rank(monkeypatch, 0, 1)
    layer = make("qkv", config_of(FORMAT_24))
    assert sum(parameter.numel() for parameter in layer.parameters()) == 0
    for shard, module, weight in weights_of("qkv", True):
        load(layer, shard, pack(weight, FORMAT_24, module))
    layer.quant_method.process_weights_after_loading(layer)
    names = [name for name, _ in layer.named_parameters()]
    assert names == (["weight_packed"] if kernels.support().isa else ["weight"])


def finish(layer: LinearBase) -> None:
    layer.quant_method.process_weights_after_loading(layer)


def quantized_config(format: str) -> RacSparseConfig:
    """A config whose weights are quantised too, as `from_config` makes it."""
    return RacSparseConfig.from_config(quantization_config(format, "int8", []))


def quantized(weight: torch.Tensor, scheme: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantized values, their scales, and what they are worth in float32."""
    values, scale = quantize(weight, scheme)
    return values, scale, values.float() * scale.repeat_interleave(weight.shape[1] // scale.shape[1], dim=1)


@pytest.mark.parametrize("isa", ["best", "off"])
@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("format", [FORMAT_24, FORMAT_BITMASK])
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2), (3, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_weights_and_their_scales_are_sharded(monkeypatch, kind, rank, size, format, scheme, isa):
    if isa == "off":
        monkeypatch.setattr(kernels, "support", lambda: kernels.Support(None, "switched off by a test"))
    on_rank(monkeypatch, rank, size)
    dense, sparse = make(kind, None), make(kind, quantized_config(format))
    for shard, module, weight in weights_of(kind, format == FORMAT_24):
        values, scale, meant = quantized(weight, scheme)
        load(dense, shard, {"weight": meant})
        parts = pack(values, format, module, bits=4 if scheme == "int4" else None)
        load(sparse, shard, {**parts, "weight_scale": scale})
    n, k = dense.weight.shape
    sparse.quant_method.process_weights_after_loading(sparse)
    packed = hasattr(sparse, "weight_packed")
    assert packed == (isa == "best" and kernels.support().isa is not None)
    assert not (packed and hasattr(sparse, "weight"))  # no dense copy beside it
    decision = sparse.quant_method.summary.decisions[sparse.quant_method.shards.prefix]
    if packed:
        assert ("int8" in decision.kernel) == (scheme != "fp8")
        assert sparse.weight_packed_scale.shape[::2] == (-(-n // 16), 16)
    finish(dense)
    x = torch.randn(5, k, generator=torch.Generator().manual_seed(0))
    found, expected = sparse.quant_method.apply(sparse, x), dense.quant_method.apply(dense, x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_groups_that_a_rank_cuts(monkeypatch):
    """96 columns in groups of 32 on 4 ranks: 24 each, so the scales are of groups of 8."""
    on_rank(monkeypatch, 1, 4)
    dense, sparse = make("row", None), make("row", quantized_config(FORMAT_BITMASK))
    (shard, module, weight), *_ = weights_of("row", False)
    values, scale, meant = quantized(weight, "int4")
    load(dense, shard, {"weight": meant})
    load(sparse, shard, {**pack(values, FORMAT_BITMASK, module, bits=4), "weight_scale": scale})
    finish(sparse)
    finish(dense)
    x = torch.randn(3, 24)
    expected = dense.quant_method.apply(dense, x)
    torch.testing.assert_close(sparse.quant_method.apply(sparse, x), expected, rtol=1e-3, atol=1e-3)


def test_quantised_with_a_bias_in_bfloat16_and_compiled(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    layer = make("column", quantized_config(FORMAT_24), bias=True)
    layer.quant_method.dtype = torch.bfloat16
    (shard, module, weight), *_ = weights_of("column", True)
    values, scale, meant = quantized(weight, "int8")
    load(layer, shard, {**pack(values, FORMAT_24, module), "weight_scale": scale.bfloat16()})
    meant = values.float() * scale.bfloat16().float()
    finish(layer)
    x, bias = torch.randn(6, K).bfloat16(), torch.randn(64).bfloat16()
    apply = torch.compile(lambda x: layer.quant_method.apply(layer, x, bias), fullgraph=True, backend="aot_eager")
    expected = torch.nn.functional.linear(x.float(), meant, bias.float()).bfloat16()
    torch.testing.assert_close(apply(x), expected, rtol=2e-2, atol=2e-2)


def test_parts_that_are_quantised_differently_run_dense(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    config = quantized_config(FORMAT_BITMASK)
    dense, mixed = make("qkv", None), make("qkv", config)
    for shard, module, weight in weights_of("qkv", False):
        values, scale, meant = quantized(weight, "fp8" if shard == "k" else "int8")
        load(dense, shard, {"weight": meant})
        if shard == "v":  # quantised and not sparse
            load(mixed, shard, {"weight": values, "weight_scale": scale})
        else:
            load(mixed, shard, {**pack(values, FORMAT_BITMASK, module), "weight_scale": scale})
    finish(mixed)
    finish(dense)
    assert not config.summary.decisions["a.qkv"].sparse
    x = torch.randn(2, K)
    torch.testing.assert_close(mixed.quant_method.apply(mixed, x), dense.quant_method.apply(dense, x))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale": None}, "missing"),
        ({"weight_scale": torch.ones(63, 1)}, "shape"),
        ({"weight_scale": torch.ones(64, 5)}, "shape"),
        ({"weight_scale": torch.full((64, 1), float("nan"))}, "not finite"),
        ({"weight_scale": torch.ones(64, 1, dtype=torch.int64)}, "int64"),
        ({"weight_zero_point": torch.zeros(64, 1)}, "symmetric"),
    ],
)
def test_damaged_scales(monkeypatch, change, message):
    on_rank(monkeypatch, 0, 1)
    layer = make("column", quantized_config(FORMAT_BITMASK))
    (shard, module, weight), *_ = weights_of("column", False)
    values, scale, _ = quantized(weight, "int8")
    parts = {**pack(values, FORMAT_BITMASK, module), "weight_scale": scale, **change}
    load(layer, shard, {name: tensor for name, tensor in parts.items() if tensor is not None})
    with pytest.raises(RacError, match=rf"^a\.column\.{next(iter(change))}: .*{message}"):
        finish(layer)


@pytest.mark.parametrize("format", [FORMAT_24, FORMAT_BITMASK])
class TestDamage:
    def test_a_shard_is_missing(self, monkeypatch, format):
        on_rank(monkeypatch, 0, 1)
        layer = make("qkv", config_of(format))
        for shard, module, weight in weights_of("qkv", True):
            if shard != "k":
                load(layer, shard, pack(weight, format, module))
        with pytest.raises(RacError, match=r"a\.qkv: the checkpoint lacks the weight of a\.q or a\.k or a\.v"):
            finish(layer)

    def test_nothing_was_loaded(self, monkeypatch, format):
        on_rank(monkeypatch, 0, 2)
        for kind in ("row", "column"):
            with pytest.raises(RacError, match="the checkpoint lacks the weight of a"):
                finish(make(kind, config_of(format)))

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("rank", [0, 1])
    def test_another_models_shapes(self, monkeypatch, format, kind, rank):
        on_rank(monkeypatch, rank, 2)
        for rows, columns in ((8, 0), (-8, 0), (0, 8), (0, -8)):
            layer = make(kind, config_of(format))
            for seed, (shard, module, n) in enumerate(KINDS[kind][2]):
                weight = random_weight(n + rows, K + columns, seed, True)
                load(layer, shard, pack(weight, format, module))
            if rows > 0 and kind == "qkv on disk":
                continue  # vLLM itself takes the first rows: with replicated heads it does not tell how many there are
            with pytest.raises(RacError, match=r"a\.\w+: .*(do not belong together|cannot be sharded)"):
                finish(layer)

    def test_a_damaged_shard_is_named(self, monkeypatch, format):
        on_rank(monkeypatch, 0, 1)
        layer = make("merged", config_of(format))
        for shard, module, weight in weights_of("merged", True):
            tensors = pack(weight, format, module)
            if shard == 1:
                tensors["bitmask"][3, 5] ^= 0x10
            load(layer, shard, tensors)
        with pytest.raises(RacError, match=r"^a\.up\.\w+: .*damaged"):
            finish(layer)

    def test_both_forms(self, monkeypatch, format):
        on_rank(monkeypatch, 0, 1)
        layer = make("column", config_of(format))
        (_, module, weight), *_ = weights_of("column", True)
        load(layer, None, {**pack(weight, format, module), "weight": weight})
        with pytest.raises(RacError, match="stored both dense and packed"):
            finish(layer)

    def test_quantised_values_without_their_scheme(self, monkeypatch, format):
        on_rank(monkeypatch, 0, 1)
        layer = make("column", config_of(format))
        load(layer, None, pack(random_weight(64, K, 0, True).mul(40).to(torch.int8), format, "a.up"))
        with pytest.raises(RacError, match=r"a\.column\.weight_scale: missing.*config_groups"):
            finish(layer)


def test_a_fused_layer_with_one_shard_stored_dense_runs_dense_and_says_so(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    config = config_of(FORMAT_BITMASK, ignore=("a.k",))
    dense, mixed = make("qkv", None), make("qkv", config)
    for shard, module, weight in weights_of("qkv", False):
        load(dense, shard, {"weight": weight})
        load(mixed, shard, {"weight": weight} if shard == "k" else pack(weight, FORMAT_BITMASK, module))
    finish(mixed)
    assert torch.equal(mixed.weight.data, dense.weight.data) or mixed.weight.numel() == 0  # prepacked by vLLM
    assert config.summary.decisions["a.qkv"].reason == "dense because a part of this fused layer is stored dense"
    finish(dense)
    x = torch.randn(2, K)
    torch.testing.assert_close(mixed.quant_method.apply(mixed, x), dense.quant_method.apply(dense, x))


def test_ignored_layers_are_vllms(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    layer = make("row", config_of(FORMAT_24, ignore=("re:.*row",)))
    assert type(layer.quant_method).__name__ == "UnquantizedLinearMethod"


@pytest.mark.parametrize("size", [1, 2])
def test_under_torch_compile(monkeypatch, size):
    if kernels.support().isa is None:
        pytest.skip(kernels.support().reason)
    on_rank(monkeypatch, 0, size)
    layer = make("row", config_of(FORMAT_24))
    (_, module, weight), *_ = weights_of("row", True)
    load(layer, None, pack(weight, FORMAT_24, module))
    finish(layer)
    compiled = torch.compile(lambda x: layer.quant_method.apply(layer, x), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, K // size)
    torch.testing.assert_close(compiled(x), x @ weight[:, : K // size].T)
