"""v^T H v for many vectors: what a change of a layer's weights costs."""

from __future__ import annotations

import torch

_BLOCK = 256


def quadratic_form(vectors: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """v^T H v for each column v of `vectors` [d, rows] and symmetric H [d, d]; float64 [rows].

    Uses the lower triangle and counts what is left of the diagonal blocks twice: half the work of a full product.
    """
    result = torch.zeros(vectors.shape[1], dtype=torch.float64, device=vectors.device)
    for start in range(0, vectors.shape[0], _BLOCK):
        block = slice(start, start + _BLOCK)
        product = hessian[block, block] @ vectors[block]
        if start:
            product.addmm_(hessian[block, :start], vectors[:start], alpha=2)
        result += product.mul_(vectors[block]).sum(0)
    return result
