"""Each kind of vLLM's linear layers, on every rank, against vLLM's own sharding of the dense weight."""

from __future__ import annotations

import pytest
import torch

from tests.kernels import fake_backend
from tests.vllm_plugin.vllm_fixtures import needs_vllm, on_rank, without_kernels

needs_vllm()

from rac_modifier.checkpoint.formats import FORMAT_24, FORMAT_BITMASK, pack  # noqa: E402
from rac_modifier.errors import RacError  # noqa: E402
from rac_modifier.kernels.choose import BACKENDS  # noqa: E402
from rac_modifier.kernels.cpu.packed import unpack  # noqa: E402
from rac_modifier.kernels.cpu.support import support  # noqa: E402
from tests.vllm_plugin.layer_kinds import KINDS, K, config_of, finish, load, make, weights_of  # noqa: E402


@pytest.mark.parametrize("isa", ["best", "off"])
@pytest.mark.parametrize("format", [FORMAT_24, FORMAT_BITMASK, None])
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2), (1, 4), (3, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_gets_what_vllm_would_give_it(monkeypatch, kind, rank, size, format, isa):
    if isa == "off":
        without_kernels(monkeypatch)
    on_rank(monkeypatch, rank, size)
    dense, sparse = make(kind, None), make(kind, config_of(format))
    for shard, module, weight in weights_of(kind, format == FORMAT_24):
        load(dense, shard, {"weight": weight})
        load(sparse, shard, {"weight": weight} if format is None else pack(weight, format, module))
    expected = dense.weight.data.clone()
    sparse.quant_method.process_weights_after_loading(sparse)
    packed = hasattr(sparse, "weight_packed")
    assert packed == (isa == "best" and support().isa is not None)
    if packed:
        n, k = expected.shape
        found = unpack(sparse.weight_packed.data, n, k)
        assert torch.equal(found, expected)
        assert not hasattr(sparse, "weight")  # no dense copy beside it
    dense.quant_method.process_weights_after_loading(dense)
    x = torch.randn(5, expected.shape[1], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        sparse.quant_method.apply(sparse, x), dense.quant_method.apply(dense, x)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bias_and_dtypes(monkeypatch, dtype):
    on_rank(monkeypatch, 0, 1)
    layer = make("column", config_of(FORMAT_BITMASK), bias=True)
    (_, module, weight), *_ = weights_of("column", False, torch.bfloat16)
    weight[:, ::2] = (
        0  # float16 is packed as float32, so half of the weights would not gain anything
    )
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
    """A layer keeps nothing but the parameters that memory accounting and torch.compile find."""
    on_rank(monkeypatch, 0, 1)
    layer = make("qkv", config_of(FORMAT_24))
    assert sum(parameter.numel() for parameter in layer.parameters()) == 0
    for shard, module, weight in weights_of("qkv", True):
        load(layer, shard, pack(weight, FORMAT_24, module))
    layer.quant_method.process_weights_after_loading(layer)
    names = [name for name, _ in layer.named_parameters()]
    assert names == (["weight_packed"] if support().isa else ["weight"])


def test_a_fused_layer_with_one_shard_stored_dense_runs_dense_and_says_so(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    config = config_of(FORMAT_BITMASK, ignore=("a.k",))
    dense, mixed = make("qkv", None), make("qkv", config)
    for shard, module, weight in weights_of("qkv", False):
        load(dense, shard, {"weight": weight})
        load(
            mixed,
            shard,
            {"weight": weight} if shard == "k" else pack(weight, FORMAT_BITMASK, module),
        )
    finish(mixed)
    assert (
        torch.equal(mixed.weight.data, dense.weight.data) or mixed.weight.numel() == 0
    )  # prepacked by vLLM
    assert (
        config.summary.decisions["a.qkv"].reason
        == "dense because a part of this fused layer is stored dense"
    )
    finish(dense)
    x = torch.randn(2, K)
    torch.testing.assert_close(
        mixed.quant_method.apply(mixed, x), dense.quant_method.apply(dense, x)
    )


def test_ignored_layers_are_vllms(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    layer = make("row", config_of(FORMAT_24, ignore=("re:.*row",)))
    assert type(layer.quant_method).__name__ == "UnquantizedLinearMethod"


@pytest.mark.parametrize("size", [1, 2])
def test_under_torch_compile(monkeypatch, size):
    if support().isa is None:
        pytest.skip(support().reason)
    on_rank(monkeypatch, 0, size)
    layer = make("row", config_of(FORMAT_24))
    (_, module, weight), *_ = weights_of("row", True)
    load(layer, None, pack(weight, FORMAT_24, module))
    finish(layer)
    compiled = torch.compile(
        lambda x: layer.quant_method.apply(layer, x), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(3, K // size)
    torch.testing.assert_close(compiled(x), x @ weight[:, : K // size].T)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2)])
def test_a_layer_is_served_through_another_backend(monkeypatch, kind, rank, size):
    """A backend that is registered in choose.py needs no change of the plugin."""
    monkeypatch.setitem(BACKENDS, "cpu", fake_backend)
    on_rank(monkeypatch, rank, size)
    dense, sparse = make(kind, None), make(kind, config_of(FORMAT_24))
    for shard, module, weight in weights_of(kind, True):
        load(dense, shard, {"weight": weight})
        load(sparse, shard, pack(weight, FORMAT_24, module))
    finish(sparse)
    assert dict(sparse.named_parameters()).keys() == {"fake_columns", "fake_flag"}
    assert sparse.quant_method.summary.decisions[sparse.quant_method.shards.prefix].kernel == "fake"
    finish(dense)
    x = torch.randn(5, sparse.fake_columns.shape[0])
    torch.testing.assert_close(
        sparse.quant_method.apply(sparse, x), dense.quant_method.apply(dense, x)
    )


def test_a_layer_that_a_backend_does_not_run_is_dense(monkeypatch):
    monkeypatch.setitem(BACKENDS, "cpu", fake_backend)
    on_rank(monkeypatch, 0, 1)
    layer = make("column", config_of(FORMAT_BITMASK))
    load(layer, None, pack(torch.ones(64, K), FORMAT_BITMASK, "a.up"))
    finish(layer)
    decision = layer.quant_method.summary.decisions["a.column"]
    assert decision.reason == "dense because it is more than half stored"
    x = torch.randn(2, K)
    torch.testing.assert_close(
        layer.quant_method.apply(layer, x), x.sum(1, keepdim=True).expand(2, 64)
    )


def test_weights_that_are_loaded_again_are_refused(monkeypatch):
    """vLLM's reload takes the packed parameters away, restores those of loading, and calls their loaders."""
    from vllm.model_executor.model_loader.reload.layerwise import (
        initialize_layerwise_reload,
        record_metadata_for_reloading,
    )

    on_rank(monkeypatch, 0, 1)
    layer = make("qkv", config_of(FORMAT_24))
    record_metadata_for_reloading(layer)
    shards = [
        (shard, pack(weight, FORMAT_24, module))
        for shard, module, weight in weights_of("qkv", True)
    ]
    for shard, parts in shards:
        load(layer, shard, parts)
    finish(layer)
    initialize_layerwise_reload(layer)
    with pytest.raises(
        RacError, match=r"a\.qkv: packed weights cannot be loaded into a running server again"
    ):
        load(layer, *shards[0])
