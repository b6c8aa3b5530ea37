"""Modules that read the same input, from statistics to pruned weights, with what the run record says of each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from loguru import logger

from rac_modifier.pruning.dense_target import target_weights
from rac_modifier.pruning.hessian import Hessian
from rac_modifier.pruning.patterns import Pattern
from rac_modifier.pruning.solver import Method, solve
from rac_modifier.pruning.sparsegpt import factorise


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
) -> list[tuple[torch.Tensor, dict[str, Any]]]:
    """Solve for `weights`, each [rows_i, d], towards the dense model's outputs if their `drift` is given (statistics.py).

    `options` are those of `solve`. Returns for each module its pruned weight and its entry in the run record.

    Raises:
        RacError: see `Hessian.matrix`, `target_weights` and `solve`.
    """
    matrix = hessian.matrix(names[0])
    factor, target = None, None
    if drift is not None:
        factor = factorise(matrix, dampening_frac, ", ".join(names))
        target = target_weights(weights, drift, matrix, dampening_frac, names, factor=factor)
    solutions = solve(
        method,
        weights,
        matrix,
        pattern,
        names=names,
        dampening_frac=dampening_frac,
        target=target,
        factor=factor,
        **options,
    )
    results = []
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
        results.append((solution.weight, record))
    return results
