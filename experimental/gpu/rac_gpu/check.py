"""Check the kernels on this machine's GPU: results, captured graphs, and time per call.

    make -C experimental/gpu gpu-check      (or: python -m rac_gpu.check --json gpu.json)

It stops at the first wrong result. In this order: every program of every layout against float64, twice,
with the same bits; the operator on odd shapes; another stream and captured graphs; prompts on cuSPARSELt;
and time per call for the layers of an 8B model, in turn with torch's bfloat16 matmul. `--small` leaves out
the times, for a run under compute-sanitizer.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import rac_gpu
from rac_gpu import cusparselt, library
from rac_gpu.backend import DATA, LAYOUT, PROMPTS
from rac_gpu.formats import FORMATS, TIMED_FORMATS, Linear, packed_linear, random_weight
from rac_gpu.layout import ALL
from rac_gpu.operator import run_program
from rac_gpu.programs import Program, all_programs, expand_program, most_tokens
from rac_modifier.errors import RacError
from rac_modifier.formats.stored_weight import StoredWeight

PROGRAMS_SHAPE = (200, 4104)  # every ring of shared memory goes round more than once
SHAPES = ((16, 128), (37, 200), (70, 1032), (4096, 4096))
TOKENS = (1, 8, 9, 17, 33, 128, 257)
PROMPTS_SHAPE = (272, 1024)  # cuSPARSELt takes multiples of 16
PROMPTS_TOKENS = (257, 2048)
TIMED = (1, 8, 16, 32, 64, 128, 2048)
LAYERS = {"o": (4096, 4096), "qkv": (6144, 4096), "down": (4096, 14336), "gate_up": (28672, 4096)}
ROUNDS = 9
CYCLED_BYTES = 512 << 20  # of weights, more than any cache holds
REPORT = "uninstall rac-modifier-gpu, and report this"


def error_of(
    what: str, linear: Linear, x: Tensor, dense: Tensor, bias: Tensor, expanded: bool
) -> float:
    """Return the largest error over the bound of fp32 sums and one rounding; 1 is the bound.

    Args:
        dense: the weight [rows, columns] in float64.
        expanded: the scaled values are rounded to bfloat16 first.

    Raises:
        RacError: a wrong result, or other bits in the second call.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_bf16_reduced_precision_reduction
    matmul.allow_bf16_reduced_precision_reduction = False  # cuBLAS sums in fp32 meanwhile
    try:
        y, again = linear(x), linear(x)
    finally:
        matmul.allow_bf16_reduced_precision_reduction = before
    terms = x.double().abs() @ dense.abs().T + bias.double().abs()
    exact = x.double() @ dense.T + bias.double()
    bound = terms * 2.0**-19 + exact.abs() * 2.0**-8 + (2.0**-8 * terms if expanded else 0.0)
    error = float(((y.double() - exact).abs() / bound).max())
    if not error <= 1.0:
        raise RacError(f"{what}: wrong by {error:.3g} times the bound; {REPORT}")
    if not torch.equal(again, y):
        raise RacError(f"{what}: other bits in the second call; {REPORT}")
    return error


def check_programs(device: str, rows: int, columns: int) -> Iterator[dict[str, object]]:
    """Run every program of every format, and yield a row for each.

    Raises:
        RacError: a wrong result.
    """
    for name, kind in FORMATS.items():
        weight = random_weight(rows, columns, *kind)
        dense, bias = _operands(weight, device)
        packed = rac_gpu.pack(weight, torch.bfloat16)
        layout, gpu = ALL[packed[LAYOUT].shape[1]], library.current_device()
        assert gpu is not None  # the weight was packed for it
        for program in all_programs(layout):
            expands = program == expand_program(layout)
            # a second block of tokens, partly filled
            tokens = most_tokens(layout) + 1 if expands else 8 * program.token_tiles + 5

            def run(x: Tensor, program: Program = program, expands: bool = expands) -> Tensor:
                if expands:
                    return rac_gpu.linear(x, packed, rows, weight.columns, bias)  # noqa: B023
                out = x.new_empty(len(x), rows)
                run_program(gpu, layout, program, x, packed[DATA], bias, out)  # noqa: B023
                return out

            x = torch.randn(tokens, weight.columns).bfloat16().to(device)
            what = f"{program.name} of {name} [{rows}, {weight.columns}], {tokens} tokens"
            error = error_of(what, run, x, dense, bias, expands and weight.scale is not None)
            yield {"format": name, "program": program.name, "tokens": tokens, "error": error}


