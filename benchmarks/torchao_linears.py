"""The products of one decode step by torchao's int4 weights on a CPU: linear layers with random weights, called one by one."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor
from torchao.prototype.quantization.int4.int4_opaque_tensor import (
    Int4OpaqueTensor,  # the only int4 that 0.18 has for CPUs
)

ROWS = 1 << 14  # that are packed at a time: the codes are 32-bit integers before that


def weight(rows: int, columns: int, group: int) -> tuple[Int4OpaqueTensor, Tensor]:
    """A weight of random codes and scales, and its last rows (up to ROWS) in float32, for a check."""
    packed, scales = [], []
    for first in range(0, rows, ROWS):
        some = min(ROWS, rows - first)
        codes = torch.randint(0, 16, (some, columns), dtype=torch.int32)
        packed.append(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1))
        scale = ((torch.rand(columns // group, some, 1) + 0.5) / columns).bfloat16()
        scales.append(
            torch.cat([scale, torch.zeros_like(scale)], 2)
        )  # a weight is (code - 8) * scale + zero
    by_column = scale.squeeze(2).T.float().repeat_interleave(group, dim=1)
    parts = {
        "qdata": torch.cat(packed),
        "scale_and_zero": torch.cat(scales, 1),
        "act_pre_scale": None,
    }
    return Int4OpaqueTensor(**parts, block_size=[1, group], shape=torch.Size((rows, columns))), (
        codes - 8
    ) * by_column


def decode_step(shapes: Sequence[tuple[int, int]], group: int, repeats: int) -> tuple[int, float]:
    """Time the products of one token, in bfloat16.

    Args:
        shapes: rows and columns of each layer, in order.
        group: columns that share a scale.
        repeats: tokens, of which the first two are not counted.

    Returns:
        bytes of the weights with their scales and zeros, and the median of milliseconds per token.

    Raises:
        RuntimeError: a product is wrong.
    """
    torch.manual_seed(0)
    inputs = {columns: torch.randn(1, columns).bfloat16() for _, columns in shapes}
    weights = []
    for rows, columns in shapes:
        packed, dense = weight(rows, columns, group)
        weights.append(packed)
        meant = inputs[columns].float() @ dense.T
        found = torch.nn.functional.linear(inputs[columns], packed)[:, -len(dense) :].float()
        if not torch.allclose(found, meant, rtol=0.02, atol=0.02 * float(meant.abs().max())):
            raise RuntimeError(
                f"torchao: a product [{rows}, {columns}] differs by {float((found - meant).abs().max())}"
            )
    times = []
    with torch.inference_mode():
        for _ in range(repeats):
            started = time.perf_counter()
            for (_, columns), packed in zip(shapes, weights, strict=True):
                torch.nn.functional.linear(inputs[columns], packed)
            times.append(time.perf_counter() - started)
    nbytes = sum(packed.qdata.nbytes + packed.scale_and_zero.nbytes for packed in weights)
    return nbytes, 1e3 * statistics.median(times[2:])
