"""Dense layers of 4 bits and fewer on every rank, against vLLM's own sharding of the weight that the codes mean."""

from __future__ import annotations

import pytest
import torch

from tests.vllm_plugin.vllm_fixtures import needs_vllm, on_rank, without_kernels

needs_vllm()

from vllm.model_executor.layers.linear import ReplicatedLinear  # noqa: E402

from rac_modifier.errors import RacError  # noqa: E402
from rac_modifier.kernels.cpu.library import BYTE_ISAS  # noqa: E402
from rac_modifier.kernels.cpu.support import support  # noqa: E402
from rac_modifier.vllm_plugin import dense_linear  # noqa: E402
from rac_modifier.vllm_plugin.quant_config import RacSparseConfig  # noqa: E402
from tests.vllm_plugin.layer_kinds import KINDS, K, finish, load, make  # noqa: E402
from tests.vllm_plugin.w4a16 import int4, quantization, rounded_here  # noqa: E402

needs_kernel = pytest.mark.skipif(support().isa in (None, "portable"), reason=support().reason)


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged, with its level."""
    lines: list[str] = []
    for level in ("info", "warning"):
        monkeypatch.setattr(
            dense_linear.logger,
            level,
            lambda text, *args, level=level: lines.append(f"{level}: {text % args}"),
        )
    return lines


def weights_of(kind, group=32, symmetric=True, bits=4):
    """Of each shard: its id, its tensors on disk, and the weight that they mean."""
    return [
        (shard, *int4(torch.randn(rows, K), group, symmetric, bits))
        for shard, _, rows in KINDS[kind][2]
    ]


def loaded(kind, config, group, symmetric, bits=4):
    """A dense layer and one of `config` with the same weights, and their rows and columns on this rank."""
    dense, ours = make(kind, None), make(kind, config)
    for shard, tensors, meant in weights_of(kind, group, symmetric, bits):
        assert tensors["weight_packed"].shape[1] == K * bits // 32
        load(dense, shard, {"weight": meant})
        load(ours, shard, tensors)
    n, k = dense.weight.shape
    finish(ours)
    finish(dense)
    return dense, ours, n, k


@needs_kernel
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, 96, None])
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2), (3, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_scales_and_zero_points_are_sharded(monkeypatch, kind, rank, size, group, symmetric):
    on_rank(monkeypatch, rank, size)
    config = RacSparseConfig.from_config(quantization(group, symmetric))
    dense, ours, n, k = loaded(kind, config, group, symmetric)
    (decision,) = config.summary.decisions.values()
    assert decision.kernel == f"int4 kernel {support().isa}"
    assert ours.weight_packed.dtype == torch.uint8
    assert (
        ours.weight_packed.numel() < -(-n // 16) * 16 * 64 * -(-k // 64) * 5 // 8 + 1024
    )  # 4 bits, zeros, a header
    assert not {"weight", "weight_shape", "weight_scale", "weight_zero_point"} & {
        n for n, _ in ours.named_parameters()
    }
    x = torch.randn(5, k)
    found, expected = ours.quant_method.apply(ours, x), dense.quant_method.apply(dense, x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)


@needs_kernel
@pytest.mark.parametrize("bits", [3, 2])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2), (3, 4)])
@pytest.mark.parametrize("kind", ["row", "merged", "qkv"])
def test_few_bits_are_sharded(monkeypatch, kind, rank, size, group, symmetric, bits):
    """Codes of 3 bits lie across words, which are unpacked before they are cut. A group that a rank cuts takes four bits."""
    on_rank(monkeypatch, rank, size)
    config = RacSparseConfig.from_config(quantization(group, symmetric, bits))
    dense, ours, n, k = loaded(kind, config, group, symmetric, bits)
    (decision,) = config.summary.decisions.values()
    cut = group is not None and k % 32 != 0
    wide = f" (int{bits} values in groups of {8 if size == 4 else 16}, four bits each)"
    assert decision.kernel == f"int{4 if cut else bits} kernel {support().isa}{wide if cut else ''}"
    assert (
        ours.weight_packed.numel()
        <= -(-n // 16) * 16 * 64 * -(-k // 64) * (4 if cut else bits) // 8 + 1024
    )
    x = torch.randn(5, k)
    found, expected = ours.quant_method.apply(ours, x), dense.quant_method.apply(dense, x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)


@needs_kernel
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_rounded_here_runs_on_the_kernel(monkeypatch, symmetric, bits):
    on_rank(monkeypatch, 0, 1)
    config = RacSparseConfig.from_config(quantization(32, symmetric, bits))
    layer = make("column", config)
    tensors, meant = rounded_here(torch.randn(64, K) + 0.5, 32, symmetric, bits)
    assert ("weight_zero_point" in tensors) != symmetric
    load(layer, None, tensors)
    finish(layer)
    (decision,) = config.summary.decisions.values()
    assert decision.kernel == f"int{bits} kernel {support().isa}"
    x = torch.randn(5, K)
    torch.testing.assert_close(
        layer.quant_method.apply(layer, x), x @ meant.T, rtol=1e-3, atol=2e-3
    )


@needs_kernel
def test_activations_of_8_bits_on_request(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    monkeypatch.setenv("RAC_ACTIVATIONS", "int8")
    config = RacSparseConfig.from_config(quantization())
    layer = make("column", config)
    ((_, tensors, meant),) = weights_of("column")
    load(layer, None, tensors)
    finish(layer)
    (decision,) = config.summary.decisions.values()
    assert "(activations in " in decision.kernel
    x = torch.randn(5, K)
    found, exact = layer.quant_method.apply(layer, x), x @ meant.T
    assert 1e-5 < float((found - exact).norm() / exact.norm()) < 0.02


@needs_kernel
def test_how_many_layers_have_activations_of_8_bits_is_logged(monkeypatch, logged):
    """What config.json records, of two layers; the other one multiplies as before."""
    on_rank(monkeypatch, 0, 1)
    monkeypatch.delenv("RAC_ACTIVATIONS", raising=False)
    config = RacSparseConfig.from_config(quantization())
    config.int8_activations = ("a.q", "a.k", "a.v", "a.row")
    layers = {kind: make(kind, config) for kind in ("qkv", "column", "row")}
    errors = {}
    for kind, layer in layers.items():
        shards = weights_of(kind)
        for shard, tensors, _ in shards:
            load(layer, shard, tensors)
        finish(layer)
        exact = torch.cat([meant for _, _, meant in shards])
        x = torch.randn(5, K)
        product = x @ exact.T
        errors[kind] = float((layer.quant_method.apply(layer, x) - product).norm() / product.norm())
    bytes_multiplied = support().isa in BYTE_ISAS
    note = (
        "activations in 8 bits"
        if bytes_multiplied
        else "activations in 16 bits, since it multiplies no bytes"
    )
    lines = logged[0].splitlines()
    assert lines[0] == "info: rac: 3 of 3 quantized layers run on an int4 kernel"
    assert sorted(
        line.partition(",")[0] if "(" not in line else line.partition(" layer")[0]
        for line in lines[1:]
    ) == [
        f"  int4 kernel {support().isa} ({note}): 2",
        f"  int4 kernel {support().isa}: 1 layer",
    ]
    assert errors["column"] < 1e-4
    assert all((errors[kind] > 1e-3) == bytes_multiplied for kind in ("qkv", "row"))


@needs_kernel
def test_bfloat16_with_a_bias_compiled(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    layer = make("column", RacSparseConfig.from_config(quantization(symmetric=False)), bias=True)
    layer.quant_method.dtype = torch.bfloat16
    ((shard, tensors, meant),) = weights_of("column", symmetric=False)
    load(layer, shard, tensors)
    finish(layer)
    x, bias = torch.randn(6, K).bfloat16(), torch.randn(64).bfloat16()
    apply = torch.compile(
        lambda x: layer.quant_method.apply(layer, x, bias), fullgraph=True, backend="aot_eager"
    )
    expected = torch.nn.functional.linear(x.float(), meant, bias.float()).bfloat16()
    torch.testing.assert_close(apply(x), expected, rtol=2e-2, atol=5e-2)


@needs_kernel
def test_what_was_loaded_is_logged_with_the_last_layer(monkeypatch, logged):
    on_rank(monkeypatch, 0, 1)
    config = RacSparseConfig.from_config(quantization())
    layers = [make(kind, config) for kind in ("column", "row")]
    for layer, kind in zip(layers, ("column", "row"), strict=True):
        assert logged == []
        for shard, tensors, _ in weights_of(kind):
            load(layer, shard, tensors)
        finish(layer)
    (text,) = logged
    isa = support().isa
    assert text.startswith(
        f"info: rac: 2 of 2 quantized layers run on an int4 kernel\n  int4 kernel {isa}: 2 layers"
    )


@pytest.mark.parametrize(
    ("why", "group", "rank", "size", "reason"),
    [
        ("no kernel", 32, 0, 1, "switched off by a test"),
        ("another device", 32, 0, 1, "there is no dense int4 kernel for meta"),
        ("groups", 40, 0, 1, "its 96 columns are no multiple of its groups of 40"),
        ("a cut", 32, 1, 16, "its groups have 2 columns on a rank, no multiple of 4"),
    ],
)
def test_vllms_own_method_with_the_reason(monkeypatch, logged, why, group, rank, size, reason):
    on_rank(monkeypatch, rank, size)
    if why == "no kernel":
        without_kernels(monkeypatch)
    config = RacSparseConfig.from_config(quantization(group))
    called = []
    monkeypatch.setattr(
        "vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors.CompressedTensorsLinearMethod."
        "create_weights",
        lambda self, layer, *args, **kwargs: called.append((args, sorted(kwargs))),
    )
    with torch.device("meta" if why == "another device" else "cpu"):
        layer = make("row", config)
    assert called == [((K // size, [40], K, 40, torch.float32), ["weight_loader"])]
    layer.scheme.process_weights_after_loading = lambda layer: called.append("finished")
    layer.scheme.apply_weights = lambda layer, x, bias: ("vLLM", x, bias)
    finish(layer)
    assert called[1:] == ["finished"]
    assert layer.quant_method.apply(layer, 1, 2) == ("vLLM", 1, 2)
    (text,) = logged
    assert text.splitlines() == [
        "warning: rac: 0 of 1 quantized layers run on an int4 kernel",
        f"  vLLM's own method because {reason}: 1 layer, such as a.row",
        "  --quantization rac has no effect on this model here; leave it out",
    ]


@pytest.mark.parametrize(("group", "bits"), [(12, 4), (32, 3), (32, 2)])
def test_neither_kernel_runs_it(monkeypatch, group, bits):
    """vLLM's reason and ours, and what to do."""
    on_rank(monkeypatch, 0, 1)
    without_kernels(monkeypatch)
    with pytest.raises(
        RacError,
        match=rf"^a\.row: the int{bits} kernel .*switched off by a test, and vLLM's own .*Failed to find(?s:.*)groups of 32",
    ):
        make("row", RacSparseConfig.from_config(quantization(group, bits=bits)))


