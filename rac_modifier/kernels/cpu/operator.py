"""The linear layer with a sparse weight, as an opaque torch operator, `torch.ops.rac_modifier.sparse_linear`.

For few tokens (decoding, limited by the bytes that are read) the kernel multiplies packed panels. For many
tokens (prefill) panels are expanded, a chunk at a time, into a small dense buffer that torch multiplies.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu import native_operator
from rac_modifier.kernels.cpu.library import BITS, INT8, TYPES, VALUE_TYPES, Library
from rac_modifier.kernels.cpu.packed import PANEL
from rac_modifier.kernels.cpu.support import library_and_isa

_crossovers: dict[str, float] = {}  # by kind of weight; else that of the kernel (Library.kernels)
FEW = (
    native_operator.TOKENS
)  # tokens that every kernel multiplies, without asking for the value type
EIGHT_BITS = " with 8-bit activations"  # kinds of integers that another kernel multiplies
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

    `data`: the packed weight [rows, columns], from `pack_values` or `pack_dense`. x and bias are bfloat16
    or float32, in any combination with the weight. `scale`, from `pack_scale`, multiplies the weight:
    integers need a scale, floats may have a scale of one group. For integers x is rounded to 16-bit
    integers, with a scale per token and 512 columns or group, which is more accurate than bfloat16. (Many
    tokens of bfloat16 are not rounded where the processor multiplies bfloat16.)

    Raises:
        RacError: other dtypes, or shapes that do not fit.
    """
    if not native_operator.state.active:
        return torch.ops.rac_modifier.sparse_linear(x, data, rows, columns, bias, scale)
    try:
        return torch.ops.rac_modifier.native_linear(x, data, rows, columns, bias, scale)
    except RuntimeError:  # Python raises what the operator in C++ can only print
        _forward(x, data, rows, columns, bias, scale)
        raise


def _forward(
    x: Tensor,
    data: Tensor,
    rows: int,
    columns: int,
    bias: Tensor | None,
    scale: Tensor | None = None,
) -> Tensor:
    """The operator. `data` was checked when it was packed; only its header is checked again."""
    library, isa = library_and_isa()
    _check(x, data, rows, columns, bias, scale)
    shape = x.shape
    x = x.reshape(-1, columns).contiguous()
    bias = None if bias is None else bias.contiguous()
    out = torch.empty((x.shape[0], rows), dtype=x.dtype)
    if x.shape[0] <= FEW or x.shape[0] <= _crossover(library, data, isa):
        library.linear(data, rows, columns, x, scale, bias, out, isa)
    else:
        expand_and_multiply(library, isa, data, x, scale, bias, out)
    return out.view(*shape[:-1], rows)


def use_crossovers(tokens: Mapping[str, float]) -> None:
    """Set up to how many tokens the kernels multiply packed panels, by kind of weight (`KINDS`).

    Kinds that `tokens` lacks keep their number: another model of this process may have set it.
    """
    _crossovers.update(tokens)


def forget_crossovers() -> None:
    """Take the numbers of the kernel again. For tests."""
    _crossovers.clear()


def _crossover(library: Library, data: Tensor, isa: str) -> float:
    value_type, kernel = library.value_type(data), library.kernels[isa]
    if value_type < INT8:
        kind, tokens = "floats", kernel.floats
    elif value_type in BITS:
        kind, tokens = "int4", kernel.int4
    else:
        kind, tokens = "int8", kernel.int8
    if library.activation_bits(data, isa) == 8:
        kind += EIGHT_BITS
    return _crossovers.get(kind, math.inf if tokens < 0 else tokens)


def expand_and_multiply(
    library: Library,
    isa: str,
    data: Tensor,
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """Fill `out` by dense matmuls with chunks of the weight.

    In bf16 where x is bf16, torch multiplies bf16 faster than fp32 on this processor, and the weight's
    values are exact in bf16: integers, or bf16 without a scale. Otherwise in fp32. In bf16, scales of
    integers, the scaled values and the bias are rounded, as the weights of a dense bf16 model are; sums
    are in fp32.
    """
    rows, columns, value_type = out.shape[1], x.shape[1], library.value_type(data)
    in_bf16 = value_type >= INT8 or (value_type == VALUE_TYPES[torch.bfloat16] and scale is None)
    fast = x.dtype == torch.bfloat16 and in_bf16 and library.kernels[isa].dense_bf16
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
        if scale is not None:
            # [groups, columns of a group, panels, 16] times [groups, 1, panels, 16]
            factors = scale[first:last].transpose(0, 1).to(dtype).contiguous()
            transposed.view(scale.shape[1], -1, last - first, PANEL).mul_(factors[:, None])
        low, high = first * PANEL, min(last * PANEL, rows)
        transposed = transposed[:, : high - low]
        if bias is None:
            out[:, low:high] = torch.mm(x, transposed)
        else:  # adding the bias to a result of mm would round a second time
            out[:, low:high] = torch.addmm(bias[low:high], x, transposed)


def _buffer(size: int) -> Tensor:
    """`size` bytes, reused by the thread: a new buffer would cost a page fault per 4 KiB at every call."""
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.numel() < size:
        buffer = _scratch.buffer = torch.empty(size, dtype=torch.uint8)
    return buffer[:size]


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
            f"bias: {bias.dtype} {list(bias.shape)} on {bias.device}; the weight's {rows} rows need "
            f"bfloat16 or float32 [{rows}] on the CPU"
        )
    if scale is None:
        return
    plain = scale.dtype in TYPES and scale.is_cpu and scale.is_contiguous() and scale.dim() == 3
    if (
        not plain
        or (scale.shape[0], scale.shape[2]) != (-(-rows // PANEL), PANEL)
        or scale.shape[1] < 1
        or columns % scale.shape[1]
    ):
        raise RacError(
            f"scale: {scale.dtype} {list(scale.shape)} on {scale.device} does not fit a weight "
            f"[{rows}, {columns}]; pass what `pack_scale` returned"
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


# Once per process, also if this module is loaded again. Python serves `native_linear` until C++ does.
_ARGUMENTS = "(Tensor x, Tensor data, int rows, int columns, Tensor? bias, Tensor? scale=None)"
for _name, _key in (("sparse_linear", "cpu"), ("native_linear", "CompositeExplicitAutograd")):
    if not hasattr(torch.ops.rac_modifier, _name):
        torch.library.define(f"rac_modifier::{_name}", f"{_ARGUMENTS} -> Tensor")
        torch.library.impl(f"rac_modifier::{_name}", _key, _forward)
        torch.library.register_fake(f"rac_modifier::{_name}", _fake)
