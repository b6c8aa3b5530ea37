"""Servers of random weights behind one client: tokens per second, latency, memory.

    .venv-serve/bin/python -m bench serving --rounds 5
    .venv-serve/bin/python -m bench serving --forms bf16 w8a8 int4 50%-int8 --prompts 512
    .venv-serve/bin/python -m bench serving --shape 30B-A3B --layers 2 --forms Q4_0 bf16 int4
    .venv-serve/bin/python -m bench serving --soak demo/served

bf16, w8a8 and w4a16 run on vLLM's own kernels. GGUF types run on llama.cpp's server,
openvino-Q4_0 on OpenVINO GenAI; zentorch-w4a16 and torchao-int4 on vLLM with these packages.
All other forms run on our kernels; int4-8 has 8-bit activations but in q, k and v. Projects have
folders of their own:

    pip install --no-deps --target build/peers/llama xllamacpp gguf
    pip install --no-deps --target build/peers/openvino openvino openvino-genai gguf
    pip install --no-deps --target build/peers/torchao "torchao>=0.18,<0.19"
    pip install --no-deps --target build/peers/zentorch "zentorch<2.14" deprecated wrapt

Each round starts a server per form, in reverse order every second round. Ratios are to the
first form. A form whose project is missing, or whose server fails, is listed with the reason.
--soak sends thousands of requests to a checkpoint: some clients leave, some prompts are bad. It
exits with 1 where memory is not flat, a request fails or a bad prompt is answered.
"""

import argparse
import json
import os
import shlex
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from bench.common import in_turn, ratios, save
from bench.gguf_file import KINDS
from bench.server import (
    Server,
    Speed,
    check_zentorch,
    measure,
    running,
    serving,
    with_packages,
)
from bench.shapes import Form, random_model
from bench.soak import soak

FORMS = ["Q4_0", "Q4_K_M", "Q3_K_M", "openvino-Q4_0", "bf16", "w8a8", "w4a16", "zentorch-bf16"]
FORMS += ["zentorch-w4a16", "torchao-int4", "int4", "int4-8", "int3", "50%-int4"]
FEWEST = 2  # requests of a measurement, which otherwise sends one per client
WARM_UP = (32, 8)  # tokens in and out
TINY = "--forms 50%-int4 --layers 2 --vocab 4096 --rounds 1 --concurrency 1 --output-tokens 4"
TINY += " --prompts 8"
TORCHAO = {"_type": "PrototypeInt4WeightOnlyConfig", "_data": {"group_size": 128}}


@dataclass(frozen=True)
class Run:
    """A server: bytes on disk and in memory, speed by concurrency, first token by prompt length."""

    disk: int
    resident: int
    speeds: dict[int, Speed]
    first_ms: dict[int, float]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--forms", nargs="+", default=FORMS)
    parser.add_argument("--shape", choices=("1.5B", "30B-A3B"), default="1.5B")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, nargs="*", default=[512, 2048], help="lengths")
    parser.add_argument("--packages", type=Path, default=Path("build/peers"), help="of projects")
    parser.add_argument("--serve-options", default="", help="of `vllm serve`, in one text")
    parser.add_argument("--soak", type=Path, metavar="FOLDER", help="a checkpoint to soak")
    parser.add_argument("--requests", type=int, default=10000, help="of the soak")


def split(name: str) -> tuple[str, str]:
    """Return the project that serves a contender, and the form of its file."""
    project, _, form = name.partition("-")
    if name in KINDS:
        return "llama", name
    if project == "openvino" and form in KINDS:
        return project, form
    if name == "torchao-int4":  # quantized at load
        return project, "bf16"
    if project == "zentorch" and Form.parse(form).vllm:
        return project, form
    return "vllm", Form.parse(name).text


