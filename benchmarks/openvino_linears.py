"""The products of one decode step in OpenVINO's CPU runtime: a graph of nothing but linear layers with random weights."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import numpy as np
import openvino
from openvino import opset13 as operations


def _weight(
    rows: int, columns: int, bits: int, group: int, draw: np.random.Generator
) -> openvino.Node:
    """Integers times scales, which OpenVINO keeps as integers: int8 with a scale per row, int4 with one per group."""
    if bits == 8:
        codes = operations.constant(draw.integers(-127, 128, (rows, columns), dtype=np.int8))
        scales = operations.constant(np.full((rows, 1), 1 / columns, np.float16))
        weight = operations.multiply(operations.convert(codes, "f16"), scales)
    else:
        packed = draw.integers(0, 256, rows * columns // 2, dtype=np.uint8)
        shape = openvino.Shape([rows, columns // group, group])
        codes = operations.constant(
            openvino.Tensor(packed, shape, openvino.Type.i4), shared_memory=False
        )
        scales = operations.constant(np.full((rows, columns // group, 1), 1 / columns, np.float16))
        weight = operations.multiply(operations.convert(codes, "f16"), scales)
        weight = operations.reshape(
            weight, operations.constant(np.array([rows, columns])), special_zero=False
        )
    return operations.convert(weight, "f32")


def decode_step(
    shapes: Sequence[tuple[int, int, int]], group: int, threads: int, repeats: int
) -> tuple[int, float]:
    """Time the products of one token.

    Args:
        shapes: rows, columns and bits of each layer, in order.
        group: columns that share a scale of int4.
        threads: of OpenVINO.
        repeats: tokens, of which the first two are not counted.

    Returns:
        bytes of the weights and their scales, and the median of milliseconds per token.
    """
    draw = np.random.default_rng(0)
    sizes = sorted({columns for _, columns, _ in shapes})
    inputs = {
        columns: operations.parameter([1, 1, columns], openvino.Type.f32) for columns in sizes
    }
    products = [
        operations.matmul(inputs[columns], _weight(rows, columns, bits, group, draw), False, True)
        for rows, columns, bits in shapes
    ]
    graph = openvino.Model(products, list(inputs.values()))
    options = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": "1", "PERFORMANCE_HINT": "LATENCY"}
    request = openvino.Core().compile_model(graph, "CPU", options).create_infer_request()
    x = [draw.standard_normal((1, 1, columns)).astype(np.float32) for columns in sizes]
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        request.infer(x, share_inputs=True, share_outputs=True)
        times.append(time.perf_counter() - started)
    bits_per_weight = {4: 4 + 16 / group, 8: 8.0}
    nbytes = sum(int(rows * columns * bits_per_weight[bits] / 8) for rows, columns, bits in shapes)
    return nbytes, 1e3 * statistics.median(times[2:])
