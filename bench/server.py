"""Servers on the loopback interface, and a client that streams token ids.

llama.cpp and OpenVINO GenAI are started by `bench serving` with

    python -m bench.server PROJECT FILE KIND SHAPE LAYERS VOCAB REQUESTS LENGTH PORT

FILE is written first if it is missing. The server holds REQUESTS sequences of LENGTH tokens.
"""

import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from aiohttp import web

from bench.common import called_in_child
from bench.gguf_file import write_gguf
from rac_modifier.errors import RacError
from rac_modifier.sampling.own_server import on_few_cores, running_server

NAME = "model"
READY_SECONDS = 900
SILENT_SECONDS = 600  # after which a client gives a server up
EXCEPTION = re.compile(r"(?:^|\] )([\w.]+(?:Error|Exception): .*(?:\n {2}\S.*)?)", re.MULTILINE)
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
        """Return the server's process and those that it started, without the one that watches."""
        return psutil.Process(self.pid).children(recursive=True)


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
    variables = {**on_few_cores(), "VLLM_NO_USAGE_STATS": "1", **inherited, **(environment or {})}
    with running(command, log, variables) as server:
        yield server


@contextmanager
def running(command: Sequence[str], log: Path, environment: dict[str, str]) -> Iterator[Server]:
    """Run a server inside the context; its command ends with the port, which is appended.

    Raises SystemExit with the first error of the log if the server ends or is not ready in time,
    and RuntimeError with that error if a request fails.
    """
    try:
        with running_server(command, environment, log=log, timeout=READY_SECONDS) as server:
            yield Server(*server)
    except RacError as error:
        raise SystemExit(f"no server; {log.name}: {first_error(log)}") from error
    except aiohttp.ClientError as error:
        raise RuntimeError(f"{error}; {log.name}: {first_error(log)}") from error


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


CORES = len(os.sched_getaffinity(0))
ENDLESS = {"ignore_eos": True, "eos_token_id": 0, "stop_token_ids": {0}}  # an id is required


def llama(path: Path, requests: int, length: int, port: int) -> None:
    """Start llama.cpp's own server."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.port, params.n_parallel, params.n_ctx = port, requests, requests * length
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = CORES
    params.cache_prompt, params.cache_ram_mib = False, 0
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    signal.pause()


def stop(engine: asyncio.Task[None]) -> None:
    """End the process when the engine has failed: its clients would wait."""
    traceback.print_exception(engine.exception())
    os._exit(1)


def openvino(path: Path, requests: int, length: int, port: int) -> None:
    """Serve OpenVINO GenAI's continuous batching: its package has no server."""
    import numpy as np
    import openvino
    import openvino_genai as genai

    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = 1, False  # GB, as vLLM has here
    scheduler.max_num_seqs, scheduler.max_num_batched_tokens = requests, max(2048, length)
    with tempfile.TemporaryDirectory() as empty:  # the tokenizer of our file does not compile
        tokenizer = genai.Tokenizer(empty)
    pipeline = genai.ContinuousBatchingPipeline(
        str(path), tokenizer, scheduler, "CPU", INFERENCE_NUM_THREADS=CORES
    )
    arrived: asyncio.Queue[tuple[dict[str, Any], asyncio.Queue[list[int]]]] = asyncio.Queue()

    async def generate() -> None:
        running: dict[int, tuple[Any, asyncio.Queue[list[int]]]] = {}
        number = 0
        while True:
            while not running or not arrived.empty():
                asked, tokens = await arrived.get()
                config = genai.GenerationConfig(**ENDLESS, max_new_tokens=asked["max_tokens"])
                ids = openvino.Tensor(np.array([asked["prompt"]], np.int64))
                number += 1
                running[number] = pipeline.add_request(number, ids, config), tokens
            await asyncio.to_thread(pipeline.step)
            for number_of, (handle, tokens) in list(running.items()):
                if handle.can_read():
                    for output in handle.read().values():
                        tokens.put_nowait(output.generated_ids)
                if handle.get_status() != genai.GenerationStatus.RUNNING:
                    del running[number_of]
            await asyncio.sleep(0)  # send before the next step

    async def complete(request: web.Request) -> web.StreamResponse:
        asked, tokens = await request.json(), asyncio.Queue[list[int]]()
        arrived.put_nowait((asked, tokens))
        response = web.StreamResponse()
        await response.prepare(request)
        count = 0
        while count < asked["max_tokens"]:
            ids = await tokens.get()
            count += len(ids)
            line = json.dumps({"choices": [{"token_ids": list(ids)}]})
            await response.write(f"data: {line}\n\n".encode())
        return response

    async def healthy(_: web.Request) -> web.Response:
        return web.Response()

    async def start(running: web.Application) -> None:
        running["engine"] = asyncio.create_task(generate())
        running["engine"].add_done_callback(stop)

    app = web.Application()
    app.add_routes([web.get("/health", healthy), web.post("/v1/completions", complete)])
    app.on_startup.append(start)
    web.run_app(app, host="127.0.0.1", port=port)


if __name__ == "__main__":
    project, file, kind, shape, *numbers = sys.argv[1:]
    layers, vocab, *rest = map(int, numbers)
    if not Path(file).exists():
        called_in_child(write_gguf, Path(file), kind, shape, layers, vocab)
    {"llama": llama, "openvino": openvino}[project](Path(file), *rest)
