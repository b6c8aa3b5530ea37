"""The formats that `make gpu-check` checks and times, and random weights in them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

import rac_gpu
from rac_modifier.formats.stored_weight import StoredWeight, from_dense

# Bits of a value; columns that share a scale, 0 for all; whether the weight is 2:4; whether values are floats of 8 bits; whether
# bfloat16 does not hold the scales. Of any pattern, half is stored.
FORMATS = {
    f"{pattern}{kind}": (bits, group, not pattern, fp8, False)
    for pattern in ("", "unstructured ")
    for kind, bits, group, fp8 in [
        ("bf16", 16, 0, False),
        ("int8", 8, 0, False),
        ("int8 g128", 8, 128, False),
        ("int8 g64", 8, 64, False),
        ("fp8", 8, 0, True),
        ("fp8 g128", 8, 128, True),
        ("fp8 g64", 8, 64, True),
        ("int4 g128", 4, 128, False),
        ("int4 g64", 4, 64, False),
    ]
}
FP32_SCALES = {f"int4 g{group} fp32 scales": (4, group, True, False, True) for group in (128, 64)}
# Groups of 64, and scales in fp32, differ by a few bytes.
TIMED_FORMATS = tuple(name for name in FORMATS if not name.endswith("g64"))
FORMATS |= FP32_SCALES
Linear = Callable[[Tensor], Tensor]


def random_weight(
    rows: int,
    columns: int,
    bits: int = 16,
    group: int = 0,
    two_of_four: bool = True,
    fp8: bool = False,
    fp32_scales: bool = False,
) -> StoredWeight:
    """A weight, half of it stored: normal in bfloat16, or integers or e4m3 with a scale per `group` columns.

    Columns are padded to whole groups. `fp32_scales`: bfloat16 does not hold the scales exactly.
    """
    columns = -(-columns // group) * group if group else columns
    kept = (torch.rand(rows, columns // 4, 4).argsort(dim=-1) < 2).view(rows, columns)
    if not two_of_four:
        kept = torch.rand(rows, columns) < 0.5
    if bits == 16:
        return from_dense(torch.randn(rows, columns).bfloat16().masked_fill(~kept, 0.0), "random")
    top = 1 << bits - 1
    if fp8:  # all codes but NaN
        codes = torch.randint(0, 127, (rows, columns)) + 128 * torch.randint(0, 2, (rows, columns))
        values = codes.masked_fill(~kept, 0).to(torch.uint8).view(torch.float8_e4m3fn)
    else:
        values = torch.randint(-top, top, (rows, columns), dtype=torch.int8).masked_fill(~kept, 0)
    scale = torch.rand(rows, columns // group if group else 1) + 0.1
    scale = scale if fp32_scales else scale.bfloat16().float()
    return replace(from_dense(values, "random"), scale=scale, bits=bits)


def packed_linear(weight: StoredWeight, bias: Tensor | None = None) -> Linear:
    """The product on the kernels."""
    packed = rac_gpu.pack(weight, torch.bfloat16)
    return lambda x: rac_gpu.linear(x, packed, weight.rows, weight.columns, bias)
