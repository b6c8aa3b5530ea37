"""Other projects in `bench peers`: a file for llama.cpp, steps in OpenVINO and torchao."""

import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.shapes import QWEN2

Shapes = Sequence[tuple[int, int]]
# largest value of a code (times a scale within the block), and where its float16 scales are
_K_QUANTS = {"Q4_K": (15 * 63, (0, 2)), "Q6_K": (32 * 127, (208,))}
LARGEST = {"Q4_0": (8, (0,)), "Q8_0": (127, (0,)), **_K_QUANTS}
ROWS = 1 << 14  # that torchao packs at a time: its codes are 32-bit integers before that


def write_gguf(folder: Path, kind: str, layers: int, vocab: int) -> Path:
    """Write Qwen2-1.5B's shape with random codes as a GGUF file, if missing; return its path.

    `kind` is Q4_0, Q8_0 or Q4_K_M: Q4_K, with Q6_K for the embedding and, in the layers
    that llama.cpp chooses, v and down.
    """
    import gguf

    path = folder / f"{kind}-{layers}-{vocab}.gguf"
    if path.exists():
        return path
    hidden, inner, heads, kv_heads = QWEN2["1.5B"].values()
    mixed = kind == "Q4_K_M"
    usual = gguf.GGMLQuantizationType["Q4_K" if mixed else kind]
    finer = gguf.GGMLQuantizationType.Q6_K if mixed else usual
    draw = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path.with_suffix(".unfinished"), "qwen2")
    writer.add_context_length(4096)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(1e6)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{i}" for i in range(vocab)])
    writer.add_token_types([gguf.TokenType.NORMAL] * vocab)
    writer.add_token_merges(["t 0"])
    writer.add_eos_token_id(vocab - 1)

    def matrix(name: str, rows: int, columns: int, form: Any = usual) -> None:
        block, size = gguf.GGML_QUANT_SIZES[form]
        codes = draw.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
        largest, scales = LARGEST[form.name]
        scale = np.full(1, 0.25 / columns**0.5 / largest, np.float16).view(np.uint8)
        for start in scales:
            codes[:, :, start : start + 2] = scale
        writer.add_tensor(f"{name}.weight", codes.reshape(rows, -1), raw_dtype=form)

    matrix("token_embd", vocab, hidden, finer)
    writer.add_tensor("output_norm.weight", np.ones(hidden, np.float32))
    kv, eighth = hidden // heads * kv_heads, layers // 8
    for layer in range(layers):
        outer = layer < eighth or layer >= 7 * eighth or (layer - eighth) % 3 == 2
        chosen = finer if outer else usual
        for norm in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(hidden, np.float32))
        for part, rows in (("q", hidden), ("k", kv), ("v", kv)):
            matrix(f"blk.{layer}.attn_{part}", rows, hidden, chosen if part == "v" else usual)
            writer.add_tensor(f"blk.{layer}.attn_{part}.bias", np.zeros(rows, np.float32))
        matrix(f"blk.{layer}.attn_output", hidden, hidden)
        matrix(f"blk.{layer}.ffn_gate", inner, hidden)
        matrix(f"blk.{layer}.ffn_up", inner, hidden)
        matrix(f"blk.{layer}.ffn_down", hidden, inner, chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path.with_suffix(".unfinished").rename(path)
    return path


def median_ms(step: Callable[[], object], repeats: int) -> float:
    """Return the median of milliseconds of a step; the first two are not counted."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return 1e3 * statistics.median(times[2:])


def openvino_step(shapes: Shapes, group: int, threads: int, repeats: int) -> tuple[int, float]:
    """Time the int4 matmuls of a token in OpenVINO's CPU runtime: weight bytes, milliseconds.

    The graph is nothing but linear layers, which the runtime may run in any order.
    """
    import openvino
    from openvino import opset13 as operations

    draw = np.random.default_rng(0)

    def weight(rows: int, columns: int) -> Any:
        words = draw.integers(0, 256, rows * columns // 2, dtype=np.uint8)
        shape = openvino.Shape([rows, columns // group, group])
        tensor = openvino.Tensor(words, shape, openvino.Type.i4)
        codes = operations.convert(operations.constant(tensor, shared_memory=False), "f16")
        scales = operations.constant(np.full((rows, columns // group, 1), 1 / columns, np.float16))
        size = operations.constant(np.array([rows, columns]))
        product = operations.multiply(codes, scales)
        return operations.convert(operations.reshape(product, size, special_zero=False), "f32")

    sizes = sorted({columns for _, columns in shapes})
    inputs = {size: operations.parameter([1, 1, size], openvino.Type.f32) for size in sizes}
    layers = [
        operations.matmul(inputs[columns], weight(rows, columns), False, True)
        for rows, columns in shapes
    ]
    graph = openvino.Model(layers, list(inputs.values()))
    options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(graph, "CPU", options).create_infer_request()
    x = [draw.standard_normal((1, 1, columns)).astype(np.float32) for columns in sizes]
    size = sum(int(rows * columns * (4 + 16 / group) / 8) for rows, columns in shapes)
    return size, median_ms(lambda: request.infer(x, share_inputs=True, share_outputs=True), repeats)


def torchao_step(shapes: Shapes, group: int, threads: int, repeats: int) -> tuple[int, float]:
    """Time the int4 matmuls of a token in torchao, by layer: weight bytes, milliseconds.

    The last rows of each product are compared with float32.
    """
    from torchao.prototype.quantization.int4.int4_opaque_tensor import Int4OpaqueTensor

    torch.manual_seed(0)
    inputs = {columns: torch.randn(1, columns).bfloat16() for _, columns in shapes}
    weights, size = [], 0
    for rows, columns in shapes:
        packed, scales = [], []
        for first in range(0, rows, ROWS):
            count = min(ROWS, rows - first)
            codes = torch.randint(0, 16, (count, columns), dtype=torch.int32)
            packed.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
            scale = ((torch.rand(columns // group, count, 1) + 0.5) / columns).bfloat16()
            scales.append(torch.cat([scale, torch.zeros_like(scale)], 2))
        data, scale_and_zero = torch.cat(packed), torch.cat(scales, 1)
        shape = torch.Size((rows, columns))
        tensors = {"qdata": data, "scale_and_zero": scale_and_zero, "act_pre_scale": None}
        weight = Int4OpaqueTensor(**tensors, block_size=[1, group], shape=shape)
        dense = (codes - 8) * scale.squeeze(2).T.float().repeat_interleave(group, dim=1)
        exact = inputs[columns].float() @ dense.T
        output = torch.nn.functional.linear(inputs[columns], weight)[:, -count:].float()
        if not torch.allclose(output, exact, rtol=0.02, atol=0.02 * float(exact.abs().max())):
            raise RuntimeError(f"torchao: the product of [{rows}, {columns}] is wrong")
        weights.append((weight, columns))
        size += data.nbytes + scale_and_zero.nbytes

    def step() -> None:
        for weight, columns in weights:
            torch.nn.functional.linear(inputs[columns], weight)

    with torch.inference_mode():
        return size, median_ms(step, repeats)
