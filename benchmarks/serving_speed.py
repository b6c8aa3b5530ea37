"""End-to-end speed of `vllm serve`: a model of the shape of Qwen2-1.5B, dense against packed sparse, in the same vLLM.

    .venv-serve/bin/python benchmarks/serving_speed.py                                       # about an hour on two AVX2 cores
    .venv-serve/bin/python benchmarks/serving_speed.py --sparsity 0.5 0.6 0.7 2:4
    .venv-serve/bin/python benchmarks/serving_speed.py --compare dense dense-int8 sparse int8 int8-8  # both: sparse, head too
    .venv-serve/bin/python benchmarks/serving_speed.py --concurrency 16 --first-token 512 2048  # long prompts, one at a time
    .venv-serve/bin/python benchmarks/serving_speed.py --layers 2 --vocab 4096 --rounds 1    # a quick test: minutes

Each round starts a new server for each model, in reverse order in every second round. A server is warmed up and then gets
prompts of random token ids at each concurrency: every request has `--prompt-tokens` in and exactly `--output-tokens` out,
and no prompt is in a prefix cache. The tables show medians over the rounds; a ratio is the median of the rounds' own ratios
to the first model of the table. Tokens per second include the time for prompts, "each further" does not. With --first-token,
single requests with prompts of these lengths follow, and a table of their times to the first token.
Other options, such as --enforce-eager, are passed to `vllm serve`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from common import machine
from random_model import save_model, size_on_disk
from streaming_client import Load, Speed, measure
from vllm_server import busy_seconds, serving

from rac_modifier.errors import RacError
from rac_modifier.settings.pattern import Pattern

NAME = "model"
DENSE, DENSE8, SPARSE, INT8, INT8_8 = "dense", "dense-int8", "sparse", "int8", "int8-8"
SUFFIX = {INT8: " int8", INT8_8: " int8, activations int8"}  # of labels
ENVIRONMENT = {INT8: {"RAC_LM_HEAD": "int8"}, INT8_8: {"RAC_LM_HEAD": "int8", "RAC_ACTIVATIONS": "int8"}}
FEWEST = 4  # requests, so that the median time to the first token means something


@dataclass(frozen=True)
class Run:
    """The figures of one server. `others`: the number of cores that other programs kept busy at the same time."""

    ready_seconds: float
    resident_bytes: int
    others: float
    speeds: dict[int, Speed]
    first_token_ms: dict[int, float]  # by tokens of the prompt


def default_dtype() -> str:
    """bfloat16 where the processor multiplies it, else float32."""
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    return "bfloat16" if {"avx512_bf16", "amx_bf16"} & set(flags) else "float32"


def parse_pattern(text: str) -> Pattern:
    """ "0.5" or "2:4"."""
    try:
        return Pattern.parse(text, None) if ":" in text else Pattern.parse("0:0", float(text))
    except (RacError, ValueError) as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def label(pattern: Pattern) -> str:
    return f"{pattern.n}:{pattern.m} sparse" if pattern.is_structured else f"{100 * pattern.sparsity:g}% sparse"


def build(folder: Path, args: argparse.Namespace) -> tuple[dict[str, Path], dict[str, dict[str, str]]]:
    """The checkpoints to compare, and what their servers' environments add, by label. Ratios are to the first one."""
    checkpoints, environments = {}, {}
    for kind in args.compare:
        for pattern in [None] if kind in (DENSE, DENSE8) else args.sparsity:
            name = kind.replace("-", " ") if pattern is None else label(pattern) + SUFFIX.get(kind, "")
            slug = name.partition(",")[0].replace(" ", "-").replace("%", "").replace(":", "of")
            checkpoints[name] = folder / f"{slug}-{args.layers}-layers-{args.vocab}-vocab"
            save_model(checkpoints[name], args.layers, args.vocab, pattern, kind in (DENSE8, INT8, INT8_8))
            environments[name] = ENVIRONMENT.get(kind, {})
    return checkpoints, environments


def run(checkpoint: Path, args: argparse.Namespace, options: list[str], log: Path, environment: dict[str, str]) -> Run:
    """Start a server, measure it, stop it."""
    load = Load(args.prompt_tokens, args.output_tokens, args.vocab, NAME)
    with serving(checkpoint, options, log, environment=environment) as server:
        resident = server.resident()
        warm_up = replace(load, output_tokens=min(8, load.output_tokens))
        measure(server.url, warm_up, max(args.concurrency), max(args.concurrency))
        started, others = time.perf_counter(), busy_seconds() - server.cpu_seconds() - time.process_time()
        speeds = {c: measure(server.url, load, c, max(c * args.waves, FEWEST)) for c in args.concurrency}
        prompts = {n: replace(load, prompt_tokens=n, output_tokens=2) for n in args.first_token}
        first_token = {n: measure(server.url, prompt, 1, FEWEST).first_token_ms for n, prompt in prompts.items()}
        others = busy_seconds() - server.cpu_seconds() - time.process_time() - others
        others /= time.perf_counter() - started
    return Run(server.ready_seconds, resident, max(others, 0.0), speeds, first_token)


def comparison(figures: dict[str, list[float]], name: str, form: str) -> list[str]:
    """Two cells for one model: the median over the rounds, and the median of the rounds' ratios with their range."""
    first = next(iter(figures.values()))
    ratios = [a / b for a, b in zip(figures[name], first, strict=True)]
    spread = f" ({min(ratios):.2f}-{max(ratios):.2f})" if max(ratios) > min(ratios) else ""
    return [form.format(statistics.median(figures[name])), f"{statistics.median(ratios):.2f}x{spread}"]


