"""Whether a weight still has the zeros that its mask structure promises."""

from __future__ import annotations

from torch import Tensor

from rac_modifier.checkpoint.bitmask import nonzero, row_chunks
from rac_modifier.checkpoint.formats import UNSTRUCTURED
from rac_modifier.pruning.masks import broken_groups
from rac_modifier.settings.pattern import Pattern


def count_broken_groups(weight: Tensor, structure: str, name: str) -> int:
    """Groups of M columns of `weight` [N, K] with fewer than N zeros; 0 for an unstructured one, which cannot break.

    Raises:
        RacError: columns that are no multiple of M.
    """
    if structure == UNSTRUCTURED:
        return 0
    pattern = Pattern.parse(structure, None)
    rows, columns = weight.shape
    pattern.check_shape(name, rows, columns)
    return sum(broken_groups(nonzero(weight[part]), pattern) for part in row_chunks(rows, columns))
