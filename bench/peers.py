"""Our kernels, llama.cpp, OpenVINO and torchao: Qwen2-1.5B's shape, random weights, batch 1.

    pip install xllamacpp gguf openvino && pip install --no-deps "torchao>=0.18,<0.19"
    .venv-serve/bin/python -m bench peers --contenders "Q4_0" "linears 50%-int4" "served int4"

llama.cpp generates, timed by itself. "linears" are the products of one decode step, of all layers
and the head, without attention and the calls of a server: a lower bound of a token's time. "python"
is vLLM's `LLM` in the process, "served" is `vllm serve` in one process, timed at the client.
Contenders run in turn, each in a process of its own. A contender that is not installed fails alone.
"""

import argparse
import json
import os
import random
import statistics
import time
from dataclasses import astuple, dataclass
from functools import partial

import torch

from bench import peers_others
from bench.common import called_in_child, in_turn, ratios, save
from bench.server import measure, serving
from bench.serving import serve_options
from bench.shapes import GROUP, SHAPES, Form, random_model

HIDDEN = 1536
LLAMA = ("Q4_0", "Q4_K_M", "Q8_0")
LINEARS = ("50%-int4", "60%-int4", "70%-int4", "int4", "int3")
CONTENDERS = [
    *LLAMA,
    "openvino",
    "torchao",
    *(f"{how} {form}" for how in ("linears", "python", "served") for form in LINEARS),
]
TINY = "--contenders 'linears int4' --rounds 1 --layers 1 --vocab 4096 --output-tokens 4"


@dataclass(frozen=True)
class Figures:
    """One run of a contender: bytes of weights that a token reads, and times."""

    weight_bytes: int
    ms_per_token: float
    first_token_s: float | None = None
    tokens_per_s: float | None = None


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--contenders", nargs="+", default=CONTENDERS, help="names, or first words")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)


def llama(name: str, options: argparse.Namespace) -> Figures:
    """Generate with llama.cpp; its own timings."""
    import xllamacpp

    path = peers_others.write_gguf(options.work, name, options.layers, options.vocab)
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx = options.prompt_tokens + options.output_tokens + 64
    params.n_parallel, params.verbosity = 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = options.threads
    server = xllamacpp.Server(params)
    firsts, further = [], []
    for prompt in prompts(options):
        body = {"prompt": prompt, "n_predict": options.output_tokens, "ignore_eos": True}
        answer = server.handle_completions({**body, "cache_prompt": False, "temperature": 0})
        timings = (json.loads(answer) if isinstance(answer, str | bytes) else answer)["timings"]
        firsts.append(timings["prompt_ms"] / 1e3)
        # llama.cpp's clock starts at the first token
        further.append(timings["predicted_ms"] / (options.output_tokens - 1))
    return figures(path.stat().st_size, firsts, further, options)


def prompts(options: argparse.Namespace) -> list[list[int]]:
    """Return three prompts of random ids; the first one warms up."""
    draw = random.Random(0)
    return [
        [draw.randrange(options.vocab - 1) for _ in range(options.prompt_tokens)] for _ in range(3)
    ]


def figures(
    size: int, firsts: list[float], further: list[float], options: argparse.Namespace
) -> Figures:
    """Return the medians of answers after the first: seconds to a token, ms per further one."""
    first, per_token = statistics.median(firsts[1:]), statistics.median(further[1:])
    seconds = first + per_token / 1e3 * (options.output_tokens - 1)
    return Figures(size, per_token, first, options.output_tokens / seconds)


def linears(form: Form, options: argparse.Namespace) -> Figures:
    """Multiply the weights of a decode step; no layers share memory, so no cache helps."""
    from bench.kernels import ours

    torch.manual_seed(0)
    head = Form.parse("int4")
    shapes = [(shape, form) for _ in range(options.layers) for shape in SHAPES["1.5B"]]
    layers, size = [], 0
    for (rows, columns), kind in [*shapes, ((options.vocab, HIDDEN), head)]:
        linear, nbytes = ours(kind, torch.randn(rows, columns).bfloat16())
        layers.append((linear, columns))
        size += nbytes
    inputs = {columns: torch.randn(1, columns).bfloat16() for _, columns in layers}

    def step() -> None:
        for linear, columns in layers:
            linear(inputs[columns])

    with torch.inference_mode():
        return Figures(size, peers_others.median_ms(step, options.output_tokens))


