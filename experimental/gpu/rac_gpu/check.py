"""Check the kernels on this machine's GPU: results, captured graphs, and time per call.

    make -C experimental/gpu gpu-check      (or: python -m rac_gpu.check)

It stops at the first wrong result. In this order: every program against float64, twice, with the same bits; `linear` on
odd shapes; captured graphs; and time per call for the layers of an 8B model, in turn with torch's bfloat16 matmul.
`--small` leaves out the times, for a run under compute-sanitizer.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import rac_gpu
from rac_gpu import library
from rac_gpu.backend import DATA, run_program
from rac_gpu.layout import GROUPS
from rac_gpu.programs import MOST_TOKENS, TOKENS, Program, all_programs
from rac_modifier.errors import RacError
from rac_modifier.formats.stored_weight import StoredWeight, from_dense

PROGRAMS_SHAPE = (200, 4104)  # every ring of shared memory goes round more than once
SHAPES = ((16, 128), (37, 200), (70, 1032), (4096, 4096))
COUNTS = (1, 8, 9, 17, 33, 64, 257)  # of tokens
LAYERS = {"o": (4096, 4096), "qkv": (6144, 4096), "down": (4096, 14336), "gate_up": (28672, 4096)}
ROUNDS = 9
CYCLED_BYTES = 512 << 20  # of weights, more than any cache holds
REPORT = "uninstall rac-modifier-gpu, and report this"
Linear = Callable[[Tensor], Tensor]


def random_weight(rows: int, columns: int, group: int, most: int = 2) -> StoredWeight:
    """Return int4, `most` of each four stored, with a scale per group; columns are padded to groups."""
    columns = -(-columns // group) * group
    kept = (torch.rand(rows, columns // 4, 4).argsort(dim=-1) < most).view(rows, columns)
    values = torch.randint(-8, 8, (rows, columns), dtype=torch.int8).masked_fill(~kept, 0)
    scale = (torch.rand(rows, columns // group) + 0.1).bfloat16().float()
    return replace(from_dense(values, "random"), scale=scale, bits=4)


def error_of(
    what: str, linear: Linear, x: Tensor, weight: StoredWeight, bias: Tensor, expanded: bool = False
) -> float:
    """Return the largest error over the bound of fp32 sums and one rounding; 1 is the bound.

    `expanded`: the scaled values are rounded to bfloat16 first.

    Raises:
        RacError: a wrong result, or other bits in the second call.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False  # cuBLAS sums in fp32
    y, again = linear(x), linear(x)
    dense = weight.dequantized(torch.float64).to(x.device)
    terms = x.double().abs() @ dense.abs().T + bias.double().abs()
    exact = x.double() @ dense.T + bias.double()
    bound = terms * 2.0**-19 + exact.abs() * 2.0**-8 + (2.0**-8 * terms if expanded else 0.0)
    error = float(((y.double() - exact).abs() / bound).max())
    if not error <= 1.0:
        raise RacError(f"{what}: wrong by {error:.3g} times the bound; {REPORT}")
    if not torch.equal(again, y):
        raise RacError(f"{what}: other bits in the second call; {REPORT}")
    return error


def check_programs(device: str, rows: int, columns: int) -> Iterator[dict[str, Any]]:
    """Run every program, and yield a row for each.

    Raises:
        RacError: a wrong result.
    """
    gpu = library.current_device()
    for group in GROUPS:
        weight, bias = random_weight(rows, columns, group), torch.randn(rows).bfloat16().to(device)
        data = rac_gpu.pack(weight, torch.bfloat16)[DATA]
        assert gpu is not None  # the weight was packed for it
        for program in all_programs(group):

            def run(x: Tensor, program: Program = program, data: Tensor = data) -> Tensor:
                out = x.new_empty(len(x), rows)
                run_program(gpu, program, x, data, bias, out)  # noqa: B023
                return out

            # a second block of tokens, partly filled
            x = torch.randn(TOKENS * program.token_tiles + 5, weight.columns).bfloat16().to(device)
            what = f"{program.name} of groups of {group} [{rows}, {columns}], {len(x)} tokens"
            error = error_of(what, run, x, weight, bias)
            yield {"group": group, "program": program.name, "tokens": len(x), "error": error}


