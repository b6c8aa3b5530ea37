"""Matmul and row lookup with packed weights, as opaque torch operators (torch.ops.rac_modifier).

`sparse_linear`: for few tokens (decoding, limited by the bytes that are read) the kernel multiplies
packed panels. For many (prefill), chunks of panels are expanded into a buffer that torch
multiplies. `packed_rows` expands a panel of 16 rows to take one row of an embedding.
"""

import math
import threading

import torch
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu.library import FLOAT_TYPES, PACKED_TYPES, PANEL, Library
from rac_modifier.kernels.cpu.support import TOKENS, library_and_isa

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
    """Return x [..., columns] W^T + bias [rows], summed in float32, in x's dtype.

    x and bias are bfloat16 or float32, whatever the weight's dtype. `scale`, from `pack_scale`:
    integers need one, floats may have one group. For integers x is rounded to 16-bit integers with
    a scale per token and 512 columns or group, which is more accurate than bfloat16; many tokens
    of 4 bits and fewer AMX multiplies in bfloat16. RacError: other dtypes, or shapes that do not
    fit.
    """
    try:
        return torch.ops.rac_modifier.native_linear(x, data, rows, columns, bias, scale)
    except RuntimeError:  # Python raises what the C++ operator can only print
        _forward(x, data, rows, columns, bias, scale)
        raise


