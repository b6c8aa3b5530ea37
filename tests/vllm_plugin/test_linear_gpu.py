"""vLLM's linear layers on the GPU backend, whose driver is a fake that runs launches in an emulator."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cuda.fake_gpu import FakeDriver, fake_gpu
from tests.vllm_plugin.vllm_fixtures import needs_vllm, on_rank

needs_vllm()

from rac_modifier.checkpoint.formats import FORMAT_24, FORMAT_BITMASK, pack  # noqa: E402
from rac_modifier.kernels.choose import BACKENDS  # noqa: E402
from tests.vllm_plugin.layer_kinds import (  # noqa: E402
    KINDS,
    K,
    config_of,
    finish,
    load,
    make,
    quantized,
    quantized_config,
    weights_of,
)

BF16 = torch.bfloat16


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch):
    """The GPU's backend for the device that vLLM has here."""
    monkeypatch.setitem(BACKENDS, "cpu", BACKENDS["cuda"])
    with fake_gpu(monkeypatch) as fake:
        yield fake


@pytest.mark.parametrize("format", [FORMAT_24, FORMAT_BITMASK])
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2), (3, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_multiplies_its_share_on_the_gpu(
    gpu: FakeDriver, monkeypatch, kind, rank, size, format
):
    """A rank's columns may cut fours, and a fused layer has several shards; 2:4 is recognised in both formats."""
    on_rank(monkeypatch, rank, size)
    dense, sparse = make(kind, None), make(kind, config_of(format))
    sparse.quant_method.dtype = BF16
    for shard, module, weight in weights_of(kind, True, BF16):
        load(dense, shard, {"weight": weight.float()})
        load(sparse, shard, pack(weight, format, module))
    expected = dense.weight.data.clone()
    finish(sparse)
    assert [name for name, _ in sparse.named_parameters()] == [
        "weight_packed",
        "weight_packed_layout",
    ]
    decision = sparse.quant_method.summary.decisions[sparse.quant_method.shards.prefix]
    assert decision.kernel == "sparse GPU kernel 2:4"
    gpu.capturing = True  # from here on nothing may be loaded
    x = torch.randn(3, expected.shape[1]).to(BF16)
    y = sparse.quant_method.apply(sparse, x)
    torch.testing.assert_close(y.float(), x.float() @ expected.T, rtol=1e-2, atol=1e-2)
    assert len(gpu.launches) == 1


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_multiplies_its_share_of_any_pattern(gpu, monkeypatch, kind, rank, size):
    """Layers as small as these are mostly padding and would stay dense: the limit is lifted."""
    monkeypatch.setattr("rac_modifier.kernels.cuda.backend._LEAST_CEILING", 0.0)
    on_rank(monkeypatch, rank, size)
    dense, sparse = make(kind, None), make(kind, config_of(FORMAT_BITMASK))
    sparse.quant_method.dtype = BF16
    for shard, module, weight in weights_of(kind, False, BF16):
        load(dense, shard, {"weight": weight.float()})
        load(sparse, shard, pack(weight, FORMAT_BITMASK, module))
    expected = dense.weight.data.clone()
    finish(sparse)
    decision = sparse.quant_method.summary.decisions[sparse.quant_method.shards.prefix]
    assert decision.kernel == "sparse GPU kernel unstructured"
    gpu.capturing = True
    x = torch.randn(3, expected.shape[1]).to(BF16)
    y = sparse.quant_method.apply(sparse, x)
    torch.testing.assert_close(y.float(), x.float() @ expected.T, rtol=1e-2, atol=1e-2)
    assert len(gpu.launches) == 1


@pytest.mark.parametrize(
    ("scheme", "rank", "size", "kind"),
    [
        *(("int8", *rank, kind) for rank in ((0, 1), (1, 2)) for kind in KINDS),
        ("fp8", 0, 1, "qkv"),
        ("fp8", 1, 2, "row"),
    ],
)
@pytest.mark.parametrize(
    ("format", "kernel"), [(FORMAT_24, "2:4"), (FORMAT_BITMASK, "unstructured")]
)
def test_a_rank_multiplies_its_share_of_8_bits(
    gpu, monkeypatch, scheme, kind, rank, size, format, kernel
):
    """Activations stay bfloat16, although the scheme is W8A8. With the limit lifted, as above."""
    monkeypatch.setattr("rac_modifier.kernels.cuda.backend._LEAST_CEILING", 0.0)
    on_rank(monkeypatch, rank, size)
    dense, sparse = make(kind, None), make(kind, quantized_config(format, scheme))
    sparse.quant_method.dtype = BF16
    for shard, module, weight in weights_of(kind, format == FORMAT_24):
        values, scale, meant = quantized(weight, scheme)
        load(dense, shard, {"weight": meant})
        load(sparse, shard, {**pack(values, format, module), "weight_scale": scale})
    expected = dense.weight.data.clone()
    finish(sparse)
    decision = sparse.quant_method.summary.decisions[sparse.quant_method.shards.prefix]
    assert decision.kernel == f"sparse GPU kernel {kernel} {scheme}"
    gpu.capturing = True
    x = torch.randn(3, expected.shape[1]).to(BF16)
    y = sparse.quant_method.apply(sparse, x)
    torch.testing.assert_close(y.float(), x.float() @ expected.T, rtol=1e-2, atol=1e-2)
    assert len(gpu.launches) == 1


def finished_column(format_name, monkeypatch):
    """A column-parallel layer of one rank, in bfloat16, with a weight of the format loaded."""
    on_rank(monkeypatch, 0, 1)
    layer = make("column", config_of(format_name))
    layer.quant_method.dtype = BF16
    ((shard, module, weight),) = weights_of("column", format_name == FORMAT_24, BF16)
    load(layer, shard, pack(weight, format_name, module))
    finish(layer)
    return layer


def test_a_weight_that_gains_nothing_stays_dense_with_the_reason(gpu, monkeypatch):
    layer = finished_column(FORMAT_BITMASK, monkeypatch)
    reason = layer.quant_method.summary.decisions["a.column"].reason
    assert reason.startswith("dense because packed it takes about ")
    assert gpu.launches == []
    assert layer.weight.shape[-1] == K or layer.weight.numel() == 0


def test_where_nobody_asks_for_it_everything_is_dense(gpu, monkeypatch):
    monkeypatch.delenv("RAC_GPU_KERNELS")
    layer = finished_column(FORMAT_24, monkeypatch)
    assert "RAC_GPU_KERNELS=on" in layer.quant_method.summary.decisions["a.column"].reason
    assert gpu.calls == []


def test_lora_finds_the_device_of_a_packed_layer(gpu, monkeypatch):
    """Its layers ask the wrapped one for `weight`, or for the name that our packed weight has."""
    from vllm.lora.layers.utils import _get_lora_device

    layer = finished_column(FORMAT_24, monkeypatch)
    assert not hasattr(layer, "weight")
    assert _get_lora_device(layer) == layer.weight_packed.device
