"""Whether a weight has the zeros of a pattern: N of every M consecutive inputs, or a share of the whole tensor."""

from __future__ import annotations

import math

import torch

from rac_modifier.errors import RacError
from rac_modifier.settings.pattern import Pattern

# Columns of one block of SparseGPT by default; the number of pruned weights is rounded down once per block.
_BLOCK = 128


def broken_groups(weight: torch.Tensor, pattern: Pattern) -> int:
    """Number of groups of M consecutive columns of `weight` [rows, columns] with more than M-N nonzeros.

    Raises:
        RacError: an unstructured pattern (it has no groups), or a number of columns that is no multiple of M.
    """
    if not pattern.is_structured:
        raise RacError("broken_groups: an unstructured pattern has no groups to count; use holds")
    rows, columns = weight.shape
    pattern.check_shape("weight", rows, columns)
    zeros = (weight == 0).view(rows, columns // pattern.m, pattern.m).sum(dim=2)
    return int((zeros < pattern.n).sum())


def holds(weight: torch.Tensor, pattern: Pattern) -> bool:
    """Whether `weight` [rows, columns] has the zeros of `pattern`.

    N:M: no group is broken. Unstructured: zeros > numel * sparsity - max(rows, ceil(columns / 128)), because solvers round
    the number of pruned weights down per row (Wanda) or per block of 128 columns (SparseGPT).
    """
    if pattern.is_structured:
        return broken_groups(weight, pattern) == 0
    rows, columns = weight.shape
    slack = max(rows, math.ceil(columns / _BLOCK))
    return int((weight == 0).sum()) > weight.numel() * pattern.sparsity - slack
