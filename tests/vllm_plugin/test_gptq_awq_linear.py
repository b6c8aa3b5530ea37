"""Layers of GPTQ and AWQ checkpoints on every rank, against vLLM's own sharding of the weight that the codes mean."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.vllm_plugin.vllm_fixtures import needs_vllm, on_rank, without_kernels

needs_vllm()

from vllm.model_executor.layers.linear import WEIGHT_LOADER_V2_SUPPORTED  # noqa: E402
from vllm.model_executor.layers.quantization import auto_awq  # noqa: E402
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQLinearMethod  # noqa: E402
from vllm.model_executor.layers.quantization.utils.quant_utils import (  # noqa: E402
    unpack_quantized_values_into_int32,
)
from vllm.scalar_type import scalar_types  # noqa: E402

from rac_modifier.checkpoint.gptq_awq import check_awq, check_gptq  # noqa: E402
from rac_modifier.errors import RacError  # noqa: E402
from rac_modifier.kernels.cpu.support import support  # noqa: E402
from rac_modifier.vllm_plugin import dense_linear  # noqa: E402
from rac_modifier.vllm_plugin.gptq_awq_linear import GptqAwqLinearMethod, left_to_vllm  # noqa: E402
from rac_modifier.vllm_plugin.quant_config import RacSparseConfig  # noqa: E402
from rac_modifier.vllm_plugin.summary import Summary  # noqa: E402
from tests.checkpoint.gptq_awq_tensors import awq, drawn, gptq  # noqa: E402
from tests.vllm_plugin.gptq_awq import config_of, tensors  # noqa: E402
from tests.vllm_plugin.layer_kinds import KINDS, K, finish, load, make  # noqa: E402

needs_kernel = pytest.mark.skipif(support().isa in (None, "portable"), reason=support().reason)
FORMS = [
    ("gptq", True),
    ("gptq", False),
    ("gptq_v2", True),
    ("gptq_v2", False),
    ("awq", True),
    ("awq", False),
]


def loaded(kind, form, group, symmetric, bits=4, orders=None, **changes):
    """A dense layer and one of such a checkpoint with the same weights, and the config."""
    config = RacSparseConfig.from_config(config_of(form, group, symmetric, bits, **changes))
    dense, ours = make(kind, None), make(kind, config)
    for shard, module, rows in KINDS[kind][2]:
        order = None if orders is None else orders[module]
        parts, meant = tensors(torch.randn(rows, K), group, symmetric, bits, form, order)
        load(dense, shard, {"weight": meant})
        load(ours, shard, parts)
    finish(ours)
    return dense, ours, config


def same(ours, dense):
    x = torch.randn(5, dense.weight.shape[1])
    found, expected = ours.quant_method.apply(ours, x), x @ dense.weight.T
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)


@needs_kernel
@pytest.mark.parametrize(("form", "symmetric"), FORMS)
@pytest.mark.parametrize("group", [32, None])
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2), (3, 4)])
@pytest.mark.parametrize("kind", KINDS)
def test_codes_scales_and_zero_points_are_sharded(
    monkeypatch, kind, rank, size, group, form, symmetric
):
    on_rank(monkeypatch, rank, size)
    dense, ours, config = loaded(kind, form, group, symmetric)
    (decision,) = config.summary.decisions.values()
    assert decision.kernel == f"int4 kernel {support().isa}"
    n, k = dense.weight.shape
    assert (
        ours.weight_packed.numel() < -(-n // 16) * 16 * 64 * -(-k // 64) * 5 // 8 + 1024
    )  # 4 bits, zeros, a header
    assert not {"weight", "qweight", "qzeros", "scales", "g_idx"} & {
        name for name, _ in ours.named_parameters()
    }
    same(ours, dense)


@needs_kernel
@pytest.mark.parametrize(
    ("bits", "form", "symmetric"), [(3, "gptq", True), (3, "gptq_v2", False), (2, "gptq", False)]
)
@pytest.mark.parametrize(("rank", "size"), [(0, 1), (1, 2), (3, 4)])
@pytest.mark.parametrize("kind", ["row", "merged", "qkv"])
def test_few_bits_are_sharded(monkeypatch, kind, rank, size, form, symmetric, bits):
    on_rank(monkeypatch, rank, size)
    dense, ours, config = loaded(kind, form, None, symmetric, bits)
    (decision,) = config.summary.decisions.values()
    assert decision.kernel == f"int{bits} kernel {support().isa}"
    same(ours, dense)


def same_order(kind):
    order = torch.randperm(K)
    return {module: order for _, module, _ in KINDS[kind][2]}


@needs_kernel
@pytest.mark.parametrize("bits", [4, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_reordered_columns(monkeypatch, kind, bits):
    """`desc_act`, which vLLM refuses: the inputs are brought into the order of the columns."""
    on_rank(monkeypatch, 0, 1)
    dense, ours, config = loaded(kind, "gptq_v2", 32, False, bits, same_order(kind), desc_act=True)
    (decision,) = config.summary.decisions.values()
    assert decision.kernel == f"int{bits} kernel {support().isa}"
    assert ours.column_order.shape == (K,)
    same(ours, dense)


@needs_kernel
def test_reordered_columns_compiled(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    _, ours, _ = loaded("column", "gptq_v2", 32, False, 4, same_order("column"), desc_act=True)
    compiled = torch.compile(
        lambda x: ours.quant_method.apply(ours, x), fullgraph=True, backend="aot_eager"
    )
    x = torch.randn(2, 3, K)
    torch.testing.assert_close(compiled(x), ours.quant_method.apply(ours, x))


@needs_kernel
def test_reordered_columns_on_several_ranks(monkeypatch):
    """A rank with some rows has all columns; one with some columns lacks groups, so that is refused."""
    on_rank(monkeypatch, 1, 2)
    dense, ours, _ = loaded("qkv", "gptq", 32, True, 4, same_order("qkv"), desc_act=True)
    same(ours, dense)
    with pytest.raises(
        RacError, match=r"^a\.row: its columns are reordered .* 48 of 96 .*--tensor-parallel-size 1"
    ):
        loaded("row", "gptq", 32, True, 4, same_order("row"), desc_act=True)
    dense, ours, _ = loaded(
        "row", "gptq", 32, True, desc_act=True
    )  # static groups: nothing is reordered
    assert not hasattr(ours, "column_order")
    same(ours, dense)


@needs_kernel
def test_parts_of_a_fused_layer_in_different_orders(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    orders = {"a.up": torch.randperm(K), "a.gate": torch.randperm(K)}
    for changed in ({}, {"a.gate": None}):
        with pytest.raises(
            RacError,
            match=r"^a\.(up|gate)\.g_idx: its columns are in another order than those of a\.",
        ):
            loaded("merged", "gptq", 32, True, 4, {**orders, **changed}, desc_act=True)


@needs_kernel
@pytest.mark.parametrize("form", ["gptq", "awq"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_activations_with_a_bias(monkeypatch, form, dtype):
    """float16 is what most of these checkpoints are served in."""
    on_rank(monkeypatch, 0, 1)
    layer = make("column", RacSparseConfig.from_config(config_of(form, 32, False)), bias=True)
    layer.quant_method.dtype = dtype
    parts, meant = tensors(torch.randn(64, K), 32, False, 4, form)
    load(layer, None, parts)
    finish(layer)
    x, bias = torch.randn(6, K).to(dtype), torch.randn(64).to(dtype)
    found = layer.quant_method.apply(layer, x, bias)
    assert found.dtype == dtype
    expected = torch.nn.functional.linear(x.float(), meant, bias.float()).to(dtype)
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=5e-2)


@needs_kernel
@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("gptq", {"qweight": None}, r"a\.k\.qweight: missing"),
        (
            "gptq",
            {"scales": torch.full((3, 16), float("nan"))},
            r"a\.k\.scales: torch\.float32, or not finite",
        ),
        (
            "gptq",
            {"weight": torch.zeros(16, 96)},
            r"a\.k\.weight: not quantized, but config\.json says that it is int4",
        ),
        ("awq", {"qzeros": torch.zeros(2, 2, dtype=torch.int32)}, r"a\.k\.qzeros: shape"),
        (
            "awq",
            {"g_idx": torch.zeros(96, dtype=torch.int32)},
            r"a\.k\.g_idx: AWQ does not reorder",
        ),
    ],
)
def test_damaged_parts_are_named(monkeypatch, form, change, message):
    on_rank(monkeypatch, 0, 1)
    layer = make("qkv", RacSparseConfig.from_config(config_of(form, 32, form == "gptq")))
    for shard, _, rows in KINDS["qkv"][2]:
        parts, _ = tensors(torch.randn(rows, K), 32, form == "gptq", 4, form)
        parts |= change if shard == "k" else {}
        load(layer, shard, {part: tensor for part, tensor in parts.items() if tensor is not None})
    with pytest.raises(RacError, match=f"^{message}"):
        finish(layer)


@needs_kernel
def test_a_missing_shard_and_another_models_shape(monkeypatch):
    on_rank(monkeypatch, 0, 1)
    for message, shape in (
        (r"a\.gate_up: the checkpoint lacks the weight of", None),
        (r"a\.up: .* weight \[24, 96\], .* \[16, 96\]; they do not belong together", (24, K)),
        (r"a\.up: .* weight \[16, 64\], .* \[16, 96\]; they do not belong together", (16, 64)),
    ):
        layer = make("merged", RacSparseConfig.from_config(config_of("gptq", 32, True)))
        load(layer, 0, tensors(torch.randn(48, K), 32, True)[0])
        if shape:
            load(layer, 1, tensors(torch.randn(shape), 32, True)[0])
        with pytest.raises(RacError, match=message):
            finish(layer)


@pytest.mark.parametrize(
    ("form", "method"),
    [("gptq", AutoGPTQLinearMethod), ("awq", auto_awq.AutoAWQMarlinLinearMethod)],
)
def test_vllms_own_method_where_there_is_no_kernel(monkeypatch, form, method):
    """It gets the layer as if this package were not there, and the summary has the reason."""
    on_rank(monkeypatch, 0, 1)
    without_kernels(monkeypatch)
    said = []
    monkeypatch.setattr(
        dense_linear.logger, "warning", lambda text, *args: said.append(text % args)
    )
    config = RacSparseConfig.from_config(config_of(form, 32, form == "gptq"))
    layer = make("column", config)
    assert type(layer.quant_method.inner) is method
    assert {"qweight", "qzeros", "scales"} <= {name for name, _ in layer.named_parameters()}
    load(layer, None, {"g_idx": torch.arange(K) // 32})
    with pytest.raises(
        RacError, match=r"^a\.column\.g_idx: its columns are reordered, and vLLM's own method"
    ):
        load(layer, None, {"g_idx": torch.arange(K) % 3})
    finish(layer)
    assert "g_idx" not in dict(layer.named_parameters())  # vLLM 0.32 has none
    assert said[0].splitlines()[:2] == [
        "rac: 0 of 1 quantized layers run on an int4 kernel",
        "  vLLM's own method because switched off by a test: 1 layer, such as a.column",
    ]


@pytest.mark.parametrize(
    ("bits", "symmetric", "desc_act", "why"),
    [
        (4, False, False, "bits=4, sym=False"),
        (3, True, False, "bits=3, sym=True"),
        (4, True, True, r"desc_act=True\) is no longer supported"),
    ],
)
def test_neither_kernel_runs_it(monkeypatch, bits, symmetric, desc_act, why):
    """vLLM's reason and ours, and what to do."""
    on_rank(monkeypatch, 0, 1)
    without_kernels(monkeypatch)
    config = RacSparseConfig.from_config(config_of("gptq", 32, symmetric, bits, desc_act=desc_act))
    with pytest.raises(
        RacError,
        match=rf"^a\.row: the int{bits} kernel .*switched off by a test, and vLLM's own .*{why}",
    ):
        make("row", config)


