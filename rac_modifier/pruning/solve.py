"""The one way in: weights and a Hessian, a method and a pattern; out come pruned weights and how much they err.

What each method costs, in multiply-adds, for d inputs and r rows (of all modules that share H), and how many times r d the
passes over memory that are not matrix products:

    method      matrix products                      also
    magnitude   -                                    one selection
    wanda       -                                    one selection
    sparsegpt   d^3 / 3 + d^2 r / 2                  ~ 20 r d, a rank-1 update a column
    alps        i/8 d^3 (or i/24 d^3) + i d^2 r      ~ 15 i r d; i = `iterations`; the second if d > 4 r, in float32
    refit       (s + 1) d^2 r                        ~ 12 s r d; s = the steps it took, at most `refit_steps`

Errors cost another d^2 r / 2 each. Memory beside the weights: d^2 for SparseGPT, 2 d^2 for ALPS, none for a refit (half of d^2
with bfloat16 products). For d = 18,944 and r = 3,584 ALPS with a refit of five steps is about 3.3e13 multiply-adds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rac_modifier.errors import RacError
from rac_modifier.pruning import narrow
from rac_modifier.pruning.checks import check_hessian, check_patterns, check_settings, check_weights, is_finite
from rac_modifier.pruning.linalg import Dampening
from rac_modifier.pruning.methods import METHODS, Problem, Settings
from rac_modifier.pruning.quadratic import quadratic_form
from rac_modifier.pruning.refit import Refit
from rac_modifier.pruning.refit import refit as refit_kept
from rac_modifier.pruning.sparsegpt import Factor
from rac_modifier.settings.pattern import Pattern
from rac_modifier.settings.pruning import ITERATIONS, REFIT_STEPS, Method

__all__ = ["ITERATIONS", "REFIT_STEPS", "Method", "Solution", "quadratic_form", "solve"]


@dataclass(frozen=True)
class Solution:
    """A pruned module.

    Attributes:
        weight: [rows, columns] in the dtype and on the device of the weight given.
        mask: bool [rows, columns], True = kept. What the method chose; a kept weight may still round to zero.
        error: ||(W - W') X||^2 as the Hessian H has it, trace((W - W') H (W - W')^T), for W' as stored, W the target.
        relative_error: error / trace(W H W^T); 0 when both are 0.
        dampening_used: the dampening_frac that the factorisation took; 0 for methods that factor nothing.
        retries: how often the dampening was raised to get there.
        dead_inputs: input columns that are 0 on every calibration token.
        iterations: of ALPS, else 0.
        refit_steps: of the refit, fewer than allowed when every row converged; 0 when there was none.
        refit_residual: the largest relative residual that a row was left with; 0 without a refit.
    """

    weight: torch.Tensor
    mask: torch.Tensor
    error: float
    relative_error: float
    dampening_used: float
    retries: int
    dead_inputs: int
    iterations: int = 0
    refit_steps: int = 0
    refit_residual: float = 0.0


@torch.no_grad()
def solve(
    method: Method,
    weights: Sequence[torch.Tensor],
    hessian: torch.Tensor,
    pattern: Pattern | Sequence[Pattern],
    *,
    names: Sequence[str] | None = None,
    block_size: int = 128,
    dampening_frac: float = 0.01,
    target: Sequence[torch.Tensor] | None = None,
    refit: bool = False,
    iterations: int = ITERATIONS,
    refit_steps: int = REFIT_STEPS,
    factor: Factor | None = None,
) -> list[Solution]:
    """Prune modules that read the same input: `weights`, each [rows_i, d], share `hessian` [d, d] (float32, symmetric).

    Each gets what it would get alone, but that a refit ends for all together (refit.py); stacking only saves time. Results are
    float32, on the Hessian's device, where ALPS and the refit use narrower products if it has units for them (narrow.py).
    `pattern` is one for all, or one a module: the same N:M, or unstructured with a sparsity of its own.
    `target` holds the weights to reconstruct, shaped like `weights` (default: the weights themselves); `names` are for
    messages. SparseGPT and ALPS zero inputs that are dead; Wanda and magnitude leave the weights they keep untouched,
    unless `refit` then moves those weights to their best values on the support chosen. ALPS always ends with that refit, and so
    does "keep", which prunes what is zero in `weights` already.
    `factor` is sparsegpt.factorise's of this Hessian and dampening_frac, if the caller has it (dense_target.py): SparseGPT
    need not factor again, ALPS takes its dampening, and its retries are recorded with either.

    Raises:
        RacError: shapes, numbers or a pattern that cannot work, values that are not finite, or a Hessian that cannot be
            factored. No method falls back to another.
    """
    names = [f"weight {i}" for i in range(len(weights))] if names is None else names
    targets = weights if target is None else target
    patterns = [pattern] * len(weights) if isinstance(pattern, Pattern) else list(pattern)
    label = ", ".join(names)
    check_settings(method, block_size, dampening_frac, iterations, refit_steps)
    check_weights(weights, targets, names, hessian.shape[0])
    check_patterns(weights, names, patterns)
    check_hessian(hessian, label)

    rows, dtype = [w.shape[0] for w in weights], weights[0].dtype
    working = stacked(targets, hessian)
    totals = quadratic_form(working, hessian)
    dead = hessian.diagonal() == 0
    settings = Settings(dampening_frac, block_size, iterations)
    zeros = stacked(weights, hessian) == 0 if method == "keep" else None
    problem = Problem(working, rows, hessian, dead, patterns, settings, label, factor, zeros)
    pruned = METHODS[method](problem)
    errors, fitted = pruned.errors, Refit(0, 0.0)
    if refit or method in ("alps", "keep"):
        dampening = Dampening.of(hessian, pruned.dampening_frac or dampening_frac)
        fitted = refit_kept(
            working,
            pruned.mask,
            stacked(targets, hessian),
            hessian,
            dampening,
            steps=refit_steps,
            product_dtype=narrow.product_dtype(hessian.device),
        )
        errors = None
    if errors is None or dtype != working.dtype:  # SparseGPT's own errors know nothing of rounding
        stored = working.to(dtype).to(working.dtype)
        errors = quadratic_form(stacked(targets, hessian).sub_(stored), hessian)

    solutions = []
    for i, (name, w) in enumerate(zip(names, weights, strict=True)):
        part = slice(sum(rows[:i]), sum(rows[: i + 1]))
        weight = working[:, part].T.contiguous().to(w)
        if not is_finite(weight):
            raise RacError(f"{name}: the pruned weight overflows {w.dtype}; raise dampening_frac ({dampening_frac})")
        # rounding may leave an error of nothing just below 0
        error, total = max(float(errors[part].sum()), 0.0), float(totals[part].sum())
        solutions.append(
            Solution(
                weight=weight,
                mask=pruned.mask[:, part].T.logical_not().contiguous().to(w.device),
                error=error,
                relative_error=error / total if total > 0 else 0.0,
                dampening_used=pruned.dampening_frac,
                retries=pruned.retries,
                dead_inputs=int(dead.sum()),
                iterations=pruned.iterations,
                refit_steps=fitted.steps,
                refit_residual=fitted.residual,
            )
        )
    return solutions


def stacked(weights: Sequence[torch.Tensor], hessian: torch.Tensor) -> torch.Tensor:
    """All weights side by side and transposed, [d, sum(rows)], in the Hessian's dtype; sparsegpt.py says why."""
    result = hessian.new_empty(hessian.shape[0], sum(w.shape[0] for w in weights))
    for part, w in zip(result.split([w.shape[0] for w in weights], dim=1), weights, strict=True):
        part.copy_(w.T)
    return result
