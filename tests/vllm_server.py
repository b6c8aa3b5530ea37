"""`vllm serve` as a process of its own, for the tests that ask a real server."""

import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

VLLM = os.environ.get("RAC_VLLM") or shutil.which("vllm")
NEEDS_SERVER = [
    pytest.mark.slow,
    pytest.mark.skipif(VLLM is None, reason="no `vllm` on the PATH; name one with RAC_VLLM"),
]
_READY = b"Application startup complete"  # uvicorn's line
_ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
    "OMP_WAIT_POLICY": "PASSIVE",
    "VLLM_NO_USAGE_STATS": "1",
}
_OPTIONS = ["--dtype", "float32", "--max-model-len", "1024", "--gpu-memory-utilization", "0.3"]


@contextmanager
def served(model: Path, log: Path, *options: str) -> Iterator[str]:
    """The address of a server of `model` on loopback; its output goes to the file `log`.

    `options` are further ones of `vllm serve`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [str(VLLM), "serve", str(model), "--host", "127.0.0.1", "--port", port]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | _ENVIRONMENT
    with log.open("wb", buffering=0) as output:
        server = subprocess.Popen(
            [*command, *_OPTIONS, "--enforce-eager", *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
        assert server.stdout is not None
        ready = False
        try:
            for line in server.stdout:  # ends with the server
                output.write(line)
                ready = _READY in line
                if ready:
                    break
            assert ready, log.read_text()[-3000:]
            rest = threading.Thread(target=shutil.copyfileobj, args=(server.stdout, output))
            rest.start()
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                os.killpg(server.pid, signal.SIGKILL)
                server.wait()
            if ready:
                rest.join()