def check_linear(
    device: str, shapes: Sequence[tuple[int, int]], counts: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Run `linear` on the programs that it chooses, and yield a row for each shape and number of tokens.

    Raises:
        RacError: a wrong result.
    """
    for rows, columns in shapes:
        for group in GROUPS:
            weight = random_weight(rows, columns, group)
            linear, bias = packed_linear(weight), torch.zeros(rows, device=device).bfloat16()
            for count in counts:
                x = torch.randn(count, weight.columns).bfloat16().to(device)
                what = f"groups of {group} [{rows}, {columns}], {count} tokens"
                error = error_of(what, linear, x, weight, bias, count > MOST_TOKENS)
                yield {"group": group, "shape": [rows, columns], "tokens": count, "error": error}


def packed_linear(weight: StoredWeight) -> Linear:
    """Return the product on the kernels."""
    packed = rac_gpu.pack(weight, torch.bfloat16)
    return lambda x: rac_gpu.linear(x, packed, weight.rows, weight.columns)


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Capture what `run` launches, after a run outside of the graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def check_graphs(device: str) -> Iterator[dict[str, Any]]:
    """Replay captured calls for other activations in the same memory, and yield a row for each.

    Raises:
        RacError: the replay has other bits than a launch.
    """
    for group in GROUPS:
        linear, kept = packed_linear(random_weight(272, 512, group)), [torch.empty(0)]
        for tokens in (1, 16, 32, 64, 300):
            x = torch.zeros(tokens, 512, dtype=torch.bfloat16, device=device)
            graph = captured(lambda: kept.__setitem__(0, linear(x)))  # noqa: B023
            x.copy_(torch.randn(x.shape))
            graph.replay()
            if not torch.equal(kept[0], linear(x)):
                raise RacError(f"{tokens} tokens: the captured graph is wrong; {REPORT}")
            yield {"group": group, "graph of tokens": tokens}


def microseconds(linears: Sequence[Linear], x: Tensor) -> float:
    """Return the median time of a call, in a graph that goes through all copies of a weight."""
    graph = captured(lambda: [linear(x) for linear in linears])
    taken = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        taken.append(1000 * start.elapsed_time(end) / len(linears))
    return statistics.median(taken)


def times(device: str) -> Iterator[dict[str, Any]]:
    """Yield the time of each layer and number of tokens, beside that of torch's bfloat16 matmul."""
    for layer, (rows, columns) in LAYERS.items():
        copies = -(-CYCLED_BYTES // (rows * columns // 2))
        weight = random_weight(rows, columns, 128)
        packed = [packed_linear(weight) for _ in range(copies)]
        dense = [weight.dequantized(torch.bfloat16).to(device) for _ in range(-(-copies // 4))]
        linears = [lambda x, w=w: x @ w.T for w in dense]
        for tokens in (1, 8, 16, 32, 64, 2048):
            x = torch.randn(tokens, columns, device=device).bfloat16()
            row = {"us": microseconds(packed, x), "dense_us": microseconds(linears, x)}
            yield {"layer": layer, "tokens": tokens, **row}


def main() -> None:
    """Run the checks; a line of JSON for each."""
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device; run this on a machine with a GPU")
    torch.manual_seed(0)
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__}))
    for row in (
        *check_programs("cuda", *PROGRAMS_SHAPE),
        *check_linear("cuda", SHAPES, COUNTS),
        *check_graphs("cuda"),
    ):
        print(json.dumps(row), flush=True)
    if "--small" not in sys.argv:
        for row in times("cuda"):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
