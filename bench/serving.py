"""`vllm serve` with random weights: tokens per second, latency, memory.

    .venv-serve/bin/python -m bench serving --forms bf16 w8a8 int4 50%-int8
    .venv-serve/bin/python -m bench serving --forms bf16 int4-8 --prompts 512 2048
    .venv-serve/bin/python -m bench serving --shape 30B-A3B --layers 2 --forms bf16 int4
    .venv-serve/bin/python -m bench serving --soak demo/served

bf16 and w8a8 run on vLLM's own kernels, all other forms on ours; int4-8 has 8-bit
activations. Each round starts a server per form, in reverse order every second round. The
ratio is to the first form. --soak sends thousands of requests; some clients leave,
to a checkpoint, and exits with 1 where memory is not flat or a request fails.
"""

import argparse
import shlex
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.common import in_turn, ratios, save
from bench.server import Speed, measure, serving
from bench.shapes import Form, random_model
from bench.soak import soak

FEWEST = 4  # requests, so that the median time to the first token means something
TINY = "--forms 50%-int4 --layers 2 --vocab 4096 --rounds 1 --concurrency 1 --output-tokens 4"


@dataclass(frozen=True)
class Run:
    """A server: memory in bytes, speed by concurrency, ms to the first token by prompt length."""

    resident: int
    speeds: dict[int, Speed]
    first_ms: dict[int, float]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    forms = ["bf16", "w8a8", "int4", "50%-bf16", "50%-int8"]
    parser.add_argument("--forms", nargs="+", default=forms)
    parser.add_argument("--shape", choices=("1.5B", "30B-A3B"), default="1.5B")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--prompts", type=int, nargs="+", default=[], help="lengths, one by one")
    parser.add_argument("--serve-options", default="", help="of `vllm serve`, in one text")
    parser.add_argument("--soak", type=Path, metavar="FOLDER", help="a checkpoint to soak")
    parser.add_argument("--requests", type=int, default=5000, help="of the soak")


def serve_options(form: Form, length: int) -> list[str]:
    """Return the options of `vllm serve` for a form."""
    options = ["--dtype", "bfloat16", "--skip-tokenizer-init", "--max-model-len", str(length)]
    options += ["--no-enable-prefix-caching", "--gpu-memory-utilization", "0.3"]
    dense_on_ours = not form.vllm and not form.pruned
    return options + (["--quantization", "rac"] if dense_on_ours else [])


def run_form(form: Form, options: argparse.Namespace) -> Run:
    """Start a server of one form, measure it, and end it."""
    folder = random_model(options.work, form, options.layers, options.vocab, options.shape)
    lengths = [options.prompt_tokens + options.output_tokens, *(n + 2 for n in options.prompts)]
    arguments = [*serve_options(form, max(lengths)), *shlex.split(options.serve_options)]
    with serving(folder, arguments, folder.with_suffix(".log")) as server:
        resident = server.resident()
        ask = partial(measure, server.url, options.vocab)
        most = max(options.concurrency)
        ask(options.prompt_tokens, min(8, options.output_tokens), most, most)
        speeds = {
            count: ask(options.prompt_tokens, options.output_tokens, count, max(2 * count, FEWEST))
            for count in options.concurrency
        }
        first = {length: ask(length, 2, 1, FEWEST).first_ms for length in options.prompts}
    return Run(resident, speeds, first)


def run(options: argparse.Namespace) -> None:
    """Measure the forms in turn and write the tables; or soak a checkpoint."""
    options.work.mkdir(parents=True, exist_ok=True)
    if options.soak:
        sys.exit(soak(options))
    forms = [Form.parse(text) for text in options.forms]
    runs = in_turn({form.text: partial(run_form, form, options) for form in forms}, options.rounds)
    base = next(iter(runs.values()))
    name = "Qwen3-30B-A3B" if options.shape == "30B-A3B" else "Qwen2-1.5B"
    model = f"shape of {name} with {options.layers} layers, random weights"
    rows, prompts, memory = [], [], []
    for name, values in runs.items():
        for count in options.concurrency:
            speeds = [run.speeds[count] for run in values]
            per_second = [speed.tokens_per_second for speed in speeds]
            ratio = ratios(per_second, [run.speeds[count].tokens_per_second for run in base])
            times = [
                statistics.median(getattr(speed, key) for speed in speeds)
                for key in ("first_ms", "further_ms")
            ]
            rows.append([count, name, statistics.median(per_second), ratio, *times])
        for length in options.prompts:
            first = [run.first_ms[length] for run in values]
            ratio = ratios(first, [run.first_ms[length] for run in base])
            prompts.append([length, name, statistics.median(first), ratio])
        form = Form.parse(name)
        folder = random_model(options.work, form, options.layers, options.vocab, options.shape)
        disk = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        memory.append([name, disk / 1e9, statistics.median(run.resident for run in values) / 1e9])
    columns = {
        "requests at a time": ".0f",
        "form": "",
        "output tokens/s": ".2f",
        "ratio": ".2f",
        "first token, ms": ",.0f",
        "each further token, ms": ".1f",
    }
    save(options.out, "serving", model, columns, sorted(rows, key=lambda row: row[0]))
    columns = {"form": "", "on disk, GB": ".2f", "resident, GB": ".2f"}
    save(options.out, "serving_memory", model, columns, memory)
    if prompts:
        columns = {"prompt tokens": ",.0f", "form": "", "first token, ms": ",.0f", "ratio": ".2f"}
        prompts.sort(key=lambda row: row[0])
        save(options.out, "serving_prompts", model, columns, prompts)
