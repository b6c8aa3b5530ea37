"""The head as int8 on request."""

from __future__ import annotations

import pytest
import torch

from tests.vllm_plugin.vllm_fixtures import needs_vllm, without_kernels

needs_vllm()

from rac_modifier.checkpoint.round_to_nearest import quantize_rows  # noqa: E402
from rac_modifier.errors import RacError  # noqa: E402
from rac_modifier.kernels.choose import BACKENDS  # noqa: E402
from rac_modifier.kernels.cpu.support import support  # noqa: E402
from rac_modifier.vllm_plugin import head  # noqa: E402
from rac_modifier.vllm_plugin.head import RoundedHeadMethod, wanted_bits  # noqa: E402


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
    for value, wanted in ((None, None), ("", None), ("int8", 8), ("int4", 4)):
        monkeypatch.setenv("RAC_LM_HEAD", value) if value is not None else monkeypatch.delenv("RAC_LM_HEAD", False)
        assert wanted_bits() == wanted
    monkeypatch.setenv("RAC_LM_HEAD", "int2")
    with pytest.raises(RacError, match='RAC_LM_HEAD="int2": the head can be int8 or int4; unset it'):
        wanted_bits()


@pytest.mark.parametrize(("bits", "columns", "group"), [(8, 120, 120), (4, 256, 128), (4, 192, 64), (4, 96, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_logits_are_those_of_the_rounded_head(logged, dtype, bits, columns, group):
    if support().isa in (None, "portable"):
        pytest.skip(support().reason)
    layer = loaded(dtype, columns=columns)
    weight = layer.weight.data.float()
    if bits == 8:
        values, scale = quantize_rows(weight)
        rounded = values.float() * scale
    else:  # the farthest value of a group is -8 times the scale
        groups = weight.view(60, -1, group)
        farthest = groups.gather(2, groups.abs().argmax(2, keepdim=True))
        scale = (farthest / -8).bfloat16().float()
        rounded = ((groups / scale).round().clamp(-8, 7) * scale).view(60, columns)
    method = RoundedHeadMethod(bits)
    method.process_weights_after_loading(layer)
    assert not hasattr(layer, "weight")
    padded = 64 * -(-columns // 64) * 64 * bits // 8
    assert layer.weight_packed.numel() < padded + 1024  # and a header
    assert f"=int{bits}: the head [60, {columns}] runs on the int{bits} kernel" in logged[0]
    error = float((rounded - weight).norm() / weight.norm())
    assert logged[0].endswith(f"rounding changed its weights by {100 * error:.1f} % of their norm")
    x, bias = torch.randn(3, columns).to(dtype), torch.randn(60).to(dtype)
    found = method.apply(layer, x, bias)
    assert found.dtype == dtype
    expected = torch.nn.functional.linear(x.float(), rounded, bias.float())
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance * 8)


def test_a_head_that_has_no_groups_is_refused():
    with pytest.raises(RacError, match="the head has 120 columns, no multiple of 32; use RAC_LM_HEAD=int8"):
        RoundedHeadMethod(4).process_weights_after_loading(loaded(torch.float32))


@pytest.mark.parametrize("reason", ["switched off by a test", "there is no sparse kernel for cpu yet"])
def test_without_a_kernel_the_head_stays_and_the_log_has_the_reason(monkeypatch, logged, reason):
    if "switched" in reason:
        without_kernels(monkeypatch)
    else:
        monkeypatch.delitem(BACKENDS, "cpu")
    layer, method = loaded(torch.float32), RoundedHeadMethod(8)
    weight, x = layer.weight.data.clone(), torch.randn(3, 120)
    method.process_weights_after_loading(layer)
    assert logged == [f"RAC_LM_HEAD=int8: the head stays as it is stored: dense because {reason}"]
    torch.testing.assert_close(method.apply(layer, x), x @ weight.T)
