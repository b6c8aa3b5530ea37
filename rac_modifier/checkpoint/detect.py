"""Which pattern the zeros of a weight have, found from the weight alone. Pure functions of tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from rac_modifier.checkpoint.bitmask import nonzero, row_chunks
from rac_modifier.checkpoint.formats import UNSTRUCTURED

_GROUPS = (4, 8, 16)  # the M of N:M, each twice the one before
_STEP = 1 / 16  # a larger M is stated only where it prunes at least so much more
_LEAST_SHARE = 0.8  # of all zeros: with fewer of them in the pattern, it is what a broken pattern of smaller groups leaves
_LEAST_BROKEN = (
    20  # groups that zeros at random places would break, for a pattern to be more than chance
)
_CHUNK = 1 << 22  # elements


def find_structure(weight: Tensor) -> str:
    """The strongest pattern "N:M" (N pruned) that every row of a weight [rows, columns] keeps, or "unstructured".

    M is 4, 8 or 16. -0.0 counts as zero. A pattern is stated only if it accounts for 80 % of the zeros, and if as many zeros
    at random places would break it in at least 20 groups: by chance, small or very sparse weights keep some pattern too.
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
    """Each `together` consecutive columns summed; a `sum` over such a short dimension is several times slower."""
    while together > 1:
        counts = counts[:, ::2] + counts[:, 1::2]
        together //= 2
    return counts


def _broken_by_chance(zeros: int, weights: int, n: int, m: int) -> float:
    """How many groups of M would have fewer than N zeros, if the zeros were at random places."""
    share = zeros / weights
    fewer = sum(math.comb(m, k) * share**k * (1 - share) ** (m - k) for k in range(n))
    return weights / m * fewer


def fits_24(weight: Tensor) -> bool:
    """Whether the 2:4 layout keeps all bits: at most two of four values are not +0.0, and -0.0 counts as a value."""
    if weight.shape[1] % 4:
        return False
    return all(int(_sums(kept.view(torch.uint8), 4).max()) <= 2 for kept in _stored(weight))


def count_stored(weight: Tensor) -> int:
    """How many values of a weight are not +0.0, and are stored to keep all bits."""
    return sum(int(kept.sum()) for kept in _stored(weight))


def without_negative_zeros(weight: Tensor) -> Tensor:
    """A copy with +0.0 in the place of -0.0."""
    result = weight.clone()
    for part in row_chunks(*weight.shape):
        _integers(result[part]).masked_fill_(~nonzero(weight[part]), 0)
    return result


def has_nan(tensor: Tensor) -> bool:
    """Whether a tensor of any shape holds NaN; integers have none."""
    if not tensor.is_floating_point():
        return False
    flat = tensor.reshape(-1)
    return any(bool(part.float().isnan().any()) for part in flat.split(_CHUNK))


def _stored(weight: Tensor) -> Iterator[Tensor]:
    """Bool masks of the values that are not +0.0, by chunks of rows."""
    return (_integers(weight[part]) != 0 for part in row_chunks(*weight.shape))


def _integers(weight: Tensor) -> Tensor:
    return weight.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[weight.element_size()])