def speed_table(runs: dict[str, list[Run]], concurrency: list[int]) -> list[str]:
    columns = (("tokens_per_second", "{:.2f}"), ("first_token_ms", "{:,.0f}"), ("each_token_ms", "{:.1f}"))
    lines = ["| concurrency | model | output tokens/s | ratio | first token ms | ratio | each further ms | ratio |"]
    lines.append("|" + "---|" * 8)
    for c in concurrency:
        for name in runs:
            cells = [str(c), name]
            for field, form in columns:
                figures = {of: [getattr(run.speeds[c], field) for run in runs[of]] for of in runs}
                cells += comparison(figures, name, form)
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def first_token_table(runs: dict[str, list[Run]], lengths: list[int]) -> list[str]:
    lines = ["| tokens of the prompt | model | first token ms | ratio |", "|" + "---|" * 4]
    for length in lengths:
        figures = {name: [run.first_token_ms[length] for run in of] for name, of in runs.items()}
        lines += [
            "| " + " | ".join([f"{length:,}", name, *comparison(figures, name, "{:,.0f}")]) + " |" for name in runs
        ]
    return lines


def size_table(runs: dict[str, list[Run]], checkpoints: dict[str, Path]) -> list[str]:
    lines = ["| model | on disk GB | ratio | resident GB | ratio | start to ready s | ratio |", "|" + "---|" * 7]
    disk = {name: [size_on_disk(checkpoint) / 1e9] for name, checkpoint in checkpoints.items()}
    resident = {name: [run.resident_bytes / 1e9 for run in of] for name, of in runs.items()}
    ready = {name: [run.ready_seconds for run in of] for name, of in runs.items()}
    for name in runs:
        cells = (
            comparison(disk, name, "{:.3f}") + comparison(resident, name, "{:.2f}") + comparison(ready, name, "{:.1f}")
        )
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return lines


def kernel_lines(log: Path) -> list[str]:
    """What the plugin says of its choices, once."""
    marks = ("rac-sparse:", "sparse kernel", "int8 kernel", "dense because")
    lines = [line.partition("] ")[2] for line in log.read_text(errors="replace").splitlines()]
    return list(dict.fromkeys(line for line in lines if any(mark in line for mark in marks)))


def compare(folder: Path, args: argparse.Namespace, serve_options: list[str]) -> None:
    """Build, measure in turn, print the tables."""
    length = max(args.prompt_tokens + args.output_tokens, *(n + 2 for n in args.first_token), 0)
    options = [
        "--served-model-name",
        NAME,
        "--dtype",
        args.dtype,
        "--skip-tokenizer-init",
        "--max-model-len",
        str(length),
    ]
    options += ["--no-enable-prefix-caching", "--gpu-memory-utilization", "0.3", *serve_options]
    checkpoints, environments = build(folder, args)
    runs: dict[str, list[Run]] = {name: [] for name in checkpoints}
    for index in range(args.rounds):
        for name in list(checkpoints)[:: 1 if index % 2 == 0 else -1]:
            started, log = time.monotonic(), folder / f"{checkpoints[name].name}.log"
            runs[name].append(run(checkpoints[name], args, options, log, environments[name]))
            took, others = time.monotonic() - started, runs[name][-1].others
            print(
                f"round {index + 1}: {name} took {took:.0f} s, other programs kept {others:.2f} cores busy", flush=True
            )
            if not index:
                print("\n".join(kernel_lines(log)), flush=True)
    loads = [run.others for of in runs.values() for run in of]
    print(
        f"\n{args.layers} layers of Qwen2-1.5B's shape, vocabulary {args.vocab:,}, served in {args.dtype}; "
        f"{args.prompt_tokens} tokens in, {args.output_tokens} out; {args.rounds} rounds; "
        f"other programs kept {min(loads):.2f}-{max(loads):.2f} of {os.cpu_count()} cores busy\n"
    )
    print("\n".join(speed_table(runs, args.concurrency)) + "\n")
    if args.first_token:
        print("\n".join(first_token_table(runs, args.first_token)) + "\n")
    print("\n".join(size_table(runs, checkpoints)))
    if args.json:
        record = {
            "machine": machine(),
            "settings": {key: str(value) for key, value in vars(args).items()} | {"serve_options": options},
            "bytes_on_disk": {name: size_on_disk(checkpoint) for name, checkpoint in checkpoints.items()},
            "runs": {name: [asdict(run) for run in of] for name, of in runs.items()},
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--compare", choices=(DENSE, DENSE8, SPARSE, INT8, INT8_8), nargs="+", default=[DENSE, SPARSE])
    parser.add_argument(
        "--sparsity", type=parse_pattern, nargs="+", default=[Pattern.unstructured(0.5)], help="shares, or N:M"
    )
    parser.add_argument("--dtype", default=default_dtype(), help="to serve in (here: %(default)s); on disk bfloat16")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--waves", type=int, default=2, help=f"requests = waves x concurrency, {FEWEST} at least")
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64, help="at least 2")
    parser.add_argument("--first-token", type=int, nargs="+", default=[], help="lengths of prompts, one at a time")
    parser.add_argument("--keep", type=Path, help="folder for checkpoints and logs, used again where they exist")
    parser.add_argument("--json", type=Path, help="write every run's figures there")
    args, serve_options = parser.parse_known_args()
    if args.output_tokens < 2 or min(args.rounds, args.waves, *args.concurrency, *args.first_token) < 1:
        parser.error("--output-tokens must be at least 2, and the other numbers at least 1")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the server is stopped as well
    print(machine(), flush=True)
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
        compare(args.keep, args, serve_options)
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(Path(folder), args, serve_options)


if __name__ == "__main__":
    main()
