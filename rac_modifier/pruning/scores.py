"""Methods that score every weight and leave the kept weights as they are: Wanda and magnitude."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rac_modifier.pruning.masks import lowest, lowest_along
from rac_modifier.settings.pattern import Pattern

Mask = Callable[[Tensor, Tensor, Pattern], Tensor]
"""From weight [rows, d] float32, Hessian [d, d] and pattern to pruned, bool [rows, d]."""


def wanda_mask(weight: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
    """Prune by |W_ij| * ||X_j||_2, compared within an output row (arXiv 2306.11695, equation 1).

    ||X_j|| is sqrt(H_jj) up to a factor that changes no comparison. Unstructured: the
    floor(d * sparsity) lowest of each row; N:M: the N lowest of each group.
    """
    scores = weight.abs() * hessian.diagonal().sqrt()
    if pattern.is_structured:
        return _lowest_in_groups(scores, pattern)
    return lowest_along(scores, int(scores.shape[1] * pattern.sparsity), dim=1)


def magnitude_mask(weight: Tensor, hessian: Tensor, pattern: Pattern) -> Tensor:
    """Prune the floor(numel * sparsity) lowest |W_ij|, or the N lowest of each group."""
    if pattern.is_structured:
        return _lowest_in_groups(weight.abs(), pattern)
    return lowest(weight.abs(), int(weight.numel() * pattern.sparsity))


# The methods by the recipe's name for them.
MASKS: dict[str, Mask] = {
    "wanda": wanda_mask,
    "magnitude": magnitude_mask,
}


def prune(
    method: str, weight: Tensor, hessian: Tensor, rows: Sequence[int], patterns: Sequence[Pattern]
) -> Tensor:
    """Prune `weight` [d, sum(rows)] (transposed) in place; return the mask of pruned weights."""
    modules = zip(weight.split(list(rows), dim=1), patterns, strict=True)
    masks = [MASKS[method](module.T.contiguous(), hessian, pattern) for module, pattern in modules]
    pruned = torch.cat(masks).T
    weight.masked_fill_(pruned, 0.0)
    return pruned


def _lowest_in_groups(scores: Tensor, pattern: Pattern) -> Tensor:
    return lowest_along(scores.view(-1, pattern.m), pattern.n, dim=1).view(scores.shape)
