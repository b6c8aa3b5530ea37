"""Recovery of a quantized sparse model that is killed 20 times at any moment ends as the undisturbed run, bit by bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.started import ROOT


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.recovery.killed_runs", "20"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["kills"] == 20
    # a kill costs the step that it interrupts; without its state, each life would begin with the first step
    assert told["began"] <= told["ended"] * told["steps"] + 20
    expected = load_file(tmp_path / "undisturbed" / "result.safetensors")
    assert float(expected["curve"].min()) < float(expected["curve"][0])
    for number in range(told["ended"]):
        found = load_file(tmp_path / f"killed-{number}" / "result.safetensors")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
