"""Which weights a pattern prunes: selection of the lowest scores, and the check of a result."""

import math

import torch
from torch import Tensor

from rac_modifier.settings.pattern import Pattern

_BLOCK = 128  # default columns of a block of SparseGPT
_RANKED_BY_PAIRS = 8  # largest M of N:M
_SAMPLE = 1 << 15


def holds(weight: Tensor, pattern: Pattern) -> bool:
    """Return whether `weight` [rows, columns] has the zeros of `pattern`.

    Unstructured: zeros > numel * sparsity - max(rows, ceil(columns / 128)), because solvers round
    the number of pruned weights down per row (Wanda) or per block of 128 columns (SparseGPT).
    """
    rows, columns = weight.shape
    if pattern.is_structured:
        pattern.check_shape("weight", rows, columns)
        zeros = (weight == 0).view(rows, columns // pattern.m, pattern.m).sum(dim=2)
        return bool((zeros >= pattern.n).all())
    slack = max(rows, math.ceil(columns / _BLOCK))  # one weight per row or per block
    return int((weight == 0).sum()) > weight.numel() * pattern.sparsity - slack


def lowest(scores: Tensor, count: int) -> Tensor:
    """Return the bool mask of the `count` lowest `scores`, of any shape; ties by position."""
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    # all below the count-th score, and of those that equal it the first ones
    threshold = flat.kthvalue(count).values  # the highest score that is pruned
    mask = flat < threshold
    missing = count - int(mask.sum())
    mask[(flat == threshold).nonzero()[:missing, 0]] = True
    return mask.view(scores.shape)


def lowest_along(scores: Tensor, count: int, dim: int) -> Tensor:
    """Return the bool mask of exactly the `count` lowest entries of `scores` along `dim`."""
    indices = scores.topk(count, dim=dim, largest=False, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(dim, indices, True)


def ranks_in_groups(scores: Tensor, m: int) -> Tensor:
    """Rank each entry of `scores` [groups * m, columns] among m rows of its column, from 0 up.

    The ranks have the dtype of `scores`; ties by position. Comparing all pairs of a short group
    takes a quarter of topk's time on a CPU.
    """
    groups = scores.view(-1, m, scores.shape[1])
    if m > _RANKED_BY_PAIRS:
        return groups.argsort(dim=1, stable=True).argsort(dim=1).to(scores.dtype).view(scores.shape)
    # rank_i = number of j < i with s_j <= s_i, and of j > i with s_j < s_i
    ranks = torch.zeros_like(groups)
    for i in range(m):
        for j in range(i + 1, m):
            # as 1.0 or 0.0: a comparison that writes booleans is not vectorised on a CPU
            later_is_lower = groups[:, j].clone().lt_(groups[:, i])
            ranks[:, i].add_(later_is_lower)
            ranks[:, j].add_(1.0).sub_(later_is_lower)
    return ranks.view(scores.shape)


def sampled_threshold(weight: Tensor, scale: Tensor, share: float) -> float:
    """Return what about a `share` of the scores |W_ij| s_i, [d, rows] and [d, 1], do not exceed.

    It is a quantile of about 32,768 of them; of a smaller matrix, of all.
    """
    columns = weight.shape[1]
    step = max(weight.numel() // _SAMPLE, 1)
    while math.gcd(step, columns) > 1 < step:  # a common divisor would leave columns out
        step += 1
    places = torch.arange(0, weight.numel(), step, device=weight.device)
    rows = places // columns
    sample = weight[rows, places % columns].mul_(scale[rows, 0]).abs_()
    return float(sample.kthvalue(max(int(sample.numel() * share), 1)).values)