def check_operator(
    device: str, shapes: Sequence[tuple[int, int]], tokens: Sequence[int]
) -> Iterator[dict[str, object]]:
    """Run every format on the programs that the operator chooses, and yield a row for each.

    Raises:
        RacError: a wrong result.
    """
    for rows, columns in shapes:
        for name, kind in FORMATS.items():
            weight = random_weight(rows, columns, *kind)
            dense, bias = _operands(weight, device)
            linear = packed_linear(weight, bias)
            for count in tokens:
                x = torch.randn(count, weight.columns).bfloat16().to(device)
                what = f"{name} [{rows}, {weight.columns}], {count} tokens"
                expanded = weight.scale is not None and count > 128
                error = error_of(what, linear, x, dense, bias, expanded)
                yield {"format": name, "rows": rows, "tokens": count, "error": error}


def check_prompts(device: str, missing: dict[str, str]) -> Iterator[dict[str, object]]:
    """Run prompts of 2:4 weights on cuSPARSELt; why it is missing goes to `missing`.

    Raises:
        RacError: a wrong result.
    """
    what, (rows, columns) = "prompts by cuSPARSELt", PROMPTS_SHAPE
    if not torch.backends.cusparselt.is_available():
        missing[what] = f"torch {torch.__version__} has none"
        return
    for name, kind in FORMATS.items():
        if not kind[2]:  # not 2:4
            continue
        weight = random_weight(rows, columns, *kind)
        dense, bias = _operands(weight, device)
        packed = rac_gpu.pack(weight, torch.bfloat16)
        try:
            copy = cusparselt.compress(weight.dequantized(torch.bfloat16), torch.device(device))
        except RacError as error:
            missing[what] = str(error)
            return
        packed[PROMPTS] = copy

        def run(x: Tensor, packed: Mapping[str, Tensor] = packed, bias: Tensor = bias) -> Tensor:
            return rac_gpu.linear(x, packed, rows, columns, bias)

        for count in PROMPTS_TOKENS:
            x = torch.randn(count, columns).bfloat16().to(device)
            named = f"{what}, {name} [{rows}, {columns}], {count} tokens"
            error = error_of(named, run, x, dense, bias, weight.scale is not None)
            yield {"format": name, "tokens": count, "error": error}


