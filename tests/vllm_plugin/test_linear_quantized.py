"""Layers whose sparse weights are quantized too, on every rank, against vLLM's own sharding of the dense weight."""

from __future__ import annotations

import pytest
import torch

from tests.vllm_plugin.vllm_fixtures import needs_vllm, on_rank, without_kernels

needs_vllm()

from vllm.model_executor.layers.linear import LinearMethodBase  # noqa: E402

from rac_modifier.checkpoint.formats import FORMAT_24, FORMAT_BITMASK, pack  # noqa: E402
from rac_modifier.errors import RacError  # noqa: E402
from rac_modifier.kernels.cpu.support import support  # noqa: E402
from rac_modifier.vllm_plugin.linear import RacSparseLinearMethod  # noqa: E402
from rac_modifier.vllm_plugin.shards import Shards  # noqa: E402
from rac_modifier.vllm_plugin.summary import Summary  # noqa: E402
from tests.vllm_plugin.layer_kinds import (  # noqa: E402
    KINDS,
    K,
    finish,
    load,
    make,
    quantized,
    quantized_config,
    weights_of,
)


@pytest.mark.parametrize("isa", ["best", "off"])
@pytest.mark.parametrize("scheme", ["int8", "int4", "fp8"])
@pytest.mark.parametrize("format", [FORMAT_24, FORMAT_BITMASK])
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2), (3, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_weights_and_their_scales_are_sharded(
    monkeypatch, kind, rank, size, format, scheme, isa
):
    if isa == "off":
        without_kernels(monkeypatch)
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
    assert packed == (isa == "best" and support().isa is not None)
    assert not (packed and hasattr(sparse, "weight"))  # no dense copy beside it
    decision = sparse.quant_method.summary.decisions[sparse.quant_method.shards.prefix]
    if packed:
        assert (f"{scheme} kernel" in decision.kernel) == (scheme != "fp8")
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


def test_quantized_with_a_bias_in_bfloat16_and_compiled(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    layer = make("column", quantized_config(FORMAT_24), bias=True)
    layer.quant_method.dtype = torch.bfloat16
    (shard, module, weight), *_ = weights_of("column", True)
    values, scale, meant = quantized(weight, "int8")
    load(layer, shard, {**pack(values, FORMAT_24, module), "weight_scale": scale.bfloat16()})
    meant = values.float() * scale.bfloat16().float()
    finish(layer)
    x, bias = torch.randn(6, K).bfloat16(), torch.randn(64).bfloat16()
    apply = torch.compile(
        lambda x: layer.quant_method.apply(layer, x, bias), fullgraph=True, backend="aot_eager"
    )
    expected = torch.nn.functional.linear(x.float(), meant, bias.float()).bfloat16()
    torch.testing.assert_close(apply(x), expected, rtol=2e-2, atol=2e-2)


def test_parts_that_are_quantized_differently_run_dense(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    config = quantized_config(FORMAT_BITMASK)
    dense, mixed = make("qkv", None), make("qkv", config)
    for shard, module, weight in weights_of("qkv", False):
        values, scale, meant = quantized(weight, "fp8" if shard == "k" else "int8")
        load(dense, shard, {"weight": meant})
        if shard == "v":  # quantized and not sparse
            load(mixed, shard, {"weight": values, "weight_scale": scale})
        else:
            load(mixed, shard, {**pack(values, FORMAT_BITMASK, module), "weight_scale": scale})
    finish(mixed)
    finish(dense)
    assert not config.summary.decisions["a.qkv"].sparse
    x = torch.randn(2, K)
    torch.testing.assert_close(
        mixed.quant_method.apply(mixed, x), dense.quant_method.apply(dense, x)
    )


def test_a_layout_without_a_plain_weight_is_refused_while_the_layer_is_made(monkeypatch):
    """As where config.json names a format whose layers have words of several values, and no weight."""

    class InWords(LinearMethodBase):
        def create_weights(self, layer, *sizes, **attributes):
            layer.register_parameter(
                "weight_packed", torch.nn.Parameter(torch.zeros(1), requires_grad=False)
            )

        def apply(self, layer, x, bias=None):
            raise NotImplementedError

    on_rank(monkeypatch, 0, 1)
    method = RacSparseLinearMethod(
        Shards("a.up", ["a.up"], FORMAT_BITMASK, "vllm's"), InWords(), Summary()
    )
    with pytest.raises(
        RacError,
        match=r"^a.up: config.json quantizes it to a layout without a plain weight.*storage: dense",
    ):
        method.create_weights(
            torch.nn.Module(), K, [64], K, 64, torch.float32, weight_loader=lambda *_: None
        )
