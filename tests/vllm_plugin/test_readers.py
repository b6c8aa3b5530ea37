"""Each reader against vLLM's own reading of the same words."""

from __future__ import annotations

import pytest
import torch

from tests.vllm_plugin.vllm_fixtures import needs_vllm, on_rank

needs_vllm()

from vllm.model_executor.layers.quantization import auto_awq  # noqa: E402
from vllm.model_executor.layers.quantization.utils.quant_utils import (  # noqa: E402
    unpack_quantized_values_into_int32,
)
from vllm.scalar_type import scalar_types  # noqa: E402

from rac_modifier.errors import RacError  # noqa: E402
from rac_modifier.vllm_plugin.layouts import CodesLayout, Layout, WordsLayout  # noqa: E402
from tests.checkpoint.gptq_awq_tensors import awq, drawn, gptq  # noqa: E402
from tests.vllm_plugin.layer_kinds import FORMS, K  # noqa: E402
from tests.vllm_plugin.stored_forms import awq_config, gptq_config, quantization  # noqa: E402
from tests.vllm_plugin.test_layouts import group  # noqa: E402

SCALE = torch.full((64, 1), 0.5)


def reader_of(form: str):
    """The reader of a layer "m"."""
    layout = FORMS[form].config().layout
    assert isinstance(layout, Layout)
    return layout.reader(torch.nn.Linear(K, 64), ["m"])


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("2:4", {"weight": torch.ones(64, K)}, "weight: stored both dense and packed"),
        ("2:4", {"bitmask": None}, "bitmask: missing"),
        ("pruned", {"weight": None}, "weight: missing"),
        ("pruned", {"weight": torch.ones(K)}, r"weight: shape \[96\] is not that of a matrix"),
        ("2:4 int8", {"weight_scale": None}, "weight_scale: missing"),
        ("2:4 int8", {"weight_scale": torch.ones(63, 1)}, "weight_scale: .*shape"),
        ("2:4 int8", {"weight_scale": SCALE * float("nan")}, "weight_scale: .*not finite"),
        ("2:4 int8", {"weight_zero_point": torch.zeros(64, 1)}, "weight_zero_point: .*symmetric"),
        ("int4", {"weight_packed": None}, "weight_packed: missing"),
        ("int4", {"weight": torch.ones(64, K)}, "weight: not quantized, but .* it is int4"),
        ("int4", {"weight_g_idx": torch.zeros(K)}, "weight_g_idx: its columns were reordered"),
        ("int4", {"weight_zero_point": torch.zeros(8, 3)}, "weight_zero_point: must not be there"),
        ("gptq", {"qweight": None}, "qweight: missing"),
        ("gptq", {"weight": torch.ones(64, K)}, r"weight: torch.float32 next to .*'qweight'"),
        ("gptq reordered", {"g_idx": None}, "g_idx: missing"),
        ("awq", {"g_idx": torch.zeros(K)}, "g_idx: AWQ does not reorder columns"),
    ],
)
def test_what_is_damaged_is_named(form, change, message):
    weight = torch.randn(64, K)
    weight.view(-1, 2)[:, 0] = 0
    tensors = {**FORMS[form].store(weight)[0], **change}
    with pytest.raises(RacError, match=f"^m.{message}"):
        reader_of(form).read({k: v for k, v in tensors.items() if v is not None}, "m")


def test_codes_in_floats_where_config_json_quantizes_them():
    layout = CodesLayout(quantization(config_groups={"g": group(["a.q"])}))
    reader = layout.reader(torch.nn.Linear(K, 64), ["a.q", "a.k"])
    weight = torch.randn(64, K)
    assert reader.read({"weight": weight}, "a.k").weight is weight
    with pytest.raises(RacError, match=r"a\.k\.weight: torch.int8 next to"):
        reader.read({"weight": weight.to(torch.int8)}, "a.k")


@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_as_vllm_reads_it(monkeypatch, symmetric):
    """vLLM's own conversion gives the same codes and codes of zero."""
    on_rank(monkeypatch, 0, 1)
    parts = awq(drawn(32, 64, 32, symmetric))
    layer = torch.nn.Module()
    for part, tensor in parts.items():
        layer.register_parameter(part, torch.nn.Parameter(tensor.clone(), requires_grad=False))
    auto_awq._convert_awq_to_standard_format(layer, "qweight", "qzeros", 4)
    codes = unpack_quantized_values_into_int32(layer.qweight.data, scalar_types.uint4, 0).T
    zeros = unpack_quantized_values_into_int32(layer.qzeros.data, scalar_types.uint4, 0)
    meant = (codes.view(32, 2, 32) - zeros[:, :, None]) * parts["scales"].T.float()[:, :, None]
    result = WordsLayout(awq_config(32, symmetric)).read(parts, "m")
    torch.testing.assert_close(result.dense(torch.float32), meant.view(32, 64), rtol=0, atol=0)


def test_gptq_as_vllm_reads_it():
    """vLLM's own unpacking, with the code of zero of its type for symmetric weights."""
    parts = gptq(drawn(32, 64, 32, True))
    bias = scalar_types.uint4b8.bias
    words = unpack_quantized_values_into_int32(parts["qweight"], scalar_types.uint4b8, 0)
    codes = words.T - bias
    meant = codes.reshape(32, 2, 32) * parts["scales"].T.float()[:, :, None]
    result = WordsLayout(gptq_config()).read(parts, "m")
    torch.testing.assert_close(result.dense(torch.float32), meant.view(32, 64), rtol=0, atol=0)


def test_the_bits_of_a_module_are_those_of_its_rule():
    layout = WordsLayout(gptq_config(dynamic={r"+:a\.down": {"bits": 3}}))
    weight = drawn(64, 96, 32, True, 3)
    result = layout.read(gptq(weight), "a.down")
    torch.testing.assert_close(result.dense(torch.float32), weight.meant, rtol=0, atol=0)
    with pytest.raises(RacError, match=r"^a\.up\."):
        layout.read(gptq(weight), "a.up")
