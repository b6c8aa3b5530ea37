"""What packing and unpacking need beside a process of their own: memory, and a loader without this package."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from rac_modifier.checkpoint import new_files
from rac_modifier.checkpoint.convert import left_out, pack_model, unpack_model
from rac_modifier.checkpoint.load import load_model
from rac_modifier.checkpoint.pack_plan import plan_packing
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
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stdout.strip()) == (0, "same"), done.stderr


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder)(IDS).logits


def _memory(source: str, out: str, shard: int, queue: multiprocessing.Queue) -> None:
    """Anonymous memory (not the mapped files) above that at the start, at each file that is written."""

    def anonymous() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("RssAnon:")[2].split()[0])

    plan = plan_packing(source)
    base, most, write = anonymous(), [0], new_files.save_file

    def measured(*args: object, **kwargs: object) -> None:
        most[0] = max(most[0], anonymous() - base)
        write(*args, **kwargs)

    new_files.save_file = measured
    pack_model(plan, out, "m")
    queue.put(most[0] / shard)


def test_memory_for_about_two_files(tmp_path: Path) -> None:
    """Twelve files of 8 MiB."""
    where, size = {}, 8 << 20
    for number in range(12):
        weight = torch.randn(size // 4 // 1024, 1024)
        weight.view(-1, 4)[:, :2] = 0
        file = f"model-{number}.safetensors"
        save_file({f"layers.{number}.up.weight": weight}, tmp_path / file)
        where[f"layers.{number}.up.weight"] = file
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (tmp_path / "config.json").write_text("{}")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_memory, args=(str(tmp_path), str(tmp_path / "out"), size, queue))
    child.start()
    files = queue.get(timeout=60)
    child.join()
    assert files < 2.5 + 24 / 8  # and 24 MiB for steps on chunks of a matrix
    assert left_out(tmp_path) == ["out"]