def bytes_read(form: Form, options: argparse.Namespace) -> int:
    """Return the bytes of values, masks and scales that a token reads, with an int4 head."""
    weights = options.layers * sum(rows * columns for rows, columns in SHAPES["1.5B"])
    pruned = float(form.pruned)
    bytes_per_weight = (1 - pruned) * form.bits / 8 + bool(pruned) / 8 + 2 / GROUP[form.bits]
    return int(bytes_per_weight * weights + (0.5 + 2 / GROUP[4]) * options.vocab * HIDDEN)


def served(form: Form, options: argparse.Namespace) -> Figures:
    """Generate with `vllm serve`, engine and worker in one process; timed at the client."""
    folder = random_model(options.work, form, options.layers, options.vocab)
    arguments = [*serve_options(form, 2048), "--distributed-executor-backend", "uni"]
    arguments.append("--disable-log-stats")
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    log = folder.with_suffix(".log")
    lengths = (options.prompt_tokens, options.output_tokens)
    with serving(folder, arguments, log, environment=environment) as server:
        ask = partial(measure, server.url, options.vocab, *lengths, 1)
        ask(1)
        speed = ask(2)
    size = bytes_read(form, options)
    return Figures(size, speed.further_ms, speed.first_ms / 1e3, speed.tokens_per_second)


def python(form: Form, options: argparse.Namespace) -> Figures:
    """Generate with vLLM's `LLM` in this process, and time each step of the engine."""
    folder = random_model(options.work, form, options.layers, options.vocab)
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
    }
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=str(folder),
        skip_tokenizer_init=True,
        dtype="bfloat16",
        max_model_len=2048,
        gpu_memory_utilization=0.5,
        enable_prefix_caching=False,
        distributed_executor_backend="uni",
        **({} if form.pruned else {"quantization": "rac"}),
    ).llm_engine
    sampling = SamplingParams(
        temperature=0, max_tokens=options.output_tokens, ignore_eos=True, detokenize=False
    )
    firsts, further = [], []
    for turn, prompt in enumerate(prompts(options)):
        started = time.perf_counter()
        engine.add_request(str(turn), {"prompt_token_ids": prompt}, sampling)
        moments: list[float] = []
        while engine.has_unfinished_requests():
            moments += [time.perf_counter() - started] * len(engine.step())
        firsts.append(moments[0])
        further.append(1e3 * (moments[-1] - moments[0]) / (options.output_tokens - 1))
    return figures(bytes_read(form, options), firsts, further, options)


def run_one(name: str, options: argparse.Namespace) -> Figures:
    """Run a contender in this process."""
    torch.set_num_threads(options.threads)
    if name in LLAMA:
        return llama(name, options)
    shapes = [shape for _ in range(options.layers) for shape in SHAPES["1.5B"]]
    shapes.append((options.vocab, HIDDEN))
    if name in ("openvino", "torchao"):
        step = getattr(peers_others, f"{name}_step")
        return Figures(*step(shapes, GROUP[4], options.threads, options.output_tokens))
    how, _, form = name.partition(" ")
    kinds = {"linears": linears, "python": python, "served": served}
    return kinds[how](Form.parse(form), options)


def run(options: argparse.Namespace) -> None:
    """Run the contenders in turn and write the table."""
    options.work.mkdir(parents=True, exist_ok=True)
    names = [name for name in CONTENDERS if {name, name.split()[0]} & set(options.contenders)]
    if not names:
        raise SystemExit(f"--contenders: known are {', '.join(CONTENDERS)}")
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    contenders = {name: partial(called_in_child, run_one, name, options) for name in names}
    runs = in_turn(contenders, options.rounds)
    speeds = {name: [1 / run.ms_per_token for run in values] for name, values in runs.items()}
    rows = []
    for name, values in runs.items():
        size, per_token, prompt, in_all = (
            statistics.median(column) if column[0] is not None else None
            for column in zip(*map(astuple, values), strict=True)
        )
        ratio = ratios(speeds[name], speeds[next(iter(runs))])
        rows.append([name, size / 1e9, prompt, per_token, in_all, ratio])
    columns = {
        "contender": "",
        "GB read per token": ".3f",
        "first token, s": ".2f",
        "ms per token": ".1f",
        "tokens/s in all": ".1f",
        "ms per token of the first row over its own": ".2f",
    }
    save(options.out, "peers", "shape of Qwen2-1.5B, random weights", columns, rows)
