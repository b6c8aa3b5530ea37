"""Prune once undisturbed, then in processes that are killed N times: MODEL RECIPE N. Prints what happened as JSON.

Each run is a fork of this process, which has imported everything: a run of its own takes a second, not ten.
A kill is timed by what the run has written, then by chance: a slow machine sees the same kills as a fast one.
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
from rac_modifier.llmcompressor import resume

GROUPS = 8  # four in each of the tiny model's two layers


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


def written() -> int:
    """The number of files of finished groups."""
    return len(list(Path("killed.unfinished").glob("*.safetensors")))


def wait_for(files: int, child: int) -> bool:
    """Wait until `files` groups are written; True if the run ended before (and is reaped)."""
    while written() < files:
        if os.waitpid(child, os.WNOHANG)[0]:
            return True
        time.sleep(0.002)
    return False


def main() -> None:
    """See above."""
    model, recipe, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
    torch.set_num_threads(1)
    resume._SAVE_SECONDS = 0.0  # here and not at import: tests import this module
    begun = time.monotonic()
    _, status = os.waitpid(start(model, recipe, "undisturbed"), 0)
    assert status == 0
    lasts = time.monotonic() - begun
    chance, done, resumed = random.Random(0), 0, 0
    while done < kills:
        found = written()
        resumed += found > 0
        child = start(model, recipe, "killed")
        more = min(chance.choice([0, 1, 1, 2, 3]), GROUPS - found)
        ended = wait_for(found + more, child) if more else False
        # within the next two groups; or before anything new is written, and where all is written, until after the end
        longest = 2 * lasts / GROUPS if more else (0.3 if found < GROUPS else 0.8) * lasts
        time.sleep(chance.uniform(0.0, longest))
        if not ended:
            os.kill(child, signal.SIGKILL)
            ended = not os.WIFSIGNALED(os.waitpid(child, 0)[1])
        done += not ended
        if ended and os.path.isdir("killed"):  # it ended before the kill; begin again
            os.rename("killed", f"ended-{done}-{time.monotonic_ns()}")
    if os.path.isdir("killed"):  # stopped while it saved: the next start would say to remove it
        os.rename("killed", "stopped-while-it-saved")
    _, status = os.waitpid(start(model, recipe, "killed"), 0)
    assert status == 0
    print(json.dumps({"kills": done, "resumed": resumed}))


if __name__ == "__main__":
    main()
