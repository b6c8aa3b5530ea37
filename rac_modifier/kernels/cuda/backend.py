"""The three functions of the GPU backend: whether a layer runs on its kernels, packing, and the product.

The kernels were compiled and emulated, but never run on a GPU. They are used only where RAC_GPU_KERNELS asks for them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from rac_modifier.checkpoint.stored_weight import StoredWeight
from rac_modifier.errors import RacError
from rac_modifier.kernels.cuda import cusparselt, library, operator, prompts
from rac_modifier.kernels.cuda import layout as layouts
from rac_modifier.kernels.cuda.cards import Card, reported_card
from rac_modifier.kernels.cuda.predict import over_dense
from rac_modifier.kernels.cuda.unstructured import MOST_COLUMNS
from rac_modifier.kernels.interface import Decision, Layer

VARIABLE = "RAC_GPU_KERNELS"
CHOICES = ("on", "all", "off")
NOT_REQUESTED = f"the GPU kernels have been checked in an emulator but never run on a GPU; {VARIABLE}=on uses them all the same"
DATA = "weight_packed"  # vLLM's LoRA looks for this name
PROMPTS = "weight_for_prompts"  # of a layer whose prompts go through cuSPARSELt
LAYOUT = "weight_packed_layout"  # [0, number of the layout]: numbers in a shape are read without waiting for the GPU
_LEAST_CAPABILITY = (8, 0)
_LEAST_CEILING = 1.1  # below this, a kernel would have to be perfect to gain anything


def requested() -> bool:
    """Whether the environment asks for the GPU kernels.

    Raises:
        RacError: it asks for something else, or for cuSPARSELt where that has no effect.
    """
    kernels = _wanted() != "off"
    cusparselt.requested(kernels)
    return kernels


def _wanted() -> str:
    """`on`: kernels where they are predicted to be faster than dense bfloat16, or are not predicted. `all`: all that exist."""
    wanted = os.environ.get(VARIABLE) or "off"
    if wanted not in CHOICES:
        raise RacError(
            f'{VARIABLE}="{wanted}": use on, all or off, or unset it; off is the default'
        )
    return wanted


def can_run(layer: Layer) -> Decision:
    """Sparse where it is asked for, the weight is bfloat16, int8, fp8 or int4, and the kernels compile and load.

    Where the card is in the table of `cards`, a layer that is predicted to be faster dense stays dense, unless all kernels are
    asked for. Where cuSPARSELt is asked for, the first 2:4 layer of a layout and shape times it here.

    Raises:
        RacError: RAC_GPU_KERNELS or RAC_GPU_PROMPTS ask for something else or have no effect, or cuSPARSELt does not work here.
    """
    dense_bytes = float(layer.served.itemsize)
    layout, problem = _plan(layer)
    size = dense_bytes if layout is None else bytes_per_weight(layer, layout)
    by_cusparselt = cusparselt.requested(requested())
    if problem is not None:
        no_effect = (
            f"; {cusparselt.VARIABLE}=cusparselt has no effect on it" if by_cusparselt else ""
        )
        return Decision(False, "dense", f"dense because {problem}{no_effect}", size, dense_bytes)
    assert layout is not None
    kernel = f"sparse GPU kernel {layout.title}"
    about = "about " if layout.any_pattern else ""
    reason = f"{kernel}, not yet measured on hardware: {about}{size:.2f} bytes per weight instead of {dense_bytes:.0f}"
    device = library.current_device()
    card = None if device is None else reported_card(device.reported, device.processors)
    if card is not None:
        reason += f"; {over_dense(card, layout, layer.rows, layer.columns, layer.density)[1]}"
    if by_cusparselt and device is not None:
        chosen = _prompts(device, layout, layer.rows, layer.columns)
        kernel, reason = kernel + chosen.kernel, f"{reason}; {chosen.reason}"
    return Decision(True, kernel, reason, size, dense_bytes)


def pack(weight: StoredWeight, served: torch.dtype) -> dict[str, Tensor]:
    """`weight_packed` in the kernels' layout (csrc/gpu/), and `weight_packed_layout`, which tells it, on the current GPU.

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
        cusparselt.requested(requested())
        and _prompts(device, layout, weight.rows, weight.columns).by_cusparselt
    ):
        parts[PROMPTS] = cusparselt.compress(
            weight.dequantized(torch.bfloat16), torch_device(device)
        )
    return parts


def _prompts(
    device: library.Device, layout: layouts.Layout, rows: int, columns: int
) -> prompts.PromptChoice:
    """What multiplies prompts where cuSPARSELt is asked for."""
    if layout.any_pattern:
        return prompts.NOT_2_OF_4
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
        exist = "bfloat16, and int8, float8_e4m3fn and int4 with one scale per row or in groups of a multiple of 64"
        return None, f"there is no GPU kernel for {name}{groups}; those that exist take {exist}"
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


def slower(layer: Layer, layout: layouts.Layout, card: Card) -> str | None:
    """Why the layer stays dense on a card: it is predicted to be faster so, in the memory that this takes."""
    gain, times = over_dense(card, layout, layer.rows, layer.columns, layer.density)
    if gain >= 1.0:
        return None
    packed = bytes_per_weight(layer, layout)
    return f"it is {times}; dense it takes {layer.served.itemsize} bytes per weight, packed {packed:.2f}: {VARIABLE}=all packs it"


def _plan(layer: Layer) -> tuple[layouts.Layout | None, str | None]:
    """The layout, and why the layer stays dense; numbers first, the device last."""
    if not requested():
        return _layout_of(layer), NOT_REQUESTED
    layout, problem = fit(layer)
    if layout is None or problem is not None:
        return layout, problem
    device = library.current_device()
    if device is None:
        return layout, "torch finds no CUDA device"
    if device.capability < _LEAST_CAPABILITY:
        return (
            layout,
            f"{device.architecture} has no cp.async and no mma.sp; sm_80 is the first that has",
        )
    card = reported_card(device.reported, device.processors)
    if (
        card is not None
        and _wanted() != "all"
        and (problem := slower(layer, layout, card)) is not None
    ):
        return layout, problem
    return layout, library.prepare(device, layout)
