"""Round dense float weights to the nearest of a symmetric grid, without calibration."""

from __future__ import annotations

import torch
from torch import Tensor

from rac_modifier.checkpoint import bitmask as layout


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
