"""Prune the linear modules that read one input: the algorithm in four steps.

For one module with weights W [rows, d], its inputs X_p [tokens, d] in the pruned model and its
inputs X_d in the dense model (without token weights; hessian.py has them):

    H  = 2/tokens X_p^T X_p             [d, d]     Hessian: second moment of the inputs
    C  = 2/tokens W (X_d - X_p)^T X_p   [rows, d]  cross moment: earlier output error x inputs

    1. damped Hessian  H' = H + lambda I,  lambda = dampening_frac * mean(diag H)    linalg.py
    2. target          W* = W + C (H + rho I)^-1,
                       rho = max(dampening_frac, d / tokens) * mean(diag H)
    3. mask            minimise trace((W* - W') H' (W* - W')^T) over W' that hold    alps.py
                       the pattern                                  sparsegpt.py, scores.py
    4. refit           minimise the same over the values that the mask keeps:        refit.py
                       H'_SS w'_S = (H' w*)_S for each row w' with kept columns S

The target is the dense one. Pruning towards W X_p would leave the errors that X_p already has. The
distance to the dense output W X_d is (W* - W') H (W* - W')^T up to a constant, so every
solver works with W* (asymmetric calibration, as in GPTAQ, arXiv 2504.02692).

Step 2 is a regression of what is missing, W (X_d - X_p), on X_p. Without a ridge it fits the noise
of few tokens: at 1.5 B parameters the down projections got further from the dense outputs on other
tokens. For coefficients N(0, t^2) and noise s^2 the ridge is 2 s^2 / (tokens t^2). It is rho where
noise and coefficients explain as much each: s^2 = t^2 d mean(diag H) / 2.

Modules that read the same input share H and are solved together. For d inputs and r rows of all
modules, with s steps of the refit and i iterations, the multiply-adds are about

    factors of H' and H + rho I d^3 / 6 each    target d^2 r    sparsegpt d^2 r / 2
    alps i d^3 / 24 + (i + 2) d^2 r    refit (s + 1) d^2 r
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from rac_modifier.pruning import linalg
from rac_modifier.pruning.linalg import Dampening, Factor, check_finite, quadratic_form, stacked
from rac_modifier.pruning.problem import Masked, Problem, SolverOptions, Target
from rac_modifier.pruning.refit import refit
from rac_modifier.settings.solvers import SOLVERS, Solver

Prune = Callable[[Sequence[Target], SolverOptions], list[Masked]]
"""Step 3, the function `prune` of a solver's module; it leaves the targets as they are."""


@dataclass(frozen=True)
class Solution:
    """A pruned module, with what quantization needs to go on.

    Attributes:
        weight: [rows, d] in the dtype and on the device of the original.
        mask: bool [rows, d], True = kept by the method; a kept weight may still round to zero.
        target: [rows, d], W* of step 2.
        error: trace((W* - W') H (W* - W')^T), that is ||W* X - W' X||^2, for W' as stored.
        relative_error: error / trace(W* H W*^T); 0 when both are 0.
        dampening_used: dampening_frac of H'; 0 when no step used H'.
        retries: how often dampening_frac was raised, because H' could not be factored.
        dead_inputs: number of inputs that are 0 on every calibration token.
        factor: of H', when a step needed it.
    """

    name: str
    weight: Tensor
    mask: Tensor
    target: Tensor
    error: float
    relative_error: float
    dampening_used: float
    retries: int
    dead_inputs: int
    refit_steps: int
    factor: Factor | None

    def record(self) -> dict[str, Any]:
        """Return the entry of this module in the run record."""
        return {
            "name": self.name,
            "shape": list(self.weight.shape),
            "sparsity": float((self.weight == 0).float().mean()),
            "relative_error": self.relative_error,
            "dampening": self.dampening_used,
            "retries": self.retries,
            "refit_steps": self.refit_steps,
            "dead_inputs": self.dead_inputs,
        }


@torch.no_grad()
def solve_many(problems: Sequence[Problem], options: SolverOptions) -> list[list[Solution]]:
    """Prune the modules of each problem.

    Each module gets what it would get alone, except that the refit ends for all modules of a
    problem together. SparseGPT solves problems of one shape (routed experts) as a batch. ALPS and
    the refit use bfloat16 matmuls where those are fast.

    Raises:
        RacError: shapes, values or a pattern that cannot work, or a Hessian without a factor.
    """
    solver = SOLVERS[options.solver]
    prune: Prune = import_module(f"rac_modifier.pruning.{solver.module}").prune
    masked = prune([_prepare(solver, options, problem) for problem in problems], options)  # step 3
    if not options.keep_factor:
        masked = [replace(m, target=replace(m.target, factor=None)) for m in masked]
    return [_refit(solver, options, m) for m in masked]


