"""The checks for a GPU, on the fake one: they launch every program, and a wrong result stops them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rac_gpu import check, operator
from rac_gpu.layout import ALL
from rac_gpu.library import Device
from rac_gpu.programs import all_programs

from rac_modifier.errors import RacError
from tests import fake_cusparselt
from tests import fake_gpu as fakes

EVERY = {(layout.title, layout.group, each.name) for layout in ALL for each in all_programs(layout)}


class Graph:
    """What was captured, run again; `stale` replays nothing."""

    stale = False

    def __init__(self, run) -> None:
        self.run = run
        run()

    def replay(self) -> None:
        if not self.stale:
            self.run()


@pytest.fixture
def wrong():
    """A `run_program` with one result 3 % too large."""
    right = operator.run_program

    def changed(device, layout, program, x, data, bias, out):
        right(device, layout, program, x, data, bias, out)
        out[-1, 3] *= 1.03

    return changed


def test_right_programs_and_calls_pass(gpu, monkeypatch):
    names = ["bf16", "int8 g64", "unstructured fp8", "unstructured int4 g128"]
    monkeypatch.setattr(check, "FORMATS", {name: check.FORMATS[name] for name in names})
    rows = list(check.check_programs("cpu", 24, 136))
    assert [row["program"] for row in rows] == [launch.name for launch in gpu.launches[::2]]
    rows += check.check_operator("cpu", ((37, 200),), (1, 9, 257))
    assert all(0 < row["error"] <= 1 for row in rows)


@pytest.mark.parametrize("processors", [58, 148])
def test_every_program_is_launched_on_small_and_large_cards(monkeypatch, processors):
    monkeypatch.setattr(fakes, "emulate_pointers", lambda *arguments: "")
    monkeypatch.setattr(check, "error_of", lambda what, linear, x, *_: float(linear(x)[0, 0]) * 0)
    with fakes.fake_gpu(monkeypatch, Device(0, (8, 9), processors)) as gpu:
        list(check.check_programs("cpu", check.PROGRAMS_SHAPE[0], 136))
    launched = {(launch.layout.title, launch.layout.group, launch.name) for launch in gpu.launches}
    assert launched == EVERY


def test_a_wrong_result_is_an_error_that_names_the_program(gpu, wrong, monkeypatch):
    monkeypatch.setattr(check, "run_program", wrong)
    with pytest.raises(RacError, match=r"rac_24_bf16_r1_t1 of bf16 \[16, 128\], 13 tokens: wrong"):
        list(check.check_programs("cpu", 16, 128))
    monkeypatch.setattr(operator, "run_program", wrong)
    with pytest.raises(RacError, match=r"bf16 \[16, 128\], 1 tokens: wrong by .*uninstall"):
        list(check.check_operator("cpu", ((16, 128),), (1,)))


def test_other_bits_in_the_second_call_are_an_error(gpu, monkeypatch):
    right, calls = operator._fill, []

    def unsteady(device, layout, x, data, bias, out):
        right(device, layout, x, data, bias, out)
        calls.append(0)
        if len(calls) == 2:
            out.view(torch.int16)[0, 0] += 1

    monkeypatch.setattr(operator, "_fill", unsteady)
    with pytest.raises(RacError, match="other bits in the second call"):
        list(check.check_operator("cpu", ((16, 128),), (1,)))


def test_prompts_on_cusparselt_are_checked_in_every_2_of_4_format(gpu, monkeypatch):
    fake_cusparselt.install(monkeypatch)
    monkeypatch.delenv("RAC_GPU_PROMPTS")
    monkeypatch.setattr(check, "PROMPTS_SHAPE", (32, 256))
    missing: dict[str, str] = {}
    rows = list(check.check_prompts("cpu", missing))
    names = [name for name, kind in check.FORMATS.items() if kind[2]]
    assert [row["format"] for row in rows] == [name for name in names for _ in range(2)]
    assert (missing, gpu.launches) == ({}, [])

    def changed(*arguments: object, **options: object) -> torch.Tensor:
        y = fake_cusparselt.sparse_mm(*arguments, **options)
        y[2, 3] *= 1.03
        return y

    monkeypatch.setattr(torch, "_cslt_sparse_mm", changed)
    with pytest.raises(RacError, match=r"cuSPARSELt, bf16 \[32, 256\], 257 tokens: wrong by"):
        list(check.check_prompts("cpu", missing))
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert list(check.check_prompts("cpu", missing)) == []
    assert missing == {"prompts by cuSPARSELt": f"torch {torch.__version__} has none"}


def test_a_stale_graph_is_an_error(monkeypatch):
    monkeypatch.setattr(check, "captured", Graph)
    check.check_graph("bf16", lambda x: x * 2, torch.zeros(8, 16))
    monkeypatch.setattr(Graph, "stale", True)
    with pytest.raises(RacError, match="bf16, 8 tokens: the captured graph is wrong"):
        check.check_graph("bf16", lambda x: x * 2, torch.zeros(8, 16))


def test_the_record_holds_what_was_checked_before_an_error(monkeypatch, tmp_path):
    def graphs(device: str) -> None:
        raise RacError("graphs are wrong")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(check, "check_programs", lambda *_: [{"error": 0.5}])
    monkeypatch.setattr(check, "check_operator", lambda *_: [{"error": 0.25}])
    monkeypatch.setattr(check, "check_graphs", graphs)
    with pytest.raises(SystemExit, match="graphs are wrong"):
        check.main(["--json", str(tmp_path / "gpu.json")])
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert (record["finished"], record["error"]) == (False, "graphs are wrong")
    assert record["operator"] == [{"error": 0.25}]
    check.main(["--json", str(tmp_path / "gpu.json"), "--small"])
    assert json.loads((tmp_path / "gpu.json").read_text())["finished"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_ends_in_one_line():
    command = [sys.executable, "-m", "rac_gpu.check"]
    finished = subprocess.run(
        command, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    assert finished.returncode == 1
    assert finished.stderr == "torch finds no CUDA device; run this on a machine with a GPU\n"
