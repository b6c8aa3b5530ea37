"""The kernel on 50 % sparse int8 weights against dense linears, over a model's fused layers: ms per decode step, as Markdown.

    python benchmarks/kernel_int8.py --model 1.5B --rows 1,8 --threads 1

A step, the cycled memory and the read probe are those of kernel.py, and so are the dense contenders: torch's and vLLM's own
linear in the dtype of the activations. Beside them: our kernel on sparse bfloat16 values and on a dense
int8 weight, and vLLM's own int8 linear (oneDNN, W8A8), whose error is printed too. Contenders run in turn, one step each.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from kernel import DTYPES, SHAPES, numbers, plain_linear, read_speed, vllm_linear
from torch import Tensor

from rac_modifier.checkpoint.round_to_nearest import quantize_rows
from rac_modifier.checkpoint.stored_weight import from_dense
from rac_modifier.kernels import cpu
from rac_modifier.kernels.cpu.operator import sparse_linear
from rac_modifier.kernels.cpu.packed import pack_dense, pack_scale, pack_values
from rac_modifier.kernels.cpu.support import support

Linear = Callable[[Tensor], Tensor]
OURS = "sparse int8"


def sparse_int8(weight: Tensor) -> tuple[Linear, int]:
    """The linear that is measured, and its bytes."""
    values, scale = quantize_rows(weight)
    stored = from_dense(values, "")
    packed, scales = pack_values(stored.values, stored.bitmask, stored.columns), pack_scale(scale)
    return lambda x: sparse_linear(
        x, packed, *weight.shape, None, scales
    ), packed.nbytes + scales.nbytes


def sparse_bf16(weight: Tensor) -> Linear:
    """The kernel on sparse floats."""
    stored = from_dense(weight.bfloat16(), "")
    packed = cpu.pack(stored, torch.bfloat16)
    return lambda x: cpu.linear(x, packed, stored.rows, stored.columns)


def dense_int8(weight: Tensor) -> Linear:
    """Our int8 kernel on the whole weight, without masks."""
    values, scale = quantize_rows(weight)
    packed, scales = pack_dense(values), pack_scale(scale)
    return lambda x: sparse_linear(x, packed, *weight.shape, None, scales)


def vllm_int8(weight: Tensor) -> Linear:
    """As vLLM's `CPUInt8ScaledMMLinearKernel._apply_weights_onednn`, activations quantized dynamically."""
    from vllm import _custom_ops as ops

    values, scale = quantize_rows(weight)
    handler = ops.create_onednn_scaled_mm(values.t(), scale, weight.dtype, True, False, 32)

    def linear(x: Tensor, keep: Tensor = scale) -> Tensor:  # the handler does not own the scales
        quantized, scales, zero = ops.onednn_scaled_int8_quant(x, None, None, True)
        out = torch.empty(len(x), handler.n, dtype=x.dtype)
        ops.onednn_scaled_mm(handler, quantized, out, scales, zero, None, None)
        return out

    return linear


def step(linears: list[Linear], inputs: list[Tensor]) -> float:
    """Seconds."""
    start = time.perf_counter()
    for linear, x in zip(linears, itertools.cycle(inputs)):
        linear(x)
    return time.perf_counter() - start


def errors(makers: dict[str, Callable[[Tensor], Linear]], dtype: torch.dtype) -> str:
    """Relative error of the int8 linears on Gaussian activations, and with one channel x1000; the weight is exact."""
    weight = torch.randint(-127, 128, (512, 1536)).float()
    weight[:, 0] = 127  # so that each row's scale is 1
    found = []
    for outlier in (1, 1000):
        x = torch.randn(8, 1536)
        x[:, 700] *= outlier
        exact = x.double() @ weight.double().T
        rounded = (x.bfloat16().double() @ weight.double().T - exact).norm() / exact.norm()
        texts = [f"bf16 activations {float(rounded):.1e}"]
        for name, make in makers.items():
            y = make(weight.to(dtype))(x.to(dtype))
            texts.append(f"{name} {float((y.double() - exact).norm() / exact.norm()):.1e}")
        found.append(f"one channel x{outlier}: " + ", ".join(texts))
    return "relative error of the product, " + "; ".join(found)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SHAPES, default="1.5B")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="of activations and dense contenders"
    )
    parser.add_argument(
        "--rows", type=numbers, default=[1, 2, 4, 8, 16, 32, 64], help="numbers of rows of x"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--gigabytes", type=float, default=0.5, help="of packed weights in a step")
    parser.add_argument("--repeats", type=int, default=5, help="steps of each contender")
    parser.add_argument("--without", nargs="*", default=[], help="contenders to leave out")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(arguments.threads)
    dtype = DTYPES[arguments.dtype]
    makers: dict[str, Callable[[Tensor], Linear]] = {
        "sparse bf16": sparse_bf16,
        "dense int8": dense_int8,
    }
    vllm = importlib.util.find_spec("vllm") is not None
    if vllm:
        makers |= {"vLLM linear": vllm_linear, "vLLM int8": vllm_int8}
    makers["torch linear"] = plain_linear
    makers = {name: make for name, make in makers.items() if name not in arguments.without}

    with torch.inference_mode():
        int8 = {name: make for name, make in makers.items() if name in ("dense int8", "vLLM int8")}
        print(f"{support().reason}; {errors(int8, dtype)}")
        weights = []
        for rows, columns in SHAPES[arguments.model]:
            weights.append(
                torch.randn(rows, columns).masked_fill(torch.rand(rows, columns) < 0.5, 0).to(dtype)
            )
        ours: list[Linear] = []
        nbytes = 0
        while nbytes < arguments.gigabytes * 1e9:
            for weight in weights:
                linear, size = sparse_int8(weight)
                ours.append(linear)
                nbytes += size
        layers = len(ours) // len(weights)
        linears = {OURS: ours} | {
            name: [make(weight) for _ in range(layers) for weight in weights]
            for name, make in makers.items()
        }
        print(
            f"\n{arguments.model} shapes, {arguments.dtype} activations, 50% sparse int8, {arguments.threads} threads, "
            f"{nbytes / 1e9:.2f} GB packed, at most {dtype.itemsize / 0.625:.2f}x by bytes\n"
        )
        print(
            "| M | sparse int8 ms | GB/s | of probe | "
            + " | ".join(f"{name} ms | ratio" for name in makers)
            + " |"
        )
        print("|" + "---|" * (4 + 2 * len(makers)))
        for m in arguments.rows:
            inputs = [torch.randn(m, weight.shape[1]).to(dtype) for weight in weights]
            probe = read_speed(3)
            times: dict[str, list[float]] = {name: [] for name in linears}
            for turn in range(arguments.repeats + 1):
                for name, of in linears.items():
                    seconds = step(of, inputs)
                    if turn:
                        times[name].append(seconds)
            medians = {name: statistics.median(of) for name, of in times.items()}
            speed = nbytes / medians[OURS]
            cells = [
                str(m),
                f"{medians[OURS] * 1e3:.1f}",
                f"{speed / 1e9:.1f}",
                f"{speed / probe:.0%}",
            ]
            for name in makers:
                cells += [f"{medians[name] * 1e3:.1f}", f"{medians[name] / medians[OURS]:.2f}x"]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
