"""Our CPU kernels against dense linears of torch and vLLM: ms per decode step by batch size.

    python -m bench kernels --forms 50%-bf16 50%-int8 int4 --tokens 1 4 16 64

A step runs every linear of so many layers that --gigabytes of our weights are read, so that
no cache helps. Contenders run in turn, one step each; medians count. vLLM and torchao take part
where they are installed. "of the probe" is the share of the memory's reading speed that our
kernel reaches.
"""

import argparse
import importlib.util
import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.common import save
from bench.shapes import GROUP, SHAPES, Form, packed_words, random_mask, rounded
from rac_modifier.formats.stored_weight import all_stored, from_dense
from rac_modifier.kernels import cpu
from rac_modifier.kernels.cpu.support import support

Linear = Callable[[Tensor], Tensor]
SMALL_PAGES = "ours in 4 KB pages"
OTHERS = (SMALL_PAGES, "torch", "vLLM bfloat16", "vLLM W8A8", "vLLM W4A16", "torchao int4")
TINY = "--forms 50%-bf16 int4 --tokens 1 --gigabytes 0.001 --repeats 1"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of this suite."""
    parser.add_argument("--shape", choices=SHAPES, default="1.5B")
    parser.add_argument("--forms", nargs="+", default=["50%-bf16", "50%-int8", "50%-int4", "int4"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 512])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--gigabytes", type=float, default=0.5, help="of our weights in a step")
    parser.add_argument("--repeats", type=int, default=5)


def ours(form: Form, weight: Tensor) -> tuple[Linear, Linear, int]:
    """Return our linear of a bfloat16 weight in a form, one in small pages, and their bytes."""
    weight = weight * random_mask(*weight.shape, form.pruned)
    store = from_dense if form.pruned else all_stored
    if form.bits == 16:
        stored = store(weight, form.text)
    else:
        values, scale = rounded(weight, form.bits, form.group)
        bits = {"bits": form.bits, "activation_bits": form.activations}
        stored = replace(store(values, form.text), scale=scale.float(), **bits)
    packed = cpu.pack(stored, torch.bfloat16)
    rows, columns = weight.shape
    size = sum(tensor.nbytes for tensor in packed.values())

    def linear(x: Tensor, packed: Mapping[str, Tensor]) -> Tensor:
        return cpu.linear(x, packed, rows, columns)

    copies = {name: tensor.clone() for name, tensor in packed.items()}  # in malloc's memory
    return partial(linear, packed=packed), partial(linear, packed=copies), size


def torch_bf16(weight: Tensor) -> Linear:
    """Return torch's own linear."""
    copy = weight.clone()
    return lambda x: torch.nn.functional.linear(x, copy)


def vllm_bf16(weight: Tensor) -> Linear:
    """Return vLLM's linear for unquantized weights."""
    from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm

    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(weight.clone(), requires_grad=False)
    dispatch_cpu_unquantized_gemm(layer, remove_weight=True)
    linear = layer.cpu_linear
    return lambda x: linear(x, layer.weight, None)


def vllm_w8a8(weight: Tensor) -> Linear:
    """Return vLLM's linear of int8 weights and activations (oneDNN)."""
    from vllm import _custom_ops as ops

    values, scale = rounded(weight, 8, None)
    scale = scale.float()
    handler = ops.create_onednn_scaled_mm(values.t(), scale, weight.dtype, True, False, 32)

    def linear(x: Tensor, held: Tensor = scale) -> Tensor:  # the handler does not own the scales
        codes, scales, _ = ops.onednn_scaled_int8_quant(x, None, None, True)
        out = torch.empty(len(x), handler.n, dtype=x.dtype)
        ops.onednn_scaled_mm(handler, codes, out, scales, None, None, None)
        return out

    return linear


