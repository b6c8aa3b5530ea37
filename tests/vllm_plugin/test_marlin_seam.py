"""What `make gpu-check` uses of vLLM's Marlin: its writer, which needs no GPU, and the arguments of its product."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

from tests.vllm_plugin.vllm_fixtures import needs_vllm

needs_vllm()

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_marlin_writes_int4_of_a_weight_and_takes_our_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_contenders

    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    contender = gpu_contenders.CONTENDERS["dense int4"]
    parts = contender.parts(weight)
    assert contender.exact(weight, parts).shape == (64, 256)
    largest = weight.double().unflatten(1, (2, 128)).abs().amax(-1, keepdim=True).expand(-1, -1, 128).flatten(1)
    assert ((contender.exact(weight, parts) - weight.double()).abs() <= largest / 8 + 1e-2).all()
    assert parts["values"].nbytes == 64 * 256 // 2
    assert parts["scale"].shape == (2, 64)
    _, product, _ = gpu_contenders._marlin()
    names = list(inspect.signature(product).parameters)
    assert names[:8] == [
        "input", "weight", "weight_scale", "weight_zp", "workspace", "wtype", "output_size_per_partition",
        "input_size_per_partition",
    ]  # fmt: skip
