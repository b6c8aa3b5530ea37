"""Each kind of vLLM's linear layers in each stored form, compared with vLLM's own sharding."""

import inspect

import pytest
import torch

from tests.formats.test_stored_weight import random_weight
from tests.kernels import fake_backend
from tests.vllm_plugin.vllm_fixtures import needs_vllm, on_rank, without_kernels

needs_vllm()

from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase

from rac_modifier.checkpoint.formats import FORMAT_24, FORMAT_BITMASK
from rac_modifier.checkpoint.formats import FORMATS as PACKED
from rac_modifier.errors import RacError
from rac_modifier.kernels.choose import BACKENDS
from rac_modifier.kernels.cpu.support import library_and_isa, support
from tests.vllm_plugin.layer_kinds import (
    FORMS,
    KINDS,
    K,
    codes,
    config_of,
    finish,
    load,
    loaded,
    make,
    weights_of,
    words,
)
from tests.vllm_plugin.stored_forms import int4, quantize

needs_kernel = pytest.mark.skipif(support().isa in (None, "portable"), reason=support().reason)


def check(ours, dense, k: int, tolerance: float = 2e-3) -> None:
    """Both give the same on random inputs."""
    x = torch.randn(5, k, generator=torch.Generator().manual_seed(0))
    result, expected = ours.quant_method.apply(ours, x), dense.quant_method.apply(dense, x)
    torch.testing.assert_close(result, expected, rtol=1e-3, atol=tolerance)


# Each kind of layer on each rank, and each form on each: 7 x 3 and 18 x 3 pairs in 54 cases.
RANKS = [(0, 1), (1, 2), (3, 4)]
CASES = [
    ([*KINDS][(i + j * 2) % 7], *RANKS[j], form) for i, form in enumerate(FORMS) for j in range(3)
]


@needs_kernel
@pytest.mark.parametrize(
    ("kind", "rank", "size", "form"), [*CASES, ("row", 1, 2, "gptq reordered")]
)
def test_a_rank_gets_what_vllm_would_give_it(monkeypatch, kind, rank, size, form):
    on_rank(monkeypatch, rank, size)
    dense, ours, config = loaded(kind, form)
    k = dense.weight.shape[1]
    finish(ours, dense)
    (decision,) = config.report.decisions.values()
    if form == "gptq reordered" and k < K:  # a rank has columns of all groups
        assert "its columns are reordered" in decision.reason
    else:
        cut = "int3" in form or "int2" in form  # a group that is cut may take four bits
        assert FORMS[form].kernel in decision.kernel or cut
        names = {name.partition("_packed")[0] for name, _ in ours.named_parameters()}
        assert names <= {"weight", "column_order"}
        assert hasattr(ours, "weight_packed")
        assert not hasattr(ours, "weight")  # no dense copy, nothing is left of loading
    check(ours, dense, k)


@pytest.mark.parametrize(
    ("kind", "form"), [(("row", "qkv")[i % 2], form) for i, form in enumerate(FORMS)]
)
def test_without_kernels_a_layer_is_dense(monkeypatch, kind, form):
    without_kernels(monkeypatch)
    on_rank(monkeypatch, 1, 2)
    dense, ours, config = loaded(kind, form)
    k = dense.weight.shape[1]
    finish(ours, dense)
    (decision,) = config.report.decisions.values()
    assert not decision.sparse
    check(ours, dense, k)


def test_dequantize_weight_is_vllms_seam(monkeypatch):
    """An online method makes our parameters, and asks for the dense weight when they are loaded."""
    on_rank(monkeypatch, 1, 2)
    dense, ours, _ = loaded("row", "gptq reordered")
    torch.testing.assert_close(ours.quant_method.dequantize_weight(ours), dense.weight.data)
    seam = getattr(QuantizeMethodBase, "dequantize_weight", None)
    if seam is None:
        pytest.skip("this vLLM quantizes no checkpoint anew")
    fp8 = pytest.importorskip("vllm.model_executor.layers.quantization.online.fp8")
    assert list(inspect.signature(seam).parameters) == ["self", "layer"]
    dense, ours, _ = loaded("merged", "2:4 int8")
    online = fp8.Fp8PerTensorOnlineLinearMethod.__new__(fp8.Fp8PerTensorOnlineLinearMethod)
    online.requantization_source_parameters = {}
    online.set_requantization_source(ours.quant_method)
    torch.testing.assert_close(online.get_weight_for_quantization(ours), dense.weight.data)


