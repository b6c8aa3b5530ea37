"""What `make gpu-check` uses of vLLM's kernels: their writers, which need no GPU, and the arguments of their products."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

from tests.vllm_plugin.vllm_fixtures import needs_vllm

needs_vllm()

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_marlin_writes_int4_of_a_weight_and_takes_our_arguments(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_contenders

    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    contender = gpu_contenders.CONTENDERS["dense int4"]
    parts = contender.parts(weight)
    assert contender.exact(weight, parts).shape == (64, 256)
    largest = (
        weight.double()
        .unflatten(1, (2, 128))
        .abs()
        .amax(-1, keepdim=True)
        .expand(-1, -1, 128)
        .flatten(1)
    )
    assert ((contender.exact(weight, parts) - weight.double()).abs() <= largest / 8 + 1e-2).all()
    assert parts["values"].nbytes == 64 * 256 // 2
    assert parts["scale"].shape == (2, 64)
    _, product, _ = gpu_contenders._marlin()
    names = list(inspect.signature(product).parameters)
    assert names[:8] == [
        "input", "weight", "weight_scale", "weight_zp", "workspace", "wtype", "output_size_per_partition",
        "input_size_per_partition",
    ]  # fmt: skip


def test_machetes_words_are_of_the_rounded_weight_and_its_operators_take_our_arguments(
    monkeypatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_contenders

    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact, words, scale = gpu_contenders.machete_words(weight)
    assert (words.shape, words.stride(), scale.shape) == ((32, 64), (1, 32), (2, 64))
    codes = (
        torch.stack([words >> 4 * n & 15 for n in range(8)], dim=1).flatten(0, 1).t()
    )  # [64, 256]
    found = (codes - 8) * scale.t().repeat_interleave(128, dim=1)
    assert torch.equal(found.to(exact.dtype), exact)
    ops, *_ = gpu_contenders._machete()
    assert list(inspect.signature(ops.machete_prepack_B).parameters)[:4] == [
        "b_q_weight", "a_type", "b_type", "group_scales_type",
    ]  # fmt: skip
    taken = {"a", "b_q", "b_type", "b_group_scales", "b_group_zeros", "b_group_size"}
    assert taken <= set(inspect.signature(ops.machete_mm).parameters)
    assert list(inspect.signature(ops.cutlass_scaled_mm).parameters)[:5] == [
        "a", "b", "scale_a", "scale_b", "out_dtype",
    ]  # fmt: skip
