"""Float weights rounded to the nearest of a symmetric grid, for tests of kernels of integers."""

from __future__ import annotations

import torch


def quantize_rows(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Round [N, K] to int8 with one scale per row: values [N, K], scales float32 [N, 1]."""
    tiny = torch.finfo(torch.float32).tiny
    scales = (weight.float().abs().amax(dim=1, keepdim=True) / 127).clamp_min(tiny)
    return (weight.float() / scales).round().clamp(-127, 127).to(torch.int8), scales


def quantize_groups(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Round [N, K] to -8..7 in groups of columns: int8 [N, K], scales [N, K / group] in bfloat16.

    The value of a group that is farthest from zero becomes -8, so a scale may be negative.
    """
    groups = weight.float().unflatten(1, (-1, group))
    farthest = groups.gather(2, groups.abs().argmax(dim=2, keepdim=True))
    scale = (farthest / -8).bfloat16().float()
    divisor = torch.where(scale == 0, 1.0, scale)
    values = (groups / divisor).round().clamp(-8, 7).to(torch.int8).flatten(1)
    return values, scale[:, :, 0]
