"""The sparse kernel against dense linears, over the fused layers of a model: milliseconds per decode step, as Markdown.

    python benchmarks/kernel.py --model 1.5B --rows 1,2,4 --threads 1 --sparsity 0.5

A step runs every linear of so many layers that at least --gigabytes of packed weights are read, so that no cache helps.
The contenders run in turn, one step each, and medians are compared: torch's prepacked oneDNN, or its plain linear where
oneDNN lacks the dtype; vLLM's own CPU linear where vLLM is installed; and for bfloat16 a float32 copy of the weights,
which is faster on a CPU without bf16 units. A read probe in the same run shows which share of the machine's reading
speed the sparse kernel reaches.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from rac_modifier.checkpoint.stored_weight import from_dense
from rac_modifier.kernels import cpu
from rac_modifier.kernels.cpu.support import support
from rac_modifier.kernels.interface import Layer

SHAPES = {  # [rows, columns] of qkv, o, gate_up and down, as vLLM fuses them
    "1.5B": [(2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960)],
    "7B": [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)],
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SPARSE, TORCH, PLAIN, VLLM, FLOAT = (
    "sparse",
    "oneDNN prepacked",
    "torch linear",
    "vLLM linear",
    "fp32 copy",
)
BF16_UNITS = any(flag in Path("/proc/cpuinfo").read_text() for flag in ("avx512_bf16", "amx_bf16"))
Linear = Callable[[Tensor], Tensor]


def torch_linear(weight: Tensor, rows: int) -> Linear:
    """What torch.compile makes of a linear when it freezes weights: oneDNN, the weight reordered for this number of rows."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


def plain_linear(weight: Tensor) -> Linear:
    """torch's own linear, for dtypes that oneDNN does not prepack."""
    copy = weight.clone()
    return lambda x: torch.nn.functional.linear(x, copy)


def float_linear(weight: Tensor) -> Linear:
    """torch's linear on a float32 copy; activations are converted to float32 and the result back."""
    copy = weight.float()
    return lambda x: torch.nn.functional.linear(x.float(), copy).to(x.dtype)


def vllm_linear(weight: Tensor) -> Linear:
    """vLLM's linear for unquantized weights on this CPU."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    linear = layer.cpu_linear
    return lambda x: linear(x, layer.weight, None)


class Model:
    """The contenders' layers, each with its own memory: a little more than `gigabytes` for the sparse one."""

    def __init__(
        self,
        shapes: list[tuple[int, int]],
        sparsity: float,
        dtype: torch.dtype,
        stored: torch.dtype,
        gigabytes: float,
    ) -> None:
        self.columns = [columns for _, columns in shapes]
        self.nbytes = 0
        self._weights, self._layers = [], 0
        sources = []
        for rows, columns in shapes:
            mask = torch.rand(rows, columns) >= sparsity
            dense = torch.randn(rows, columns).to(stored).masked_fill(~mask, 0)
            sources.append(from_dense(dense, "benchmark"))
            self._weights.append(dense.to(dtype))
        self.sparse: list[Linear] = []
        while self.nbytes < gigabytes * 1e9:
            for source in sources:
                packed, shape = cpu.pack(source, stored), (source.rows, source.columns)
                self.nbytes += sum(tensor.nbytes for tensor in packed.values())
                self.sparse.append(
                    lambda x, packed=packed, shape=shape: cpu.linear(x, packed, *shape)
                )
            self._layers += 1

    def dense(self, make: Callable[[Tensor], Linear]) -> list[Linear]:
        """The same number of layers of another linear."""
        return [make(weight) for _ in range(self._layers) for weight in self._weights]

    def step(self, linears: list[Linear], inputs: list[Tensor]) -> float:
        """Seconds."""
        start = time.perf_counter()
        for linear, x in zip(linears, itertools.cycle(inputs)):
            linear(x)
        return time.perf_counter() - start


