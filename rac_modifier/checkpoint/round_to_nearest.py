"""Dense float weights rounded to the nearest of a symmetric grid, without calibration: what the head of a served model gets."""

from __future__ import annotations

import torch
from torch import Tensor

from rac_modifier.checkpoint import bitmask as layout
from rac_modifier.checkpoint.stored_weight import dequantize
from rac_modifier.errors import RacError

HEAD_BITS = (8, 4)  # to which a head can be rounded
_GROUPS = (128, 64, 32)  # columns that share a scale of int4: the first that divides the columns


def head_group(columns: int, bits: int) -> int:
    """Columns that share a scale where a head of `columns` is rounded to 8 or 4 bits.

    Raises:
        RacError: int4 has no groups for so many columns.
    """
    if bits == 8:
        return columns
    group = next((group for group in _GROUPS if columns % group == 0), None)
    if group is None:
        raise RacError(
            f"the head has {columns} columns, no multiple of 32, so int4 has no groups for it; use int8"
        )
    return group


def round_head(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """A float weight [N, K] rounded to 8 or 4 bits: values int8 [N, K], scales float32 [N, groups].

    Raises:
        RacError: int4 has no groups for so many columns.
    """
    group = head_group(weight.shape[1], bits)
    return quantize_rows(weight) if bits == 8 else quantize_groups(weight, group)


def relative_error(weight: Tensor, values: Tensor, scale: Tensor) -> float:
    """||W - Q|| / ||W|| of a weight and what it was rounded to, on at most 4,096 rows, evenly spaced."""
    rows = slice(None, None, -(-len(weight) // 4096))
    exact = weight[rows].float()
    return float(
        (dequantize(values[rows], scale[rows], torch.float32) - exact).norm() / exact.norm()
    )


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A float weight [N, K] rounded to int8, symmetric, with one scale per row: values [N, K], scales float32 [N, 1]."""
    values, scales = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight), 1)
    for part in layout.row_chunks(*weight.shape):
        rows = weight[part].float()
        scales[part] = (rows.abs().amax(dim=1, keepdim=True) / 127).clamp_min(
            torch.finfo(torch.float32).tiny
        )
        values[part] = (rows / scales[part]).round().clamp(-127, 127).to(torch.int8)
    return values, scales


def quantize_groups(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """A float weight [N, K] rounded to -8..7 in groups of columns: int8 [N, K], and scales [N, K / group] that are bfloat16.

    The value of a group that is farthest from zero becomes -8, as in llama.cpp's Q4_0, so a scale may be negative.
    """
    values = torch.empty(weight.shape, dtype=torch.int8)
    scales = torch.empty(len(weight), weight.shape[1] // group)
    for part in layout.row_chunks(*weight.shape):
        groups = weight[part].float().unflatten(1, (-1, group))
        farthest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
        scale = (farthest / -8).bfloat16().float()
        scales[part] = scale[:, :, 0]
        divisor = torch.where(scale.abs() < torch.finfo(torch.float32).tiny, 1.0, scale)
        values[part] = (groups / divisor).round().clamp(-8, 7).to(torch.int8).flatten(1)
    return values, scales
