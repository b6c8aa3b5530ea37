"""Freed memory goes back to the system before operators with large results, and not only between batches.

Within the forward pass of a batch most is left free between attention, whose scores are the largest blocks, and what comes after
it: their place holds one block of another size and a rest. Layer by layer the pass of a whole layer is one part of a run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from rac_modifier.freed_memory import return_freed_memory

# which dimension of the second factor the result has, in place of the last one of the first
_PRODUCTS = {
    torch.nn.functional.linear: 0,
    torch.matmul: -1,
    torch.Tensor.matmul: -1,
    torch.Tensor.__matmul__: -1,
}


class BeforeLargeResults(TorchFunctionMode):
    """While it is in place, freed memory is given back before torch functions whose result on the CPU is large."""

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        before_operator(func, args)
        return func(*args, **(kwargs or {}))


def before_operator(operator: Any, args: tuple[Any, ...]) -> None:
    """Give freed memory back where the result of a torch function of `args` on the CPU is large (freed_memory.py).

    The result is taken to be as large as its first argument, and that of a product is known from its factors.
    """
    if not args or not isinstance(args[0], torch.Tensor) or not args[0].is_cpu:
        return
    x, size = args[0], args[0].nbytes
    if operator in _PRODUCTS and len(args) > 1 and size:
        size = size // x.shape[-1] * args[1].shape[_PRODUCTS[operator]]
    return_freed_memory(size)
