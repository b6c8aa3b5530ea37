"""Tiny GPTQ and AWQ models served on our kernels: greedy tokens in float32 equal transformers' on the dequantized weights."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.vllm_plugin.vllm_fixtures import (
    needs_vllm,
    reference,
    serve,
    served_log_probabilities,
    without_kernels,
)

needs_vllm()

from rac_modifier.kernels.cpu.support import support  # noqa: E402
from rac_modifier.vllm_plugin import load_report  # noqa: E402
from tests.vllm_plugin.gptq_awq import save  # noqa: E402
from tests.vllm_plugin.test_vllm_serving import entry_point  # noqa: E402
from tests.vllm_plugin.test_w4a16_serving import expected_log_probabilities  # noqa: E402

TOKENS = 12
ROOT = Path(__file__).parents[2]
needs_kernel = pytest.mark.skipif(support().isa in (None, "portable"), reason=support().reason)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the log says of the layers."""
    lines: list[str] = []
    monkeypatch.setattr(
        load_report.logger, "info", lambda message, *arguments: lines.append(message % arguments)
    )
    return lines


@pytest.mark.slow
@needs_kernel
@pytest.mark.parametrize(
    ("form", "group", "symmetric", "reorder"),
    [
        ("gptq", 32, True, False),
        ("gptq", 128, False, False),
        ("gptq_v2", None, False, False),
        ("gptq", 32, True, True),
        ("awq", 32, False, False),
        ("awq", 128, True, False),
    ],
)
def test_greedy_tokens(tmp_path, said, form, group, symmetric, reorder):
    save(tmp_path / "model", tmp_path / "meant", form, group, symmetric, reorder=reorder)
    tokens, methods = serve(tmp_path / "model", TOKENS, quantization="rac")
    assert tokens == reference(tmp_path / "meant", TOKENS)
    assert methods["model.layers.0.self_attn.o_proj"] == "RacLinearMethod"  # in floats
    assert methods["model.layers.1.self_attn.o_proj"] == "packed"
    (text,) = said
    assert text.startswith("rac: 7 of 7 compressed layers run on a kernel\n")


@pytest.mark.slow
@needs_kernel
@pytest.mark.parametrize(
    ("form", "bits", "group", "symmetric"),
    [("gptq", 3, 32, True), ("gptq_v2", 3, 32, False), ("gptq", 2, 64, False)],
)
def test_log_probabilities_of_few_bits(tmp_path, said, form, bits, group, symmetric):
    save(tmp_path / "model", tmp_path / "meant", form, group, symmetric, bits)
    sequences = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))
    found = served_log_probabilities(tmp_path / "model", sequences, quantization="rac")
    torch.testing.assert_close(
        found, expected_log_probabilities(tmp_path / "meant", sequences), rtol=0, atol=1e-3
    )
    (text,) = said
    assert text.startswith(
        f"rac: 7 of 7 compressed layers run on a kernel\n  int{bits} kernel {support().isa}: 7 layers"
    )


TWO_RANKS = """
import sys
from pathlib import Path
from tests.vllm_plugin.vllm_fixtures import needs_vllm, serve
if __name__ == "__main__":
    needs_vllm()
    tokens, _ = serve(Path(sys.argv[1]), int(sys.argv[2]), quantization="rac", tensor_parallel_size=2)
    print("tokens:", tokens)
"""


@pytest.mark.slow
@needs_kernel
@pytest.mark.parametrize(("form", "symmetric"), [("gptq", False), ("awq", False)])
def test_two_ranks(tmp_path, form, symmetric):
    """Each rank has some rows of the fused layers, and some columns of the others."""
    save(tmp_path / "model", tmp_path / "meant", form, 32, symmetric)
    script = tmp_path / "two_ranks.py"
    script.write_text(TWO_RANKS)
    path = [str(entry_point(tmp_path / "path")), str(ROOT)]
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "model"), str(TOKENS)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        timeout=400,
    )
    found = [
        line.removeprefix("tokens: ")
        for line in done.stdout.splitlines()
        if line.startswith("tokens: ")
    ]
    assert found == [str(reference(tmp_path / "meant", TOKENS))], done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["gptq", "awq"])
def test_without_kernels_the_weights_run_dense_and_the_log_says_so(
    monkeypatch, tmp_path, said, form
):
    without_kernels(monkeypatch)
    monkeypatch.setattr(load_report.logger, "warning", lambda text, *args: said.append(text % args))
    save(tmp_path / "model", tmp_path / "meant", form, 32, form == "gptq")
    tokens, _ = serve(tmp_path / "model", TOKENS, quantization="rac")
    assert tokens == reference(tmp_path / "meant", TOKENS)
    assert said[0].endswith("--quantization rac has no effect on this model here; leave it out")
