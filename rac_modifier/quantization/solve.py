"""Quantize pruned modules that read the same input: the one entry point of this station."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rac_modifier.errors import RacError
from rac_modifier.pruning.checks import check_hessian, check_weights, is_finite
from rac_modifier.pruning.linalg import Dampening
from rac_modifier.pruning.quadratic import quadratic_form
from rac_modifier.pruning.solve import stacked
from rac_modifier.pruning.sparsegpt import Factor, factorise
from rac_modifier.quantization.grid import Grid, search_scales
from rac_modifier.quantization.rounding import descend, gptq
from rac_modifier.settings.quantization import SWEEPS


@dataclass(frozen=True)
class Quantized:
    """A quantized module.

    Attributes:
        weight: [rows, d], code times scale, in the dtype of the scales; zero where pruned.
        scale: [rows, groups] (one group: a scale a row), as compressed-tensors' `weight_scale`.
        relative_error: trace((T - Q) H (T - Q)^T) / trace(T H T^T) for the target T; 0 when both are 0.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    relative_error: float


@torch.no_grad()
def quantize(
    weights: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    hessian: torch.Tensor,
    grid: Grid,
    *,
    names: Sequence[str],
    dtype: torch.dtype,
    dampening_frac: float = 0.01,
    factor: Factor | None = None,
    sweeps: int = SWEEPS,
) -> list[Quantized]:
    """Round pruned `weights`, each [rows_i, d], to `grid`, so that the outputs stay those of `targets`; rounding.py says how.

    `masks` [rows_i, d] bool, True = kept: nothing else becomes nonzero. `hessian` [d, d] float32 is that of the inputs, the
    same that the pruning used, and `factor` sparsegpt.factorise's of it. Scales are chosen on the weights and the Hessian's
    diagonal (grid.py) and are exact in `dtype`, in which weights and scales come back.

    Raises:
        RacError: shapes or numbers that cannot work, or a result that `dtype` cannot hold.
    """
    label = ", ".join(names)
    check_weights(weights, targets, names, hessian.shape[0])
    check_hessian(hessian, label)
    if grid.group_size and hessian.shape[0] % grid.group_size:
        raise RacError(
            f"{names[0]}: {hessian.shape[0]} inputs are no multiple of the group_size {grid.group_size}; set a group_size "
            "that divides them (config_groups), or add the module to ignore"
        )
    factor = factor or factorise(hessian, dampening_frac, label)
    dampening = Dampening.of(hessian, factor.dampening_frac)
    keep = stacked([mask.to(hessian.dtype) for mask in masks], hessian)
    target = stacked(targets, hessian)
    working = stacked(weights, hessian).mul_(keep)
    scales = search_scales(working, grid, dampening.diagonal, dtype)
    spread = grid.column_scales(scales, working.shape[0])
    gptq(working, keep, spread, grid, factor)
    descend(working, target, keep, spread, grid, hessian, dampening, sweeps)
    working.add_(0.0)  # -0.0 is a value to the sparse layouts, and 8-bit floats have it

    rows = [w.shape[0] for w in weights]
    totals = quadratic_form(target, hessian)
    errors = quadratic_form(target.sub_(working), hessian)
    results = []
    for name, w, scale, error, total in zip(
        names, working.split(rows, 1), scales.split(rows, 1), errors.split(rows), totals.split(rows), strict=True
    ):
        weight = w.T.contiguous().to(dtype)
        if not is_finite(weight):
            raise RacError(f"{name}: the quantized weight overflows {dtype}; raise dampening_frac ({dampening_frac})")
        whole = float(total.sum())
        relative = max(float(error.sum()), 0.0) / whole if whole > 0 else 0.0
        results.append(Quantized(weight, scale.T.contiguous().to(dtype), relative))
    return results
