"""Methods that score every weight once and change none of the weights that they keep: Wanda and magnitude."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from rac_modifier.pruning.topk import lowest, lowest_along
from rac_modifier.settings.pattern import Pattern


def prune(
    weight: torch.Tensor,
    rows: Sequence[int],
    patterns: Sequence[Pattern],
    mask_of: Callable[[torch.Tensor, Pattern], torch.Tensor],
) -> torch.Tensor:
    """Prune `weight` [d, sum(rows)] (transposed) in place, modules of `rows` rows each side by side.

    `mask_of` gets each module by itself, [rows_i, d], and returns what to prune of it. Returns the mask of what was pruned.
    """
    parts = zip(weight.split(list(rows), dim=1), patterns, strict=True)
    pruned = torch.cat([mask_of(part.T.contiguous(), pattern) for part, pattern in parts]).T
    weight.masked_fill_(pruned, 0.0)
    return pruned


def wanda_mask(weight: torch.Tensor, hessian: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Weights to prune by |W_ij| * ||X_j||_2, compared within an output row (arXiv 2306.11695, equation 1).

    `weight` is [rows, d] float32; ||X_j|| is sqrt(H_jj) up to a factor that changes no comparison. Unstructured: the
    floor(d * sparsity) lowest of each row; N:M: the N lowest of each group.
    """
    scores = weight.abs() * hessian.diagonal().sqrt()
    if pattern.is_structured:
        return _lowest_in_groups(scores, pattern)
    return lowest_along(scores, int(scores.shape[1] * pattern.sparsity), dim=1)


def magnitude_mask(weight: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Weights to prune by |W_ij|: the floor(numel * sparsity) lowest of the module, or the N lowest of each group."""
    if pattern.is_structured:
        return _lowest_in_groups(weight.abs(), pattern)
    return lowest(weight.abs(), int(weight.numel() * pattern.sparsity))


def _lowest_in_groups(scores: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    return lowest_along(scores.view(-1, pattern.m), pattern.n, dim=1).view(scores.shape)
