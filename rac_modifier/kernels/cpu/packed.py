"""Weights in the kernels' layout, which csrc/format/layout.h describes."""

from __future__ import annotations

import torch
from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.kernels.cpu.library import DENSE_TYPES, INT4, VALUE_TYPES
from rac_modifier.kernels.cpu.support import library_and_isa

PANEL = 16  # rows
MOST_GROUP = 512  # columns that share a scale of the weight, where a row has several, or of x


def pack_values(
    values: Tensor,
    bitmask: Tensor | None,
    shape: tuple[int, int],
    bits: int = 8,
    zeros: Tensor | None = None,
) -> Tensor:
    """Pack a weight of `shape` [N, K]: uint8 [bytes] (RacError: these do not fit together).

    values: the stored values, row-major; bfloat16, float32, int8, or float16 (as float32).
    bitmask: uint8 [N, ceil(K / 8)]; bit i of byte j is column 8j + i. None: all are stored (int8).
    bits: 4 packs int8 values as codes of four bits; 3 and 2 only without a bitmask.
    zeros: codes of zero, uint8 [N, groups], 0 to 15; a value is a code minus its code of zero.
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


def pack_scale(scale: Tensor, narrow: bool = False) -> Tensor:
    """Return scales [N, groups] in the kernels' layout: float32 [panels, groups, 16].

    `narrow`: bfloat16 where it holds every scale exactly; only values of 4 bits or less may have
    such scales.
    """
    packed = _panels(scale.float())
    exact = narrow and torch.equal(packed.bfloat16().float(), packed)
    return packed.bfloat16() if exact else packed


def _panels(by_row: Tensor) -> Tensor:
    """Return [N, groups] as [panels, groups, 16], with zeros for the rows that pad a panel."""
    rows, groups = by_row.shape
    padded = torch.nn.functional.pad(by_row, (0, 0, 0, -rows % PANEL))
    return padded.view(-1, PANEL, groups).transpose(1, 2).contiguous()
