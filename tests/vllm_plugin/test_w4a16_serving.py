"""A tiny W4A16 model served on the int4 kernel: greedy tokens in float32 equal transformers' on the dequantized weights."""

from __future__ import annotations

import pytest

from tests.vllm_plugin.vllm_fixtures import needs_vllm, reference, serve

needs_vllm()

from rac_modifier.kernels.cpu.support import support  # noqa: E402
from rac_modifier.vllm_plugin import dense_linear  # noqa: E402
from tests.vllm_plugin.w4a16 import rounded_here, save_w4a16  # noqa: E402

TOKENS = 12


@pytest.mark.slow
@pytest.mark.skipif(support().isa in (None, "portable"), reason=support().reason)
@pytest.mark.parametrize(("group", "symmetric"), [(32, False), (None, True)])
def test_greedy_tokens_on_request(tmp_path, monkeypatch, group, symmetric):
    said: list[str] = []
    monkeypatch.setattr(dense_linear.logger, "info", lambda message, *arguments: said.append(message % arguments))
    save_w4a16(tmp_path / "model", tmp_path / "meant", group, symmetric)
    tokens, methods = serve(tmp_path / "model", TOKENS, quantization="rac-sparse")
    assert tokens == reference(tmp_path / "meant", TOKENS)
    assert methods["model.layers.0.self_attn.o_proj"] == "UnquantizedLinearMethod"  # ignored
    (text,) = said
    assert text.startswith("rac-sparse: 7 of 7 quantized layers run on an int4 kernel\n")


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
def test_stock_vllm_serves_what_is_rounded_here(tmp_path, symmetric):
    """Its CPU kernel takes zero points of 4 bits as they are packed, and no other number of bits."""
    save_w4a16(tmp_path / "model", tmp_path / "meant", 32, symmetric, rounding=rounded_here)
    tokens, methods = serve(tmp_path / "model", TOKENS)
    assert tokens == reference(tmp_path / "meant", TOKENS)
    assert methods["model.layers.0.mlp.down_proj"] == "CompressedTensorsLinearMethod"
