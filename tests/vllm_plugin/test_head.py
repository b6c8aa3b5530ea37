"""The head as int8 on request."""

from __future__ import annotations

import pytest
import torch

from tests.vllm_plugin.vllm_fixtures import needs_vllm, without_kernels

needs_vllm()

from rac_modifier.checkpoint.stored_weight import quantize_rows  # noqa: E402
from rac_modifier.errors import RacError  # noqa: E402
from rac_modifier.kernels.choose import BACKENDS  # noqa: E402
from rac_modifier.kernels.cpu.support import support  # noqa: E402
from rac_modifier.vllm_plugin import head  # noqa: E402
from rac_modifier.vllm_plugin.head import Int8HeadMethod, wants_int8  # noqa: E402


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged."""
    lines: list[str] = []
    monkeypatch.setattr(head.logger, "info", lambda message, *arguments: lines.append(message % arguments))
    return lines


def loaded(dtype: torch.dtype, rows: int = 60, columns: int = 120) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.register_parameter("weight", torch.nn.Parameter(torch.randn(rows, columns).to(dtype), requires_grad=False))
    return layer


def test_what_the_environment_requests(monkeypatch):
    for value, wanted in ((None, False), ("", False), ("int8", True)):
        monkeypatch.setenv("RAC_LM_HEAD", value) if value is not None else monkeypatch.delenv("RAC_LM_HEAD", False)
        assert wants_int8() is wanted
    monkeypatch.setenv("RAC_LM_HEAD", "int4")
    with pytest.raises(RacError, match='RAC_LM_HEAD="int4": the head can be int8; unset it'):
        wants_int8()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_are_those_of_the_rounded_head(logged, dtype):
    if support().isa in (None, "portable"):
        pytest.skip(support().reason)
    layer = loaded(dtype)
    values, scale = quantize_rows(layer.weight.data)
    method = Int8HeadMethod()
    method.process_weights_after_loading(layer)
    assert not hasattr(layer, "weight")
    assert layer.weight_packed.numel() < 2 * 64 * 128  # a byte per weight of the padded head, and a header
    assert "the head [60, 120] runs on the int8 kernel" in logged[0]
    x, bias = torch.randn(3, 120).to(dtype), torch.randn(60).to(dtype)
    found = method.apply(layer, x, bias)
    assert found.dtype == dtype
    expected = torch.nn.functional.linear(x.float(), values.float() * scale, bias.float())
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance * 8)


@pytest.mark.parametrize("reason", ["switched off by a test", "there is no sparse kernel for cpu yet"])
def test_without_a_kernel_the_head_stays_and_the_log_has_the_reason(monkeypatch, logged, reason):
    if "switched" in reason:
        without_kernels(monkeypatch)
    else:
        monkeypatch.delitem(BACKENDS, "cpu")
    layer, method = loaded(torch.float32), Int8HeadMethod()
    weight, x = layer.weight.data.clone(), torch.randn(3, 120)
    method.process_weights_after_loading(layer)
    assert logged == [f"RAC_LM_HEAD=int8: the head stays as it is stored: dense because {reason}"]
    torch.testing.assert_close(method.apply(layer, x), x @ weight.T)
