"""Requests of token ids to a completions endpoint, several at a time, timed at the client as `vllm bench serve` does.

That command cannot be used here: its random prompts need a tokenizer, which a model of random weights does not have.
"""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass

import aiohttp


@dataclass(frozen=True)
class Load:
    """The requests to a server: `prompt_tokens` random ids below `vocab` in, exactly `output_tokens` out."""

    prompt_tokens: int
    output_tokens: int
    vocab: int
    model: str


@dataclass(frozen=True)
class Speed:
    """Output tokens per second over all requests; medians of the time to the first token and to each further token."""

    tokens_per_second: float
    first_token_ms: float
    each_token_ms: float


def measure(url: str, load: Load, concurrency: int, requests: int) -> Speed:
    """Send `requests` different prompts, `concurrency` at a time; the same prompts for the same arguments.

    Raises:
        RuntimeError: a request failed, or its answer does not have the requested length.
    """
    return asyncio.run(_measure(url, load, concurrency, requests))


async def _measure(url: str, load: Load, concurrency: int, requests: int) -> Speed:
    draw = random.Random(f"{concurrency} {requests}")
    prompts = [
        [draw.randrange(load.vocab) for _ in range(load.prompt_tokens)] for _ in range(requests)
    ]
    times: list[tuple[float, float]] = []

    async def worker(session: aiohttp.ClientSession) -> None:
        while prompts:
            times.append(await _request(session, url, load, prompts.pop()))

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        started = time.perf_counter()
        await asyncio.gather(*(worker(session) for _ in range(concurrency)))
        seconds = time.perf_counter() - started
    return Speed(
        requests * load.output_tokens / seconds,
        1e3 * statistics.median(first for first, _ in times),
        1e3
        * statistics.median((total - first) / (load.output_tokens - 1) for first, total in times),
    )


async def _request(
    session: aiohttp.ClientSession, url: str, load: Load, prompt: list[int]
) -> tuple[float, float]:
    """Seconds to the first token and to the last."""
    body = {
        "model": load.model,
        "prompt": prompt,
        "max_tokens": load.output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,  # without a tokenizer there is no text, and empty chunks are not sent
    }
    started = time.perf_counter()
    first = last = 0.0
    usage: dict[str, int] = {}
    async with session.post(f"{url}/v1/completions", json=body) as reply:
        if reply.status != 200:
            raise RuntimeError(f"the server answered {reply.status}: {(await reply.text())[:500]}")
        async for line in reply.content:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line.removeprefix(b"data: "))
            if "error" in chunk:
                raise RuntimeError(f"the server stopped with an error: {chunk['error']}")
            if any(choice.get("token_ids") for choice in chunk["choices"]):
                last = time.perf_counter() - started
                first = first or last
            usage = chunk.get("usage") or usage
    if usage.get("completion_tokens") != load.output_tokens or not first:
        raise RuntimeError(f"asked for {load.output_tokens} tokens, got {usage or 'no usage'}")
    return first, last
