"""Thousands of requests to a served checkpoint, some abandoned or bad: is the memory flat?

Memory is what the server's processes have allocated, sampled every 100 requests. The cache
for keys and values has few blocks, so that the first requests touch all of its pages; a
larger one looks like a leak.
"""

import argparse
import asyncio
import json
import random
import shlex
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from bench.common import save
from bench.server import Server, body, serving

OPTIONS = ["--max-model-len", "512", "--gpu-memory-utilization", "0.2", "--enforce-eager"]
OPTIONS += ["--num-gpu-blocks-override", "256", "--dtype", "float32"]
EVERY = 100  # requests from one sample of memory to the next
LEAVING = 0.2  # share of the clients
BAD = 0.05  # share of the requests
LONG = 200  # tokens that a leaving client requests
PROBE = list(range(10, 40))  # the prompt that is asked before and after
CONCURRENCY = 64
TOLERANCE = 0.03  # of memory, relative


async def answer(
    session: aiohttp.ClientSession, url: str, prompt: list[int], tokens: int
) -> list[int]:
    """Return the greedy tokens of a complete answer."""
    async with session.post(f"{url}/v1/completions", json=body(prompt, tokens)) as reply:
        reply.raise_for_status()
        ids: list[int] = (await reply.json())["choices"][0]["token_ids"]
    return ids


async def leave_in_stream(
    session: aiohttp.ClientSession, url: str, prompt: list[int], chunks: int
) -> None:
    """Read some chunks of a stream and close the connection."""
    streamed = body(prompt, LONG, stream=True)
    async with session.post(f"{url}/v1/completions", json=streamed) as reply:
        reply.raise_for_status()
        async for line in reply.content:
            chunks -= line.startswith(b"data: {")
            if chunks <= 0:
                reply.close()
                return


async def in_the_engine(session: aiohttp.ClientSession, url: str) -> float:
    """Return the number of requests that run or wait, as vLLM's metrics say."""
    async with session.get(f"{url}/metrics") as reply:
        lines = (await reply.text()).splitlines()
    counts = ("vllm:num_requests_running{", "vllm:num_requests_waiting{")
    return sum(float(line.split()[-1]) for line in lines if line.startswith(counts))


@dataclass
class Load:
    """What the clients saw: faults, memory in bytes, seconds of whole answers, counted events."""

    wrong: list[str] = field(default_factory=list)
    samples: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)


async def load(server: Server, vocab: int, requests: int) -> Load:
    """Send the requests."""
    draw, seen, waiting = random.Random(0), Load(), requests
    bad = ([vocab], [-1], [], [[]], [2**40], [7] * 513)

    async def request(session: aiohttp.ClientSession) -> None:
        prompt = [draw.randrange(vocab) for _ in range(draw.randint(1, 256))]
        kind = draw.random()
        if kind < BAD:
            faulty = draw.choice(bad)
            async with session.post(f"{server.url}/v1/completions", json=body(faulty, 4)) as reply:
                seen.counts["refused"] += 400 <= reply.status < 500
                if not 400 <= reply.status < 500:
                    seen.wrong.append(f"the prompt {str(faulty)[:20]} got status {reply.status}")
        elif kind < BAD + LEAVING / 2:
            await leave_in_stream(session, server.url, prompt, draw.randint(1, 20))
            seen.counts["left"] += 1
        elif kind < BAD + LEAVING:
            call = answer(session, server.url, prompt, LONG)
            try:
                await asyncio.wait_for(call, draw.uniform(0.001, 0.05))
            except TimeoutError:
                seen.counts["left"] += 1
        else:
            started = time.perf_counter()
            await answer(session, server.url, prompt, draw.randint(1, 32))
            seen.seconds.append(time.perf_counter() - started)

    async def worker(session: aiohttp.ClientSession) -> None:
        nonlocal waiting
        while waiting:
            waiting -= 1
            try:
                await request(session)
            except aiohttp.ClientError as error:
                seen.wrong.append(f"a request failed: {type(error).__name__}: {error}")
            seen.counts["ended"] += 1
            if seen.counts["ended"] % EVERY == 0:
                seen.samples.append(await asyncio.to_thread(server.allocated))

    timeout = aiohttp.ClientTimeout(total=3600)
    connector = aiohttp.TCPConnector(limit=CONCURRENCY)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        before = await answer(session, server.url, PROBE, 16)
        await asyncio.gather(*(worker(session) for _ in range(CONCURRENCY)))
        for _ in range(300):
            if not (running := await in_the_engine(session, server.url)):
                break
            await asyncio.sleep(0.1)
        else:
            seen.wrong.append(f"{running:.0f} requests of clients that left are in the engine")
        if await answer(session, server.url, PROBE, 16) != before:
            seen.wrong.append("one prompt was answered differently before and after")
    return seen


def soak(options: argparse.Namespace) -> int:
    """Soak `options.soak`, write the table, and return the exit status."""
    folder: Path = options.soak
    vocab = json.loads((folder / "config.json").read_text())["vocab_size"]
    arguments = [*OPTIONS, *shlex.split(options.serve_options)]
    with serving(folder, arguments, options.work / "soak.log") as server:
        seen = asyncio.run(load(server, vocab, options.requests))
    settled = seen.samples[len(seen.samples) // 10 :]
    furthest = max((sample / settled[0] for sample in settled), key=lambda ratio: abs(ratio - 1))
    if abs(furthest - 1) > TOLERANCE:
        seen.wrong.append(
            f"memory is not flat: {furthest:.3f} of that after a tenth of the requests"
        )
    columns = {
        "requests": ",.0f",
        "clients that left": ",.0f",
        "bad prompts refused": ",.0f",
        "failed": ".0f",
        "answer, median, ms": ",.0f",
        "answer, 99 %, ms": ",.0f",
        "MB, settled": ",.1f",
        "MB at the end": ",.1f",
        "furthest over settled": ".4f",
    }
    failed = sum(text.startswith("a request failed") for text in seen.wrong)
    milliseconds = [1e3 * value for value in sorted(seen.seconds)]
    row = [
        options.requests,
        seen.counts["left"],
        seen.counts["refused"],
        failed,
        statistics.median(milliseconds),
        milliseconds[int(0.99 * len(milliseconds))],
        settled[0] / 1e6,
        settled[-1] / 1e6,
        furthest,
    ]
    save(options.out, "serving_soak", folder.name, columns, [row])
    print("\n".join(seen.wrong) or "memory is flat and no request failed")
    return int(bool(seen.wrong))
