"""Traces: how fast a collection is, and which changes of the calibration set matter.

    python -m bench traces rates --vllm .venv-serve/bin/vllm     # a server, or the process itself
    python -m bench traces client --vllm .venv-serve/bin/vllm    # against a bare load generator
    python -m bench traces changes --patterns 2:4 0.6            # a change of the set at a time

The model is the embedded reasoner in float32, or SmolLM2 in bfloat16 (`--model smollm2`). Each
round completes other problems, in the same order for both contenders.
"""

import argparse
import asyncio
import json
import time
from contextlib import suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import aiohttp
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.common import in_turn, ratios, save, spread
from bench.grid import COLUMNS, OURS, cells, pattern, run_grid
from bench.models import SUBJECTS
from bench.server import NAME, Server, serving
from rac_modifier.errors import RacError
from rac_modifier.problems.source import load_problems
from rac_modifier.reasoner import reasoner_path
from rac_modifier.sampling.generate import render_question
from rac_modifier.sampling.model_identity import ModelIdentity
from rac_modifier.settings.calibration import TraceSettings
from rac_modifier.settings.problems import ProblemSource
from rac_modifier.settings.sampling import EngineSettings, SamplingSettings
from rac_modifier.traces.collect import collect_traces
from rac_modifier.traces.store import TraceStore

