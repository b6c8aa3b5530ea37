"""Calls of a process that imports call_counts/sitecustomize.py, between its two signals, and their totals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("aiohttp")

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PROCESS = """
import math, sys

def twice(x):
    return math.sqrt(x) + math.sqrt(x)

print("ready", flush=True)
for line in sys.stdin:  # a signal reaches the loop as soon as it waits
    for _ in range(int(line)):
        twice(4.0)
    print("done", flush=True)
"""


def test_calls_between_the_signals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from served_token import totals

    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    environment = {
        **os.environ,
        "PYTHONPATH": str(BENCHMARKS / "call_counts"),
        "RAC_COUNT_CALLS": str(tmp_path),
    }
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        found = []
        for calls in (5, 30):
            process.send_signal(signal.SIGUSR1)
            for times in (
                0,
                calls,
            ):  # a signal that comes just before a read is handled when that returns
                print(times, file=process.stdin, flush=True)
                process.stdout.readline()
            file = tmp_path / f"{process.pid}.json"
            while not file.is_file():
                process.send_signal(
                    signal.SIGUSR2
                )  # again: a read that began meanwhile is interrupted
                for _ in range(100):
                    if file.is_file():
                        break
                    time.sleep(0.01)
            rows = json.loads(file.read_text())
            file.unlink()
            of = {name: number for kind, path, name, number in rows if path == str(script)}
            assert (of["twice"], of["sqrt"]) == (calls, 2 * calls)
            found.append(tuple(totals(rows)))
        print(1, file=process.stdin, flush=True)  # not counted
        process.stdin.close()
        assert process.stdout.readline() == "done\n"
    assert not (tmp_path / f"{process.pid}.json").exists()
    (python, c, polled), (more_python, more_c, _) = found
    # 25 calls more of each function; a signal may come a call or two earlier or later in the loop that reads
    assert 22 <= more_python - python <= 28
    assert 45 <= more_c - c <= 55
    assert polled == 0


def test_polling_is_counted_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from served_token import totals

    rows = [
        ("py", "/x/model.py", "f", 3),
        ("c", "/x/model.py", "len", 5),
        ("c", "/v/shm_broadcast.py", "yield", 700),
    ]
    assert tuple(totals([*rows, ("py", "/v/shm_broadcast.py", "wait", 900)])) == (3, 5, 1600)
