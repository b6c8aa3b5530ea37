"""What `make gpu-check` runs first: its time, what it writes, and that it needs a GPU. test_gpu_correct.py has the checks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rac_modifier.errors import RacError
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


def test_a_run_inside_compute_sanitizer_that_takes_too_long_is_ended_and_named(
    benchmark, monkeypatch
):
    def run(command, timeout):
        if "racecheck" in command:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(benchmark.shutil, "which", lambda tool: tool)
    monkeypatch.setattr(benchmark.subprocess, "run", run)
    budget = benchmark.Budget(100.0)
    assert benchmark.sanitize(budget) == ["memcheck"]
    assert budget.left_out == ["compute-sanitizer racecheck"]
    monkeypatch.setattr(
        benchmark.subprocess,
        "run",
        lambda command, timeout: subprocess.CompletedProcess(command, 9),
    )
    with pytest.raises(RacError, match="compute-sanitizer memcheck found an error"):
        benchmark.sanitize(budget)


def test_a_dry_run_says_how_much_there_is_to_do(benchmark, monkeypatch):
    import gpu_budget

    monkeypatch.setattr(gpu_budget, "_SAMPLE", (32, 256))
    monkeypatch.setattr(gpu_budget, "_compiling", lambda kernels: f"{sum(kernels)} kernels")
    lines = list(
        gpu_budget.plan((40, 264), ((16, 128), (37, 200)), (1, 8), {"o": (64, 128)}, (1, 2048), 3)
    )
    assert lines[0].startswith(
        f"checks: 168 programs and {2 * len(benchmark.FORMATS) * 2} products"
    )
    assert lines[1].endswith("6 rounds of all contenders")
    assert "ns per weight" in lines[2]
    names = {each.name for layout in ALL for each in all_programs(layout)}
    assert len(names) < int(
        lines[3].split()[1]
    )  # of some layouts they are compiled anew, for other groups


@pytest.fixture
def parts(benchmark, monkeypatch: pytest.MonkeyPatch):
    """A run whose parts return at once; `wrong` names the one that finds something wrong."""
    state = {"wrong": ""}

    def part(name: str, *found: object):
        def act(*arguments: object):
            if state["wrong"] == name:
                raise RacError(f"{name} is wrong")
            return found[0] if found else None

        monkeypatch.setattr(benchmark, name, act)

    part("check_programs", [{"program": "r1_t1", "error": 0.5}])
    part("check", [{"format": "bf16", "error": 0.5}])
    part("check_streams")
    part("check_graphs")
    part("check_prompts", [{"format": "bf16", "tokens": 257, "error": 0.5}])
    part("sanitize", ["memcheck"])
    part("launch_overhead", {"graph": 2.0, "called": 9.0})
    row = {
        "layer": "o",
        "rows": 4096,
        "columns": 4096,
        "tokens": 1,
        "contender": "2:4",
        "us": 3.0,
        "GB/s": 9.0,
        "faster": 1.5,
    }
    part("times", [row])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    return state


def run_with(benchmark, monkeypatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu_kernels.py", *map(str, arguments)])
    benchmark.main()


def test_everything_is_written(benchmark, parts, monkeypatch, tmp_path, capsys):
    run_with(benchmark, monkeypatch, "--json", tmp_path / "gpu.json")
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["finished"] is True
    assert set(record) == {
        *(
            "device",
            "torch",
            "finished",
            "programs",
            "checked",
            "prompts",
            "sanitizer",
            "launch",
            "times",
            "missing",
        ),
        "left_out",
    }
    assert [row["contender"] for row in record["times"]] == ["2:4"]
    assert "a GPU: 1 programs are right" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wrong", "kept"),
    [
        ("check_programs", set()),
        ("check_streams", {"programs", "checked"}),
        ("check_prompts", {"programs", "checked", "missing"}),
        ("sanitize", {"programs", "checked", "prompts", "missing"}),
        ("times", {"programs", "checked", "prompts", "sanitizer", "launch", "times", "missing"}),
    ],
)
def test_what_was_finished_before_an_error_is_written_with_the_error(
    benchmark, parts, monkeypatch, tmp_path, wrong, kept
):
    parts["wrong"] = wrong
    with pytest.raises(RacError, match=f"{wrong} is wrong"):
        run_with(benchmark, monkeypatch, "--json", tmp_path / "gpu.json")
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert (record["finished"], record["error"]) == (False, f"{wrong} is wrong")
    assert set(record) == {"device", "torch", "finished", "error", "left_out", *kept}


def test_a_run_that_is_ended_from_outside_keeps_what_it_finished(
    benchmark, parts, monkeypatch, tmp_path
):
    def interrupted(budget: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(benchmark, "sanitize", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_with(benchmark, monkeypatch, "--json", tmp_path / "gpu.json")
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["finished"] is False
    assert record["checked"] == [{"format": "bf16", "error": 0.5}]


def test_under_compute_sanitizer_programs_and_products_alone_run(
    benchmark, parts, monkeypatch, tmp_path, capsys
):
    parts["wrong"] = "check_streams"  # which does not run
    run_with(benchmark, monkeypatch, "--only-check")
    assert "1 programs are right\n1 products are right\n" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_in_one_line():
    done = subprocess.run(
        [sys.executable, BENCHMARKS / "gpu_kernels.py"], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr == "torch finds no CUDA device; run this on a machine with a GPU\n"