def captured(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Capture what `run` launches, after a run outside of the graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def check_graph(what: str, linear: Linear, x: Tensor) -> None:
    """Replay a captured call for other activations in the same memory; `x` is written.

    Raises:
        RacError: the replay has other bits than a launch.
    """
    kept = [torch.empty(0)]

    def step() -> None:
        kept[0] = linear(x)

    graph = captured(step)
    x.copy_(torch.randn(x.shape))
    graph.replay()
    if not torch.equal(kept[0], linear(x)):
        raise RacError(f"{what}, {len(x)} tokens: the captured graph is wrong; {REPORT}")


def check_graphs(device: str) -> None:
    """Check graphs of every format, and a call on a stream that is not the default one."""
    for name, kind in FORMATS.items():
        linear = packed_linear(random_weight(272, 512, *kind))
        for tokens in (1, 16, 32, 64, 300):
            check_graph(name, linear, torch.zeros(tokens, 512, dtype=torch.bfloat16, device=device))
    linear, x = packed_linear(random_weight(64, 256)), torch.randn(4, 256, device=device).bfloat16()
    expected = linear(x)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        y = linear(x)
    torch.cuda.synchronize()
    if not torch.equal(y, expected):
        raise RacError(f"a call on another stream has other bits; {REPORT}")


def microseconds(linears: Sequence[Linear], x: Tensor) -> float:
    """Time a call, in a graph that goes through all copies of a weight."""
    graph = captured(lambda: [linear(x) for linear in linears])
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    graph.replay()
    end.record()
    torch.cuda.synchronize()
    return 1000 * start.elapsed_time(end) / len(linears)


def contenders(rows: int, columns: int, device: str) -> dict[str, list[Linear]]:
    """Return the timed formats and "dense bf16", each with copies that no cache holds."""
    linears: dict[str, list[Linear]] = {}
    for name in TIMED_FORMATS:
        weight = random_weight(rows, columns, *FORMATS[name])
        packed, shape = rac_gpu.pack(weight, torch.bfloat16), (weight.rows, weight.columns)
        size = sum(tensor.nbytes for tensor in packed.values())
        copies = [
            {key: tensor.clone() for key, tensor in packed.items()}
            for _ in range(-(-CYCLED_BYTES // size))
        ]
        linears[name] = [lambda x, p=p, s=shape: rac_gpu.linear(x, p, *s) for p in copies]
    dense = [
        torch.randn(rows, columns, device=device).bfloat16()
        for _ in range(-(-CYCLED_BYTES // (2 * rows * columns)))
    ]
    linears["dense bf16"] = [lambda x, w=w: torch.nn.functional.linear(x, w) for w in dense]
    return linears


def times(device: str, rounds: int) -> Iterator[dict[str, object]]:
    """Yield the median time of each format, layer and number of tokens; formats take turns."""
    for layer, (rows, columns) in LAYERS.items():
        linears = contenders(rows, columns, device)
        for tokens in TIMED:
            x = torch.randn(tokens, columns, device=device).bfloat16()
            samples: dict[str, list[float]] = {name: [] for name in linears}
            for _ in range(rounds):
                for name, copies in linears.items():
                    samples[name].append(microseconds(copies, x))
            dense = statistics.median(samples["dense bf16"])
            for name, taken in samples.items():
                us = statistics.median(taken)
                row = {"layer": layer, "tokens": tokens, "format": name}
                yield row | {"us": us, "faster": dense / us}


def run(record: dict[str, Any], small: bool) -> None:
    """Run all checks in order, and add what they find to `record`."""
    record["programs"] = list(check_programs("cuda", *PROGRAMS_SHAPE))
    print(f"{record['device']}: {len(record['programs'])} programs are right", flush=True)
    record["operator"] = list(check_operator("cuda", SHAPES[:-1] if small else SHAPES, TOKENS))
    print(f"{len(record['operator'])} calls of the operator are right", flush=True)
    if small:
        return
    check_graphs("cuda")
    print("captured graphs and another stream are right", flush=True)
    record["missing"] = {}
    record["prompts"] = list(check_prompts("cuda", record["missing"]))
    print(f"{len(record['prompts'])} prompts by cuSPARSELt are right; {record['missing']}")
    print("| layer | tokens | format | us | over dense bf16 |\n|---|---|---|---|---|")
    record["times"] = []
    for row in times("cuda", ROUNDS):
        record["times"].append(row)
        line = "| {layer} | {tokens} | {format} | {us:.1f} | {faster:.2f}x |"
        print(line.format(**row), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the checks, and write the record also where one of them fails."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the record to this file")
    parser.add_argument("--small", action="store_true", help="small weights, no times")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no CUDA device; run this on a machine with a GPU")
    torch.manual_seed(0)
    record: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "finished": False,
    }
    try:
        run(record, options.small)
        record["finished"] = True
    except RacError as error:
        record["error"] = str(error)
        raise SystemExit(str(error)) from error
    finally:
        if options.json is not None:
            options.json.write_text(json.dumps(record, indent=1))


def _operands(weight: StoredWeight, device: str) -> tuple[Tensor, Tensor]:
    """Return the dense weight in float64, and a random bias."""
    dense = weight.dequantized(torch.float64).to(device)
    return dense, torch.randn(weight.rows).bfloat16().to(device)


if __name__ == "__main__":
    main()
