"""The check that runs on a GPU, here on the fake one; that it notices a wrong result; and that it needs a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.kernels.cuda import operator
from tests.kernels.cuda.fake_gpu import fake_gpu

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    """The module, with a GPU that is not there."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import gpu_kernels

    with fake_gpu(monkeypatch):
        yield gpu_kernels


def test_right_products_pass(benchmark):
    rows = list(benchmark.check("cpu", ((16, 128), (37, 200)), (1, 9, 129)))
    assert [row["format"] for row in rows] == [name for name in benchmark.FORMATS for _ in range(6)]
    assert all(0 < row["error"] <= 1 for row in rows)


def test_a_wrong_product_is_an_error(benchmark, monkeypatch):
    right = operator._fill

    def wrong(device, layout, x, data, bias, out):
        right(device, layout, x, data, bias, out)
        out[-1, 3] *= 1.03

    monkeypatch.setattr(operator, "_fill", wrong)
    with pytest.raises(RacError, match=r"bf16 \[16, 128\] times 1 tokens: wrong by .*do not set RAC_GPU_KERNELS"):
        list(benchmark.check("cpu", ((16, 128),), (1,)))


def test_other_bits_the_second_time_are_an_error(benchmark, monkeypatch):
    right, calls = operator._fill, []

    def unsteady(device, layout, x, data, bias, out):
        right(device, layout, x, data, bias, out)
        calls.append(0)
        if len(calls) == 2:
            out.view(torch.int16)[0, 0] += 1

    monkeypatch.setattr(operator, "_fill", unsteady)
    with pytest.raises(RacError, match=r"other bits the second time"):
        list(benchmark.check("cpu", ((16, 128),), (1,)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_in_one_line():
    done = subprocess.run([sys.executable, BENCHMARKS / "gpu_kernels.py"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "torch finds no CUDA device; run this on a machine with a GPU\n"
