"""Modules that read the same input, from statistics to pruned weights, with what the run record says of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from loguru import logger

from rac_modifier.pruning.dense_target import target_weights
from rac_modifier.pruning.hessian import Hessian
from rac_modifier.pruning.solve import Method, Solution, solve
from rac_modifier.pruning.sparsegpt import Factor, factorise
from rac_modifier.settings.pattern import Pattern


@dataclass(frozen=True)
class PrunedGroup:
    """Pruned modules with what they were pruned on, which quantization goes on with.

    `targets` are what their outputs aim at, `hessian` [d, d] the statistics, `factor` its factor where there is one, and
    `records` the modules' entries in the run record.
    """

    names: Sequence[str]
    solutions: Sequence[Solution]
    targets: Sequence[torch.Tensor]
    hessian: torch.Tensor
    factor: Factor | None
    records: list[dict[str, Any]]


def prune_group(
    method: Method,
    names: Sequence[str],
    weights: Sequence[torch.Tensor],
    hessian: Hessian,
    drift: Sequence[torch.Tensor] | None,
    pattern: Pattern | Sequence[Pattern],
    *,
    dampening_frac: float,
    **options: Any,
) -> PrunedGroup:
    """Solve for `weights`, each [rows_i, d], towards the dense model's outputs if their `drift` is given (statistics.py).

    `options` are those of `solve`.

    Raises:
        RacError: see `Hessian.matrix`, `target_weights` and `solve`.
    """
    matrix = hessian.matrix(names[0])
    factor, targets = None, weights
    if drift is not None:
        factor = factorise(matrix, dampening_frac, ", ".join(names))
        targets = target_weights(weights, drift, matrix, dampening_frac, names, factor=factor)
    solutions = solve(
        method,
        weights,
        matrix,
        pattern,
        names=names,
        dampening_frac=dampening_frac,
        target=targets,
        factor=factor,
        **options,
    )
    records = []
    for name, solution in zip(names, solutions, strict=True):
        retries = max(solution.retries, factor.retries if factor else 0)
        if retries:
            logger.warning(f"{name}: dampening was raised {retries} times to factor its Hessian")
        record = {
            "name": name,
            "shape": list(solution.weight.shape),
            "sparsity": float((solution.weight == 0).float().mean()),
            "relative_error": solution.relative_error,
            "dampening": max(solution.dampening_used, factor.dampening_frac if factor else 0.0),
            "retries": retries,
            "refit_steps": solution.refit_steps,
            "dead_inputs": solution.dead_inputs,
            "tokens": hessian.tokens,
        }
        records.append(record)
    return PrunedGroup(names, solutions, targets, matrix, factor, records)
