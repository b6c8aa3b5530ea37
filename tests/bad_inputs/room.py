"""What does not fit on the disk, on the accelerator or in memory."""

from __future__ import annotations

import shutil

import torch

from tests.bad_inputs.bench import Bench, Cases
from tests.tiny import entry

CASES = Cases()


@CASES.case("no room on disk for what is pruned so far", "and what is pruned so far up to")
def _(b: Bench) -> None:
    size = sum(file.stat().st_size for file in b.folder.glob("*.safetensors"))
    b.monkeypatch.setattr(
        shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 2 * size)
    )
    b.rac_prune()


@CASES.case(
    "traces to be sampled by a model that does not fit on the accelerator",
    "fill the trace store with a server first",
)
def _(b: Bench) -> None:
    from rac_modifier import model_tools
    from rac_modifier.calibration import trace_budget

    for module in (model_tools, trace_budget):
        b.monkeypatch.setattr(module, "accelerator", lambda: torch.device("cuda"))
    b.monkeypatch.setattr(model_tools, "free_bytes", lambda device: 2**20)
    b.prune(settings={"traces": entry(b.tmp / "new.jsonl")["traces"]})


@CASES.case("a model that is larger than the memory of the host", "GiB of the host's memory, and")
def _(b: Bench) -> None:
    b.monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    b.rac_prune()
