"""float32 products on a CPU where oneDNN computes them faster than the library that torch calls.

torch gives float32 products to Intel's MKL, which does not use all that processors of AMD have. oneDNN, which is in torch too and
computes its bfloat16 products, does. Results differ in the last bits, as between any
two libraries. The same product of the same shape goes the same way in every process of a machine.

oneDNN makes code for each shape of a product and keeps it, 0.57 MiB each, half of that to the end of the process. So where the
number of tokens varies, from batch to batch or from expert to expert, zeros are added to make it one of a few sizes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_LEAST = 1 << 26  # multiply-adds: with fewer, what a call of oneDNN costs is more than it gains
_LEAST_ROWS = 256  # of the first factor: with fewer, a copy of the second costs too much
SIZES_PER_DOUBLING = 8  # of numbers of tokens that products are given
CODE_OF_A_SHAPE = 0.57 * 2**20  # bytes that oneDNN keeps for a product of a new shape
_ROWS = 2048  # of a result that is added: so many are there beside it


def onednn_is_faster(device: torch.device) -> bool:
    """Whether float32 products on this device are given to oneDNN: on processors of AMD with AVX-512."""
    return device.type == "cpu" and _on_this_cpu()


@functools.cache
def _on_this_cpu() -> bool:
    known = hasattr(torch.cpu, "get_capabilities")  # not in torch 2.10
    has = torch.cpu.get_capabilities() if known else {}
    built = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return bool(built and has.get("avx512_f") and str(has.get("cpu_name", "")).startswith("AMD"))


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`a` [m, k] @ `b` [k, n]."""
    return _onednn(a, b.T) if _gains(a, b.T) else a @ b


def add_product(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    alpha: float = 1.0,
    rows: int | None = None,
) -> torch.Tensor:
    """`out` [m, n] += `alpha` `a` [m, k] @ `b` [k, n], in place; `rows` of the product, or 2048, are there beside it."""
    rows = rows or _ROWS
    if not _gains(a, b.T):
        return out.addmm_(a, b, alpha=alpha)
    weight = b.T.contiguous()
    for part, some in zip(out.split(rows), a.split(rows), strict=True):
        part.add_(_onednn(some, weight), alpha=alpha)
    return out


def _gains(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether oneDNN is faster for `x` [..., k] @ `weight` [n, k]^T."""
    large = x.numel() * weight.shape[0] >= _LEAST and x.numel() >= _LEAST_ROWS * x.shape[-1]
    return large and x.dtype == weight.dtype == torch.float32 and onednn_is_faster(x.device)


def _onednn(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x` [..., k] @ `weight` [n, k]^T + `bias`, by the operator that torch's own compiler uses for linear layers.

    With a weight that does not lie row by row, oneDNN takes a way that is a hundred times slower, so that it is copied first.
    """
    result: torch.Tensor = torch.ops.mkldnn._linear_pointwise(
        x, weight.contiguous(), bias, "none", [], ""
    )
    return result


def one_of_few_sizes(count: int) -> int:
    """`count` or a little more: there are eight sizes per power of two, at most an eighth above."""
    step = max((1 << count.bit_length()) // (2 * SIZES_PER_DOUBLING), 1)
    return -(-count // step) * step


def with_rows_of_zeros(x: torch.Tensor) -> torch.Tensor:
    """`x` [rows, k] with zeros up to one of a few sizes; `x` itself where it has such a size."""
    more = one_of_few_sizes(len(x)) - len(x)
    return torch.nn.functional.pad(x, (0, 0, 0, more)) if more else x


class FasterLinears(TorchFunctionMode):
    """While it is in place, linear layers that compute float32 without gradients go to oneDNN where that is faster."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.nn.functional.linear and not kwargs and not torch.is_grad_enabled():
            x, weight, *bias = args
            plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) for t in (x, weight))
            if plain and _gains(x, weight):
                found = _onednn(with_rows_of_zeros(x.reshape(-1, x.shape[-1])), weight, *bias)
                return found[: x.shape[:-1].numel()].view(*x.shape[:-1], -1)
        return func(*args, **(kwargs or {}))
