"""Runs `vllm serve` on the loopback interface while it is measured, and reads the memory of its processes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

# The same for all contenders; variables of the caller's environment override it. vLLM's "auto" binding leaves a core out.
# OMP_WAIT_POLICY=PASSIVE, which is right on a shared machine, would cost a wake-up in each of the hundreds of products per step.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
    "VLLM_NO_USAGE_STATS": "1",
}


@dataclass(frozen=True)
class Server:
    """A running server. `ready_seconds`: from its start to the first successful health check."""

    url: str
    pid: int
    ready_seconds: float

    def resident(self) -> int:
        """Bytes of memory of its processes; memory that several of them share is counted once (PSS)."""
        return sum(process.memory_full_info().pss for process in self._processes())

    def allocated(self) -> int:
        """Bytes that its processes have allocated; memory that several of them share is counted once.

        Pages of files, such as libraries, are left out: the share that counts as a process's own depends on who else reads them.
        """
        lines = [
            line.split()
            for process in self._processes()
            for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
        ]
        return sum(
            1024 * int(words[1]) for words in lines if words[0] in ("Pss_Anon:", "Pss_Shmem:")
        )

    def cpu_seconds(self) -> float:
        """Processor time of its processes."""
        return sum(
            times.user + times.system
            for times in (process.cpu_times() for process in self._processes())
        )

    def _processes(self) -> list[psutil.Process]:
        server = psutil.Process(self.pid)
        return [server, *server.children(recursive=True)]


def busy_seconds() -> float:
    """Processor time over all cores that the machine has used or lost to other virtual machines (steal)."""
    times = psutil.cpu_times()
    return (
        sum(times) - times.idle - times.iowait - times.guest - times.guest_nice
    )  # guest time is part of user time


@contextmanager
def serving(
    checkpoint: Path,
    options: list[str],
    log: Path,
    timeout: float = 900,
    environment: dict[str, str] | None = None,
    vllm: Path | None = None,
) -> Iterator[Server]:
    """Run `vllm serve` inside the context, with `environment` added to its variables.

    Exits with the end of its log if it does not become ready.

    Args:
        vllm: the command of another Python environment; it runs without this one's PYTHONPATH.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    executable = vllm.absolute() if vllm is not None else Path(sys.executable).with_name("vllm")
    command = [str(executable), "serve", str(checkpoint), "--host", "127.0.0.1"]
    inherited = {k: v for k, v in os.environ.items() if vllm is None or k != "PYTHONPATH"}
    started = time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), *options],
            env=ENVIRONMENT | inherited | (environment or {}),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        while not _is_ready(url):
            if process.poll() is not None or time.monotonic() - started > timeout:
                raise SystemExit(
                    f"the server did not become ready; the end of {log}:\n{log.read_text()[-3000:]}"
                )
            time.sleep(0.2)
        yield Server(url, process.pid, time.monotonic() - started)
    finally:
        _stop(process)


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:  # URLError is one
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Stop the server, then all remaining processes of its group: the next server needs the cores and the memory."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(30)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(30)
