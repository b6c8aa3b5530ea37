"""Prune once undisturbed, then in processes that are killed N times: MODEL RECIPE N. Prints what happened as JSON.

Each run is a fork of this process, which has imported everything: a run of its own takes a second, not ten.
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

import torch
from llmcompressor import oneshot

import rac_modifier  # noqa: F401 - registers the modifier
from rac_modifier.llmcompressor import finished_groups

finished_groups._SAVE_SECONDS = 0.0


def start(model: str, recipe: str, output: str) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            oneshot(model=model, recipe=recipe, output_dir=output)
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def main(model: str, recipe: str, kills: int) -> None:
    torch.set_num_threads(1)
    begun = time.monotonic()
    _, status = os.waitpid(start(model, recipe, "undisturbed"), 0)
    assert status == 0
    lasts = time.monotonic() - begun
    chance, done, resumed = random.Random(0), 0, 0
    while done < kills:
        resumed += any(Path("killed.unfinished").glob("*.safetensors"))
        child = start(model, recipe, "killed")
        time.sleep(chance.uniform(0.3, 0.9) * lasts)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            done += 1
        elif os.path.isdir("killed"):  # it ended before the kill; begin again
            os.rename("killed", f"ended-{done}-{time.monotonic_ns()}")
    if os.path.isdir("killed"):  # stopped while it saved: the next start would say to remove it
        os.rename("killed", "stopped-while-it-saved")
    _, status = os.waitpid(start(model, recipe, "killed"), 0)
    assert status == 0
    print(json.dumps({"kills": done, "resumed": resumed}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
