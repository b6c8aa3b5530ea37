"""The product on a GPU as an operator of torch, so that torch.compile keeps it whole and CUDA graphs capture its launches."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from rac_gpu import cusparselt, library
from rac_gpu.layout import ALL, TILE, Layout, fits, units_of
from rac_gpu.library import Device
from rac_gpu.programs import (
    Program,
    decode_program,
    expand_grid,
    expand_program,
    most_tokens,
    part_rows,
)
from rac_modifier.errors import RacError

SCRATCH_BYTES = 64 << 20  # of expanded rows at a time
_ALIGNMENT = 16  # bytes; what cp.async copies


def sparse_linear(
    x: Tensor,
    data: Tensor,
    layout: int,
    rows: int,
    columns: int,
    bias: Tensor | None = None,
    compressed: Tensor | None = None,
) -> Tensor:
    """X [..., columns] times the transposed weight, plus bias [rows]: [..., rows] in bfloat16, summed in fp32.

    `data`: what `layout.pack` returned, on x's device. `layout`: the number of its layout in `layout.ALL`. `compressed`: the copy
    for cuSPARSELt, which then multiplies more tokens than the kernels do.

    Raises:
        RacError: other dtypes or shapes, or a device without loaded kernels.
    """
    return torch.ops.rac_modifier.sparse_linear_gpu(
        x, data, layout, rows, columns, bias, compressed
    )


def _forward(
    x: Tensor,
    data: Tensor,
    number: int,
    rows: int,
    columns: int,
    bias: Tensor | None,
    compressed: Tensor | None = None,
) -> Tensor:
    layout = _check(x, data, number, rows, columns, bias, compressed)
    device = _device(x)
    flat = x.reshape(-1, columns).contiguous()
    if flat.data_ptr() % _ALIGNMENT:
        flat = flat.clone()
    if compressed is not None and len(flat) > most_tokens(layout):
        with _current(x):
            return cusparselt.product(flat, compressed, bias).view(*x.shape[:-1], rows)
    out = x.new_empty(flat.shape[0], rows)
    if flat.shape[0]:
        with _current(x):
            _fill(device, layout, flat, data, None if bias is None else bias.contiguous(), out)
    return out.view(*x.shape[:-1], rows)


def _fill(
    device: Device, layout: Layout, x: Tensor, data: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    (tokens, columns), rows = x.shape, out.shape[1]
    same_order = cusparselt.batch_invariant()
    if tokens <= most_tokens(layout) or same_order:
        program = decode_program(layout, rows, columns, tokens, device.processors, same_order)
        run_program(device, layout, program, x, data, bias, out)
        return
    module, stream, units = (
        library.module(device, layout),
        _stream(x),
        units_of(layout, data, columns),
    )
    program = expand_program(layout)
    step = part_rows(layout, rows, columns, tokens, device.processors, device.cache, SCRATCH_BYTES)
    dense = x.new_empty(min(step, rows), columns)
    for first in range(0, rows, step):
        part = dense[: min(step, rows - first)]
        grid = expand_grid(layout, len(part), columns)
        arguments = data.data_ptr(), 0, 0, part.data_ptr(), rows, columns, 0, units, first // TILE
        module.launch(program.name, grid, program.threads, stream, arguments)
        rows_here = slice(first, first + len(part))
        if bias is None:
            torch.mm(x, part.T, out=out[:, rows_here])
        else:
            torch.addmm(bias[rows_here], x, part.T, out=out[:, rows_here])


def run_program(
    device: Device,
    layout: Layout,
    program: Program,
    x: Tensor,
    data: Tensor,
    bias: Tensor | None,
    out: Tensor,
) -> None:
    """Launch one decode program: out [tokens, rows] of x [tokens, columns]. Nothing is checked; `sparse_linear` does that.

    Raises:
        RacError: the layout's kernels are not loaded on the device.
    """
    (tokens, columns), rows = x.shape, out.shape[1]
    pointers = data.data_ptr(), x.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr()
    arguments = (*pointers, rows, columns, tokens, units_of(layout, data, columns), 0)
    grid = program.grid(rows, tokens)
    library.module(device, layout).launch(
        program.name, grid, program.threads, _stream(x), arguments
    )


def _device(x: Tensor) -> Device:
    """The GPU of a tensor."""
    found = torch.cuda.get_device_properties(x.device)
    capability, processors = (found.major, found.minor), found.multi_processor_count
    return Device(x.device.index, capability, processors, found.L2_cache_size)


def _current(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of a tensor the current one, to which launches go."""
    return torch.cuda.device(x.device)


def _stream(x: Tensor) -> int:
    """The stream that torch uses for a tensor's device now; during a capture, the one that is captured."""
    return torch.cuda.current_stream(x.device).cuda_stream


def _check(
    x: Tensor,
    data: Tensor,
    number: int,
    rows: int,
    columns: int,
    bias: Tensor | None,
    compressed: Tensor | None,
) -> Layout:
    """The layout of this number, which the packed weight must fit."""
    if x.dtype != torch.bfloat16 or x.dim() < 1 or x.shape[-1] != columns:
        raise RacError(
            f"x: {x.dtype} {list(x.shape)}; the sparse GPU kernel takes bfloat16 with {columns} columns"
        )
    if columns % 8:
        raise RacError(
            f"a weight of {columns} columns: the GPU kernels need a multiple of 8; keep it dense"
        )
    if not 0 <= number < len(ALL):
        raise RacError(f"layout {number}: there are {len(ALL)}; pass what `pack` returned")
    layout = ALL[number]
    if not fits(layout, data, rows, columns) or data.data_ptr() % _ALIGNMENT:
        raise RacError(
            f"data: {data.dtype} {list(data.shape)} does not fit a weight [{rows}, {columns}] in the layout {layout.title}; "
            "pass what `pack` returned"
        )
    if bias is not None and (bias.dtype != torch.bfloat16 or bias.shape != (rows,)):
        raise RacError(
            f"bias: {bias.dtype} {list(bias.shape)}; the weight's {rows} rows need bfloat16 [{rows}]"
        )
    if (
        any(other is not None and other.device != x.device for other in (data, bias, compressed))
        or not data.is_contiguous()
    ):
        raise RacError(
            f"x is on {x.device}; the weight and the bias must be there too, and contiguous"
        )
    if compressed is not None and (
        compressed.dtype != torch.bfloat16 or 2 * compressed.numel() < rows * columns
    ):
        raise RacError(
            f"compressed: {compressed.dtype} {list(compressed.shape)} is no copy of a weight [{rows}, {columns}] for cuSPARSELt; "
            "pass what `cusparselt.compress` returned"
        )
    return layout


def _fake(
    x: Tensor,
    data: Tensor,
    number: int,
    rows: int,
    columns: int,
    bias: Tensor | None,
    compressed: Tensor | None = None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


if not hasattr(
    torch.ops.rac_modifier, "sparse_linear_gpu"
):  # once per process, also if this module is loaded again
    torch.library.define(
        "rac_modifier::sparse_linear_gpu",
        "(Tensor x, Tensor data, int layout, int rows, int columns, Tensor? bias, Tensor? compressed=None) -> Tensor",
    )
    torch.library.impl("rac_modifier::sparse_linear_gpu", "cuda", _forward)
    torch.library.register_fake("rac_modifier::sparse_linear_gpu", _fake)
