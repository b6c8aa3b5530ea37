"""Dense and 2:4 weights on the kernels that a GPU's user has already: those of torch, and vLLM's Marlin where vLLM is installed.

A contender that this GPU or environment does not have says so with `NotHereError`, and the others are measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

GROUP = 128  # columns that share a scale of int4
E4M3_MAX = 448.0
Parts = dict[str, Tensor]


class NotHereError(Exception):
    """Why a contender cannot run."""


@dataclass(frozen=True)
class Contender:
    """A kernel that is not ours.

    Attributes:
        parts: of a weight [rows, columns], what the kernel reads.
        given: of activations x [tokens, columns], what the kernel reads; not timed.
        run: the product [tokens, rows] in bfloat16.
        exact: [rows, columns] float64, the weight that the parts stand for; for 2:4 with zeros in it.
        read: of what is given, the activations that they stand for.
    """

    parts: Callable[[Tensor], Parts]
    run: Callable[[Any, Parts], Tensor]
    exact: Callable[[Tensor, Parts], Tensor]
    given: Callable[[Tensor], Any] = lambda x: x
    read: Callable[[Any], Tensor] = lambda x: x


def _to_e4m3(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in float8 and their scales [rows, 1]."""
    scale = x.float().abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / E4M3_MAX
    return (x.float() / scale).to(torch.float8_e4m3fn), scale


def _fp8_parts(weight: Tensor) -> Parts:
    values, scale = _to_e4m3(weight)
    return {"values": values, "scale": scale}


def _fp8(x: tuple[Tensor, Tensor], parts: Parts) -> Tensor:
    """As FP8_DYNAMIC is served, by cuBLASLt or CUTLASS; the rounding of activations is not timed, which favours it."""
    return torch._scaled_mm(
        x[0], parts["values"].t(), scale_a=x[1], scale_b=parts["scale"].t(), out_dtype=torch.bfloat16
    )


def _marlin() -> tuple[Any, Any, Any]:
    """vLLM's writer of Marlin's layout, its product, and the type of the codes."""
    try:
        from vllm.model_executor.layers.quantization.utils.marlin_utils import apply_gptq_marlin_linear
        from vllm.model_executor.layers.quantization.utils.marlin_utils_test import marlin_quantize
        from vllm.scalar_type import scalar_types
    except ImportError as error:
        raise NotHereError(f"vLLM has no Marlin here ({error})") from error
    return marlin_quantize, apply_gptq_marlin_linear, scalar_types.uint4b8


def _int4_parts(weight: Tensor) -> Parts:
    write, _, kind = _marlin()
    exact, values, scale = write(weight.t().contiguous(), kind, GROUP)
    empty = torch.empty(0, dtype=torch.int32, device=weight.device)
    return {"values": values, "scale": scale, "none": empty, "exact": exact.t()}


def _int4(x: Tensor, parts: Parts) -> Tensor:
    _, product, kind = _marlin()
    columns, rows = x.shape[1], parts["scale"].shape[1]
    return product(x, parts["values"], parts["scale"], parts["none"], None, kind, rows, columns)


def _sparse_parts(weight: Tensor) -> Parts:
    """2:4, the larger two of four kept, in the layout of cuSPARSELt."""
    grouped = weight.reshape(-1, 4)
    kept = torch.zeros_like(grouped, dtype=torch.bool).scatter_(1, grouped.abs().topk(2, dim=1).indices, True)
    pruned = (grouped * kept).reshape(weight.shape)
    return {"sparse": torch.sparse.to_sparse_semi_structured(pruned), "exact": pruned}


CONTENDERS = {
    "dense fp8": Contender(
        _fp8_parts,
        _fp8,
        lambda weight, parts: parts["values"].double() * parts["scale"].double(),
        _to_e4m3,
        lambda x: x[0].double() * x[1].double(),
    ),
    "dense int4": Contender(_int4_parts, _int4, lambda weight, parts: parts["exact"].double()),
    "2:4 by cuSPARSELt": Contender(
        _sparse_parts,
        lambda x, parts: torch.nn.functional.linear(x, parts["sparse"]),
        lambda weight, parts: parts["exact"].double(),
    ),
}


def prepared(name: str, weight: Tensor, copies: int) -> list[Parts]:
    """The parts of so many copies of a weight [rows, columns], when one product of it is right.

    Raises:
        NotHereError: this GPU or environment lacks it, or its product is wrong.
    """
    contender = CONTENDERS[name]
    x = contender.given(torch.randn(8, weight.shape[1], device=weight.device).bfloat16())
    try:
        parts = contender.parts(weight)
        found = contender.run(x, parts).double()
    except (RuntimeError, NotImplementedError, ValueError, AttributeError, TypeError) as error:
        raise NotHereError(str(error).splitlines()[0]) from error
    activations, exact = contender.read(x).double(), contender.exact(weight, parts)
    bound = 2.0**-7 * (activations @ exact.T).abs() + 2.0**-9 * (activations.abs() @ exact.abs().T)
    if not bool(((found - activations @ exact.T).abs() <= bound).all()):
        raise NotHereError("its product is wrong")
    parts.pop("exact", None)
    return [{key: part.clone() for key, part in parts.items()} for _ in range(copies)]
