"""The kernels that ours are timed beside: a wrong or missing one says why, and the weights are what they say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_contenders

    return gpu_contenders


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(32, 128, generator=torch.Generator().manual_seed(0)).bfloat16()


def with_product(benchmark, monkeypatch, product):
    """The FP8 contender with a product that needs no GPU."""
    contender = replace(benchmark.CONTENDERS["dense fp8"], run=product)
    monkeypatch.setitem(benchmark.CONTENDERS, "dense fp8", contender)


def right(x, parts):
    return (
        (x[0].double() * x[1].double()) @ (parts["values"].double() * parts["scale"].double()).T
    ).bfloat16()


def test_fp8_parts_are_the_rounded_weight(benchmark, weight):
    parts = benchmark.CONTENDERS["dense fp8"].parts(weight)
    exact = parts["values"].double() * parts["scale"].double()
    assert parts["scale"].shape == (32, 1)
    largest = weight.double().abs().amax(1, keepdim=True)
    assert ((exact - weight.double()).abs() <= weight.double().abs() / 16 + largest / 448).all()


def test_a_right_product_gives_as_many_copies_as_asked_for(benchmark, monkeypatch, weight):
    with_product(benchmark, monkeypatch, right)
    first, second = benchmark.prepared("dense fp8", weight, 2)
    assert first.keys() == {"values", "scale"}
    assert first["values"].data_ptr() != second["values"].data_ptr()


def test_a_wrong_product_is_not_timed(benchmark, monkeypatch, weight):
    def wrong(x, parts):
        y = right(x, parts)
        y[3, 5] += 1
        return y

    with_product(benchmark, monkeypatch, wrong)
    with pytest.raises(benchmark.NotHereError, match="its product is wrong"):
        benchmark.prepared("dense fp8", weight, 1)


def test_a_contender_that_this_machine_lacks_says_why_and_the_others_are_timed(
    benchmark, monkeypatch
):
    import gpu_kernels

    def fails(x, parts):
        raise RuntimeError("needs compute capability 8.9\nand more")

    with_product(benchmark, monkeypatch, fails)
    monkeypatch.setattr(gpu_kernels, "CYCLED_BYTES", 3 * 2 * 32 * 128)
    missing: dict[str, str] = {}
    found = gpu_kernels.theirs(32, 128, "cpu", missing)
    assert missing["dense fp8"] == "needs compute capability 8.9"
    assert "dense int4" in missing
    assert len(found["dense bf16"].products) == 3
    assert "dense fp8" not in found
    with_product(benchmark, monkeypatch, right)
    del missing["dense fp8"]
    timed = gpu_kernels.theirs(32, 128, "cpu", missing)["dense fp8"]
    assert timed.size == 32 * 128 + 4 * 32
    x = torch.randn(2, 128).bfloat16()
    assert timed.products[0](timed.given(x)).shape == (2, 32)


def test_two_of_four_keeps_the_larger_two(benchmark, monkeypatch):
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda pruned: pruned)
    parts = benchmark.CONTENDERS["2:4 by cuSPARSELt"].parts(torch.tensor([[1.0, -4.0, 3.0, 2.0]]))
    assert parts["exact"].tolist() == [[0.0, -4.0, 3.0, 0.0]]
