"""The check that runs on a GPU, here on the fake one; that it notices a wrong result; and that it needs a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rac_modifier.errors import RacError
from rac_modifier.kernels.cuda import operator
from rac_modifier.kernels.cuda.layout import ALL
from rac_modifier.kernels.cuda.programs import all_programs
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
    budget = benchmark.Budget(3600)
    rows = list(benchmark.check("cpu", ((16, 128), (37, 200)), (1, 9, 257), budget))
    assert [row["format"] for row in rows] == [name for _ in range(2) for name in benchmark.FORMATS for _ in range(3)]
    assert all(0 < row["error"] <= 1 for row in rows)
    assert budget.left_out == []


def test_what_there_is_no_time_for_is_named(benchmark, monkeypatch):
    moments = iter([0.0, 1.0, 4.0, 3.0, 90.0])
    budget = benchmark.Budget(10.0, lambda: next(moments))
    some = {name: benchmark.FORMATS[name] for name in ("bf16", "int8 g64")}
    monkeypatch.setattr(benchmark, "FORMATS", some)
    rows = list(benchmark.check("cpu", ((16, 128),), (1,), budget))  # 0.35 of 10 seconds are over when int8 would begin
    assert [row["format"] for row in rows] == ["bf16"]
    assert budget.left(0.6) == 3.0
    assert not budget.allows("times of o")
    assert budget.left_out == ["products of int8 g64 [16, 128]", "times of o"]


def test_a_run_inside_compute_sanitizer_that_takes_too_long_is_ended_and_named(benchmark, monkeypatch):
    def run(command, timeout):
        if "racecheck" in command:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(benchmark.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(benchmark.subprocess, "run", run)
    budget = benchmark.Budget(100.0)
    assert benchmark.sanitize(budget) == ["memcheck"]
    assert budget.left_out == ["compute-sanitizer racecheck"]
    monkeypatch.setattr(benchmark.subprocess, "run", lambda command, timeout: subprocess.CompletedProcess(command, 9))
    with pytest.raises(RacError, match="compute-sanitizer memcheck found an error"):
        benchmark.sanitize(budget)


def test_a_dry_run_says_how_much_there_is_to_do(benchmark, monkeypatch):
    import gpu_budget

    monkeypatch.setattr(gpu_budget, "_SAMPLE", (32, 256))
    monkeypatch.setattr(gpu_budget, "_compiling", lambda kernels: f"{sum(kernels)} kernels")
    lines = list(gpu_budget.plan(((16, 128), (37, 200)), (1, 8), {"o": (64, 128)}, (1, 2048), 3))
    assert lines[0].startswith(f"checks: {2 * len(benchmark.FORMATS) * 2} products")
    assert lines[1].endswith("6 rounds of all contenders")
    assert "ns per weight" in lines[2]
    names = {each.name for layout in ALL for each in all_programs(layout)}
    assert len(names) < int(lines[3].split()[1])  # of some layouts they are compiled anew, for other groups


def test_a_wrong_product_is_an_error(benchmark, monkeypatch):
    right = operator._fill

    def wrong(device, layout, x, data, bias, out):
        right(device, layout, x, data, bias, out)
        out[-1, 3] *= 1.03

    monkeypatch.setattr(operator, "_fill", wrong)
    with pytest.raises(RacError, match=r"bf16 \[16, 128\] times 1 tokens: wrong by .*do not set RAC_GPU_KERNELS"):
        list(benchmark.check("cpu", ((16, 128),), (1,), benchmark.Budget(3600)))


def test_other_bits_the_second_time_are_an_error(benchmark, monkeypatch):
    right, calls = operator._fill, []

    def unsteady(device, layout, x, data, bias, out):
        right(device, layout, x, data, bias, out)
        calls.append(0)
        if len(calls) == 2:
            out.view(torch.int16)[0, 0] += 1

    monkeypatch.setattr(operator, "_fill", unsteady)
    with pytest.raises(RacError, match=r"other bits the second time"):
        list(benchmark.check("cpu", ((16, 128),), (1,), benchmark.Budget(3600)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_in_one_line():
    done = subprocess.run([sys.executable, BENCHMARKS / "gpu_kernels.py"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "torch finds no CUDA device; run this on a machine with a GPU\n"
