"""The three functions of the GPU backend, `can_run`, `pack` and `linear`, and the operator of torch behind `linear`.

The kernels were compiled and emulated, but never run on a GPU. Installing this package asks for them. An operator, so
that torch.compile keeps the product whole and CUDA graphs capture its launches.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from rac_gpu import layout, library
from rac_gpu.library import Device
from rac_gpu.programs import EXPAND, MOST_TOKENS, Program, decode_program, expand_grid
from rac_modifier.errors import RacError
from rac_modifier.formats.encoding import Encoding
from rac_modifier.formats.stored_weight import StoredWeight
from rac_modifier.kernels.interface import Decision, Layer

DATA = "weight_packed"  # vLLM's LoRA looks for this name
GROUP = "weight_packed_group"  # [0, group]: a number in a shape is read without waiting for the GPU
_SCRATCH_BYTES = 64 << 20  # of expanded rows at a time
_LEAST_CAPABILITY = (8, 0)
_ALIGNMENT = 16  # bytes; what cp.async copies


def can_run(layer: Layer) -> Decision:
    """Decide sparse where the layout holds the weight and its kernels compile and load."""
    dense_bytes = float(layer.served.itemsize)
    problem, group = _problem(layer), layout.group_of(layer.group, layer.columns)
    if problem is not None or group is None:
        return Decision(False, "dense", f"dense because {problem}", dense_bytes, dense_bytes)
    size = layout.packed_bytes(layer.rows, layer.columns, group) / (layer.rows * layer.columns)
    reason = f"never run on a GPU: {size:.2f} bytes per weight instead of {dense_bytes:.0f}"
    kernel = "sparse GPU kernel 2:4 int4"
    return Decision(True, kernel, f"{kernel}, {reason}", size, dense_bytes)


def _problem(layer: Layer) -> str | None:
    """Return why no kernel runs the layer on the current GPU."""
    group = layout.group_of(layer.group, layer.columns)
    if layer.served != torch.bfloat16:
        return f"it is served in {layer.served}; the GPU kernel multiplies bfloat16"
    int4 = replace(layer.encoding, group_size=None) == Encoding("int", 4)
    if not (int4 and layer.two_of_four and layer.group_bytes == 2 and group is not None):
        return (
            "the GPU kernel takes 2:4 weights of symmetric int4, with scales of bfloat16, one per row or in groups of a "
            "multiple of 64"
        )
    if layer.columns % 8:
        return f"its {layer.columns} columns are no multiple of 8, so rows of x do not start at 16 bytes"
    device = library.current_device()
    if device is None:
        return "torch finds no CUDA device"
    if device.capability < _LEAST_CAPABILITY:
        return f"{device.architecture} has no cp.async and no mma.sp; sm_80 is the first that has"
    return library.prepare(device, group)


def pack(weight: StoredWeight, served: torch.dtype) -> dict[str, Tensor]:
    """Pack a weight that `can_run` on the current GPU, and the group of its kernels, as `linear` reads them.

    Raises:
        RacError: a weight that the layout does not hold, or no kernels for it here.
    """
    group, device = layout.group_of(weight.group, weight.columns), library.current_device()
    if group is None or served != torch.bfloat16 or device is None:
        raise RacError(
            f"{weight.name}: groups of {weight.group} served in {served} have no GPU kernel here; keep it dense"
        )
    problem = library.prepare(device, group)
    if problem is not None:
        raise RacError(f"{weight.name}: {problem}")
    there = layout.pack(weight, group).to(_torch_device(device))
    return {DATA: there, GROUP: there.new_empty(0, group)}


def _torch_device(device: Device) -> torch.device:
    return torch.device("cuda", device.index)


def linear(
    x: Tensor, packed: Mapping[str, Tensor], rows: int, columns: int, bias: Tensor | None = None
) -> Tensor:
    """Multiply x [..., columns] by the transposed weight, plus bias [rows]: bfloat16 [..., rows], summed in fp32.

    Raises:
        RacError: other dtypes, or shapes that do not fit the packed weight.
    """
    return torch.ops.rac_modifier.sparse_linear_gpu(
        x, packed[DATA], packed[GROUP].shape[1], rows, columns, bias
    )


def _forward(
    x: Tensor, data: Tensor, group: int, rows: int, columns: int, bias: Tensor | None
) -> Tensor:
    _check(x, data, group, rows, columns, bias)
    flat = x.reshape(-1, columns).contiguous()
    flat = flat.clone() if flat.data_ptr() % _ALIGNMENT else flat
    out = x.new_empty(flat.shape[0], rows)
    if not flat.shape[0]:
        return out.view(*x.shape[:-1], rows)
    device = Device.of(x.device)
    same_order = os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0")
    with torch.cuda.device(x.device):
        if len(flat) <= MOST_TOKENS or same_order:
            program = decode_program(group, rows, columns, len(flat), device.processors, same_order)
            run_program(device, program, flat, data, bias, out)
        else:
            _expand_and_multiply(device, group, flat, data, bias, out)
    return out.view(*x.shape[:-1], rows)


def run_program(
    device: Device, program: Program, x: Tensor, data: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """Launch one program: out [tokens, rows] of x [tokens, columns]. Nothing is checked; `linear` does that."""
    (tokens, columns), rows = x.shape, out.shape[1]
    bias = None if bias is None else bias.contiguous()
    pointers = data.data_ptr(), x.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr()
    arguments = (*pointers, rows, columns, tokens, layout.units(columns), 0)
    stream = torch.cuda.current_stream(x.device).cuda_stream
    kernels = library.module(device, program.group)
    kernels.launch(program.name, program.grid(rows, tokens), program.threads, stream, arguments)


def _expand_and_multiply(
    device: Device, group: int, x: Tensor, data: Tensor, bias: Tensor | None, out: Tensor
) -> None:
    """Write dense rows into scratch memory, and let torch multiply them."""
    columns, rows = x.shape[1], out.shape[1]
    step = max(layout.TILE, _SCRATCH_BYTES // (2 * columns) // layout.TILE * layout.TILE)
    dense = x.new_empty(min(step, rows), columns)
    kernels, stream = library.module(device, group), torch.cuda.current_stream(x.device).cuda_stream
    for first in range(0, rows, step):
        part = dense[: min(step, rows - first)]
        pointers, units = (data.data_ptr(), 0, 0, part.data_ptr()), layout.units(columns)
        arguments = (*pointers, rows, columns, 0, units, first // layout.TILE)
        kernels.launch(EXPAND, expand_grid(len(part), columns), 128, stream, arguments)
        here = slice(first, first + len(part))
        if bias is None:
            torch.mm(x, part.T, out=out[:, here])
        else:
            torch.addmm(bias[here], x, part.T, out=out[:, here])


def _check(
    x: Tensor, data: Tensor, group: int, rows: int, columns: int, bias: Tensor | None
) -> None:
    """Refuse what a kernel would read out of range."""
    if x.dtype != torch.bfloat16 or x.dim() < 1 or x.shape[-1] != columns or columns % 8:
        raise RacError(
            f"x: {x.dtype} {list(x.shape)}; the sparse GPU kernel takes bfloat16 with the weight's {columns} columns, a "
            "multiple of 8"
        )
    nbytes = layout.packed_bytes(rows, columns, group) if group in layout.GROUPS else None
    if data.dtype != torch.uint8 or data.shape != (nbytes,) or data.data_ptr() % _ALIGNMENT:
        raise RacError(
            f"data: {data.dtype} {list(data.shape)} does not fit a weight [{rows}, {columns}] with groups of {group}; pass "
            "what `pack` returned"
        )
    if bias is not None and (bias.dtype != torch.bfloat16 or bias.shape != (rows,)):
        raise RacError(
            f"bias: {bias.dtype} {list(bias.shape)}; the weight's {rows} rows need bfloat16 [{rows}]"
        )
    others = [data] if bias is None else [data, bias]
    if any(other.device != x.device for other in others) or not data.is_contiguous():
        raise RacError(
            f"x is on {x.device}; the weight and the bias must be there too, and contiguous"
        )


def _fake(
    x: Tensor, data: Tensor, group: int, rows: int, columns: int, bias: Tensor | None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows)


if not hasattr(torch.ops.rac_modifier, "sparse_linear_gpu"):  # once per process
    torch.library.define(
        "rac_modifier::sparse_linear_gpu",
        "(Tensor x, Tensor data, int group, int rows, int columns, Tensor? bias) -> Tensor",
    )
    torch.library.impl("rac_modifier::sparse_linear_gpu", "cuda", _forward)
    torch.library.register_fake("rac_modifier::sparse_linear_gpu", _fake)
