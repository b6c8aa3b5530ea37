"""A command that behaves as `vllm serve` does: it serves `FakeServer`, with a process of its own beside it, and faults on demand.

`install` writes the command. It notes each start in a folder: a test sees which processes there were and which are left.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FAULT = "FAKE_VLLM"  # variable: crash, crash of a worker, silent, never, dies, or nothing
DELAY = "FAKE_VLLM_DELAY"  # variable: seconds per completion


def install(folder: Path) -> Path:
    """Write the command into a folder and return its path."""
    path = folder / "vllm"
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.sampling.fake_vllm import main; main({str(folder)!r})"
    path.write_text(f"#!{sys.executable} -S\n{code}\n")
    path.chmod(0o755)
    return path


def starts(folder: Path) -> list[dict[str, Any]]:
    """Each start of the command: its processes, arguments and variables."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("start-*.json"))]


def is_running(pid: int) -> bool:
    """Whether a process runs; one that ended and waits for its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def left_over(folder: Path, seconds: float = 120.0) -> list[int]:
    """The processes of all starts that still run after so many seconds."""
    pids = [pid for start in starts(folder) for pid in (start["pid"], start["worker"])]
    until(lambda: not any(map(is_running, pids)), seconds)
    return [pid for pid in pids if is_running(pid)]


def until(condition: Callable[[], bool], seconds: float = 120.0) -> bool:
    """Wait until a condition holds, or so many seconds have passed; whether it holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def main(folder: str) -> None:
    fault = os.environ.get(FAULT)
    if fault == "crash":
        print("\n".join(f"loading part {i}" for i in range(40)), flush=True)
        sys.exit("ValueError: the KV cache does not fit")
    if fault == "crash of a worker":
        print("WARNING limits can cause errors like `OSError: [Errno 24] Too many open files`")
        print("(Worker pid=7) ERROR 11-26 [executor.py:953] ValueError: no memory on node 0")
        print("\n".join(f"  File part{i}.py" for i in range(40)), flush=True)
        sys.exit("RuntimeError: Engine core initialization failed. See root cause above.")
    if fault == "silent":
        sys.exit(7)
    print("still loading", flush=True)
    worker = subprocess.Popen(
        [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
    )  # as vLLM's engine process
    note(Path(folder), worker.pid)
    if fault == "never":
        time.sleep(600)
    serve(sys.argv[2], int(sys.argv[sys.argv.index("--port") + 1]), dies=fault == "dies")


def note(folder: Path, worker: int) -> None:
    """Whole or not at all: the test reads it while this process runs."""
    processes = {"pid": os.getpid(), "worker": worker, "watcher": os.getppid()}
    start = {**processes, "argv": sys.argv[1:], "variables": dict(os.environ)}
    part = folder / f"part-{os.getpid()}"
    part.write_text(json.dumps(start))
    part.rename(folder / f"start-{time.monotonic_ns():020d}.json")


def serve(model: str, port: int, dies: bool) -> None:
    from tests.sampling.fake_server import FakeServer

    server = FakeServer(port)
    server.cards = [{"id": model, "root": model, "max_model_len": 512}]

    def delay(body: dict[str, Any]) -> float:
        if dies and len(server.bodies) > 6:
            print("RuntimeError: the engine died", flush=True)
            os._exit(5)
        return float(os.environ.get(DELAY, "0"))

    server.delay = delay
    signal.pause()