def prepare(name: str, options: argparse.Namespace) -> tuple[Path, AbstractContextManager[Server]]:
    """Return the file or folder of a contender, and the context in which its server runs."""
    project, form = split(name)
    lengths = [options.prompt_tokens + options.output_tokens, sum(WARM_UP)]
    length = max(lengths + [n + 2 for n in options.prompts])
    log = options.work / f"{options.shape}-{name}.log"
    environment = dict(os.environ)
    if project != "vllm":
        environment["PYTHONPATH"] = with_packages(options.packages / project)
    if project in ("llama", "openvino"):
        file = options.work / f"{options.shape}-{form}-{options.layers}-{options.vocab}.gguf"
        sizes = (options.layers, options.vocab, max(options.concurrency), length)
        arguments = map(str, [project, file, form, options.shape, *sizes])
        command = [sys.executable, "-m", "bench.server", *arguments]
        return file, running(command, log, environment)
    if project == "zentorch":
        check_zentorch(environment)
    kind = Form.parse(form)
    folder = random_model(options.work, kind, options.layers, options.vocab, options.shape)
    serve = ["--dtype", "bfloat16", "--skip-tokenizer-init", "--max-model-len", str(length)]
    serve += ["--no-enable-prefix-caching", "--gpu-memory-utilization", "0.3"]
    if project == "torchao":
        overrides = {"quantization_config_dict_json": json.dumps(TORCHAO)}
        serve += ["--quantization", "torchao", "--hf-overrides", json.dumps(overrides)]
    elif not kind.vllm and not kind.pruned:
        serve += ["--quantization", "rac"]
    serve += shlex.split(options.serve_options)
    return folder, serving(folder, serve, log, environment=environment)


def run_one(name: str, options: argparse.Namespace) -> Run:
    """Start a contender's server, measure it, and end it."""
    file, context = prepare(name, options)
    with context as server:
        resident = server.resident()
        ask = partial(measure, server.url, options.vocab)
        most = max(options.concurrency)
        ask(*WARM_UP, most, most)
        speeds = {
            count: ask(options.prompt_tokens, options.output_tokens, count, max(count, FEWEST))
            for count in options.concurrency
        }
        first = {length: ask(length, 2, 1, 1).first_ms for length in options.prompts}
    weights = [file] if file.is_file() else file.glob("*.safetensors")
    result = Run(sum(path.stat().st_size for path in weights), resident, speeds, first)
    print(name, result, flush=True)  # a round that is ended early has its figures in the log
    return result


def table(
    runs: Mapping[str, Sequence[Run]], counts: Sequence[int], lengths: Sequence[int]
) -> tuple[dict[str, str], list[list[Any]]]:
    """Return the columns of the table and a row per contender, medians of its rounds."""
    columns = {"contender": ""}
    rows: list[list[Any]] = [[name] for name in runs]

    def add(title: str, form: str, read: Callable[[Run], float], ratio: bool = False) -> None:
        columns[title] = form
        if ratio:
            columns[f"{title}, ratio"] = ".2f"
        figures = [[read(run) for run in values] for values in runs.values()]
        for row, values in zip(rows, figures, strict=True):
            row.append(statistics.median(values))
            if ratio:
                row.append(ratios(values, figures[0]))

    def speed(run: Run, count: int) -> float:
        return run.speeds[count].tokens_per_second

    def first_ms(run: Run, length: int) -> float:
        return run.first_ms[length]

    add("on disk, GB", ".2f", lambda run: run.disk / 1e9)
    add("resident, GB", ".2f", lambda run: run.resident / 1e9)
    for count in counts:
        add(f"tokens/s, {count} at a time", ".1f", partial(speed, count=count), ratio=True)
    add("each further token, ms", ".1f", lambda run: run.speeds[counts[0]].further_ms)
    for length in lengths:
        add(f"first token of {length:,}, ms", ",.0f", partial(first_ms, length=length), ratio=True)
    return columns, rows


def run(options: argparse.Namespace) -> None:
    """Measure the contenders in turn and write the table; or soak a checkpoint."""
    options.work.mkdir(parents=True, exist_ok=True)
    if options.soak:
        sys.exit(soak(options))
    for name in options.forms:
        split(name)  # a misspelt form ends the run before it begins
    gaps: dict[str, str] = {}
    calls = {name: partial(run_one, name, options) for name in options.forms}
    columns, rows = table(
        in_turn(calls, options.rounds, gaps), options.concurrency, options.prompts
    )
    measured = {row[0] for row in rows}
    rows += [[name, *[None] * (len(columns) - 1)] for name in gaps if name not in measured]
    shape = "Qwen3-30B-A3B" if options.shape == "30B-A3B" else "Qwen2-1.5B"
    model = f"shape of {shape} with {options.layers} layers, random weights"
    save(options.out, "serving", model, columns, rows, gaps)
