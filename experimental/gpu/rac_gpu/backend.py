"""The three functions of the GPU backend: `can_run`, `pack` and `linear`.

The kernels were compiled and emulated, but never run on a GPU. Installing this package asks for them.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from rac_gpu import cusparselt, library, operator, prompts
from rac_gpu import layout as layouts
from rac_gpu.unstructured import MOST_COLUMNS
from rac_modifier.errors import RacError
from rac_modifier.formats.stored_weight import StoredWeight
from rac_modifier.kernels.interface import Decision, Layer

DATA = "weight_packed"  # vLLM's LoRA looks for this name
PROMPTS = "weight_for_prompts"  # of a layer whose prompts go through cuSPARSELt
# [0, number of the layout]: a number in a shape is read without waiting for the GPU
LAYOUT = "weight_packed_layout"
_LEAST_CAPABILITY = (8, 0)
_LEAST_CEILING = 1.1  # below this, a kernel would have to be perfect to gain anything
_SUPPORTED = (
    "bfloat16, and int8, float8_e4m3fn and int4 with one scale per row or in groups of a "
    "multiple of 64"
)


def can_run(layer: Layer) -> Decision:
    """Decide sparse where a layout holds the weight and its kernels compile and load.

    With RAC_GPU_PROMPTS=cusparselt, the first 2:4 layer of a layout and shape times cuSPARSELt.

    Raises:
        RacError: RAC_GPU_PROMPTS has another value, or cuSPARSELt does not work on this machine.
    """
    dense_bytes = float(layer.served.itemsize)
    layout, problem = fit(layer)
    size = dense_bytes if layout is None else bytes_per_weight(layer, layout)
    if problem is None:
        assert layout is not None
        problem = _device_problem(layout)
    if problem is not None:
        return Decision(False, "dense", f"dense because {problem}", size, dense_bytes)
    assert layout is not None
    kernel = f"sparse GPU kernel {layout.title}"
    about = "about " if layout.any_pattern else ""
    reason = (
        f"{kernel}, never run on a GPU: {about}{size:.2f} bytes per weight instead of "
        f"{dense_bytes:.0f}"
    )
    device = library.current_device()
    if device is not None and cusparselt.requested() and not layout.any_pattern:
        chosen = _prompts(device, layout, layer.rows, layer.columns)
        kernel, reason = kernel + chosen.kernel, f"{reason}; {chosen.reason}"
    return Decision(True, kernel, reason, size, dense_bytes)


def pack(weight: StoredWeight, served: torch.dtype) -> dict[str, Tensor]:
    """`weight_packed` in the kernels' layout (rac_gpu/source/), and `weight_packed_layout`, which tells it, on the current GPU.

    `weight_for_prompts` too, in cuSPARSELt's layout, where that is asked for and faster.

    Raises:
        RacError: a weight that no layout holds, no kernels for it here, or too little memory.
    """
    bits = torch.int32 if weight.bits == 4 else weight.values.dtype
    layout = layouts.layout_of(
        bits, weight.group, weight.columns, weight.two_of_four, weight.group_bytes
    )
    device = library.current_device()
    if layout is None or served != torch.bfloat16 or device is None:
        raise RacError(
            f"{weight.name}: {weight.values.dtype} served in {served} has no GPU kernel here; keep it dense"
        )
    problem = library.prepare(device, layout)
    if problem is not None:
        raise RacError(f"{weight.name}: {problem}")
    packed = layouts.pack(weight, layout)
    try:
        there = packed.to(torch_device(device))
    except torch.OutOfMemoryError as error:
        raise RacError(
            f"{weight.name}: {packed.nbytes >> 20} MB do not fit into the GPU's memory beside what is there; use more GPUs "
            "(--tensor-parallel-size) or a larger one"
        ) from error
    parts = {DATA: there, LAYOUT: there.new_empty(0, layouts.ALL.index(layout), dtype=torch.uint8)}
    if (
        cusparselt.requested()
        and not layout.any_pattern
        and _prompts(device, layout, weight.rows, weight.columns).by_cusparselt
    ):
        parts[PROMPTS] = cusparselt.compress(
            weight.dequantized(torch.bfloat16), torch_device(device)
        )
    return parts


def _prompts(
    device: library.Device, layout: layouts.Layout, rows: int, columns: int
) -> prompts.PromptChoice:
    """Choose what multiplies prompts of a 2:4 weight."""
    return prompts.choose(device, torch_device(device), layout, rows, columns)


def linear(
    x: Tensor, packed: Mapping[str, Tensor], rows: int, columns: int, bias: Tensor | None = None
) -> Tensor:
    """X [..., columns] times the transposed weight, plus bias [rows]: [..., rows] in bfloat16, summed in fp32.

    Raises:
        RacError: other dtypes, or shapes that do not fit the packed weight.
    """
    return operator.sparse_linear(
        x, packed[DATA], packed[LAYOUT].shape[1], rows, columns, bias, packed.get(PROMPTS)
    )


def torch_device(device: library.Device) -> torch.device:
    """The device as torch names it."""
    return torch.device("cuda", device.index)


def bytes_per_weight(layer: Layer, layout: layouts.Layout) -> float:
    """Of the packed layer, padding included; an expectation where it has any pattern."""
    return layout.nbytes(layer.rows, layer.columns, layer.density) / (layer.rows * layer.columns)


def _layout_of(layer: Layer) -> layouts.Layout | None:
    scale_bytes = layer.group_bytes - layer.zero_points
    return layouts.layout_of(
        layer.stored, layer.group, layer.columns, layer.two_of_four, scale_bytes
    )


def fit(layer: Layer) -> tuple[layouts.Layout | None, str | None]:
    """The layout, and why no GPU runs the layer on a kernel; from numbers alone."""
    layout = _layout_of(layer)
    if layer.word_bits != 4:
        layout = None
    if layer.served != torch.bfloat16:
        return layout, f"it is served in {layer.served}; the GPU kernels multiply bfloat16"
    if layer.zero_points:
        return None, "its values have zero points; the GPU kernels take symmetric int4 and int8"
    if layout is None:
        name = (
            f"int{layer.word_bits}"
            if layer.stored == torch.int32
            else str(layer.stored).removeprefix("torch.")
        )
        groups = f" in groups of {layer.group}" if layer.group != layer.columns else ""
        return None, f"there is no GPU kernel for {name}{groups}; the kernels take {_SUPPORTED}"
    if layer.columns % 8:
        return (
            layout,
            f"its {layer.columns} columns are no multiple of 8, so rows of x do not start at 16 bytes",
        )
    size, dense_bytes = bytes_per_weight(layer, layout), layer.served.itemsize
    if layout.any_pattern and layer.columns > MOST_COLUMNS:
        return (
            layout,
            f"its {layer.columns} columns are more than the {MOST_COLUMNS} of the GPU kernel for any pattern",
        )
    if layout.any_pattern and (gain := dense_bytes / size) < _LEAST_CEILING:
        return layout, (
            f"packed it takes about {size:.2f} bytes per weight instead of {dense_bytes}: at most {gain:.2f}x faster"
        )
    return layout, None


def _device_problem(layout: layouts.Layout) -> str | None:
    """Prepare the kernels of a layout on the current GPU; return why that is impossible."""
    device = library.current_device()
    if device is None:
        return "torch finds no CUDA device"
    if device.capability < _LEAST_CAPABILITY:
        return f"{device.architecture} has no cp.async and no mma.sp; sm_80 is the first that has"
    return library.prepare(device, layout)
