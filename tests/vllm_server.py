"""`vllm serve` as a process of its own, for the tests that ask a real server: named by RAC_VLLM, or `vllm` on the PATH."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

VLLM = os.environ.get("RAC_VLLM") or shutil.which("vllm")
NEEDS_SERVER = [
    pytest.mark.slow,
    pytest.mark.skipif(VLLM is None, reason="no `vllm` on the PATH; name one with RAC_VLLM"),
]
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_NO_USAGE_STATS": "1",
}
_OPTIONS = [
    "--dtype",
    "float32",
    "--max-model-len",
    "1024",
    "--gpu-memory-utilization",
    "0.3",
    "--enforce-eager",
]


@contextmanager
def served(model: Path, log: Path, *options: str) -> Iterator[str]:
    """The address of a server of `model` on loopback; its output goes to the file `log`.

    `options` are further ones of `vllm serve`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        str(VLLM),
        "serve",
        str(model),
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        *_OPTIONS,
        *options,
    ]
    with log.open("wb") as output:
        server = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | _ENVIRONMENT,
        )
    try:
        deadline = time.monotonic() + 600
        while not _answers(f"http://127.0.0.1:{port}/health"):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]  # noqa: PT018
            time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        try:
            server.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(10)


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False
