"""A dense model served with a compressed copy as its draft: the dense model's answers, and what a token of them takes.

    # in the serving environment; each DRAFT is a compressed checkpoint of MODEL
    python benchmarks/speculation.py MODEL --drafts DRAFT... --tokens 2 4 --problems held_out.jsonl
    # the shape of Qwen2-1.5B with random weights: what a step takes
    python benchmarks/speculation.py --random --keep FOLDER --tokens 2 4 --rounds 3

The draft writes `--tokens` tokens, one by one; the dense model reads them in one step, and keeps those that it would have written
(speculative decoding; vLLM's method `draft_model`). One request at a time. Of a real model the requests are the problems of a
file (a JSON object with "problem" per line); the table has the share of drafted tokens that were kept, tokens per step of the
dense model, milliseconds per token with prompts included, and how many greedy answers are those of the dense model alone, token
by token: in bfloat16 several tokens at once round otherwise than one, so not all need to be. Random weights keep hardly any
drafted token, so only the time of a step means something: divide it by the tokens per step of a real model.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import statistics
import sys
import tempfile
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import machine
from random_model import save_model
from streaming_client import Load, measure
from vllm_server import Server, serving

from rac_modifier.settings.pattern import Pattern

DENSE = "dense alone"
# One process, so that no engine polls beside the products (docs/serving.md).
OPTIONS = [
    "--served-model-name",
    "model",
    "--dtype",
    "bfloat16",
    "--distributed-executor-backend",
    "uni",
]
ENVIRONMENT = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
REQUESTS, PROMPT, NEW = 3, 128, 64  # of random weights: requests, their tokens in and out
SHAPE = (28, 151936)  # layers and vocabulary of Qwen2-1.5B
# Random drafts by name: sparsity, bits.
RANDOM_DRAFTS = {"50 % + int4": (0.5, 4), "70 % + int4": (0.7, 4), "dense int3": (0.0, 3)}


@dataclass
class Run:
    """What the servers of one row did. `answers`: token ids per problem. Without a draft the counters are 0."""

    ms_per_token: list[float] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    steps: int = 0
    drafted: int = 0
    kept: int = 0


def speculative(draft: Path, tokens: int) -> list[str]:
    """vLLM's options for a draft."""
    config: dict[str, Any] = {
        "method": "draft_model",
        "model": str(draft),
        "num_speculative_tokens": tokens,
    }
    config["quantization"] = "rac"  # dense weights of few bits run on our kernels when asked for
    return ["--speculative-config", json.dumps(config)]