def test_what_is_left_to_vllm_and_refused_there():
    def create(layer, *sizes, **attributes):
        raise ValueError("no, says vLLM")

    summary = Summary()
    method = SimpleNamespace(
        create_weights=create, process_weights_after_loading=lambda layer: None
    )
    left = left_to_vllm(method, summary, "a.b", "its weights are int8")
    with pytest.raises(
        RacError,
        match=r"^a\.b: no kernel .* its weights are int8, and vLLM does not either \(no, says vLLM\)",
    ):
        left.create_weights(None, 1, 2)
    assert summary.expected == 1


def test_the_order_of_a_layer_that_is_left_to_vllm(monkeypatch):
    """It is taken from the file and checked, since vLLM's own method has no parameter for it."""
    on_rank(monkeypatch, 0, 1)
    summary, layer = Summary(), torch.nn.Module()
    method = SimpleNamespace(
        create_weights=lambda layer: None,
        process_weights_after_loading=lambda layer: done.append(hasattr(layer, "g_idx")),
    )
    done: list[bool] = []
    left = left_to_vllm(method, summary, "a.b", "its weights are int8")
    left.create_weights(layer)
    load(layer, None, {"g_idx": torch.zeros(8, dtype=torch.int32)})
    with pytest.raises(RacError, match=r"^a\.b\.g_idx: its columns are reordered"):
        load(layer, None, {"g_idx": torch.tensor([0, 1, 0, 1])})
    left.process_weights_after_loading(layer)
    assert done == [False]


