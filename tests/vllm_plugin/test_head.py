"""The head and the embedding in 8 or 4 bits on request."""

from __future__ import annotations

import pytest
import torch

from tests.vllm_plugin.vllm_fixtures import needs_vllm, without_kernels

needs_vllm()

from rac_modifier.checkpoint.round_to_nearest import quantize_rows, round_head  # noqa: E402
from rac_modifier.checkpoint.stored_weight import dequantize  # noqa: E402
from rac_modifier.errors import RacError  # noqa: E402
from rac_modifier.kernels.choose import BACKENDS  # noqa: E402
from rac_modifier.kernels.cpu.support import support  # noqa: E402
from rac_modifier.vllm_plugin import head  # noqa: E402
from rac_modifier.vllm_plugin.head import (  # noqa: E402
    EMBEDDING,
    VARIABLE,
    RoundedMethod,
    UntiedHeadMethod,
    wanted_bits,
)


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged."""
    lines: list[str] = []
    monkeypatch.setattr(
        head.logger, "info", lambda message, *arguments: lines.append(message % arguments)
    )
    return lines


def loaded(dtype: torch.dtype, rows: int = 60, columns: int = 120) -> torch.nn.Module:
    layer = torch.nn.Module()
    layer.register_parameter(
        "weight", torch.nn.Parameter(torch.randn(rows, columns).to(dtype), requires_grad=False)
    )
    return layer


def test_what_the_environment_requests(monkeypatch):
    for value, wanted in ((None, None), ("", None), ("int8", 8), ("int4", 4)):
        monkeypatch.setenv("RAC_LM_HEAD", value) if value is not None else monkeypatch.delenv(
            "RAC_LM_HEAD", False
        )
        assert wanted_bits() == wanted
    monkeypatch.setenv("RAC_LM_HEAD", "int2")
    with pytest.raises(
        RacError, match='RAC_LM_HEAD="int2": the head can be int8 or int4; unset it'
    ):
        wanted_bits()
    monkeypatch.setenv("RAC_EMBEDDING", "8")
    with pytest.raises(
        RacError, match='RAC_EMBEDDING="8": the embedding can be int8 or int4; unset it'
    ):
        wanted_bits(EMBEDDING)


@pytest.mark.parametrize(
    ("bits", "columns", "group"), [(8, 120, 120), (4, 256, 128), (4, 192, 64), (4, 96, 32)]
)
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
    method = RoundedMethod(VARIABLE, bits)
    method.process_weights_after_loading(layer)
    assert not hasattr(layer, "weight")
    padded = 64 * -(-columns // 64) * 64 * bits // 8
    assert layer.weight_packed.numel() < padded + 1024  # and a header
    assert f"=int{bits}: the head [60, {columns}] runs on the int{bits} kernel" in logged[0]
    error = float((rounded - weight).norm() / weight.norm())
    assert (
        f"rounding changed its weights by {100 * error:.1f} % of their norm; `rac head` measures"
        in logged[0]
    )
    x, bias = torch.randn(3, columns).to(dtype), torch.randn(60).to(dtype)
    found = method.apply(layer, x, bias)
    assert found.dtype == dtype
    expected = torch.nn.functional.linear(x.float(), rounded, bias.float())
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance * 8)


def test_a_head_that_has_no_groups_is_refused():
    with pytest.raises(
        RacError,
        match=r"RAC_LM_HEAD=int4: the head has 120 columns, no multiple of 32, .*; use int8",
    ):
        RoundedMethod(VARIABLE, 4).process_weights_after_loading(loaded(torch.float32))


@pytest.mark.parametrize(
    "reason", ["switched off by a test", "there is no sparse kernel for cpu yet"]
)
def test_without_a_kernel_the_head_stays_and_the_log_has_the_reason(monkeypatch, logged, reason):
    if "switched" in reason:
        without_kernels(monkeypatch)
    else:
        monkeypatch.delitem(BACKENDS, "cpu")
    layer, method = loaded(torch.float32), RoundedMethod(VARIABLE, 8)
    weight, x = layer.weight.data.clone(), torch.randn(3, 120)
    method.process_weights_after_loading(layer)
    assert logged == [f"RAC_LM_HEAD=int8: the head stays as it is stored: dense because {reason}"]
    torch.testing.assert_close(method.apply(layer, x), x @ weight.T)


def tied_pair(
    dtype: torch.dtype, bits: tuple[int, int] | int
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """An embedding and a head of one weight, each with its method: rounded to the bits given for it."""
    of_embedding, of_head = bits if isinstance(bits, tuple) else (bits, bits)
    embedding, layer = loaded(dtype, columns=96), loaded(dtype, columns=96)
    embedding.params_dtype = dtype
    embedding.quant_method = RoundedMethod(EMBEDDING, of_embedding)
    layer.quant_method = RoundedMethod(VARIABLE, of_head)
    layer.quant_method.tie_weights(layer, embedding)
    return embedding, layer


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_tied_embedding_and_head_share_one_rounded_copy(logged, dtype, bits):
    if support().isa in (None, "portable"):
        pytest.skip(support().reason)
    embedding, layer = tied_pair(dtype, bits)
    weight = embedding.weight.data.clone()
    values, scale = round_head(weight, bits)
    rounded = dequantize(values, scale, torch.float32)
    for module in (embedding, layer):
        module.quant_method.process_weights_after_loading(module)
        assert not hasattr(module, "weight")
    assert layer.weight_packed is embedding.weight_packed
    assert logged[1].endswith("the head is the tied embedding's weight; both share it")
    ids = torch.tensor([[0, 59, 7], [7, 16, 15]])
    assert torch.equal(embedding.quant_method.embedding(embedding, ids), rounded[ids].to(dtype))
    x = torch.randn(2, 96).to(dtype)
    tolerance = 1e-3 if dtype == torch.float32 else 3e-2
    expected = x.float() @ rounded.T
    torch.testing.assert_close(
        layer.quant_method.apply(layer, x).float(), expected, rtol=tolerance, atol=8 * tolerance
    )


def test_a_tied_embedding_that_stays_in_floats_is_said_with_its_bytes(logged):
    if support().isa in (None, "portable"):
        pytest.skip(support().reason)
    embedding, layer = loaded(torch.float32, columns=96), loaded(torch.float32, columns=96)
    method = RoundedMethod(VARIABLE, 8)
    method.tie_weights(layer, embedding)
    assert layer.weight is embedding.weight
    method.process_weights_after_loading(layer)
    assert hasattr(embedding, "weight")
    assert "keeps its own copy of 0.0 MB; RAC_EMBEDDING=int8 lets both share one" in logged[1]


def test_one_weight_has_one_width_and_is_not_kept_twice(monkeypatch):
    with pytest.raises(
        RacError, match=r"RAC_EMBEDDING=int4 and RAC_LM_HEAD=int8: .* one weight; set both alike"
    ):
        tied_pair(torch.float32, (4, 8))
    monkeypatch.setenv("RAC_EMBEDDING", "int8")
    with pytest.raises(RacError, match="embedding is its head, too; set RAC_LM_HEAD=int8 as well"):
        UntiedHeadMethod().tie_weights(loaded(torch.float32), loaded(torch.float32))


def test_without_a_kernel_a_tied_pair_stays_in_floats(monkeypatch, logged):
    without_kernels(monkeypatch)
    embedding, layer = tied_pair(torch.float32, 8)
    for module in (embedding, layer):
        module.quant_method.process_weights_after_loading(module)
    assert layer.weight is embedding.weight
    assert logged[0].startswith(
        "RAC_EMBEDDING=int8: the embedding stays as it is stored: dense because"
    )
    ids = torch.tensor([3, 1])
    assert torch.equal(embedding.quant_method.embedding(embedding, ids), embedding.weight[ids])