@pytest.mark.parametrize(
    ("form", "dtype"),
    [("unstructured", torch.float16), ("2:4 int8", torch.bfloat16), ("gptq", torch.float32),
     ("int4 asymmetric", torch.float16)],
)  # fmt: skip
def test_a_compiled_layer_with_a_bias(monkeypatch, form, dtype):
    on_rank(monkeypatch, 0, 1)
    torch._dynamo.reset()
    layer = make("column", FORMS[form].config(), bias=True)
    layer.quant_method.dtype = dtype
    ((shard, _, weight),) = weights_of("column", FORMS[form].two_of_four)
    if form == "unstructured":
        weight[:, ::2] = 0  # float16 is packed as float32, which half of the weights would not gain
    parts, meant = FORMS[form].store(weight)
    load(layer, shard, parts)
    finish(layer)
    x, bias = torch.randn(2, 3, K).to(dtype), torch.randn(64).to(dtype)
    apply = torch.compile(
        lambda x: layer.quant_method.apply(layer, x, bias), fullgraph=True, backend="aot_eager"
    )
    result = apply(x)
    assert (result.dtype, result.shape) == (dtype, (2, 3, 64))
    expected = torch.nn.functional.linear(x.float(), meant.float(), bias.float()).to(dtype)
    tolerance = 5e-2 if dtype != torch.float32 else 2e-3
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ("dense", "dense because a part of this fused layer is stored dense"),
        ("fp8", "dense because a.k cannot be fused with a.q: their"),
        ("quantized", "dense because a part of this fused layer is stored dense"),
    ],
)
def test_a_fused_layer_with_one_shard_of_another_kind(monkeypatch, other, reason):
    on_rank(monkeypatch, 0, 1)
    config = config_of(FORMAT_BITMASK, "int8")
    dense, mixed = make("qkv", None), make("qkv", config)
    for shard, module, weight in weights_of("qkv", False):
        values, scale, meant = quantize(weight, "fp8" if (other, shard) == ("fp8", "k") else "int8")
        parts = {**PACKED[FORMAT_BITMASK].compress(values, module), "weight_scale": scale}
        if shard == "k" and other == "dense":
            parts, meant = {"weight": weight}, weight
        if shard == "k" and other == "quantized":
            parts = {"weight": values, "weight_scale": scale}
        load(dense, shard, {"weight": meant})
        load(mixed, shard, parts)
    finish(mixed, dense)
    assert config.report.decisions["a.qkv"].reason.startswith(reason)
    check(mixed, dense, K, 1e-4)


@needs_kernel
def test_a_part_that_packing_left_in_words_of_int4(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    config = config_of(FORMAT_BITMASK, "int4")
    dense, mixed = make("qkv", None), make("qkv", config)
    for shard, module, weight in weights_of("qkv", False):
        values, scale, meant = quantize(weight, "int4")
        parts = {**PACKED[FORMAT_BITMASK].compress(values, module, 4), "weight_scale": scale}
        if shard == "k":
            parts, meant = int4(torch.randn_like(weight))
        load(dense, shard, {"weight": meant})
        load(mixed, shard, parts)
    finish(mixed, dense)
    assert config.report.decisions["a.qkv"].sparse
    check(mixed, dense, K, 5e-3)


def test_a_layer_in_floats_of_a_gptq_checkpoint_is_not_in_the_report(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    config = FORMS["gptq"].config()
    dense, ours = make("merged", None), make("merged", config)
    for shard, _, weight in weights_of("merged", False):
        for layer in (dense, ours):
            load(layer, shard, {"weight": weight})
    finish(ours, dense)
    assert (config.report.expected, config.report.decisions) == (0, {})
    check(ours, dense, K, 1e-6)


@needs_kernel
@pytest.mark.parametrize(
    ("form", "recorded", "bits"),
    [("2:4 int8", ("a.q", "a.k", "a.v"), 8), ("int4", ("a.q", "a.k", "a.v"), 8),
     ("2:4 int8", ("a.q", "a.k"), 16), ("int4", (), 16)],
)  # fmt: skip
def test_a_fused_layer_takes_8_bits_where_all_parts_are_recorded(monkeypatch, form, recorded, bits):
    on_rank(monkeypatch, 0, 1)
    config = FORMS[form].config()
    config.int8_activations = recorded
    dense, layer, _ = loaded("qkv", FORMS[form]._replace(config=lambda: config))
    finish(layer)
    library, isa = library_and_isa()
    bits = bits if library.kernels[isa].multiplies_bytes else 16
    x = torch.randn(5, K)
    exact = x @ dense.weight.T
    error = float((layer.quant_method.apply(layer, x) - exact).norm() / exact.norm())
    assert error < 0.02
    assert (error > 1e-3) == (bits == 8)


@needs_kernel
@pytest.mark.parametrize(
    ("group", "size", "symmetric"), [(12, 2, True), (48, 4, False), (32, 16, True), (12, 2, False)]
)
def test_odd_groups_and_groups_that_a_rank_cuts(monkeypatch, group, size, symmetric):
    on_rank(monkeypatch, 1, size)
    dense, ours, _ = loaded("row", codes(group, symmetric))
    finish(ours, dense)
    check(ours, dense, K // size)


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2)])
def test_a_layer_is_served_through_another_backend(monkeypatch, rank, size):
    """A backend that is registered in choose.py needs no change of the plugin."""
    monkeypatch.setitem(BACKENDS, "cpu", fake_backend)
    on_rank(monkeypatch, rank, size)
    dense, ours, config = loaded("row", "2:4")
    k = dense.weight.shape[1]
    finish(ours, dense)
    assert dict(ours.named_parameters()).keys() == {"fake_columns", "fake_flag"}
    (decision,) = config.report.decisions.values()
    assert decision.kernel == "fake"
    check(ours, dense, k)