def test_a_missing_order(monkeypatch):
    """Where config.json says that columns may be reordered, a checkpoint without their order is not taken for one in order."""
    on_rank(monkeypatch, 0, 1)
    layer = make("column", RacSparseConfig.from_config(config_of("gptq", 32, True, desc_act=True)))
    parts, _ = tensors(torch.randn(64, K), 32, True)
    load(layer, None, {part: tensor for part, tensor in parts.items() if part != "g_idx"})
    with pytest.raises(RacError, match=r"^a\.column\.g_idx: missing"):
        finish(layer)


def test_vllm_loads_its_rows_by_our_method():
    """Where a method is not in this list, the loaders of layers cut another parameter than they are given."""
    assert GptqAwqLinearMethod.__name__ in WEIGHT_LOADER_V2_SUPPORTED


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_as_vllm_reads_it(monkeypatch, symmetric):
    """vLLM's own conversion gives the same codes and codes of zero."""
    on_rank(monkeypatch, 0, 1)
    weight = drawn(32, 64, 32, symmetric, least=0)
    parts = awq(weight)
    layer = torch.nn.Module()
    for part, tensor in parts.items():
        layer.register_parameter(part, torch.nn.Parameter(tensor.clone(), requires_grad=False))
    auto_awq._convert_awq_to_standard_format(layer, "qweight", "qzeros", 4)
    codes = unpack_quantized_values_into_int32(layer.qweight.data, scalar_types.uint4, 0).T
    zeros = unpack_quantized_values_into_int32(layer.qzeros.data, scalar_types.uint4, 0)
    meant = (codes.view(32, 2, 32) - zeros[:, :, None]) * parts["scales"].T.float()[:, :, None]
    found = check_awq(parts, "m", 32, symmetric).weight.dequantized(torch.float32)
    torch.testing.assert_close(found, meant.view(32, 64), rtol=0, atol=0)


def test_gptq_as_vllm_reads_it():
    """vLLM's own unpacking, with the code of zero of its type for symmetric weights."""
    weight = drawn(32, 64, 32, True)
    parts = gptq(weight)
    codes = (
        unpack_quantized_values_into_int32(parts["qweight"], scalar_types.uint4b8, 0).T
        - scalar_types.uint4b8.bias
    )
    meant = codes.reshape(32, 2, 32) * parts["scales"].T.float()[:, :, None]
    found = check_gptq(parts, "m", 4, 32, True, "gptq").weight.dequantized(torch.float32)
    torch.testing.assert_close(found, meant.view(32, 64), rtol=0, atol=0)
