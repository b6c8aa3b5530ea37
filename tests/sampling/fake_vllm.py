"""A command that behaves as `vllm serve` does: it serves `FakeServer`, next to a process of its
own.

`install` writes the command, which notes each start in its folder. All its processes hold a
lock there.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FAULT = "FAKE_VLLM"  # variable: crash, silent, never, dies, or nothing
DELAY = "FAKE_VLLM_DELAY"  # variable: seconds per completion


def install(folder: Path) -> Path:
    """Write the command into a folder and return its path."""
    path = folder / "vllm"
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); from tests.sampling.fake_vllm import "
        f"main; main({str(folder)!r})"
    )
    path.write_text(f"#!{sys.executable} -S\n{code}\n")
    path.chmod(0o755)
    return path


def starts(folder: Path) -> list[dict[str, Any]]:
    """Return the processes, arguments and variables of each start."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("start-*.json"))]


def pipe_of_starts(folder: Path) -> int:
    """Return a descriptor that gives a byte for each start from now on."""
    os.mkfifo(folder / "started")
    return os.open(folder / "started", os.O_RDWR)


def left_over(folder: Path) -> list[int]:
    """Wait until all processes of all starts have ended; return [], the processes that are left."""
    with (folder / "running").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
    return []


def main(folder: str) -> None:
    fault = os.environ.get(FAULT)
    if fault == "crash":
        print("WARNING 12-03 [utils.py:255] This can cause errors like `OSError: [Errno 24]`")
        print("ERROR 12-03 [core.py:953] RuntimeError: no memory")
        print("\n".join(f"loading part {i}" for i in range(149)), flush=True)
        sys.exit("ValueError: the KV cache does not fit")
    if fault == "silent":
        sys.exit(7)
    print("still loading", flush=True)
    lock = os.open(Path(folder) / "running", os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_SH)
    code = "import signal; signal.pause()"  # as vLLM's engine process
    subprocess.Popen([sys.executable, "-S", "-c", code], pass_fds=[lock])
    note(Path(folder))
    if fault == "never":
        signal.pause()
    serve(sys.argv[2], int(sys.argv[sys.argv.index("--port") + 1]), dies=fault == "dies")


def note(folder: Path) -> None:
    """Write the file of a start whole or not at all: the test reads it while this process runs."""
    processes = {"pid": os.getpid(), "watcher": os.getppid()}
    start = {**processes, "argv": sys.argv[1:], "variables": dict(os.environ)}
    part = folder / f"part-{os.getpid()}"
    part.write_text(json.dumps(start))
    part.rename(folder / f"start-{time.monotonic_ns():020d}.json")
    if (folder / "started").exists():
        pipe = os.open(folder / "started", os.O_RDWR)
        os.write(pipe, b"s")


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
