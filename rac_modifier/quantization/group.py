"""Pruned modules that read the same input, from their grids to quantized weights, with what the run record says of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rac_modifier.pruning.group import PrunedGroup
from rac_modifier.quantization.grid import Grid
from rac_modifier.quantization.solve import Quantized, quantize


def quantize_group(
    group: PrunedGroup, grids: Sequence[Grid | None], *, dtype: torch.dtype, dampening_frac: float, sweeps: int
) -> list[Quantized | None]:
    """Round the modules of a pruned group to their `grids`, on its Hessian and towards its targets; None leaves one as it is.

    `dtype` is that of the model's weights. The error after rounding goes into the group's records.

    Raises:
        RacError: see `quantize`.
    """
    results: list[Quantized | None] = [None] * len(grids)
    for grid in dict.fromkeys(grids):
        if grid is None:
            continue
        members = [i for i, other in enumerate(grids) if other == grid]
        quantized = quantize(
            [group.solutions[i].weight for i in members],
            [group.solutions[i].mask for i in members],
            [group.targets[i] for i in members],
            group.hessian,
            grid,
            names=[group.names[i] for i in members],
            dtype=dtype,
            dampening_frac=dampening_frac,
            factor=group.factor,
            sweeps=sweeps,
        )
        for i, result in zip(members, quantized, strict=True):
            results[i] = result
            record = group.records[i]
            record["relative_error_before_rounding"] = record["relative_error"]
            record["relative_error"] = result.relative_error
            record["sparsity"] = float((result.weight == 0).float().mean())
    return results
