"""Selection of the lowest scores: an exact number of them, their ranks, or a threshold."""

from __future__ import annotations

import math

import torch

_RANKED_UP_TO = 8
_SAMPLE = 1 << 15


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Boolean mask of exactly the `count` lowest entries of `scores` (any shape, read as one list; ties by position).

    It selects a threshold and does not sort, which is ten times faster on a block of a wide layer.
    """
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    flat = scores.flatten()
    threshold = _kth_lowest(flat, count)
    mask = flat < threshold
    missing = count - int(mask.sum())
    mask[(flat == threshold).nonzero()[:missing, 0]] = True
    return mask.view(scores.shape)


def _kth_lowest(flat: torch.Tensor, count: int) -> torch.Tensor:
    """The `count`-th lowest entry, from 1. Of many, only those between two values of a sample are selected from.

    Those hold it but for one time in 1e8 where the sample is like the rest, and else it is selected from all.
    """
    size = len(flat)
    if size >= 8 * _SAMPLE:
        sample = flat[:: size // _SAMPLE | 1]
        share, taken = count / size, len(sample)
        near = 6 * math.sqrt(share * (1 - share) * taken) + 1
        first, last = math.floor(share * taken - near), math.ceil(share * taken + near)
        low = sample.kthvalue(first).values if first >= 1 else flat.new_tensor(-math.inf)
        high = sample.kthvalue(last).values if last <= taken else flat.new_tensor(math.inf)
        before = int((flat < low).sum())
        between = flat[(flat >= low).logical_and_(flat <= high)]
        if before < count <= before + len(between):
            return between.kthvalue(count - before).values
    return flat.kthvalue(count).values


def lowest_along(scores: torch.Tensor, count: int, dim: int) -> torch.Tensor:
    """Boolean mask of exactly the `count` lowest entries of `scores` along `dim`."""
    indices = scores.topk(count, dim=dim, largest=False, sorted=False).indices
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(dim, indices, True)


def ranks_in_groups(scores: torch.Tensor, m: int) -> torch.Tensor:
    """Rank, from 0 for the lowest, of each entry of `scores` [groups * m, columns] among `m` rows of its column.

    The ranks have the dtype of `scores`; ties by position. Short groups are ranked by comparing every pair, which on a CPU is
    four times faster than topk.
    """
    groups = scores.view(-1, m, scores.shape[1])
    if m > _RANKED_UP_TO:
        return groups.argsort(dim=1, stable=True).argsort(dim=1).to(scores.dtype).view(scores.shape)
    ranks = torch.zeros_like(groups)
    for i in range(m):
        for j in range(i + 1, m):
            # in place, as 1.0 or 0.0: a comparison that writes booleans is not vectorised on a CPU
            later_is_lower = groups[:, j].clone().lt_(groups[:, i])
            ranks[:, i].add_(later_is_lower)
            ranks[:, j].add_(1.0).sub_(later_is_lower)
    return ranks.view(scores.shape)


def sampled_places(
    rows: int, columns: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns of about 32,768 entries of a matrix [rows, columns], in all of its rows and columns; of fewer, of all."""
    step = max(rows * columns // _SAMPLE, 1)
    while (
        math.gcd(step, columns) > 1 < step
    ):  # with a common divisor, the sample would miss columns
        step += 1
    places = torch.arange(0, rows * columns, step, device=device)
    return places // columns, places % columns


def sampled_threshold(sample: torch.Tensor, share: float) -> float:
    """A value that about a `share` of the scores of a matrix do not exceed, from those at its `sampled_places`.

    It is exact for up to 32,768 entries. For more, the sample takes a fraction of the time, and is wrong by 0.3 % of the
    entries (one standard deviation).
    """
    return float(sample.kthvalue(max(int(sample.numel() * share), 1)).values)
