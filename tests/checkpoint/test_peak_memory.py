"""A checkpoint of many files is read tensor by tensor and written file by file: never is more than two files' worth in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.started import ROOT

ROOM = 24 << 20  # bytes that steps on chunks of a large matrix take, and on none of the small one


def started(module: str, folder: Path) -> Any:
    """What a module of this folder prints in its last line."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.checkpoint.{module}"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_at_most_two_files_are_in_memory(tmp_path: Path):
    """Mapped pages of files count too: a file that stays mapped while the next is read is in memory."""
    told = started("peak_memory", tmp_path)
    assert told["all"] > 4 * told["file"] + ROOM, (
        "all of it would hardly be above the limit: the test shows nothing"
    )
    assert len(told["above"]) == 7
    too_much = {
        name: above for name, above in told["above"].items() if above > 2 * told["file"] + ROOM
    }
    assert too_much == {}, told
    assert max(told["above"].values()) > told["file"] / 4, (
        "hardly any memory was seen: the test shows nothing"
    )


def test_loading_takes_the_dense_model_and_little_more(tmp_path: Path):
    """Pages of files that are mapped meanwhile are not counted: how many, of libraries too, depends on the machine."""
    told = started("loading_memory", tmp_path)
    assert told["packed"] > 4 * told["file"] + ROOM, (
        "all of it would hardly be above the limit: the test shows nothing"
    )
    assert -told["model"] / 20 < told["beyond"]["own"] < 2 * told["file"] + ROOM, told
