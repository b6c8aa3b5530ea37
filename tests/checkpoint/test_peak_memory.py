"""A checkpoint of many files is read tensor by tensor and written file by file: never is more than two files' worth in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.started import ROOT

ROOM = 24 << 20  # bytes that steps on chunks of a large matrix take, and on none of the small one


def test_at_most_two_files_are_in_memory(tmp_path: Path):
    """Mapped pages of files count too: a file that stays mapped while the next is read is in memory."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.checkpoint.peak_memory"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["all"] > 4 * told["file"] + ROOM, "all of it would hardly be above the limit: the test shows nothing"
    assert len(told["above"]) == 7
    too_much = {name: above for name, above in told["above"].items() if above > 2 * told["file"] + ROOM}
    assert too_much == {}, told
    assert max(told["above"].values()) > told["file"] / 4, "hardly any memory was seen: the test shows nothing"