# ---- damaged, missing and contradicting shards


@pytest.mark.parametrize("kind", ["row", "column", "qkv"])
def test_a_missing_shard_is_named(monkeypatch, kind):
    on_rank(monkeypatch, 0, 1)
    layer = make(kind, config_of(FORMAT_24))
    for shard, module, weight in weights_of(kind, True):
        if shard in ("q", "v"):
            load(layer, shard, PACKED[FORMAT_24].compress(weight, module))
    with pytest.raises(RacError, match=r"the checkpoint lacks a\.(q or a\.k or a)?"):
        finish(layer)


@pytest.mark.parametrize(("rank", "format"), [(0, FORMAT_24), (1, FORMAT_BITMASK)])
@pytest.mark.parametrize("kind", KINDS)
def test_another_models_shapes(monkeypatch, format, kind, rank):
    on_rank(monkeypatch, rank, 2)
    for rows, columns in ((8, 0), (-8, 0), (0, 8), (0, -8)):
        layer = make(kind, config_of(format))
        for seed, (shard, module, n) in enumerate(KINDS[kind][2]):
            weight = random_weight(n + rows, K + columns, seed, True)
            load(layer, shard, PACKED[format].compress(weight, module))
        if rows > 0 and kind == "qkv on disk":
            continue  # with replicated heads vLLM does not tell how many rows there are
        with pytest.raises(RacError, match=r"a\.\w+: .*(do not match|cannot be sharded)"):
            finish(layer)


def test_a_damaged_shard_is_named(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    layer = make("merged", config_of(FORMAT_BITMASK))
    for shard, module, weight in weights_of("merged", True):
        tensors = PACKED[FORMAT_BITMASK].compress(weight, module)
        if shard == 1:
            tensors["bitmask"][3, 5] ^= 0x10
        load(layer, shard, tensors)
    with pytest.raises(RacError, match=r"^a\.up\.\w+: .*damaged"):
        finish(layer)


@needs_kernel
def test_columns_in_different_orders(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    config = FORMS["gptq reordered"].config()
    dense, layer = make("merged", None), make("merged", config)
    for shard, form in ((0, FORMS["gptq reordered"]), (1, words("gptq_v2", 32, False))):
        parts, meant = form.store(torch.randn(48 if shard == 0 else 16, K))
        load(dense, shard, {"weight": meant})
        load(layer, shard, parts)
    finish(layer, dense)
    assert "a.up cannot be fused with a.gate" in config.report.decisions["a.gate_up"].reason
    check(layer, dense, K)


def test_weights_that_are_loaded_again_are_refused(monkeypatch):
    """vLLM's reload takes the packed parameters away, restores those of loading."""
    from vllm.model_executor.model_loader.reload.layerwise import (
        initialize_layerwise_reload,
        record_metadata_for_reloading,
    )

    on_rank(monkeypatch, 0, 1)
    layer = make("qkv", config_of(FORMAT_24))
    record_metadata_for_reloading(layer)
    whole = weights_of("qkv", True)
    shards = [(shard, PACKED[FORMAT_24].compress(w, module)) for shard, module, w in whole]
    for shard, parts in shards:
        load(layer, shard, parts)
    finish(layer)
    initialize_layerwise_reload(layer)
    with pytest.raises(RacError, match=r"a\.qkv: packed weights cannot be loaded into a running"):
        load(layer, *shards[0])
