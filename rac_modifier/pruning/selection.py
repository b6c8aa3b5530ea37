"""Picking the lowest scores, always an exact number of them."""

from __future__ import annotations

import torch


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Boolean mask of exactly `count` lowest entries of `scores` (any shape, taken as one list; ties by position).

    A threshold by selection rather than a sort: an order of magnitude faster on a block of a wide layer.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    threshold = flat.kthvalue(count).values
    mask = flat < threshold
    missing = count - int(mask.sum())
    mask[(flat == threshold).nonzero()[:missing, 0]] = True
    return mask.view(scores.shape)


def lowest_along(scores: torch.Tensor, count: int, dim: int) -> torch.Tensor:
    """Boolean mask of exactly `count` lowest entries of `scores` along `dim`."""
    indices = scores.topk(count, dim=dim, largest=False, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(dim, indices, True)
