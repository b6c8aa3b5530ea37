"""llama.cpp and OpenVINO GenAI as servers of token ids, started by `bench serving`.

python -m bench.peer_server PROJECT FILE KIND SHAPE LAYERS VOCAB REQUESTS LENGTH PORT

FILE is written first if it is missing. The server holds REQUESTS sequences of LENGTH tokens.
"""

import asyncio
import json
import os
import signal
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from aiohttp import web

from bench.common import called_in_child
from bench.gguf_file import write_gguf

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
                body, tokens = await arrived.get()
                config = genai.GenerationConfig(**ENDLESS, max_new_tokens=body["max_tokens"])
                ids = openvino.Tensor(np.array([body["prompt"]], np.int64))
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
        body, tokens = await request.json(), asyncio.Queue[list[int]]()
        arrived.put_nowait((body, tokens))
        response = web.StreamResponse()
        await response.prepare(request)
        count = 0
        while count < body["max_tokens"]:
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
