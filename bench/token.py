"""One request's further token on our kernels: milliseconds by part, in one process.

    .venv-serve/bin/python -m bench token --forms int4-8
    .venv-serve/bin/python -m bench token --checkpoint FOLDER

vLLM generates without its server, first alone and then under torch's profiler. Parts are the
profiler's; "all" is the median without it. "graph" is what vLLM's compiler made of norms,
activations and rotary embeddings. "rest" is Python: scheduler, runner, sampler, and the work
around the head's kernel.
"""

import argparse
import os
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from bench.common import called_in_child, save
from bench.shapes import Form, random_model
from rac_modifier.sampling.own_server import on_few_cores

PARTS = {  # start of the names of the profiler's events
    "attention": "_C::cpu_attention",
    "write of the KV cache": "_C::cpu_attn_reshape_and_cache",
    "graph": "## Call CompiledFxGraph",
    "other operators": "aten::",
}
LINEAR = "rac_modifier::native_linear"
COLUMNS = {"form": "", "part": "", "ms per token": ".2f", "GB stored": ".2f"}
TINY = "--forms int4-8 --layers 2 --vocab 4096 --tokens 4"
WARM_UP = 16  # tokens


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--forms", nargs="+", default=["int4-8"], help="of random weights")
    parser.add_argument("--checkpoint", type=Path, help="a folder instead of random weights")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--tokens", type=int, default=64, help="measured, and profiled once more")


def run(options: argparse.Namespace) -> None:
    """Measure each form in a process of its own, and write the table."""
    options.work.mkdir(parents=True, exist_ok=True)
    if options.checkpoint:
        folders = {options.checkpoint.name: options.checkpoint}
    else:
        forms = [Form.parse(text) for text in options.forms]
        folders = {
            form.text: random_model(options.work, form, options.layers, options.vocab)
            for form in forms
        }
    rows = [
        [form, *row]
        for form, folder in folders.items()
        for row in called_in_child(measured, folder, options.tokens)
    ]
    model = f"shape of Qwen2-1.5B with {options.layers} layers, random weights"
    save(options.out, "token", str(options.checkpoint or model), COLUMNS, rows)


def measured(folder: Path, tokens: int) -> list[list[Any]]:
    """Return rows of part, milliseconds, and GB that its weights take."""
    os.environ |= on_few_cores() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    from torch.profiler import ProfilerActivity, profile
    from vllm import LLM, SamplingParams

    prompt = list(range(128))
    engine = LLM(
        str(folder),
        quantization="rac",
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=len(prompt) + WARM_UP + 2 * tokens + 8,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.3,
    ).llm_engine
    sampling = SamplingParams(temperature=0, ignore_eos=True, detokenize=False, max_tokens=1 << 20)
    engine.add_request("0", {"prompt_token_ids": prompt}, sampling)

    def steps(count: int) -> list[float]:
        times = []
        for _ in range(count):
            started = time.perf_counter()
            engine.step()
            times.append(1e3 * (time.perf_counter() - started))
        return times

    steps(1 + WARM_UP)
    alone = statistics.median(steps(tokens))
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        whole = sum(steps(tokens)) / tokens
    return table(profiled.events(), tokens, alone, whole, stored_bytes(folder))


def table(
    events: Sequence[Any], tokens: int, alone: float, whole: float, stored: dict[str, int]
) -> list[list[Any]]:
    """Add up the profiler's events: the head is the last linear of a token."""
    linears = sorted((e for e in events if e.name == LINEAR), key=lambda e: e.time_range.start)
    per_token = len(linears) // tokens
    parts = {"linears of the layers": 0.0, "head": 0.0}
    for number, event in enumerate(linears):
        is_head = number % per_token == per_token - 1
        parts["head" if is_head else "linears of the layers"] += event.cpu_time_total
    for part, start in PARTS.items():
        parts[part] = sum(e.self_cpu_time_total for e in events if e.name.startswith(start))
    rows: list[list[Any]] = [
        [part, microseconds / tokens / 1e3, stored[part] / 1e9 if part in stored else None]
        for part, microseconds in parts.items()
    ]
    rows.append(["rest", whole - sum(row[1] for row in rows), None])
    size = sum(stored.values()) / 1e9
    return [["all", alone, size], ["all, profiled", whole, None], *rows]


def stored_bytes(folder: Path) -> dict[str, int]:
    """Return the bytes of the layers' linears and of the head as the checkpoint stores them."""
    sizes = {"linears of the layers": 0, "head": 0}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                part = "head" if name.startswith("lm_head.") else "linears of the layers"
                if part == "head" or "_proj.weight" in name:
                    sizes[part] += file.get_tensor(name).nbytes
    return sizes
