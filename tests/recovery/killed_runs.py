"""Recover once undisturbed, then in processes that are killed N times: `python -m tests.recovery.killed_runs N`.

Each run is a fork of this process, which has imported everything. It says when a step begins, so that it is killed while it
trains or writes its state, and not before. A run that ends between two kills is kept, and another one begins. Prints what
happened as JSON.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rac_modifier.processes import Processes
from rac_modifier.recovery.training_loop import TrainingLoop
from tests.recovery.sharded_run import run


def start(folder: Path) -> tuple[int, int]:
    """Start a run that leaves `folder/result.safetensors`; its process, and a pipe with a byte per step that it begins."""
    reads, writes = os.pipe()
    child = os.fork()
    if child:
        os.close(writes)
        return child, reads
    code = 1
    try:
        step = TrainingLoop.step

        def told(self: Any, batches: Any) -> float:
            os.write(writes, b".")
            return step(self, batches)

        TrainingLoop.step = told  # type: ignore[method-assign]
        result, model = run("quantized", Processes(), folder, passes=8)
        curve = torch.tensor([kl for _, kl in result.curve], dtype=torch.float64)
        save_file({**model.state_dict(), "curve": curve}, folder / "result.new")
        os.replace(folder / "result.new", folder / "result.safetensors")
        code = 0
    except Exception:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int, reads: int) -> int:
    """Wait for a run: the steps that it began."""
    steps = 0
    while found := os.read(reads, 1000):
        steps += len(found)
    os.close(reads)
    _, status = os.waitpid(child, 0)
    assert status == 0
    return steps


def main() -> None:
    """See above."""
    kills = int(sys.argv[1])
    torch.set_num_threads(1)
    begun = time.monotonic()
    steps = ended(*start(Path("undisturbed")))
    per_step = (time.monotonic() - begun) / steps
    chance, done, began, number = random.Random(0), 0, 0, 0
    while done < kills:
        child, reads = start(Path(f"killed-{number}"))
        if os.read(reads, 1):
            began += 1
            time.sleep(chance.uniform(0.0, 3.0) * per_step)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        began += len(os.read(reads, 1000))
        os.close(reads)
        done += os.WIFSIGNALED(status)
        number += Path(f"killed-{number}/result.safetensors").exists()
    last = ended(*start(Path(f"killed-{number}")))
    print(json.dumps({"kills": done, "steps": steps, "began": began + last, "ended": number + 1}))


if __name__ == "__main__":
    main()
