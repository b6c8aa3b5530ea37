"""`rac eval --serve` killed again and again: no answer is lost, no server is left, and the end is that of an undisturbed run."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path

import pytest

from rac_modifier.traces.fill_store import pending_path
from rac_modifier.traces.store import TraceStore, read_header
from tests.cli.served_child import run
from tests.fork_server import fork_server
from tests.sampling import fake_vllm

KILLS = 20
PROBLEMS, SAMPLES = 120, 2
DELAY = 0.1  # seconds per answer in runs that are killed


def answered(folder: Path) -> set[str]:
    """The ids of the answers that are kept in a folder."""
    path = folder / "a.jsonl"
    return {
        trace.id
        for p in (path, pending_path(path))
        if p.exists() and read_header(p)
        for trace in TraceStore.read(p)
    }


def written(folder: Path) -> int:
    """Bytes of answers so far."""
    path = folder / "a.jsonl"
    return sum(p.stat().st_size for p in (path, pending_path(path)) if p.exists())


def result(folder: Path) -> dict:
    """What an evaluation found, without how long it took."""
    (found,) = json.loads((folder / "r.json").read_text())["results"]
    return {
        name: value for name, value in found.items() if name not in ("seconds", "tokens_per_second")
    }


@pytest.mark.slow
def test_twenty_kills_end_as_an_undisturbed_run(tiny_folder, tmp_path):
    context = fork_server()
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    rng = random.Random(0)

    def start(folder: Path, delay: float):
        folder.mkdir(exist_ok=True)
        variables = {"RAC_VLLM": str(fake_vllm.install(folder)), fake_vllm.DELAY: str(delay)}
        options = [
            "--problems",
            str(PROBLEMS),
            "--samples",
            str(SAMPLES),
            "--temperature",
            "0.6",
            "--cap",
            "12",
        ]
        files = ["--answers", "a.jsonl", "--json", "r.json", "--concurrency", "4"]
        arguments = ["eval", str(tiny_folder), "--serve", *options, *files]
        child = context.Process(target=run, args=(arguments, str(folder), variables))
        child.start()
        return child

    kept: set[str] = set()
    while_answering = 0
    for number in range(KILLS):
        before = written(killed)
        child = start(killed, DELAY)
        if number % 2:  # at any time, mostly while it or its server starts
            time.sleep(rng.uniform(0, 1))
        else:
            while written(killed) <= before and child.is_alive():
                time.sleep(0.005)
            time.sleep(rng.uniform(0, 0.3))
        child.kill()
        child.join()
        assert child.exitcode == -9, (killed / "output.txt").read_text()[-2000:]
        while_answering += written(killed) > before
        assert fake_vllm.left_over(killed) == []
        now = answered(killed)
        assert kept <= now
        kept = now
    assert while_answering >= KILLS / 2
    assert 0 < len(kept) < PROBLEMS * SAMPLES

    for folder in (killed, undisturbed):
        child = start(folder, delay=0)
        child.join()
        assert child.exitcode == 0, (folder / "output.txt").read_text()[-2000:]
        assert fake_vllm.left_over(folder) == []
    assert (killed / "a.jsonl").read_bytes() == (undisturbed / "a.jsonl").read_bytes()
    assert not pending_path(killed / "a.jsonl").exists()
    assert result(killed) == result(undisturbed)
    assert result(killed)["problems"] == PROBLEMS
