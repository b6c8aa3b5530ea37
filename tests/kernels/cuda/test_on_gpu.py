"""On a GPU, if there is one: products, graphs, and that the driver takes what NVRTC makes. `make gpu-check` runs them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device"),
]


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    """What gpu_kernels.py compiled is used again: to compile all of it takes a part of the minute that these tests have."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("RAC_GPU_KERNELS", "on")
    import gpu_correct

    return gpu_correct


def test_every_program_is_right(benchmark):
    found = list(
        benchmark.check_programs("cuda", *benchmark.PROGRAMS_SHAPE, benchmark.Budget(3600))
    )
    assert len(found) > 100


def test_products_are_right(benchmark):
    """Within 20 seconds; `make gpu-check` has ten minutes in all."""
    assert (
        len(
            list(
                benchmark.check(
                    "cuda", benchmark.ODD_SHAPES, benchmark.TOKENS, benchmark.Budget(20)
                )
            )
        )
        > 50
    )


def test_captured_graphs_compute_the_same(benchmark):
    benchmark.check_graphs("cuda")


def test_a_stream_that_is_not_the_default_one(benchmark):
    benchmark.check_streams("cuda")