def test_an_odd_group_of_3_bits_says_why(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    with pytest.raises(
        RacError, match=r"^a\.row: the int3 kernel .*96 columns are no multiple of its groups of 40"
    ):
        make("row", RacSparseConfig.from_config(quantization(40, bits=3)))


@needs_kernel
def test_scales_that_would_take_more_than_bfloat16_are_noticed_before_loading(monkeypatch):
    """A byte per code, and 5 bytes for each 4 columns."""
    on_rank(monkeypatch, 0, 1)
    config = RacSparseConfig.from_config(quantization(4, symmetric=False))
    layer = ReplicatedLinear(
        K, 64, bias=False, quant_config=config, prefix="a.b", params_dtype=torch.bfloat16
    )
    assert layer.quant_method.vllms is not None
    assert "vLLM's own method because packed it takes 2." in layer.quant_method.vllms.reason


@needs_kernel
def test_a_scale_per_row_needs_no_multiple_of_4_columns(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    config = RacSparseConfig.from_config(quantization(None))
    ours = ReplicatedLinear(
        90, 24, bias=False, quant_config=config, prefix="a.b", params_dtype=torch.float32
    )
    tensors, meant = int4(torch.randn(24, 90), None)
    load(ours, None, tensors)
    finish(ours)
    x = torch.randn(3, 90)
    torch.testing.assert_close(ours.quant_method.apply(ours, x), x @ meant.T, rtol=1e-3, atol=2e-3)


@needs_kernel
@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_12_columns_take_a_byte_per_value(monkeypatch, symmetric):
    on_rank(monkeypatch, 1, 2)
    config = RacSparseConfig.from_config(quantization(12, symmetric))
    ours = make("row", config)
    ((shard, tensors, meant),) = weights_of("row", 12, symmetric)
    load(ours, shard, tensors)
    finish(ours)
    assert "int4 values in groups of 12, one byte each" in config.summary.decisions["a.row"].kernel
    x = torch.randn(3, 48)
    torch.testing.assert_close(
        ours.quant_method.apply(ours, x), x @ meant[:, 48:].T, rtol=1e-3, atol=2e-3
    )


@needs_kernel
def test_a_cut_group(monkeypatch):
    """96 columns in groups of 48 on 4 ranks: 24 columns each, half a group."""
    on_rank(monkeypatch, 2, 4)
    config = RacSparseConfig.from_config(quantization(48, symmetric=False))
    dense, ours = make("row", None), make("row", config)
    ((shard, tensors, meant),) = weights_of("row", 48, symmetric=False)
    load(dense, shard, {"weight": meant})
    load(ours, shard, tensors)
    finish(ours)
    finish(dense)
    x = torch.randn(3, 24)
    expected = dense.quant_method.apply(dense, x)
    torch.testing.assert_close(ours.quant_method.apply(ours, x), expected, rtol=1e-3, atol=2e-3)


@needs_kernel
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_packed": None}, r"a\.k\.weight_packed: missing"),
        (
            {"weight_zero_point": torch.zeros(2, 3, dtype=torch.int32)},
            r"a\.k\.weight_zero_point: must not be there",
        ),
        (
            {"weight_g_idx": torch.zeros(96, dtype=torch.int32)},
            r"a\.k\.weight_g_idx: its columns were reordered",
        ),
        (
            {"weight": torch.zeros(16, 96)},
            r"a\.k\.weight: not quantized, but config\.json says that it is int4",
        ),
    ],
)
def test_damaged_parts_are_named(monkeypatch, change, message):
    on_rank(monkeypatch, 0, 1)
    layer = make("qkv", RacSparseConfig.from_config(quantization()))
    for shard, tensors, _ in weights_of("qkv"):
        parts = {**tensors, **(change if shard == "k" else {})}
        load(layer, shard, {part: tensor for part, tensor in parts.items() if tensor is not None})
    with pytest.raises(RacError, match=f"^{message}"):
        finish(layer)


@needs_kernel
def test_a_missing_shard_and_another_models_shape(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    for message, rows in (
        (r"a\.gate_up: the checkpoint lacks the weight of", None),
        ("do not belong together", 24),
    ):
        layer = make("merged", RacSparseConfig.from_config(quantization()))
        load(layer, 0, int4(torch.randn(48, K))[0])
        if rows:
            load(layer, 1, int4(torch.randn(rows, K))[0])
        with pytest.raises(RacError, match=message):
            finish(layer)
