"""A tiny W4A16 model served on our kernels: greedy tokens in float32 equal transformers' on the dequantized weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.vllm_plugin.vllm_fixtures import needs_vllm, reference, serve, served_log_probabilities

needs_vllm()

from rac_modifier.checkpoint.load import load_model  # noqa: E402
from rac_modifier.kernels.cpu.support import support  # noqa: E402
from rac_modifier.vllm_plugin import load_report  # noqa: E402
from tests.vllm_plugin.w4a16 import rounded_here, save_w4a16  # noqa: E402

TOKENS = 12


@pytest.mark.slow
@pytest.mark.skipif(support().isa in (None, "portable"), reason=support().reason)
@pytest.mark.parametrize(("group", "symmetric"), [(32, False), (None, True)])
def test_greedy_tokens_on_request(tmp_path, monkeypatch, group, symmetric):
    said: list[str] = []
    monkeypatch.setattr(
        load_report.logger, "info", lambda message, *arguments: said.append(message % arguments)
    )
    save_w4a16(tmp_path / "model", tmp_path / "meant", group, symmetric)
    tokens, methods = serve(tmp_path / "model", TOKENS, quantization="rac")
    assert tokens == reference(tmp_path / "meant", TOKENS)
    assert methods["model.layers.0.self_attn.o_proj"] == "UnquantizedLinearMethod"  # ignored
    (text,) = said
    assert text.startswith("rac: 7 of 7 compressed layers run on a kernel\n")


@pytest.mark.slow
@pytest.mark.skipif(support().isa in (None, "portable"), reason=support().reason)
@pytest.mark.parametrize(("bits", "symmetric"), [(3, True), (2, False)])
def test_log_probabilities_of_few_bits(tmp_path, monkeypatch, bits, symmetric):
    said: list[str] = []
    monkeypatch.setattr(
        load_report.logger, "info", lambda message, *arguments: said.append(message % arguments)
    )
    save_w4a16(
        tmp_path / "model", tmp_path / "meant", 32, symmetric, rounding=rounded_here, bits=bits
    )
    sequences = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    found = served_log_probabilities(tmp_path / "model", sequences, quantization="rac")
    torch.testing.assert_close(
        found, expected_log_probabilities(tmp_path / "meant", sequences), rtol=0, atol=1e-3
    )
    (text,) = said
    assert text.startswith(
        f"rac: 7 of 7 compressed layers run on a kernel\n  int{bits} kernel {support().isa}: 7 layers"
    )


def expected_log_probabilities(folder: Path, sequences: torch.Tensor) -> torch.Tensor:
    """Those of transformers on the dequantized weights, in float32."""
    with torch.inference_mode():
        scores = load_model(folder, dtype="float32")(sequences).logits.log_softmax(-1)
    return scores[:, :-1].gather(-1, sequences[:, 1:, None])[..., 0]


@pytest.mark.slow
@pytest.mark.parametrize("symmetric", [True, False])
def test_stock_vllm_serves_what_is_rounded_here(tmp_path, symmetric):
    """Its CPU kernel takes 4 bits, zero points too, in bfloat16: errors are near those of the same weights, dense."""
    if not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        pytest.skip("vLLM has no int4 kernel for this processor")
    save_w4a16(tmp_path / "model", tmp_path / "meant", 32, symmetric, rounding=rounded_here)
    sequences = torch.randint(0, 256, (4, 64), generator=torch.Generator().manual_seed(0))
    expected = expected_log_probabilities(tmp_path / "meant", sequences)
    errors = [
        float(
            (served_log_probabilities(tmp_path / name, sequences, dtype="bfloat16") - expected)
            .abs()
            .mean()
        )
        for name in ("model", "meant")
    ]
    assert 0 < errors[0] <= 4 * errors[1], errors  # twice was found