def vllm_w4a16(weight: Tensor) -> Linear:
    """Return vLLM's linear of int4 weights in groups of 128.

    With AMX it rounds activations to 8 bits, unless VLLM_CPU_INT4_W4A8=0.
    """
    from vllm.model_executor.kernels.linear.mixed_precision import MPLinearLayerConfig, cpu
    from vllm.scalar_type import scalar_types

    values, scale = rounded(weight, 4, GROUP[4])
    shape = (weight.shape[1], weight.shape[0])
    config = MPLinearLayerConfig(
        shape, shape, scalar_types.uint4b8, weight.dtype, GROUP[4], zero_points=False
    )
    layer = torch.nn.Module()
    layer.bias = None
    for name, tensor in (("codes", packed_words(values, 4)), ("scale", scale)):
        parameter = torch.nn.Parameter(tensor, requires_grad=False)
        parameter.input_dim, parameter.packed_dim, parameter.output_dim = 1, 1, 0
        setattr(layer, name, parameter)
    kernel = cpu.CPUWNA16LinearKernel(config, "codes", "scale", "zeros")
    kernel.process_weights_after_loading(layer)
    return lambda x: kernel.apply_weights(layer, x)


def torchao_int4(weight: Tensor) -> Linear:
    """Return torchao's linear of int4 weights in groups of 128."""
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

    packed = Int4OpaqueTensor.from_hp(weight, [1, 128])
    return lambda x: torch.nn.functional.linear(x, packed)


def read_speed(repeats: int = 3) -> float:
    """Return the bytes per second that a sum over half a gigabyte of float32 reads."""
    block, times = torch.ones(1 << 14, 1 << 13), []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        block.sum()
        times.append(time.perf_counter() - started)
    return block.nbytes / statistics.median(times[1:])


def step(linears: list[Linear], inputs: list[Tensor]) -> float:
    """Return the seconds of one step."""
    started = time.perf_counter()
    for linear, x in zip(linears, itertools.cycle(inputs)):
        linear(x)
    return time.perf_counter() - started


def measure(form: Form, options: argparse.Namespace) -> list[list[Any]]:
    """Return a row of the table per number of tokens."""
    weights = [torch.randn(shape).bfloat16() for shape in SHAPES[options.shape]]
    contenders: dict[str, list[Linear]] = {"ours": [], SMALL_PAGES: []}
    size = 0
    while size < options.gigabytes * 1e9:
        for weight in weights:
            linear, in_small_pages, nbytes = ours(form, weight)
            contenders["ours"].append(linear)
            contenders[SMALL_PAGES].append(in_small_pages)
            size += nbytes
    layers = len(contenders["ours"]) // len(weights)
    makers = {"torch": torch_bf16}
    if importlib.util.find_spec("vllm") is not None:
        makers |= {"vLLM bfloat16": vllm_bf16, "vLLM W8A8": vllm_w8a8}
        if torch.backends.cpu.get_cpu_capability() == "AVX512":
            makers["vLLM W4A16"] = vllm_w4a16
    if importlib.util.find_spec("torchao") is not None:
        makers["torchao int4"] = torchao_int4
    for name, make in makers.items():
        contenders[name] = [make(weight) for _ in range(layers) for weight in weights]
    rows = []
    for tokens in options.tokens:
        inputs = [torch.randn(tokens, weight.shape[1]).bfloat16() for weight in weights]
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(options.repeats + 1):
            for name, linears in contenders.items():
                seconds = step(linears, inputs)
                times[name] += [seconds] if turn else []
        median = {name: statistics.median(values) for name, values in times.items()}
        speed = size / median["ours"]
        ratios = [median[name] / median["ours"] if name in median else None for name in OTHERS]
        rows.append([form.text, tokens, 1e3 * median["ours"], 100 * speed / read_speed(), *ratios])
        print(*rows[-1], flush=True)
    return rows


def run(options: argparse.Namespace) -> None:
    """Measure each form and write the table."""
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    print(support().reason, flush=True)
    with torch.inference_mode():
        rows = [row for text in options.forms for row in measure(Form.parse(text), options)]
    columns = {
        "form": "",
        "tokens": ".0f",
        "ours, ms": ".2f",
        "of the probe, %": ".0f",
        **{f"{name} over it": ".2f" for name in OTHERS},
    }
    model = f"{options.shape} shapes, random weights, {options.threads} threads"
    save(options.out, "kernels", model, columns, rows)
