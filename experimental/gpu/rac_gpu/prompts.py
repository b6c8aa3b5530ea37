"""What multiplies prompts with a 2:4 weight: cuSPARSELt with its copy of the weight, or expanding and a dense product.

Both are timed on the device while weights load, once per layout and shape, so that all layers of a shape run alike.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rac_gpu import cusparselt, operator
from rac_gpu.layout import ALL, TILE, Layout, pack
from rac_gpu.library import Device
from rac_modifier.errors import RacError
from rac_modifier.formats.stored_weight import StoredWeight, from_dense

TOKENS = 2048  # of the prompt that is timed
_ROUNDS = 7
_DIFFERENCE = (
    2.0**-3
)  # of two products, in their standard deviation; rounding to bfloat16 makes at most a third of it


@dataclass(frozen=True)
class PromptChoice:
    """`by_cusparselt`: whether layers keep the copy. `kernel` is added to the kernel's name, and `reason` to the reason."""

    by_cusparselt: bool
    kernel: str
    reason: str


_chosen: dict[tuple[int, Layout, int, int], PromptChoice] = {}


def choose(
    device: Device, place: torch.device, layout: Layout, rows: int, columns: int
) -> PromptChoice:
    """The faster of both for a weight [rows, columns] in a 2:4 layout, whose kernels are loaded; `place`: the device for torch.

    Raises:
        RacError: cuSPARSELt does not work here, its product is another one, or too little memory.
    """
    key = device.index, layout, rows, columns
    if key not in _chosen:
        problem = cusparselt.problem(rows, columns)
        if problem is not None:
            _chosen[key] = PromptChoice(
                False, ", prompts expanded", f"prompts are expanded: {problem}"
            )
            return _chosen[key]
        try:
            _chosen[key] = _faster(place, layout, rows, columns)
        except torch.OutOfMemoryError as error:
            raise RacError(
                f"timing a prompt of {TOKENS} tokens times a weight [{rows}, {columns}] does not fit into the GPU's memory; "
                f"unset {cusparselt.VARIABLE}"
            ) from error
    return _chosen[key]


def forget() -> None:
    """Choose anew. For tests."""
    _chosen.clear()


def _faster(place: torch.device, layout: Layout, rows: int, columns: int) -> PromptChoice:
    """By a weight of random values; what it takes is freed at the end, also the copy for cuSPARSELt."""
    sample, tiles = _sample(layout, columns), rows // TILE
    data = _repeated(pack(sample, layout).to(place), layout, tiles, columns)
    compressed = cusparselt.compress(
        sample.dequantized(torch.bfloat16).to(place).repeat(tiles, 1), place
    )
    x = (
        torch.randn(TOKENS, columns, generator=torch.Generator().manual_seed(0))
        .bfloat16()
        .to(place)
    )

    def run(copy: Tensor | None) -> Tensor:
        return operator.sparse_linear(x, data, ALL.index(layout), rows, columns, None, copy)

    _check_alike(run(None), run(compressed), rows, columns)
    expanded, sparse = _microseconds([lambda: run(None), lambda: run(compressed)])
    each = compressed.nbytes / (rows * columns)
    times = f"{sparse:.0f} us by cuSPARSELt and {expanded:.0f} us expanded"
    measured = f"a prompt of {TOKENS} tokens was measured here, {times}"
    if sparse < expanded:
        size = f"a copy of {each:.2f} bytes per weight"
        kept = f"{size}, {compressed.nbytes / 2**20:.1f} MB, is kept for it"
        return PromptChoice(True, f", prompts by cuSPARSELt ({size})", f"{measured}; {kept}")
    return PromptChoice(False, ", prompts expanded", f"{measured}; no copy is kept")


def _check_alike(expanded: Tensor, sparse: Tensor, rows: int, columns: int) -> None:
    difference = (expanded.float() - sparse.float()).abs().max() / expanded.float().std()
    if not float(difference) <= _DIFFERENCE:
        raise RacError(
            f"cuSPARSELt's product of a weight [{rows}, {columns}] is another one, by {float(difference):.3g} of its standard "
            f"deviation; unset {cusparselt.VARIABLE}, and report this"
        )


def _sample(layout: Layout, columns: int) -> StoredWeight:
    """A tile of random values that the layout holds, two of each four columns stored."""
    generator = torch.Generator().manual_seed(0)
    kept = (torch.rand(TILE, columns // 4, 4, generator=generator).argsort(dim=-1) < 2).view(
        TILE, columns
    )
    values = torch.randn(TILE, columns, generator=generator).masked_fill(
        ~kept, 0.0
    )  # no -0.0, which would be stored
    if layout.bits == 16:
        return from_dense(values.bfloat16(), "sample")
    if layout.e4m3:
        values = values.to(torch.float8_e4m3fn)
    else:
        top = 1 << layout.bits - 1
        values = (values * top / 3).round().clamp(-top, top - 1).to(torch.int8)
    return replace(
        from_dense(values, "sample"), scale=torch.full((TILE, 1), 2.0**-6), bits=layout.bits
    )


def _repeated(packed: Tensor, layout: Layout, tiles: int, columns: int) -> Tensor:
    """The packed form of a weight that has a tile so many times."""
    data, size = packed.view(torch.uint8), layout.units(columns) * layout.unit_bytes
    return torch.cat([data[:size].repeat(tiles), data[size:].repeat(tiles)]).view(layout.dtype)


def _microseconds(runs: Sequence[Callable[[], object]]) -> list[float]:
    """Medians over rounds in which the runs take turns."""
    found: list[list[float]] = [[] for _ in runs]
    for _ in range(_ROUNDS):
        for each, run in zip(found, runs, strict=True):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            end.synchronize()
            each.append(1000 * start.elapsed_time(end))
    return [statistics.median(each) for each in found]
