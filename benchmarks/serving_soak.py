"""A soak of `vllm serve` on a packed checkpoint: thousands of requests, of which some clients leave; is its memory flat?

    make serve-demo                                                   # writes demo/served
    .venv-serve/bin/python benchmarks/serving_soak.py demo/served     # 5,000 requests, about five minutes on one core

Prompts of random token ids and of many lengths, many at a time. `--leave` of the clients go away before their answer is complete:
half of them in the middle of a stream, half before the first byte. Memory is what the server's processes have allocated, sampled
after each 100 requests: PSS without the pages of files, whose share depends on who else reads them. The exit code is 1 if a
sample after the first `--settle` requests differs from the one at that point by more than `--tolerance`, if a request fails, if
requests of clients that left stay in the engine, or if the answer to one prompt is not the same before and after. Other options,
such as --dtype bfloat16, are passed to `vllm serve`.

The cache for keys and values has few blocks (`--num-gpu-blocks-override`), so that the first requests use all of them: the pages
of a larger one are touched one by one, which looks like a leak.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import aiohttp
from vllm_server import serving

NAME = "model"
OPTIONS = ["--served-model-name", NAME, "--max-model-len", "512", "--gpu-memory-utilization", "0.2"]
OPTIONS += ["--num-gpu-blocks-override", "256", "--enforce-eager", "--dtype", "float32"]
EVERY = 100  # requests from one sample of memory to the next
LONG = 200  # tokens that are asked for by a client that leaves: more than it waits for
PROBE = list(range(10, 40))  # the prompt that is asked before and after
PATIENCE = 30.0  # seconds that the engine has to forget requests of clients that left


@dataclass
class Soak:
    """What happened. `samples`: how many requests had ended, and the bytes of memory then.

    `ended` counts requests that were answered, that failed and whose client left; `failures` has the first texts.
    """

    settle: int
    ended: int = 0
    left: int = 0
    failed: int = 0
    failures: list[str] = field(default_factory=list)
    samples: list[tuple[int, int]] = field(default_factory=list)
    unfinished: int = 0  # requests that are in the engine at the end
    same_answer: bool = True
    seconds: float = 0.0

    @property
    def settled(self) -> int:
        """Bytes at the first sample from `settle` requests on."""
        return next(memory for ended, memory in self.samples if ended >= self.settle)

    @property
    def ratio(self) -> float:
        """The sample, of those from `settle` on, that is furthest from the first of them, over it."""
        ratios = [memory / self.settled for ended, memory in self.samples if ended >= self.settle]
        return max(ratios, key=lambda ratio: abs(ratio - 1))

    def wrong(self, tolerance: float) -> list[str]:
        """What makes the soak fail; empty if it passed."""
        found = []
        if abs(self.ratio - 1) > tolerance:
            found.append(
                f"memory is not flat: {self.ratio:.3f} of that after {self.settle} requests"
            )
        if self.failed:
            found.append(f"{self.failed} requests failed; the first: {self.failures[0]}")
        if self.unfinished:
            found.append(f"{self.unfinished} requests of clients that left are in the engine")
        if not self.same_answer:
            found.append("one prompt was answered differently before and after")
        return found

    def table(self) -> str:
        cells = {
            "requests": f"{self.ended:,}",
            "clients that left": f"{self.left:,}",
            "failed": f"{self.failed}",
            f"MB after {self.settle}": f"{self.settled / 1e6:.1f}",
            "MB at the end": f"{self.samples[-1][1] / 1e6:.1f}",
            "end over settled": f"{self.samples[-1][1] / self.settled:.4f}",
            "furthest": f"{self.ratio:.4f}",
            "minutes": f"{self.seconds / 60:.1f}",
        }
        return "\n".join(
            [
                "| " + " | ".join(cells) + " |",
                "|" + "---|" * len(cells),
                f"| {' | '.join(cells.values())} |",
            ]
        )


async def answer(
    session: aiohttp.ClientSession, url: str, prompt: list[int], tokens: int
) -> list[int]:
    """The greedy tokens of one complete answer.

    Raises:
        RuntimeError: the server refuses, or its answer has another length.
    """
    body = {
        "model": NAME,
        "prompt": prompt,
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
    }
    async with session.post(
        f"{url}/v1/completions", json={**body, "return_token_ids": True}
    ) as reply:
        if reply.status != 200:
            raise RuntimeError(f"the server answered {reply.status}: {(await reply.text())[:300]}")
        found = (await reply.json())["choices"][0]["token_ids"]
    if len(found) != tokens:
        raise RuntimeError(f"asked for {tokens} tokens, got {len(found)}")
    return found


async def leave_in_the_stream(
    session: aiohttp.ClientSession, url: str, prompt: list[int], chunks: int
) -> bool:
    """Read some chunks of a stream and close the connection. False if the stream ended before."""
    body = {"model": NAME, "prompt": prompt, "max_tokens": LONG, "ignore_eos": True, "stream": True}
    async with session.post(
        f"{url}/v1/completions", json={**body, "return_token_ids": True}
    ) as reply:
        if reply.status != 200:
            raise RuntimeError(f"the server answered {reply.status}: {(await reply.text())[:300]}")
        async for line in reply.content:
            if line.startswith(b"data: {"):
                if "error" in json.loads(line.removeprefix(b"data: ")):
                    raise RuntimeError(f"the server stopped with an error: {line[:300]!r}")
                chunks -= 1
            if not chunks:
                reply.close()  # without reading the rest
                return True
    return False


async def leave_before_the_answer(
    session: aiohttp.ClientSession, url: str, prompt: list[int], wait: float
) -> bool:
    """Close the connection `wait` seconds after the request was sent. False if the answer came before."""
    try:
        await asyncio.wait_for(answer(session, url, prompt, LONG), wait)
    except TimeoutError:
        return True
    return False


async def in_the_engine(session: aiohttp.ClientSession, url: str) -> int:
    """Requests that run or wait in the engine, as it reports."""
    async with session.get(f"{url}/metrics") as reply:
        lines = (await reply.text()).splitlines()
    found = [
        float(line.split()[-1])
        for line in lines
        if line.startswith(("vllm:num_requests_running{", "vllm:num_requests_waiting{"))
    ]
    if len(found) != 2:
        raise SystemExit(
            "vLLM's /metrics has no num_requests_running and num_requests_waiting; this vLLM has other names"
        )
    return int(sum(found))


async def soak(url: str, memory: Callable[[], int], vocab: int, args: argparse.Namespace) -> Soak:
    """Send the requests; `memory` returns the bytes of the server's processes. The same requests for the same arguments."""
    draw, found, left_to_send = random.Random(0), Soak(args.settle), args.requests

    async def one(session: aiohttp.ClientSession) -> None:
        prompt = [draw.randrange(vocab) for _ in range(draw.randint(1, 256))]
        kind, tokens, chunks, wait = (
            draw.random() / args.leave,
            draw.randint(8, 16),
            draw.randint(1, 12),
            draw.uniform(0.0, 0.5),
        )
        try:
            gone = False
            if kind < 0.5:
                gone = await leave_in_the_stream(session, url, prompt, chunks)
            elif kind < 1:
                gone = await leave_before_the_answer(session, url, prompt, wait)
            else:
                await answer(session, url, prompt, tokens)
            found.left += gone
        except (RuntimeError, TimeoutError, aiohttp.ClientError) as error:
            found.failed += 1
            found.failures.append(f"{type(error).__name__}: {error}")
        found.ended += 1
        if found.ended % EVERY == 0 or found.ended == args.requests:
            ended = found.ended
            found.samples.append((ended, await asyncio.to_thread(memory)))
            if ended % (10 * EVERY) == 0:
                print(f"{ended} requests, {found.samples[-1][1] / 1e6:.1f} MB", flush=True)

    async def worker(session: aiohttp.ClientSession) -> None:
        nonlocal left_to_send
        while left_to_send:
            left_to_send -= 1
            await one(session)

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=3600)) as session:
        before = await answer(session, url, PROBE, 16)
        started = time.monotonic()
        await asyncio.gather(*(worker(session) for _ in range(args.concurrency)))
        found.seconds = time.monotonic() - started
        deadline = time.monotonic() + PATIENCE
        while (unfinished := await in_the_engine(session, url)) and time.monotonic() < deadline:
            await asyncio.sleep(0.1)
        found.unfinished = unfinished
        found.same_answer = await answer(session, url, PROBE, 16) == before
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--requests", type=int, default=5000)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--leave", type=float, default=0.2, help="share of clients that leave")
    parser.add_argument(
        "--settle", type=int, default=500, help="requests before memory has to be flat"
    )
    parser.add_argument("--tolerance", type=float, default=0.03, help="of memory, relative")
    parser.add_argument("--json", type=Path, help="write the counts and all samples there")
    parser.add_argument("--log", type=Path, help="the server's log; default: a temporary file")
    args, serve_options = parser.parse_known_args()
    if not 0 < args.leave <= 1 or args.concurrency < 1:
        parser.error("--leave must be above 0 and at most 1, --concurrency at least 1")
    if args.settle % EVERY or not 0 < args.settle < args.requests:
        parser.error(f"--settle must be a multiple of {EVERY} and less than --requests")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server is stopped as well
    vocab = json.loads((args.checkpoint / "config.json").read_text())["vocab_size"]
    with tempfile.TemporaryDirectory() as folder:
        log = args.log or Path(folder, "server.log")
        with serving(args.checkpoint, [*OPTIONS, *serve_options], log, timeout=3600) as server:
            found = asyncio.run(soak(server.url, server.allocated, vocab, args))
        sparse = [
            line
            for line in log.read_text(errors="replace").splitlines()
            if "rac:" in line and " run on " in line
        ]
    print(
        sparse[0].partition("] ")[2] if sparse else "no layer is reported to run on a sparse kernel"
    )
    print(found.table())
    if args.json:
        args.json.write_text(json.dumps({**asdict(found), "ratio": found.ratio}, indent=1) + "\n")
    wrong = found.wrong(args.tolerance)
    for line in wrong:
        print(line)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
