"""Collecting traces of the embedded reasoner through `vllm serve`, against transformers' `generate` in batches of 8.

    python benchmarks/trace_speed.py rates --vllm .venv-serve/bin/vllm             # tokens/s of both on the same problems
    python benchmarks/trace_speed.py client --vllm .venv-serve/bin/vllm            # what our client adds to the server's time
    python benchmarks/trace_speed.py client --vllm .venv-serve/bin/vllm --model FOLDER --problems 64    # of another model's
    python benchmarks/trace_speed.py memory --vllm .venv-serve/bin/vllm            # a million tokens; goes on where it was

`rates`: each round takes other problems, in the same order for both. The server is asked as many as hold --tokens; `generate`, as
the paper's code calls it, the first --problems of them, eight at a time. Both sample float32 weights at the same settings.
Tokens are those of completions up to their EOS; padding does not count. The server stays up, idle, while `generate` runs.

`client`: each round completes other problems, --problems of them, twice: by a whole collection (checks of the model and of each
answer, and the store's writes included), and by a bare load generator, which sends the same requests from ready bodies and
reads only the number of tokens of an answer. In turn, the order reversed each round. The last columns are the processor time of
each client per 1,000 completion tokens, which it takes from a server on the same cores.

`memory`: one collection to budgets of 10,000, 100,000 and 1,130,000 tokens, in one process, and the most memory that the
collector (not the server) held resident in each part.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import aiohttp
import psutil
import torch
from common import fresh, machine
from transformers import AutoTokenizer
from vllm_server import Server, serving

from rac_modifier.errors import RacError
from rac_modifier.problems.source import load_problems
from rac_modifier.reasoner import reasoner_path
from rac_modifier.sampling.completions_api import Request, trace_seed
from rac_modifier.sampling.model_identity import ModelIdentity
from rac_modifier.sampling.prompts import render_prompt, render_question
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings
from rac_modifier.traces.collect import collect_traces
from rac_modifier.traces.fill_store import pending_path
from rac_modifier.traces.store import TraceStore

REASONER = reasoner_path()
OPTIONS = ["--dtype", "float32", "--max-model-len", "1024", "--gpu-memory-utilization", "0.3"]
REFERENCE_BATCH = 8
STEPS = (10_000, 100_000, 1_130_000)  # the last one so that completions alone are a million


def sampling(seed: int) -> SamplingSettings:
    return SamplingSettings(temperature=0.6, top_p=0.95, top_k=0, max_new_tokens=512, seed=seed)


def collect(
    server: Server,
    path: Path,
    tokens: int,
    seed: int,
    concurrency: int,
    problems: int | None = None,
    model: Path = REASONER,
) -> TraceStore:
    return collect_traces(
        ModelIdentity.of_files(str(model)),
        AutoTokenizer.from_pretrained(model),
        path,
        problems=ProblemSource(limit=problems),
        sampling=sampling(seed),
        tokens=tokens,
        engine=EngineSettings(base_urls=(f"{server.url}/v1",), concurrency=concurrency),
        progress=False,
    )


def server_rate(server: Server, path: Path, tokens: int, seed: int, concurrency: int) -> float:
    """Completion tokens a second of a whole collection: checks of the model, writes and the last stragglers included."""
    path.unlink(missing_ok=True)
    pending_path(path).unlink(missing_ok=True)
    started = time.perf_counter()
    store = collect(server, path, tokens, seed, concurrency)
    seconds = time.perf_counter() - started
    print(
        f"  server: {len(store)} traces, {store.counts.completion_tokens} tokens in {seconds:.1f} s",
        flush=True,
    )
    return store.counts.completion_tokens / seconds


@torch.no_grad()
def reference_rate(model, tokenizer, problems: int, seed: int) -> float:
    settings = sampling(seed)
    tokenizer.padding_side = "left"
    prompts = [
        render_prompt(tokenizer, p.question)
        for p in islice(load_problems(ProblemSource(), seed), problems)
    ]
    torch.manual_seed(seed)
    tokens, eos = 0, model.generation_config.eos_token_id
    started = time.perf_counter()
    for start in range(0, len(prompts), REFERENCE_BATCH):
        batch = tokenizer.pad(
            {"input_ids": prompts[start : start + REFERENCE_BATCH]}, return_tensors="pt"
        )
        output = model.generate(
            **batch,
            do_sample=True,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=0,
            max_new_tokens=settings.max_new_tokens,
        )
        for row in output[:, batch["input_ids"].shape[1] :].tolist():
            tokens += row.index(eos) + 1 if eos in row else len(row)
    seconds = time.perf_counter() - started
    print(f"  generate: {len(prompts)} traces, {tokens} tokens in {seconds:.1f} s", flush=True)
    return tokens / seconds


def rates(server: Server, args: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(REASONER)
    model = fresh(REASONER)
    server_rate(server, args.out / "warm-up.jsonl", 5_000, 10**6, max(args.concurrency))
    reference_rate(model, tokenizer, REFERENCE_BATCH, 10**6)
    found: dict[int | str, list[float]] = {}
    for seed in range(args.rounds):
        for concurrency in args.concurrency:
            rate = server_rate(server, args.out / "rate.jsonl", args.tokens, seed, concurrency)
            found.setdefault(concurrency, []).append(rate)
        idle = server.cpu_seconds()
        found.setdefault("generate", []).append(
            reference_rate(model, tokenizer, args.problems, seed)
        )
        print(
            f"  (the server used {server.cpu_seconds() - idle:.1f} s of processor time meanwhile)",
            flush=True,
        )
    print(
        "| | tokens/s, median of the rounds (range) | ratio to generate in the same round |\n|---|---|---|"
    )
    for name, values in found.items():
        ratios = [a / b for a, b in zip(values, found["generate"], strict=True)]
        label = (
            f"transformers generate, batch {REFERENCE_BATCH}"
            if name == "generate"
            else f"server, {name} at a time"
        )
        print(
            f"| {label} | {statistics.median(values):,.0f} ({min(values):,.0f}-{max(values):,.0f}) | "
            f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f}) |"
        )


class Took(NamedTuple):
    """What a client took: the seconds of the clock and of its processor, and the completion tokens that it got."""

    seconds: float
    busy: float
    tokens: int

    @property
    def rate(self) -> float:
        """Completion tokens per second."""
        return self.tokens / self.seconds

    @property
    def busy_ms(self) -> float:
        """Milliseconds of the processor per 1,000 completion tokens."""
        return 1e6 * self.busy / self.tokens


def told(what: str, took: Took) -> Took:
    """Prints it."""
    print(
        f"  {what}: {took.tokens} tokens in {took.seconds:.1f} s, {took.busy:.2f} s of the processor",
        flush=True,
    )
    return took


def collection(
    server: Server, path: Path, problems: int, seed: int, concurrency: int, model: Path
) -> Took:
    """A collection that ends when its problems do."""
    path.unlink(missing_ok=True)
    pending_path(path).unlink(missing_ok=True)
    started, busy = time.perf_counter(), time.process_time()
    with suppress(
        RacError
    ):  # the problems are used up before the budget is reached; all traces are kept
        collect(server, path, 10**9, seed, concurrency, problems, model)
    seconds, busy = time.perf_counter() - started, time.process_time() - busy
    counts = TraceStore.read(path).counts
    assert counts.traces == problems, f"{counts.traces} of {problems} traces"
    return told("collection", Took(seconds, busy, counts.completion_tokens))


def bodies(problems: int, seed: int, model: Path) -> list[bytes]:
    """The requests that a collection of the first `problems` makes."""
    settings, tokenizer = sampling(seed), AutoTokenizer.from_pretrained(model)
    requests = []
    for problem in islice(load_problems(ProblemSource(), seed), problems):
        prompt = tuple(render_question(tokenizer, problem.question, settings))
        seed_here = trace_seed(seed, f"{problem.id}#0")
        request = Request(prompt, settings.max_new_tokens, seed_here, (tokenizer.eos_token_id,))
        requests.append(json.dumps(request.body(str(model), settings)).encode())
    return requests


def bare_load(server: Server, requests: list[bytes], concurrency: int) -> Took:
    """A client that does nothing but send and count."""

    async def load() -> int:
        left, tokens = requests[::-1], 0
        headers = {"Content-Type": "application/json"}

        async def worker(session: aiohttp.ClientSession) -> None:
            nonlocal tokens
            while left:
                async with session.post(
                    f"{server.url}/v1/completions", data=left.pop(), headers=headers
                ) as reply:
                    tokens += json.loads(await reply.read())["usage"]["completion_tokens"]

        connector = aiohttp.TCPConnector(limit=concurrency)
        async with aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=None)
        ) as session:
            await asyncio.gather(*(worker(session) for _ in range(concurrency)))
        return tokens

    started, busy = time.perf_counter(), time.process_time()
    tokens = asyncio.run(load())
    return told(
        "load generator", Took(time.perf_counter() - started, time.process_time() - busy, tokens)
    )


def client(server: Server, args: argparse.Namespace) -> None:
    """Our client's share of the server's throughput."""
    path = args.out / "client.jsonl"
    collection(
        server, path, min(args.problems, 100), 10**6, max(args.concurrency), args.model
    )  # to warm up
    print(
        "| at a time | collection, tokens/s | load generator, tokens/s | ratio of the same round "
        "| collection, processor ms per 1,000 tokens | load generator |\n|---|---|---|---|---|---|"
    )
    for concurrency in args.concurrency:
        found: dict[str, list[Took]] = {"ours": [], "bare": []}
        for seed in range(args.rounds):
            requests = bodies(args.problems, seed, args.model)
            for name in ("ours", "bare") if seed % 2 == 0 else ("bare", "ours"):
                found[name].append(
                    bare_load(server, requests, concurrency)
                    if name == "bare"
                    else collection(server, path, args.problems, seed, concurrency, args.model)
                )
        ratios = [
            one.rate / other.rate for one, other in zip(found["ours"], found["bare"], strict=True)
        ]
        ours, bare = (statistics.median(took.rate for took in each) for each in found.values())
        busy = " | ".join(
            f"{statistics.median(took.busy_ms for took in each):.1f}" for each in found.values()
        )
        print(
            f"| {concurrency} | {ours:,.0f} | {bare:,.0f} | "
            f"{statistics.median(ratios):.3f}x ({min(ratios):.3f}-{max(ratios):.3f}) | {busy} |",
            flush=True,
        )


@contextmanager
def most_resident() -> Iterator[list[float]]:
    """The most MiB that this process held resident while inside, in a list of one."""
    process, most, stop = psutil.Process(), [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.1):
            most[0] = max(most[0], process.memory_info().rss / 2**20)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        stop.set()
        thread.join()


def memory(server: Server, args: argparse.Namespace) -> None:
    for tokens in STEPS:
        started = time.perf_counter()
        with most_resident() as most:
            store = collect(server, args.out / "million.jsonl", tokens, 0, max(args.concurrency))
        row = {
            "tokens": store.counts.tokens,
            "traces": len(store),
            "completion_tokens": store.counts.completion_tokens,
            "finished": store.counts.finished,
            "resident_mib": round(most[0], 1),
            "seconds": round(time.perf_counter() - started, 1),
            "store_mib": round(store.path.stat().st_size / 2**20, 1),
            "pid": os.getpid(),
        }
        with (args.out / "memory.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["rates", "client", "memory"])
    parser.add_argument(
        "--vllm", type=Path, help="the `vllm` of a serving environment; default: beside this Python"
    )
    parser.add_argument("--out", type=Path, default=Path("build/trace_speed"))
    parser.add_argument("--concurrency", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--tokens", type=int, default=60_000, help="that the server is asked for in each round"
    )
    parser.add_argument(
        "--problems",
        type=int,
        default=80,
        help="that generate, or both clients, are asked in each round",
    )
    parser.add_argument(
        "--model", type=Path, default=REASONER, help="folder of the model, for `client`"
    )
    args = parser.parse_args()
    if args.what != "client" and args.model != REASONER:
        parser.error(f"--model is for client, not for {args.what}")
    args.out.mkdir(parents=True, exist_ok=True)
    print(machine(), flush=True)
    with serving(args.model, OPTIONS, args.out / "vllm.log", vllm=args.vllm) as server:
        {"rates": rates, "client": client, "memory": memory}[args.what](server, args)


if __name__ == "__main__":
    main()
