"""Peak memory of each thing that is done to a checkpoint of many files: `python -m tests.checkpoint.peak_memory` in a new folder.

Every step is a fork of this process, which has imported everything and done the same to a small checkpoint. Prints as JSON the
bytes of a file and of all of them, and by how much the peak of each step is above that of the same step on the small one.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from rac_modifier.checkpoint.convert import pack_model, unpack_model
from rac_modifier.checkpoint.inspect import inspect_checkpoint
from rac_modifier.checkpoint.pack_plan import plan_packing
from rac_modifier.checkpoint.packing import mark_dense, pack_checkpoint

FILES, MODULES = 10, 4  # and modules per file
NAMES = [[f"layers.{file}.{module}" for module in range(MODULES)] for file in range(FILES)]


def make(folder: Path, side: int) -> None:
    """A 2:4 checkpoint of square float32 matrices."""
    torch.manual_seed(0)
    folder.mkdir()
    for file, names in enumerate(NAMES):
        weight = torch.randn(side, side // 4, 4)
        weight[..., :2] = 0
        save_file(
            {f"{name}.weight": weight.reshape(side, side).clone() for name in names},
            folder / f"{file}.safetensors",
        )
    where = {
        f"{name}.weight": f"{file}.safetensors"
        for file, names in enumerate(NAMES)
        for name in names
    }
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": where})
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))


def peak(step: Callable[[], object]) -> int:
    """Bytes of the largest resident set of a fork of this process that does it."""
    child = os.fork()
    if child == 0:
        try:
            step()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    _, status, usage = os.wait4(child, 0)
    if status:
        sys.exit(1)
    return usage.ru_maxrss * 1024


def steps(size: str) -> dict[str, Callable[[], object]]:
    """What is done, in this order, since some need the result of one before."""
    dense, copy = Path(f"{size}-dense"), Path(f"{size}-copy")
    modules = {name: "2:4" for names in NAMES for name in names}
    return {
        "plan": lambda: plan_packing(dense),
        "pack": lambda: pack_model(plan_packing(dense), f"{size}-packed", "model"),
        "inspect": lambda: inspect_checkpoint(f"{size}-packed"),
        "inspect dense": lambda: inspect_checkpoint(dense),
        "unpack": lambda: unpack_model(f"{size}-packed", f"{size}-unpacked"),
        "mark dense": lambda: mark_dense(copy, modules),
        "pack in place": lambda: pack_checkpoint(copy, modules),
    }


def main() -> None:
    """See above."""
    torch.set_num_threads(1)
    found: dict[str, dict[str, int]] = {}
    for size, side in ("small", 64), ("large", 1024):
        make(Path(f"{size}-dense"), side)
        shutil.copytree(f"{size}-dense", f"{size}-copy")
        found[size] = {name: peak(step) for name, step in steps(size).items()}
    sizes = [path.stat().st_size for path in Path("large-dense").glob("*.safetensors")]
    above = {name: found["large"][name] - found["small"][name] for name in found["large"]}
    print(json.dumps({"file": max(sizes), "all": sum(sizes), "above": above}))


if __name__ == "__main__":
    main()