def _prepare(solver: Solver, options: SolverOptions, problem: Problem) -> Target:
    """Run steps 1 and 2."""
    problem.check()
    hessian, cross_moment = problem.hessian, problem.cross_moment

    dampening, factor = Dampening.of(hessian, options.dampening_frac), None

    def factored(frac: float) -> Factor:
        # rounding alone takes the inputs in the order of the factor
        of = hessian, Dampening.of(hessian, frac), problem.label
        return Factor.of(*of, largest_first=not solver.prunes)

    # 2. Target: W* = W + C (H + rho I)^-1, or W itself without a cross moment. It comes first, so
    #    that its factor is gone before that of H'.
    weights = list(problem.weights)
    if cross_moment is not None:
        ridge = max(dampening.frac, len(hessian) / problem.tokens)
        factor = factored(ridge)
        # C (H + rho I)^-1 of all modules at once: they share the factor
        moves = factor.solve(torch.cat([c.to(hessian) for c in cross_moment]))
        weights = [w.to(m) + m for w, m in zip(weights, moves.split(problem.rows), strict=True)]
        for name, weight in zip(problem.names, weights, strict=True):
            check_finite(weight, name, "dense target", factor.dampening.larger)
        if ridge > dampening.frac:
            factor = None

    # 1. Damped Hessian. Where a step needs the factor U of H' = U U^T, lambda is raised until it
    #    exists.
    if factor is None and (
        solver.needs_factor or (cross_moment is not None and options.keep_factor)
    ):
        factor = factored(dampening.frac)
    if factor is not None:
        dampening = factor.dampening

    if not (solver.needs_factor or options.keep_factor):
        factor = None  # a solver has its memory
    bf16 = linalg.bf16_is_fast(hessian.device)
    totals = quadratic_form(stacked(weights, hessian), hessian, bf16=bf16)
    return Target(problem, weights, totals, dampening, factor, solver.only_scores)


def _refit(solver: Solver, options: SolverOptions, masked: Masked) -> list[Solution]:
    """Run step 4 where it is asked for, and measure what the result loses."""
    target, weight, pruned = masked.target, masked.weight, masked.pruned
    problem, dampening, hessian = target.problem, masked.dampening, target.problem.hessian
    dead = target.dead
    if not solver.only_scores:
        pruned[dead] = True  # their weights never matter; scores keep to the pattern

    # 4. Refit.
    steps, refits = 0, options.refit or solver.always_refits
    if refits:
        goal, bf16 = stacked(target.weights, hessian), linalg.bf16_is_fast(hessian.device)
        most = options.refit_steps
        steps = refit(weight, pruned, goal, hessian, dampening, steps=most, bf16=bf16)

    # SparseGPT's own errors are without a refit and before rounding.
    dtype, errors = problem.weights[0].dtype, masked.errors
    if errors is None or refits or dtype != weight.dtype:
        change = stacked(target.weights, hessian).sub_(weight.to(dtype))  # W* - W'
        errors = quadratic_form(change, hessian)
    damped = refits or solver.needs_factor or problem.cross_moment is not None
    solutions, first = [], 0
    for name, original, aim in zip(problem.names, problem.weights, target.weights, strict=True):
        rows = slice(first, first + len(original))
        first = rows.stop
        stored = weight[:, rows].T.contiguous().to(original)
        check_finite(stored, name, f"pruned weight in {dtype}", dampening.larger)
        error = max(float(errors[rows].sum()), 0.0)  # rounding: 0 may be < 0
        total = float(target.totals[rows].sum())
        solution = Solution(
            name=name,
            weight=stored,
            mask=pruned[:, rows].T.logical_not().contiguous().to(original.device),
            target=aim,
            error=error,
            relative_error=error / total if total > 0 else 0.0,
            dampening_used=dampening.frac if damped else 0.0,
            retries=dampening.retries,
            dead_inputs=int(dead.sum()),
            refit_steps=steps,
            factor=target.factor,
        )
        solutions.append(solution)
    return solutions
