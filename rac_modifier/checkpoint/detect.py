"""The pattern that the zeros of a weight have, from the weight alone. Pure functions of tensors."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rac_modifier.checkpoint.bitmask import as_integers, nonzero, row_chunks
from rac_modifier.checkpoint.stored_weight import UNSTRUCTURED

_GROUPS = (4, 8, 16)  # the M of N:M, each twice the one before
_STEP = 1 / 16  # a larger M is stated only where it prunes at least so much more
# Of all zeros: with fewer in the pattern, it is what a broken pattern of smaller groups leaves.
_LEAST_SHARE = 0.8
_LEAST_BROKEN = 20  # groups that zeros at random places would break; fewer may be chance


def find_structure(weight: Tensor) -> str:
    """Return the strongest pattern "N:M" (N pruned) of a weight [rows, columns], or "unstructured".

    M is 4, 8 or 16. -0.0 counts as zero. A pattern is stated only if it accounts for 80 % of the
    zeros, and if as many zeros at random places would break it in at least 20 groups: small or
    very sparse weights keep a pattern by chance.
    """
    rows, columns = weight.shape
    least = {m: m for m in _GROUPS if columns % m == 0}
    zeros = 0
    for part in row_chunks(rows, columns):
        zero = ~nonzero(weight[part])
        zeros += int(zero.sum())
        counts = zero.view(torch.uint8)
        for m in least:  # ascending
            counts = _sums(counts, m * counts.shape[1] // columns)
            least[m] = min(least[m], int(counts.min()))
    best, share = UNSTRUCTURED, -_STEP
    for m, n in least.items():
        stronger = (
            0 < n < m and n / m >= share + _STEP and n / m >= _LEAST_SHARE * zeros / weight.numel()
        )
        if stronger and _broken_by_chance(zeros, weight.numel(), n, m) >= _LEAST_BROKEN:
            best, share = f"{n}:{m}", n / m
    return best


def _sums(counts: Tensor, together: int) -> Tensor:
    """Sum each `together` consecutive columns; torch.sum is several times slower."""
    while together > 1:
        counts = counts[:, ::2] + counts[:, 1::2]
        together //= 2
    return counts


def _broken_by_chance(zeros: int, weights: int, n: int, m: int) -> float:
    """Count the groups of M with fewer than N zeros if the zeros were at random places."""
    share = zeros / weights
    fewer = sum(math.comb(m, k) * share**k * (1 - share) ** (m - k) for k in range(n))
    return weights / m * fewer


def fits_24(weight: Tensor) -> bool:
    """Tell whether the 2:4 layout keeps all bits: at most two of four values are not +0.0."""
    if weight.shape[1] % 4:
        return False
    parts = (as_integers(weight[part]) != 0 for part in row_chunks(*weight.shape))
    return all(int(_sums(stored.view(torch.uint8), 4).max()) <= 2 for stored in parts)


def without_negative_zeros(weight: Tensor) -> Tensor:
    """Return a copy with +0.0 instead of -0.0."""
    result = weight.clone()
    for part in row_chunks(*weight.shape):
        as_integers(result[part]).masked_fill_(~nonzero(weight[part]), 0)
    return result
