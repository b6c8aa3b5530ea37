"""Recovery of a quantized sparse model that is killed 20 times at any moment ends as the undisturbed run, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import forked
from tests.recovery import killed_runs


@pytest.mark.slow
def test_twenty_kills(tmp_path: Path) -> None:
    done = forked.run(killed_runs.main, ["20"], tmp_path)
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