def counters(server: Server) -> dict[str, int]:
    """vLLM's own counts since it started: steps with a draft, drafted tokens, kept ones."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as reply:
        lines = reply.read().decode().splitlines()
    names = {"num_drafts": "steps", "num_draft_tokens": "drafted", "num_accepted_tokens": "kept"}
    found = {}
    for line in lines:
        for name, ours in names.items():
            if line.startswith(f"vllm:spec_decode_{name}_total{{"):
                found[ours] = int(float(line.split()[-1]))
    return found


def answer(server: Server, problem: str, cap: int, temperature: float) -> tuple[list[int], float]:
    """Token ids of one answer, and its seconds."""
    body = {
        "model": "model",
        "messages": [{"role": "user", "content": problem}],
        "max_tokens": cap,
        "temperature": temperature,
        "seed": 0,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"{server.url}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    started = time.perf_counter()
    with urllib.request.urlopen(request, timeout=600) as reply:
        choice = json.loads(reply.read())["choices"][0]
    return choice["token_ids"], time.perf_counter() - started


def one_round(
    args: argparse.Namespace, target: Path, draft: Path | None, tokens: int, run: Run
) -> None:
    """Start a server, send the requests, and add to `run`."""
    options = [*OPTIONS, *shlex.split(args.vllm)]
    options += ["--skip-tokenizer-init", "--max-model-len", "2048"] if args.random else []
    options += speculative(draft, tokens) if draft is not None else []
    environment = ENVIRONMENT | (
        {"RAC_LM_HEAD": args.head} if draft is not None and args.head else {}
    )
    with serving(target, options, args.keep / "server.log", environment=environment) as server:
        if args.random:
            load = Load(PROMPT, NEW, SHAPE[1], "model")
            measure(server.url, load, 1, 1)
            before = counters(server)
            run.ms_per_token.append(measure(server.url, load, 1, REQUESTS).each_token_ms)
        else:
            answer(server, args.asked[0], 16, args.temperature)
            before = counters(server)
            done = [answer(server, problem, args.cap, args.temperature) for problem in args.asked]
            run.answers = [ids for ids, _ in done]
            run.ms_per_token.append(
                1e3 * sum(seconds for _, seconds in done) / sum(map(len, run.answers))
            )
        for name, count in counters(server).items():
            setattr(run, name, getattr(run, name) + count - before[name])


def report(runs: dict[tuple[str, int], Run]) -> None:
    """A line per row; ratios are per round, against the dense model alone of the same round."""
    alone = runs[DENSE, 0]
    print(
        "| draft | drafted tokens | kept | tokens per step | ms per step | ms per token | over dense alone | answers alike |"
    )
    print("|---" * 8 + "|")
    for (name, tokens), run in runs.items():
        ratios = [a / b for a, b in zip(alone.ms_per_token, run.ms_per_token, strict=True)]
        kept, per_step = (
            (run.kept / run.drafted, 1 + run.kept / run.steps) if run.steps else (None, 1.0)
        )
        alike = sum(a == b for a, b in zip(alone.answers, run.answers, strict=True))
        each = statistics.median(run.ms_per_token)
        print(
            f"| {name} | {tokens or '-'} | {'-' if kept is None else f'{kept:.1%}'} | {per_step:.2f} | "
            f"{each * per_step:.1f} | {each:.1f} | "
            f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f}) | "
            + (f"{alike} of {len(run.answers)} |" if run.answers else "- |")
        )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?")
    parser.add_argument(
        "--drafts", type=Path, nargs="+", default=[], help="compressed checkpoints of the model"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[3], help="drafted per step")
    parser.add_argument("--problems", type=Path, help='a JSON object with "problem" per line')
    parser.add_argument("--count", type=int, default=16, help="problems that are asked")
    parser.add_argument("--cap", type=int, default=256, help="new tokens per answer")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument(
        "--random", action="store_true", help="random weights in the shape of Qwen2-1.5B"
    )
    parser.add_argument("--head", default="int4", help="RAC_LM_HEAD of the draft, '' for none")
    parser.add_argument(
        "--only", nargs="+", default=[*RANDOM_DRAFTS], choices=RANDOM_DRAFTS, help="random drafts"
    )
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for random models and the server's log")
    parser.add_argument("--vllm", default="", help="further options of vllm serve, in one string")
    args = parser.parse_args()
    if (args.model is None) != args.random:
        parser.error("give a MODEL with --drafts and --problems, or --random")
    if args.model is not None and not (args.drafts and args.problems):
        parser.error("a MODEL needs --drafts and --problems")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a server is stopped as well
    if args.problems:
        args.asked = [
            json.loads(line)["problem"] for line in args.problems.read_text().splitlines()
        ][: args.count]
    with tempfile.TemporaryDirectory() as folder:
        args.keep = args.keep or Path(folder)
        if args.random:
            args.model, drafts = args.keep / "dense-int16-28-151936", {}
            save_model(args.model, *SHAPE, None)
            for name in args.only:
                pruned, bits = RANDOM_DRAFTS[name]
                drafts[name] = (
                    args.keep
                    / f"{f'{100 * pruned:.0f}' if pruned else 'dense'}-int{bits}-28-151936"
                )
                save_model(
                    drafts[name],
                    *SHAPE,
                    Pattern.unstructured(pruned) if pruned else None,
                    codes=bits,
                )
        else:
            drafts = {path.name: path for path in args.drafts}
        rows = [(DENSE, 0), *((name, tokens) for name in drafts for tokens in args.tokens)]
        runs = {key: Run() for key in rows}
        print(machine(), flush=True)
        for turn in range(args.rounds):
            for name, tokens in rows[:: 1 if turn % 2 == 0 else -1]:
                one_round(args, args.model, drafts.get(name), tokens, runs[name, tokens])
                print(
                    f"round {turn + 1}: {name}, {tokens}: {runs[name, tokens].ms_per_token[-1]:.1f} ms",
                    flush=True,
                )
    report(runs)


if __name__ == "__main__":
    main()
