"""Methods that score every weight once and change none of those kept: Wanda and magnitude."""

from __future__ import annotations

import torch

from rac_modifier.pruning.topk import lowest, lowest_along
from rac_modifier.settings.pattern import Pattern


def wanda_mask(weight: torch.Tensor, hessian: torch.Tensor, pattern: Pattern) -> torch.Tensor:
    """Weights to prune by |W_ij| * ||X_j||_2, compared within an output row (arXiv 2306.11695, equation 1).

    `weight` [rows, columns] float32; ||X_j|| = sqrt(H_jj) up to a factor that changes no comparison. Unstructured: the
    floor(columns * sparsity) lowest of each row; N:M: the N lowest of each group.
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
