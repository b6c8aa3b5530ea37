"""On a GPU, if there is one: products, graphs, and that the driver takes what NVRTC makes. `make gpu-check` runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("RAC_GPU_KERNELS", "on")
    monkeypatch.setenv("RAC_GPU_CACHE", str(tmp_path / "kernels"))
    import gpu_kernels

    return gpu_kernels


def test_products_are_right(benchmark):
    """Within a minute; `make gpu-check` has ten in all."""
    assert len(list(benchmark.check("cuda", benchmark.ODD_SHAPES, benchmark.TOKENS, benchmark.Budget(60)))) > 50


def test_captured_graphs_compute_the_same(benchmark):
    benchmark.check_graphs("cuda")


def test_a_stream_that_is_not_the_default_one(benchmark):
    linear = benchmark.packed_linear(benchmark.random_weight(64, 256))
    x = torch.randn(4, 256, device="cuda").bfloat16()
    expected = linear(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        found = linear(x)
    torch.cuda.synchronize()
    assert torch.equal(found, expected)
