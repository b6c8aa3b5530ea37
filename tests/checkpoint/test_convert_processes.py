"""What is unpacked is read by a process without this package. test_peak_memory.py has the memory that it takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from rac_modifier.checkpoint.convert import unpack_model
from rac_modifier.checkpoint.load import load_model
from tests.checkpoint.checkpoint_helpers import Saved

IDS = torch.tensor([[1, 2, 3]])


def test_stock_transformers_loads_what_is_unpacked(saved: Saved, tmp_path: Path) -> None:
    """In a process that never imports this package."""
    folder, expected, _ = saved(shard="60KB")
    unpack_model(folder, tmp_path / "dense")
    save_file(expected | {"logits": logits(folder)}, tmp_path / "expected.safetensors")
    code = f"""
import sys, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained({str(tmp_path / "dense")!r}, output_loading_info=True)
expected = load_file({str(tmp_path / "expected.safetensors")!r})
assert not any(info.values()), info
assert torch.equal(model(torch.tensor([[1, 2, 3]])).logits, expected.pop("logits"))
state = model.state_dict()
assert state.keys() == expected.keys()
assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items())
assert not [name for name in sys.modules if name.startswith("rac_modifier")]
print("same")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout.strip()) == (0, "same"), done.stderr


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder)(IDS).logits
