"""The GPU kernels on this machine's GPU: are they right, are they captured in graphs, and how fast are they?

    make gpu-check     (or: python benchmarks/gpu_kernels.py --json gpu.json)

At most `--seconds` on one GPU, where what does not fit is named and left out; `--dry-run` says without a GPU how long the parts
on the CPU take. The kernels have never run on a GPU before. It stops at the first wrong result. In this order:

1. Every program of every layout with a small random weight, against float64; twice, with the same bits. This card would choose
   some of them only for shapes that are not checked below.
2. Products of every layout as the operator chooses their programs, likewise; small weights first. For weights that are
   expanded, cuBLAS is told to sum in fp32: by default it may add parts of a product in bfloat16.
3. The same on another stream and out of a captured CUDA graph; prompts times 2:4 weights on cuSPARSELt, where torch has it; and,
   where compute-sanitizer is installed, 1 and 2 under memcheck and racecheck.
4. What a launch costs: a product that does nearly nothing, out of a graph and called one by one.
5. Time per product of an 8B model's layers, out of graphs, in turn with what would run there instead: torch's bfloat16 linear and
   FP8 product, 2:4 on cuSPARSELt, and where vLLM is installed its int4 (Marlin, Machete) and FP8 (CUTLASS). Weights are
   cycled through, so that they come from the GPU's memory and not from its cache. A contender that is missing says why. At
   2,048 tokens our weights are expanded, and the product is dense. Small layers first.

`--json` is written anew after each part, so that what is finished is kept. `gpu_served.py` serves a model with vLLM on the
kernels and dense; `make gpu-check` (`gpu_check.py`) runs both.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gpu_budget import Budget, plan
from gpu_contenders import CONTENDERS, NotHereError, prepared
from gpu_correct import (
    ODD_SHAPES,
    PROGRAMS_SHAPE,
    TOKENS,
    captured,
    check,
    check_graphs,
    check_programs,
    check_prompts,
    check_streams,
)
from gpu_formats import FORMATS, TIMED_FORMATS, packed_linear, random_weight
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.files import write_json_atomic
from rac_modifier.kernels import cuda

TIMED = (1, 8, 16, 32, 64, 128, 2048)
LAYERS = {
    "o": (4096, 4096),
    "qkv": (6144, 4096),
    "down": (4096, 14336),
    "gate_up": (28672, 4096),
}  # of an 8B model
SANITIZED_BY, PACKED_BY = (
    0.6,
    0.85,
)  # by which share of the time compute-sanitizer and packing must be done
CYCLED_BYTES = 512 << 20  # of weights: more than any cache


def microseconds(linears: Sequence[Callable[[Any], object]], x: Any) -> float:
    """Of one product, from a graph that goes through all of them."""

    def step() -> None:
        for linear in linears:
            linear(x)

    graph = captured(step)
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return 1000 * start.elapsed_time(end) / len(linears)


@dataclass(frozen=True)
class Timed:
    """A contender of one layer: products with so many copies of its weight, its bytes, and what it makes of activations."""

    products: Sequence[Callable[[Any], object]]
    size: int
    given: Callable[[Tensor], Any] = lambda x: x


def ours(layer: str, rows: int, columns: int, budget: Budget) -> dict[str, Timed]:
    """The formats of ours that there is time to pack."""
    found = {}
    for name in TIMED_FORMATS:
        if not budget.allows(f"times of {name} in {layer}", PACKED_BY):
            continue
        weight = random_weight(rows, columns, *FORMATS[name])
        packed = cuda.pack(weight, torch.bfloat16)
        size = sum(part.nbytes for part in packed.values())
        copies = [
            {key: part.clone() for key, part in packed.items()}
            for _ in range(-(-CYCLED_BYTES // size))
        ]
        shape = weight.rows, weight.columns
        found[name] = Timed([lambda x, p=p, s=shape: cuda.linear(x, p, *s) for p in copies], size)
    return found


def theirs(rows: int, columns: int, device: str, missing: dict[str, str]) -> dict[str, Timed]:
    """The others; why one is not here is added to `missing`."""
    size = 2 * rows * columns
    weights = [
        torch.randn(rows, columns, device=device).bfloat16()
        for _ in range(-(-CYCLED_BYTES // size))
    ]
    found = {
        "dense bf16": Timed(
            [lambda x, w=w: torch.nn.functional.linear(x, w) for w in weights], size
        )
    }
    for name, contender in CONTENDERS.items():
        if name in missing:
            continue
        try:
            (one,) = prepared(name, weights[0], 1)
            size = sum(part.nbytes for part in one.values())
            copies = prepared(name, weights[0], -(-CYCLED_BYTES // size))
        except NotHereError as error:
            missing[name] = str(error)
            continue
        found[name] = Timed(
            [lambda x, p=p, run=contender.run: run(x, p) for p in copies], size, contender.given
        )
    return found


def times(
    device: str, tokens: tuple[int, ...], rounds: int, missing: dict[str, str], budget: Budget
) -> Iterator[dict[str, object]]:
    """Medians over rounds, in which the contenders take turns; why a contender is not here is added to `missing`."""
    for layer, (rows, columns) in LAYERS.items():
        if not budget.allows(f"times of {layer}", PACKED_BY):
            continue
        contenders = {
            **ours(layer, rows, columns, budget),
            **theirs(rows, columns, device, missing),
        }
        for number in tokens:
            if not budget.allows(f"times of {layer} at {number} tokens"):
                continue
            x = torch.randn(number, columns, device=device).bfloat16()
            given = {name: contender.given(x) for name, contender in contenders.items()}
            found: dict[str, list[float]] = {name: [] for name in contenders}
            for _ in range(rounds):
                for name, contender in contenders.items():
                    found[name].append(microseconds(contender.products, given[name]))
            for name, contender in contenders.items():
                taken = statistics.median(found[name])
                faster = statistics.median(found["dense bf16"]) / taken
                row = {
                    "layer": layer,
                    "rows": rows,
                    "columns": columns,
                    "tokens": number,
                    "contender": name,
                }
                yield row | {"us": taken, "faster": faster, "GB/s": contender.size / taken / 1000}


def launch_overhead(device: str, calls: int = 1000) -> dict[str, float]:
    """Microseconds per call of a product [16, 128] with one token: replayed in a graph, and called from Python."""
    linear = packed_linear(random_weight(16, 128))
    x = torch.randn(1, 128, device=device).bfloat16()
    replayed = microseconds([linear] * 100, x)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        linear(x)
    torch.cuda.synchronize()
    return {"graph": replayed, "called": 1e6 * (time.perf_counter() - start) / calls}


def sanitize(budget: Budget) -> list[str]:
    """Memcheck and racecheck of small products, where compute-sanitizer is installed; what ran through."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        print(
            "compute-sanitizer is not installed: memory accesses and races were not checked on the hardware"
        )
        return []
    ran = []
    for kind in ("memcheck", "racecheck"):
        seconds = budget.left(SANITIZED_BY) / (2 - len(ran))
        command = [
            tool,
            "--tool",
            kind,
            "--error-exitcode",
            "9",
            sys.executable,
            __file__,
            "--only-check",
        ]
        try:
            # the run inside ends by itself, with what it came to
            found = subprocess.run(
                [*command, "--seconds", str(seconds)], timeout=seconds * 2 + 10
            ).returncode
        except subprocess.TimeoutExpired:
            budget.leave_out(f"compute-sanitizer {kind}")
            continue
        if found:
            raise RacError(
                f"compute-sanitizer {kind} found an error; do not set RAC_GPU_KERNELS, and report its output"
            )
        ran.append(kind)
    return ran


