"""Weights in the kernels' layout, which csrc/format/layout.h describes."""

from __future__ import annotations

import torch
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu.library import DENSE_TYPES, INT4, VALUE_TYPES
from rac_modifier.kernels.cpu.support import library_and_isa

PANEL = 16  # rows
MOST_GROUP = 512  # columns that share a scale, where a row has several


def pack_values(
    values: Tensor,
    bitmask: Tensor | None,
    shape: tuple[int, int],
    bits: int = 8,
    zeros: Tensor | None = None,
) -> Tensor:
    """Pack a weight of `shape` [N, K]: uint8 [bytes].

    Args:
        values: the stored values, row-major; bfloat16, float32, int8, or float16 (as float32).
        bitmask: uint8 [N, ceil(K / 8)]; bit i of byte j is column 8j + i. None: all int8 values
            are stored.
        shape: of the weight.
        bits: 4 packs int8 values as codes of four bits; 3 and 2 only without a bitmask.
        zeros: codes of zero, uint8 [N, groups], 0 to 15; a value is a code minus its code of zero.

    Raises:
        RacError: these do not fit together.
    """
    if values.dtype == torch.float16:
        values = values.float()
    if values.dtype not in VALUE_TYPES:
        raise RacError(
            f"values of {values.dtype}: the kernels read bfloat16, float32, float16 and int8; "
            "keep it dense"
        )
    value_type = VALUE_TYPES[values.dtype]
    if bitmask is None:
        value_type = DENSE_TYPES[bits]
    elif values.dtype == torch.int8 and bits == 4:
        value_type = INT4
    if zeros is None and bits < 4:  # these always have codes of zero
        zeros = torch.full((shape[0], 1), 1 << (bits - 1), dtype=torch.uint8)
    return library_and_isa()[0].pack(
        values.detach().contiguous(),
        None if bitmask is None else bitmask.contiguous(),
        None if zeros is None else _panels(zeros),
        shape,
        value_type,
    )


def split_groups(scale: Tensor, group: int, unit: int = 4) -> Tensor:
    """Cut groups of more than 512 columns into equal ones of a multiple of `unit` columns."""
    if scale.shape[1] == 1 or group <= MOST_GROUP:
        return scale
    return scale.repeat_interleave(_pieces(group, unit), dim=1)


def block_of(columns: int, group: int, unit: int = 4) -> int:
    """Return how many columns of x share a scale in a matmul of integers in groups of `group`."""
    if group == columns:
        return min(columns, MOST_GROUP)
    return group if group <= MOST_GROUP else group // _pieces(group, unit)


def pack_scale(
    scale: Tensor, group: int = 0, narrow: bool = False, unit: int | None = None
) -> Tensor:
    """Return scales [N, groups] in the kernels' layout: float32 [panels, groups, 16].

    `group` and `unit` (default: 8 with `narrow`, else 4) as for `split_groups`. `narrow`: bfloat16
    where it holds every scale exactly; only values of 4 bits or less may have such scales.
    """
    packed = _panels(split_groups(scale, group, unit or (8 if narrow else 4)).float())
    exact = narrow and torch.equal(packed.bfloat16().float(), packed)
    return packed.bfloat16() if exact else packed


def _pieces(group: int, unit: int) -> int:
    return next(n for n in range(2, group) if group % (unit * n) == 0 and group // n <= MOST_GROUP)


def _panels(by_row: Tensor) -> Tensor:
    """Return [N, groups] as [panels, groups, 16], with zeros for the rows that pad a panel."""
    rows, groups = by_row.shape
    padded = torch.nn.functional.pad(by_row, (0, 0, 0, -rows % PANEL))
    return padded.view(-1, PANEL, groups).transpose(1, 2).contiguous()
