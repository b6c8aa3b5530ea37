"""The linear layer with a sparse weight, as one opaque torch operator, `torch.ops.rac_modifier.sparse_linear`.

For few rows of x (decoding, limited by the bytes that are read) the kernel multiplies packed panels itself. For many rows
(prefill) panels are expanded, one chunk at a time, into a small dense buffer that torch's own matrix product reads.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu import native_operator
from rac_modifier.kernels.cpu.library import (
    ARM_ISAS,
    DENSE8,
    INT8,
    TYPES,
    VALUE_TYPES,
    X86_ISAS,
    Library,
)
from rac_modifier.kernels.cpu.packed import PANEL
from rac_modifier.kernels.cpu.support import dense_products_in_bf16, library_and_isa

# The largest number of rows of x for which the kernel itself is the faster way: measured on shapes of a 1.5B model, on AVX512
# (beside dense products in float32) up to 512 and on AMX up to 1024. Those of ARM and AVX-VNNI are assumed to be as AVX2. A
# server measures (crossover.py).
CROSSOVER = {"portable": 8, **dict.fromkeys((*X86_ISAS, *ARM_ISAS), math.inf)}
# The same for weights of 8 and of 4 bits, which are multiplied as integers. Portable: assumed.
CROSSOVER8 = {**CROSSOVER, **dict.fromkeys(("avx2", "avxvnni", *ARM_ISAS), 512)}
CROSSOVER4 = {**CROSSOVER8, "amx": 512}
_chosen: dict[str, float] = {}  # by kind of weight, where `use_crossovers` was called
FEW = (
    native_operator.LINES
)  # rows that every kernel multiplies itself: no call to learn the type of the values
EIGHT_BITS = " with 8-bit activations"  # behind a kind of weights of integers: another kernel multiplies these
KINDS = ("floats", "int8", "int4", f"int8{EIGHT_BITS}", f"int4{EIGHT_BITS}")
SCRATCH_BYTES = 8 << 20  # of expanded panels at a time: they about fit into the last-level cache

_scratch = threading.local()


def sparse_linear(
    x: Tensor,
    data: Tensor,
    rows: int,
    columns: int,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """X [..., columns] times the transposed weight, plus bias [rows]: [..., rows] in x's dtype, summed in fp32.

    `data`: the packed weight [rows, columns], from `pack_values` or `pack_dense`. x and bias are bfloat16 or float32, in any
    combination with the weight. `scale`, from `pack_scale`, multiplies the weight: integers need one, floats may have one of a
    single group. For weights of integers x is rounded to 16-bit integers, with a scale per row and 512 columns or group, which is
    more accurate than bfloat16. (Many rows of bfloat16 are not rounded where the processor multiplies bfloat16.)

    Raises:
        RacError: other dtypes, or shapes that do not fit.
    """
    if not native_operator.state.active:
        return torch.ops.rac_modifier.sparse_linear(x, data, rows, columns, bias, scale)
    try:
        return torch.ops.rac_modifier.native_linear(x, data, rows, columns, bias, scale)
    except RuntimeError:
        _forward(
            x, data, rows, columns, bias, scale
        )  # raises what the operator in C++ can only print
        raise


def _forward(
    x: Tensor,
    data: Tensor,
    rows: int,
    columns: int,
    bias: Tensor | None,
    scale: Tensor | None = None,
) -> Tensor:
    """The operator. `data` was checked when it was packed; only its header is checked again here."""
    library, isa = library_and_isa()
    _check(x, data, rows, columns, bias, scale)
    shape = x.shape
    if len(shape) != 2:
        x = x.reshape(-1, columns)
    x = x.contiguous()
    if bias is not None:
        bias = bias.contiguous()
    out = torch.empty((x.shape[0], rows), dtype=x.dtype)
    if x.shape[0] <= FEW or x.shape[0] <= _crossover(library, data, isa):
        library.linear(data, rows, columns, x, scale, bias, out, isa)
    else:
        expand_and_multiply(library, isa, data, x, scale, bias, out)
    return out if len(shape) == 2 else out.view(*shape[:-1], rows)


def use_crossovers(rows: Mapping[str, float]) -> None:
    """From now on the kernels multiply so many rows of x themselves, by kind of weight (`KINDS`).

    Other kinds keep what an earlier call gave, for another model of this process, or the number of the tables. `rows` below 8
    act as 8.
    """
    _chosen.update(rows)


def forget_crossovers() -> None:
    """Take the numbers of the tables again. For tests."""
    _chosen.clear()


def _crossover(library: Library, data: Tensor, isa: str) -> float:
    value_type = library.value_type(data)
    kind = "floats" if value_type < INT8 else "int8" if value_type in (INT8, DENSE8) else "int4"
    table = {"floats": CROSSOVER, "int8": CROSSOVER8, "int4": CROSSOVER4}[kind]
    if library.activation_bits(data, isa) == 8:
        kind += EIGHT_BITS
    return _chosen.get(kind, table[isa])


def expand_and_multiply(
    library: Library,
    isa: str,
    data: Tensor,
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """Fill `out` by dense products with chunks of the weight.

    In bf16 where x is in bf16, torch multiplies that faster than fp32 on this processor (`dense_products_in_bf16`), and the
    weight's values are exact in it: integers, or bf16 without a scale. Else in fp32. Scales of integers, what they are multiplied
    to, and the bias are rounded to bf16 then, as a dense bf16 model's weights are; sums are in fp32.
    """
    rows, columns, value_type = out.shape[1], x.shape[1], library.value_type(data)
    in_bf16 = value_type >= INT8 or (value_type == VALUE_TYPES[torch.bfloat16] and scale is None)
    fast = x.dtype == torch.bfloat16 and in_bf16 and dense_products_in_bf16(isa)
    dtype = torch.bfloat16 if fast else torch.float32
    x, bias = x.to(dtype), bias if bias is None else bias.to(dtype)
    panels = -(-rows // PANEL)
    step = min(panels, max(1, SCRATCH_BYTES // (columns * PANEL * dtype.itemsize)))
    buffer = _buffer(columns * step * PANEL * dtype.itemsize).view(dtype)
    for first in range(0, panels, step):
        last = min(first + step, panels)
        width = PANEL * (last - first)
        transposed = buffer[: columns * width].view(columns, width)
        library.expand(data, rows, columns, first, last, transposed, isa)
        if (
            scale is not None
        ):  # [groups, columns of a group, panels, 16] times [groups, 1, panels, 16]
            groups = scale.shape[1]
            factors = scale[first:last].transpose(0, 1).to(dtype).contiguous()
            transposed.view(groups, -1, last - first, PANEL).mul_(factors[:, None])
        low, high = first * PANEL, min(last * PANEL, rows)
        transposed = transposed[:, : high - low]
        # addmm, because adding the bias to the product's result would round a second time.
        out[:, low:high] = (
            torch.mm(x, transposed) if bias is None else torch.addmm(bias[low:high], x, transposed)
        )


def _buffer(size: int) -> Tensor:
    """`size` bytes, reused by the thread: a new buffer would cost a page fault per 4 KiB at every call."""
    kept = getattr(_scratch, "buffer", None)
    if kept is None or kept.numel() < size:
        kept = _scratch.buffer = torch.empty(size, dtype=torch.uint8)
    return kept[:size]


def _check(
    x: Tensor, data: Tensor, rows: int, columns: int, bias: Tensor | None, scale: Tensor | None
) -> None:
    if x.dtype not in TYPES or not x.is_cpu:
        raise RacError(
            f"x: {x.dtype} on {x.device}; the sparse kernel takes bfloat16 or float32 on the CPU"
        )
    if x.dim() < 1 or x.shape[-1] != columns:
        raise RacError(f"x: shape {list(x.shape)} does not end in the weight's {columns} columns")
    if data.dtype != torch.uint8 or not data.is_cpu or not data.is_contiguous():
        raise RacError(f"data: {data.dtype} on {data.device}; pass what `pack_values` returned")
    if bias is not None and (bias.shape != (rows,) or bias.dtype not in TYPES or not bias.is_cpu):
        raise RacError(
            f"bias: {bias.dtype} {list(bias.shape)} on {bias.device}; the weight's {rows} rows need bfloat16 or float32 "
            f"[{rows}] on the CPU"
        )
    if scale is not None and (
        scale.dtype not in TYPES
        or not scale.is_cpu
        or not scale.is_contiguous()
        or scale.dim() != 3
        or (scale.shape[0], scale.shape[2]) != (-(-rows // PANEL), PANEL)
        or scale.shape[1] < 1
        or columns % scale.shape[1]
    ):
        raise RacError(
            f"scale: {scale.dtype} {list(scale.shape)} on {scale.device} does not fit a weight [{rows}, {columns}]; pass "
            "what `pack_scale` returned"
        )


def _fake(
    x: Tensor,
    data: Tensor,
    rows: int,
    columns: int,
    bias: Tensor | None,
    scale: Tensor | None = None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


# Once per process, also if this module is loaded again. `native_linear` is this one where its own in C++ is not registered.
for _name, _key in (("sparse_linear", "cpu"), ("native_linear", "CompositeExplicitAutograd")):
    if not hasattr(torch.ops.rac_modifier, _name):
        torch.library.define(
            f"rac_modifier::{_name}",
            "(Tensor x, Tensor data, int rows, int columns, Tensor? bias, Tensor? scale=None) -> Tensor",
        )
        torch.library.impl(f"rac_modifier::{_name}", _key, _forward)
        torch.library.register_fake(f"rac_modifier::{_name}", _fake)
