"""`vllm serve` on the loopback interface, and a client that streams token ids."""

import asyncio
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from rac_modifier.sampling.server_watch import end_group

NAME = "model"
READY_SECONDS = 900
SILENT_SECONDS = 600  # after which a client gives a server up
EXCEPTION = re.compile(r"(?:^|\] )([\w.]+(?:Error|Exception): .*(?:\n {2}\S.*)?)", re.MULTILINE)
# vLLM's "auto" binding leaves a core out.
ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0)))),
    "VLLM_NO_USAGE_STATS": "1",
}


IS_ZEN = """
import zentorch
from vllm.platforms import current_platform
assert current_platform.is_zen_cpu(), "vLLM takes zentorch on AMD processors with AVX-512 only"
"""


@dataclass(frozen=True)
class Server:
    """A running server."""

    url: str
    pid: int

    def resident(self) -> int:
        """Return the bytes of memory of its processes; shared pages count once (PSS)."""
        return sum(process.memory_full_info().pss for process in self.processes())

    def allocated(self) -> int:
        """Return the bytes that its processes have allocated, without the pages of files."""
        total = 0
        for process in self.processes():
            for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
                if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                    total += 1024 * int(line.split()[1])
        return total

    def processes(self) -> list[psutil.Process]:
        """Return the server's process and those that it started."""
        server = psutil.Process(self.pid)
        return [server, *server.children(recursive=True)]


@contextmanager
def serving(
    checkpoint: Path,
    options: Sequence[str],
    log: Path,
    *,
    environment: dict[str, str] | None = None,
    vllm: Path | None = None,
) -> Iterator[Server]:
    """Run `vllm serve` inside the context; `log` gets its output.

    `vllm` is the command of another Python environment: it runs without this one's PYTHONPATH.
    """
    executable = vllm.absolute() if vllm else Path(sys.executable).with_name("vllm")
    command = [str(executable), "serve", str(checkpoint), "--host", "127.0.0.1"]
    command += ["--served-model-name", NAME, *options, "--port"]
    inherited = {k: value for k, value in os.environ.items() if not (vllm and k == "PYTHONPATH")}
    with running(command, log, ENVIRONMENT | inherited | (environment or {})) as server:
        yield server


@contextmanager
def running(command: Sequence[str], log: Path, environment: dict[str, str]) -> Iterator[Server]:
    """Run a server inside the context; its command ends with the port, which is appended.

    Raises SystemExit with the first error of the log if the server ends or is not ready in time,
    and RuntimeError with that error if a request fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [*command, str(port)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    deadline = time.monotonic() + READY_SECONDS
    try:
        while not is_ready(url):
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"no server; {log.name}: {first_error(log)}")
            time.sleep(0.2)
        yield Server(url, process.pid)
    except aiohttp.ClientError as error:
        raise RuntimeError(f"{error}; {log.name}: {first_error(log)}") from error
    finally:
        end_group(process)  # the next server needs cores and memory


def with_packages(folder: Path) -> str:
    """Return a PYTHONPATH that has the packages in a folder."""
    return os.pathsep.join([str(folder.resolve()), os.environ.get("PYTHONPATH", "")])


def check_zentorch(environment: dict[str, str]) -> None:
    """Refuse a machine on which `vllm serve` would leave zentorch out (SystemExit)."""
    command = [sys.executable, "-c", IS_ZEN]
    check = subprocess.run(command, env=environment, capture_output=True, text=True)
    if check.returncode:
        raise SystemExit(check.stderr.splitlines()[-1])


def first_error(log: Path) -> str:
    """Return the first exception that a log names, or else its last line, in 300 characters."""
    text = log.read_text(errors="replace").strip()
    match = EXCEPTION.search(text)
    return " ".join((match[1] if match else text.split("\n")[-1]).split())[:300]


def is_ready(url: str) -> bool:
    """Return whether the server's health check succeeds."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            return reply.status == 200
    except OSError:
        return False


@dataclass(frozen=True)
class Speed:
    """Output tokens per second of all requests; median ms to the first and further tokens."""

    tokens_per_second: float
    first_ms: float
    further_ms: float


def measure(
    url: str, vocab: int, prompt_tokens: int, output_tokens: int, concurrency: int, requests: int
) -> Speed:
    """Send requests of random token ids, `concurrency` at a time; equal arguments, equal prompts.

    `vllm bench serve` needs a tokenizer for its random prompts, which a model with random
    weights does not have.
    """
    draw = random.Random(f"{concurrency} {requests}")
    prompts = [[draw.randrange(vocab) for _ in range(prompt_tokens)] for _ in range(requests)]
    times: list[tuple[float, float]] = []

    async def worker(session: aiohttp.ClientSession) -> None:
        while prompts:
            times.append(await stream(session, url, prompts.pop(), output_tokens))

    async def load() -> float:
        timeout = aiohttp.ClientTimeout(total=None, sock_read=SILENT_SECONDS)
        connector = aiohttp.TCPConnector(force_close=True)  # llama.cpp closes what it streamed on
        async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
            started = time.perf_counter()
            await asyncio.gather(*(worker(session) for _ in range(concurrency)))
            return time.perf_counter() - started

    seconds = asyncio.run(load())
    further = [(last - first) / max(1, output_tokens - 1) for first, last in times]
    return Speed(
        requests * output_tokens / seconds,
        1e3 * statistics.median(first for first, _ in times),
        1e3 * statistics.median(further),
    )


def body(prompt: list[int], tokens: int, stream: bool = False) -> dict[str, Any]:
    """Return a request of exactly `tokens` greedy tokens, as ids: there may be no tokenizer."""
    fixed = {"model": NAME, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    return {**fixed, "prompt": prompt, "max_tokens": tokens, "stream": stream}


async def stream(
    session: aiohttp.ClientSession, url: str, prompt: list[int], tokens: int
) -> tuple[float, float]:
    """Return the seconds to the first token and to the last."""
    started, first, last, count = time.perf_counter(), 0.0, 0.0, 0
    streamed = body(prompt, tokens, stream=True)
    async with session.post(f"{url}/v1/completions", json=streamed) as reply:
        reply.raise_for_status()
        async for line in reply.content:
            if not line.startswith(b"data: {"):
                continue
            choices = json.loads(line[6:]).get("choices", ())
            # llama.cpp sends a text per token
            ids = sum(
                len(choice.get("token_ids") or choice.get("text", "")[:1]) for choice in choices
            )
            if ids:
                count += ids
                last = time.perf_counter() - started
                first = first or last
    if count != tokens:
        raise aiohttp.ClientError(f"asked for {tokens} tokens, got {count}")
    return first, last