def read_speed(repeats: int) -> float:
    """Bytes per second that a sum over, or a product with, half a GB of float32 reads: the higher of the two."""
    block = torch.ones(1 << 14, 1 << 13)
    vector = torch.ones(1 << 13)
    best = 0.0
    for read in (block.sum, lambda: torch.mv(block, vector)):
        times = []
        for _ in range(repeats + 1):
            start = time.perf_counter()
            read()
            times.append(time.perf_counter() - start)
        best = max(best, block.nbytes / statistics.median(times[1:]))
    return best


def measure(model: Model, rows: int, dtype: torch.dtype, repeats: int) -> dict[str, float]:
    """Median seconds of a step for each contender; they run in turn."""
    contenders = {SPARSE: model.sparse}
    try:
        contenders[TORCH] = model.dense(lambda weight: torch_linear(weight, rows))
    except RuntimeError:  # no bfloat16 in oneDNN below AVX512
        contenders[PLAIN] = model.dense(plain_linear)
    if importlib.util.find_spec("vllm") is not None:
        contenders[VLLM] = model.dense(vllm_linear)
    if dtype == torch.bfloat16 and not BF16_UNITS:
        contenders[FLOAT] = model.dense(float_linear)
    inputs = [torch.randn(rows, columns).to(dtype) for columns in model.columns]
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, linears in contenders.items():
            seconds = model.step(linears, inputs)
            if turn:
                times[name].append(seconds)
    return {name: statistics.median(of) for name, of in times.items()}


def table(arguments: argparse.Namespace, threads: int, sparsity: float) -> None:
    """One Markdown table: one line per number of rows of x."""
    dtype = DTYPES[arguments.dtype]
    stored = DTYPES[arguments.stored or arguments.dtype]
    torch.set_num_threads(threads)
    shapes = SHAPES[arguments.model]
    model = Model(shapes, sparsity, dtype, stored, arguments.gigabytes)
    layer = Layer(*shapes[2], 1 - sparsity, stored, stored, group=shapes[2][1])
    ceiling = dtype.itemsize / cpu.can_run(layer).bytes_per_weight
    print(
        f"\n{arguments.model} shapes, {arguments.dtype} on {arguments.stored or arguments.dtype} values, {sparsity:.0%} sparse, "
        f"{threads} threads, "
        f"{model.nbytes / 1e9:.2f} GB packed, at most {ceiling:.2f}x by bytes\n"
    )
    for index, rows in enumerate(arguments.rows):
        probe = read_speed(3)
        seconds = measure(model, rows, dtype, arguments.repeats)
        others = [name for name in seconds if name != SPARSE]
        if not index:
            print(
                "| M | sparse ms | GB/s | of probe | "
                + " | ".join(f"{name} ms | ratio" for name in others)
                + " |"
            )
            print("|" + "---|" * (4 + 2 * len(others)))
        speed = model.nbytes / seconds[SPARSE]
        cells = [
            str(rows),
            f"{seconds[SPARSE] * 1e3:.1f}",
            f"{speed / 1e9:.1f}",
            f"{speed / probe:.0%}",
        ]
        for name in others:
            cells += [f"{seconds[name] * 1e3:.1f}", f"{seconds[name] / seconds[SPARSE]:.2f}x"]
        print("| " + " | ".join(cells) + " |", flush=True)


def numbers(text: str) -> list[int]:
    """Comma-separated integers of the command line."""
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="1.5B")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument(
        "--stored", choices=DTYPES, help="dtype of the packed values, if another than --dtype"
    )
    parser.add_argument(
        "--rows",
        type=numbers,
        default=[1, 2, 4, 8, 16, 32, 64, 128, 512],
        help="numbers of rows of x",
    )
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument(
        "--sparsity", type=lambda text: [float(part) for part in text.split(",")], default=[0.5]
    )
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of packed weights in a step")
    parser.add_argument("--repeats", type=int, default=7, help="steps of each contender")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    names = [
        line
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    print(
        f"{names[0].split(': ')[1]}, {os.cpu_count()} cores, torch {torch.__version__}; {support().reason}"
    )
    print(f"load average {os.getloadavg()[0]:.1f} at the start")
    with torch.inference_mode():
        for threads, sparsity in itertools.product(arguments.threads, arguments.sparsity):
            table(arguments, threads, sparsity)


if __name__ == "__main__":
    main()