def expand_and_multiply(
    library: Library,
    isa: str,
    data: Tensor,
    x: Tensor,
    scale: Tensor | None,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """Fill `out` by dense matmuls in float32 with chunks of the weight."""
    rows, columns = out.shape[1], x.shape[1]
    x, bias = x.float(), bias if bias is None else bias.float()
    panels = -(-rows // PANEL)
    step = min(panels, max(1, SCRATCH_BYTES // (columns * PANEL * x.itemsize)))
    buffer = _buffer(columns * step * PANEL)
    for first in range(0, panels, step):
        last = min(first + step, panels)
        width = PANEL * (last - first)
        transposed = buffer[: columns * width].view(columns, width)
        library.expand(data, rows, columns, first, last, transposed, isa)
        if scale is not None:
            # [groups, columns of a group, panels, 16] times [groups, 1, panels, 16]
            factors = scale[first:last].transpose(0, 1).float().contiguous()
            transposed.view(scale.shape[1], -1, last - first, PANEL).mul_(factors[:, None])
        low, high = first * PANEL, min(last * PANEL, rows)
        transposed = transposed[:, : high - low]
        if bias is None:
            out[:, low:high] = torch.mm(x, transposed)
        else:  # adding the bias to a result of mm would round a second time
            out[:, low:high] = torch.addmm(bias[low:high], x, transposed)


def _forward(
    x: Tensor,
    data: Tensor,
    rows: int,
    columns: int,
    bias: Tensor | None,
    scale: Tensor | None = None,
) -> Tensor:
    """Multiply; only the header of `data` is checked, the rest was when it was packed."""
    library, isa = library_and_isa()
    _check(x, data, rows, columns, bias, scale)
    shape = x.shape
    x = x.reshape(-1, columns).contiguous()
    bias = None if bias is None else bias.contiguous()
    out = torch.empty((x.shape[0], rows), dtype=x.dtype)
    if x.shape[0] <= TOKENS or x.shape[0] <= _most_tokens(library, data, isa):
        library.linear(data, rows, columns, x, scale, bias, out, isa)
    else:
        expand_and_multiply(library, isa, data, x, scale, bias, out)
    return out.view(*shape[:-1], rows)


def _most_tokens(library: Library, data: Tensor, isa: str) -> float:
    """Return up to how many tokens the kernel multiplies this weight itself."""
    bits, kernel = PACKED_TYPES[library.value_type(data)].bits, library.kernels[isa]
    tokens = kernel.floats if bits > 8 else kernel.int8 if bits == 8 else kernel.int4
    return math.inf if tokens < 0 else tokens


def _buffer(size: int) -> Tensor:
    """Return `size` floats of the thread: new ones would cost a page fault per 4 KiB at a call."""
    buffer = getattr(_scratch, "buffer", None)
    if buffer is None or buffer.numel() < size:
        with torch.inference_mode(False):  # later calls may be outside of it
            buffer = _scratch.buffer = torch.empty(size, dtype=torch.float32)
    return buffer[:size]


def _check(
    x: Tensor, data: Tensor, rows: int, columns: int, bias: Tensor | None, scale: Tensor | None
) -> None:
    for name, tensor in (("x", x), ("bias", bias), ("scale", scale), ("data", data)):
        dtypes = (torch.uint8,) if name == "data" else (*FLOAT_TYPES,)
        if tensor is not None and (tensor.dtype not in dtypes or not tensor.is_cpu):
            raise RacError(f"{name}: {tensor.dtype} on {tensor.device}; use {dtypes} on the CPU")
    if x.dim() < 1 or x.shape[-1] != columns:
        raise RacError(f"x: shape {list(x.shape)} does not end in the weight's {columns} columns")
    if bias is not None and bias.shape != (rows,):
        raise RacError(f"bias: shape {list(bias.shape)} for a weight of {rows} rows")
    packed = data.is_contiguous()
    if scale is not None:
        packed &= scale.is_contiguous() and scale.dim() == 3 and scale.shape[1] > 0
        packed = packed and (scale.shape[0], scale.shape[2]) == (-(-rows // PANEL), PANEL)
        packed = packed and columns % scale.shape[1] == 0
    if not packed:
        raise RacError(
            f"scale {None if scale is None else list(scale.shape)} of a weight [{rows}, "
            f"{columns}]: pass what `pack_values` and `pack_scale` returned"
        )


def _packed_rows(
    ids: Tensor, data: Tensor, rows: int, columns: int, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    library, isa = library_and_isa()
    ordered, order = ids.flatten().sort()
    out = torch.empty(len(ordered), columns, dtype=dtype)
    if not len(ordered):
        return out.view(*ids.shape, columns)
    if int(ordered[0]) < 0 or int(ordered[-1]) >= rows:
        raise RacError(f"ids {int(ordered[0])} to {int(ordered[-1])}: the weight has {rows} rows")
    panels, counts = (ordered // PANEL).unique_consecutive(return_counts=True)
    expanded = torch.empty(columns, PANEL)
    starts = (counts.cumsum(0) - counts).tolist()
    for panel, start, count in zip(panels.tolist(), starts, counts.tolist(), strict=True):
        library.expand(data, rows, columns, panel, panel + 1, expanded, isa)
        if scale is not None:  # [groups, columns of a group, 16] times [groups, 1, 16]
            expanded.view(scale.shape[1], -1, PANEL).mul_(scale[panel].float()[:, None])
        positions = slice(start, start + count)
        out[order[positions]] = expanded[:, ordered[positions] % PANEL].t().to(dtype)
    return out.view(*ids.shape, columns)


# Once per process, also after a reload. Python serves `native_linear` until C++ does.
_LINEAR = "(Tensor x, Tensor data, int rows, int columns, Tensor? bias, Tensor? scale=None)"
_ROWS = "(Tensor ids, Tensor data, int rows, int columns, Tensor? scale, ScalarType dtype)"
for _name, _arguments, _key, _function, _fake in (
    ("sparse_linear", _LINEAR, "cpu", _forward,
     lambda x, data, rows, columns, bias, scale=None: x.new_empty(*x.shape[:-1], rows)),
    ("native_linear", _LINEAR, "CompositeExplicitAutograd", _forward,
     lambda x, data, rows, columns, bias, scale=None: x.new_empty(*x.shape[:-1], rows)),
    ("packed_rows", _ROWS, "cpu", _packed_rows,
     lambda ids, data, rows, columns, scale, dtype:
         data.new_empty(*ids.shape, columns, dtype=dtype)),
):  # fmt: skip
    if not hasattr(torch.ops.rac_modifier, _name):
        torch.library.define(f"rac_modifier::{_name}", f"{_arguments} -> Tensor")
        torch.library.impl(f"rac_modifier::{_name}", _key, _function)
        torch.library.register_fake(f"rac_modifier::{_name}", _fake)
