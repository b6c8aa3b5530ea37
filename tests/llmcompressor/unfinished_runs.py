"""Runs that end before they are finished, what they leave, and what is compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from rac_modifier.llmcompressor.resume import FinishedGroups

GROUPS = 8  # four in each of the tiny model's two layers


RECOVERED = {
    "quantization": {"config_groups": {"all": {"weights": {"num_bits": 8, "strategy": "channel"}}}},
    "recover": {"tokens": 300, "held_out_tokens": 100, "step_tokens": 128},
}


class Killed(BaseException):
    """Ends a run as a kill does, as far as it matters here: nothing more is pruned or written."""


def result(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Of a saved checkpoint, the record without its times, and the bytes of its weights."""
    record = json.loads((folder / "rac_run.json").read_text())
    record.pop("time")
    for part in record.get("recovery", {}), record:
        part.pop("seconds", None), part.pop("cpu_seconds", None)
    return record, {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def everything(folder: Path) -> dict[str, tuple[bytes, int]]:
    """What is in a folder, and when it was written."""
    return {
        path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(folder.iterdir())
    }


def modules() -> list[torch.nn.Linear]:
    torch.manual_seed(0)
    return [torch.nn.Linear(3, 2, bias=False) for _ in range(5)]


def written(folder: Path, about: dict[str, Any]) -> Path:
    groups = FinishedGroups(folder, about)
    groups.begin({"calibration set": "a"})
    groups.add({"m": modules()[0]}, {"m": {}}, {})
    return next(folder.glob("*.safetensors"))