def report(budget: Budget) -> None:
    """Print what was left out."""
    for what in budget.left_out:
        print(f"left out, since its share of {budget.seconds:.0f} seconds was over: {what}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", help="write everything to this file")
    parser.add_argument("--rounds", type=int, default=9, help="rounds of timing (9)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=360,
        help="leave out what does not fit into this time (360)",
    )
    parser.add_argument("--only-check", action="store_true", help="small products only, no timing")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="no GPU: how much there is to do, and how long its parts take on this machine",
    )
    arguments = parser.parse_args()
    if arguments.dry_run:
        for line in plan(PROGRAMS_SHAPE, ODD_SHAPES, TOKENS, LAYERS, TIMED, arguments.rounds):
            print(line)
        return
    os.environ[cuda.VARIABLE] = "on"
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device; run this on a machine with a GPU")
    torch.manual_seed(0)
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "finished": False,
    }
    budget = Budget(arguments.seconds)

    def keep() -> None:
        record["left_out"] = budget.left_out
        if arguments.json:
            write_json_atomic(arguments.json, json.loads(json.dumps(record)))

    try:
        run(record, budget, arguments.rounds, arguments.only_check, keep)
        record["finished"] = True
    except RacError as error:
        record["error"] = str(error)
        raise
    finally:
        keep()
        report(budget)


def run(
    record: dict[str, Any], budget: Budget, rounds: int, only_check: bool, keep: Callable[[], None]
) -> None:
    """All parts, whose results are added to `record`; `keep` is called after each."""
    shapes = ODD_SHAPES
    if only_check:
        budget.shares, shapes = False, ODD_SHAPES[:-1]
    record["programs"] = list(check_programs("cuda", *PROGRAMS_SHAPE, budget))
    print(f"{record['device']}: {len(record['programs'])} programs are right")
    record["checked"] = list(check("cuda", shapes, TOKENS, budget))
    print(f"{len(record['checked'])} products are right")
    keep()
    if only_check:
        return
    check_streams("cuda")
    check_graphs("cuda")
    print("products on another stream and out of captured graphs are the same", flush=True)
    record["missing"] = {}
    record["prompts"] = list(check_prompts("cuda", budget, record["missing"]))
    print(f"{len(record['prompts'])} prompts by cuSPARSELt are right")
    record["sanitizer"] = sanitize(budget)
    record["launch"] = launch_overhead("cuda")
    print(
        "a launch takes {graph:.1f} us in a graph and {called:.1f} us from Python".format(
            **record["launch"]
        )
    )
    keep()
    print("| layer | tokens | contender | us | GB/s | over dense bf16 |\n|---|---|---|---|---|---|")
    record["times"] = []
    for row in times("cuda", TIMED, rounds, record["missing"], budget):
        record["times"].append(row)
        print(
            "| {layer} | {tokens} | {contender} | {us:.1f} | {GB/s:.0f} | {faster:.2f}x |".format(
                **row
            ),
            flush=True,
        )
        keep()
    for name, reason in record["missing"].items():
        print(f"{name} was not measured: {reason}")


if __name__ == "__main__":
    try:
        main()
    except RacError as error:
        raise SystemExit(str(error)) from error
