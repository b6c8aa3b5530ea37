"""Dense and 2:4 weights on the kernels that a GPU's user has already: those of torch, and where vLLM is installed its Marlin,
Machete and CUTLASS.

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
        x[0],
        parts["values"].t(),
        scale_a=x[1],
        scale_b=parts["scale"].t(),
        out_dtype=torch.bfloat16,
    )


def _marlin() -> tuple[Any, Any, Any]:
    """vLLM's writer of Marlin's layout, its product, and the type of the codes."""
    try:
        from vllm.model_executor.layers.quantization.utils.marlin_utils import (
            apply_gptq_marlin_linear,
        )
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


def _cutlass_fp8(x: tuple[Tensor, Tensor], parts: Parts) -> Tensor:
    """vLLM's own FP8 product, which its FP8 layers use where there is no other."""
    try:
        from vllm import _custom_ops as ops
    except ImportError as error:
        raise NotHereError(f"vLLM is not here ({error})") from error
    return ops.cutlass_scaled_mm(
        x[0], parts["values"].t(), x[1], parts["scale"].t(), torch.bfloat16
    )


def _machete() -> tuple[Any, Any, Any, Any]:
    """vLLM's operators, its rounding to groups, its packing into words, and the type of the codes."""
    try:
        from vllm import _custom_ops as ops
        from vllm.model_executor.layers.quantization.utils.quant_utils import (
            pack_rows,
            quantize_weights,
        )
        from vllm.scalar_type import scalar_types
    except ImportError as error:
        raise NotHereError(f"vLLM has no Machete here ({error})") from error
    return ops, quantize_weights, pack_rows, scalar_types.uint4b8


def machete_words(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The rounded weight [rows, columns], its words [columns / 8, rows] as Machete's writer takes them, and the scales."""
    _, round_groups, pack_rows, kind = _machete()
    exact, codes, scale, _ = round_groups(weight.t().contiguous(), kind, GROUP)
    words = pack_rows(codes, 4, *codes.shape).t().contiguous().t()  # columns after columns
    return exact.t(), words, scale.contiguous()


def _machete_parts(weight: Tensor) -> Parts:
    ops, _, _, kind = _machete()
    exact, words, scale = machete_words(weight)
    return {
        "values": ops.machete_prepack_B(words, weight.dtype, kind, weight.dtype),
        "scale": scale,
        "exact": exact,
    }


def _machete_int4(x: Tensor, parts: Parts) -> Tensor:
    ops, _, _, kind = _machete()
    return ops.machete_mm(
        a=x,
        b_q=parts["values"],
        b_type=kind,
        b_group_scales=parts["scale"],
        b_group_zeros=None,
        b_group_size=GROUP,
    )


def _sparse_parts(weight: Tensor) -> Parts:
    """2:4, the larger two of four kept, in the layout of cuSPARSELt."""
    grouped = weight.reshape(-1, 4)
    kept = torch.zeros_like(grouped, dtype=torch.bool).scatter_(
        1, grouped.abs().topk(2, dim=1).indices, True
    )
    pruned = (grouped * kept).reshape(weight.shape)
    return {"sparse": torch.sparse.to_sparse_semi_structured(pruned), "exact": pruned}


def _dense_fp8(product: Callable[[Any, Parts], Tensor]) -> Contender:
    """FP8 weights and activations, by this product."""
    return Contender(
        _fp8_parts,
        product,
        lambda weight, parts: parts["values"].double() * parts["scale"].double(),
        _to_e4m3,
        lambda x: x[0].double() * x[1].double(),
    )


CONTENDERS = {
    "dense fp8": _dense_fp8(_fp8),
    "dense fp8 by CUTLASS": _dense_fp8(_cutlass_fp8),
    "dense int4": Contender(_int4_parts, _int4, lambda weight, parts: parts["exact"].double()),
    "dense int4 by Machete": Contender(
        _machete_parts, _machete_int4, lambda weight, parts: parts["exact"].double()
    ),
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