DTYPES = {"reasoner": "float32", "smollm2": "bfloat16"}
# vLLM 0.32 on a CPU fails if it reads the prompt of a request with a seed in chunks
OPTIONS = ["--max-model-len", "1024", "--no-enable-chunked-prefill"]
CAP = 512  # most new tokens
SAMPLING: dict[str, Any] = {"temperature": 0.6, "top_p": 0.95, "top_k": 0}
CHANGES: dict[str, dict[str, Any]] = {  # changed settings of the pruning entry
    "baseline: whole traces": {},
    "a quarter in bare prompts": {"calibration.mixture": {"traces": 0.75, "prompts": 0.25}},
    "half in bare prompts": {"calibration.mixture": {"traces": 0.5, "prompts": 0.5}},
    "a quarter in generic text": {"calibration.mixture": {"traces": 0.75, "generic": 0.25}},
    "right answers only": {"traces.select.answers": "correct"},
    "an eighth of the tokens": {"calibration.tokens": 4096},
    "four times the tokens": {"calibration.tokens": 131072},
}
TINY = "--patterns 2:4 --changes 'baseline: whole traces' --tokens 512 --problems 2 --cap 24"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    what = ["rates", "client", "changes"]
    parser.add_argument("what", nargs="?", choices=what, default="changes")
    parser.add_argument("--vllm", type=Path, help="the `vllm` of a serving environment")
    parser.add_argument("--model", default="reasoner", choices=SUBJECTS, help="of rates and client")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=128, help="requests in progress")
    parser.add_argument("--problems", type=int, default=200, help="per round or evaluation")
    parser.add_argument("--patterns", nargs="+", default=["2:4", "0.6"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--changes", nargs="+", choices=CHANGES, default=list(CHANGES))
    parser.add_argument("--tokens", type=int, default=32768, help="of calibration")
    parser.add_argument("--cap", type=int, default=CAP, help="most new tokens of an answer")


def changes(options: argparse.Namespace) -> None:
    """Prune with each change and write the table; `paper` loses enough to show differences."""
    subject = SUBJECTS["reasoner"](options.work)
    rows = [
        {
            "label": f"{share}, {name}",
            "recipe": {OURS: {**pattern(share), "preset": "paper"}},
            "set": CHANGES[name],
            "seeds": options.seeds,
        }
        for share in options.patterns
        for name in options.changes
    ]
    budgets = {name: getattr(options, name) for name in ("tokens", "problems", "cap")}
    finished = run_grid(subject, rows, options.work / "traces-changes", **budgets)
    save(options.out, "traces_changes", subject.name, COLUMNS, [cells(row) for row in finished])


def collection(server: Server | None, options: argparse.Namespace) -> tuple[float, float]:
    """Collect a round of problems, from a server or in this process.

    Returns tokens per second, and CPU ms of this process per 1,000 tokens.
    """
    path = options.work / f"rate-{time.time_ns()}.jsonl"
    model: Any
    if server is None:
        engine, dtype = None, getattr(torch, DTYPES[options.model])
        model = AutoModelForCausalLM.from_pretrained(options.folder, dtype=dtype)
    else:
        urls = [f"{server.url}/v1"]
        engine = EngineSettings(base_urls=urls, concurrency=options.concurrency)
        model = ModelIdentity.of_files(str(options.folder))
    settings = TraceSettings(
        store=str(path),
        problems=problems_of(options),
        sampling=SamplingSettings(
            **SAMPLING, max_new_tokens=CAP, seed=options.round, batch_size=options.concurrency
        ),
        engine=engine,
    )
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    started, cpu = time.perf_counter(), time.process_time()
    with suppress(RacError):  # the problems are used up before the budget is reached
        collect_traces(model, tokenizer, settings, 10**9)
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    return rates(TraceStore.read(path).counts.completion_tokens, seconds, cpu)


def problems_of(options: argparse.Namespace) -> ProblemSource:
    """Return the problems that the model's calibration samples first."""
    traces = options.subject.shared["traces"]
    first = next(iter(traces.get("sources", {"": traces}).values()))
    return ProblemSource(**first["problems"], limit=options.problems)


def rates(tokens: int, seconds: float, cpu: float) -> tuple[float, float]:
    """Return tokens per second and CPU ms per 1,000 tokens."""
    return tokens / seconds, 1e6 * cpu / tokens


def round_prompts(options: argparse.Namespace) -> list[list[int]]:
    """Return the prompts of a round as token ids."""
    tokenizer = AutoTokenizer.from_pretrained(options.folder)
    problems = islice(load_problems(problems_of(options), options.round), options.problems)
    return [render_question(tokenizer, problem.question) for problem in problems]


def bare_load(server: Server, options: argparse.Namespace) -> tuple[float, float]:
    """Send the same prompts with nothing but a counter of tokens."""
    body = {"model": NAME, "temperature": 0.6, "top_p": 0.95, "max_tokens": CAP}
    bodies = [
        json.dumps({**body, "prompt": ids, "seed": at})
        for at, ids in enumerate(round_prompts(options))
    ]

    async def load() -> int:
        tokens = 0

        async def worker(session: aiohttp.ClientSession) -> None:
            nonlocal tokens
            while bodies:
                headers = {"Content-Type": "application/json"}
                url = f"{server.url}/v1/completions"
                async with session.post(url, data=bodies.pop(), headers=headers) as reply:
                    tokens += json.loads(await reply.read())["usage"]["completion_tokens"]

        timeout = aiohttp.ClientTimeout(total=None)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            await asyncio.gather(*(worker(session) for _ in range(options.concurrency)))
        return tokens

    started, cpu = time.perf_counter(), time.process_time()
    tokens = asyncio.run(load())
    return rates(tokens, time.perf_counter() - started, time.process_time() - cpu)


def run(options: argparse.Namespace) -> None:
    """Measure and write the table."""
    options.work.mkdir(parents=True, exist_ok=True)
    if options.what == "changes":
        changes(options)
        return
    subject = options.subject = SUBJECTS[options.model](options.work)
    options.folder = reasoner_path() if subject.model == "reasoner" else Path(subject.model)
    log, flags = options.work / "traces.log", [*OPTIONS, "--dtype", DTYPES[options.model]]
    with serving(options.folder, flags, log, vllm=options.vllm) as server:
        results: dict[str, list[tuple[float, float]]] = {}
        for number in range(options.rounds):
            options.round = number
            runs: dict[str, Any] = {
                "collection from the server": partial(collection, server, options)
            }
            if options.what == "rates":
                runs["collection in this process"] = partial(collection, None, options)
            else:
                runs["bare load generator"] = partial(bare_load, server, options)
            for name, values in in_turn(runs, 1).items():
                results.setdefault(name, []).extend(values)
    rows, (last, _) = [], zip(*list(results.values())[-1], strict=True)
    for name, values in results.items():
        per_second, cpu = zip(*values, strict=True)
        rows.append([name, spread(per_second), ratios(per_second, last), spread(cpu)])
    columns = {
        "client": "",
        "completion tokens/s": ",.0f",
        "ratio to the last row": ".3f",
        "CPU ms per 1,000 tokens": ".1f",
    }
    name = f"traces_{options.what}" + "_smollm2" * (options.model == "smollm2")
    save(options.out, name, subject.name, columns, rows)
