"""Prune the linear modules that read one input: the algorithm in four steps.

For one module with weights W [rows, d], its inputs X_p [tokens, d] in the pruned model and its
inputs X_d in the dense model (without token weights; hessian.py has them):

    H  = 2/tokens X_p^T X_p             [d, d]     Hessian: second moment of the inputs
    C  = 2/tokens W (X_d - X_p)^T X_p   [rows, d]  cross moment: earlier output error x inputs

    1. damped Hessian  H' = H + lambda I,  lambda = dampening_frac * mean(diag H)    linalg.py
    2. target          W* = W + C H'^-1
    3. mask            minimise trace((W* - W') H' (W* - W')^T) over W' that hold    alps.py
                       the pattern                                  sparsegpt.py, scores.py
    4. refit           minimise the same over the values that the mask keeps:        refit.py
                       H'_SS w'_S = (H' w*)_S for each row w' with kept columns S

The target is the dense one. Pruning towards W X_p would leave the errors that X_p already has. The
distance to the dense output W X_d is (W* - W') H (W* - W')^T up to a constant, so every
solver works with W* (asymmetric calibration, as in GPTAQ, arXiv 2504.02692); lambda keeps
W* close to W where the inputs carry little information.

Modules that read the same input share H and are solved together. For d inputs and r rows of all
modules, with s steps of the refit and i iterations, the multiply-adds are about

    factor of H' d^3 / 6    target d^2 r    sparsegpt d^2 r / 2
    alps i d^3 / 24 + (i + 2) d^2 r    refit (s + 1) d^2 r
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from rac_modifier.pruning import alps, linalg, scores, sparsegpt
from rac_modifier.pruning.checks import check_problem, is_finite, refuse
from rac_modifier.pruning.linalg import Dampening, Factor, factorise, quadratic_form, stacked
from rac_modifier.pruning.refit import refit as refit_kept
from rac_modifier.settings.pattern import Pattern
from rac_modifier.settings.pruning import ITERATIONS, REFIT_STEPS, Method


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


@dataclass(frozen=True)
class Problem:
    """Modules that read the same input: weights [rows_i, d], Hessian [d, d] in float32, names.

    patterns: one per module: the same N:M, or unstructured with a sparsity per module.
    cross_moment: C of each module (hessian.py); without it the target is `weights`.
    """

    weights: Sequence[Tensor]
    hessian: Tensor
    patterns: Sequence[Pattern]
    names: Sequence[str]
    cross_moment: Sequence[Tensor] | None = None

    @property
    def rows(self) -> list[int]:
        """Return the rows of each module."""
        return [w.shape[0] for w in self.weights]

    @property
    def label(self) -> str:
        """Return the names, for messages about the Hessian."""
        return ", ".join(self.names)


@torch.no_grad()
def solve_many(
    method: Method,
    problems: Sequence[Problem],
    *,
    dampening_frac: float = 0.01,
    refit: bool = False,
    iterations: int = ITERATIONS,
    refit_steps: int = REFIT_STEPS,
    keep_factor: bool = True,
) -> list[list[Solution]]:
    """Prune the modules of each problem.

    Each module gets what it would get alone, except that the refit ends for all modules of a
    problem together. SparseGPT solves problems of one shape (routed experts) as a batch. ALPS and
    the refit use bfloat16 matmuls where those are fast. alps and keep always end with a refit;
    wanda and magnitude change kept weights only with `refit`. keep prunes what is zero in `weights`
    already, and none nothing, so that the result is the target.

    `iterations` is of alps, `dampening_frac` lambda / mean(diag H), `refit_steps` the most steps of
    the refit. With `keep_factor` solutions have their factor, which takes the memory of a Hessian.

    Raises:
        RacError: shapes, values or a pattern that cannot work, or a Hessian without a factor.
    """
    known = get_args(Method)
    refuse(method not in known, f"pruning method {method!r}: choose from {', '.join(known)}")
    states = [_aim(method, problem, dampening_frac) for problem in problems]  # steps 1 and 2
    if method == "sparsegpt":
        _sparsegpt(states)
    for state in states:
        state.factor = state.factor if keep_factor else None
        if method != "sparsegpt":
            _choose(method, state, iterations)
    steps = refit_steps if refit or method in ("alps", "keep") else None
    return [_finish(method, state, steps) for state in states]


@dataclass
class _State:
    """A problem between the steps: `working` is W'^T of all modules, `pruned` its mask."""

    problem: Problem
    dampening: Dampening
    damped: bool
    factor: Factor | None
    targets: list[Tensor]
    working: Tensor
    totals: Tensor
    dead: Tensor
    pruned: Tensor
    errors: Tensor | None = None


def _aim(method: Method, problem: Problem, dampening_frac: float) -> _State:
    """Run steps 1 and 2."""
    hessian, cross_moment = problem.hessian, problem.cross_moment
    check_problem(problem.weights, hessian, problem.names, problem.patterns, cross_moment or ())

    # 1. Damped Hessian. Where a step needs the factor U of H' = U U^T, lambda is raised until it
    #    exists. Rounding alone takes the inputs in the order of the factor.
    dampening, factor = Dampening.of(hessian, dampening_frac), None
    if cross_moment is not None or method == "sparsegpt":
        factor = factorise(hessian, dampening, problem.label, largest_first=method == "none")
        dampening = factor.dampening

    # 2. Target: W* = W + C H'^-1, or W itself without a cross moment.
    targets = list(problem.weights)
    if cross_moment is not None and factor is not None:
        moves = factor.solve(torch.cat([c.to(hessian) for c in cross_moment]))
        targets = [w.to(m) + m for w, m in zip(targets, moves.split(problem.rows), strict=True)]
        for name, target in zip(problem.names, targets, strict=True):
            raised = f"raise dampening_frac ({dampening.frac:.4g})"
            refuse(not is_finite(target), f"{name}: the dense target overflows; {raised}")

    # Weights of dead inputs are pruned too: they never matter. Scores do not change kept weights.
    working, dead = stacked(targets, hessian), hessian.diagonal() == 0
    totals = quadratic_form(working, hessian, bf16=linalg.bf16_is_fast(hessian.device))
    if method not in scores.MASKS:
        working[dead] = 0.0
    damped, pruned = factor is not None, dead.unsqueeze(1)
    return _State(problem, dampening, damped, factor, targets, working, totals, dead, pruned)


def _sparsegpt(states: Sequence[_State]) -> None:
    """Step 3 by SparseGPT: a batch, if all have the same shapes and patterns."""
    problems = [state.problem for state in states]
    kinds = {(p.hessian.shape, *p.rows, *p.patterns) for p in problems}
    for batch in [states] if len(kinds) == 1 else [[state] for state in states]:
        problem, factors = batch[0].problem, [w.factor for w in batch if w.factor is not None]
        results = sparsegpt.prune_batch(
            [w.working for w in batch], factors, problem.rows, problem.patterns
        )
        for state, (working, pruned, errors) in zip(batch, results, strict=True):
            state.working, state.pruned, state.errors = working, pruned, errors


def _choose(method: Method, state: _State, iterations: int) -> None:
    """Step 3 by any other method."""
    problem, working = state.problem, state.working
    rows, patterns, hessian = problem.rows, problem.patterns, problem.hessian
    if method == "alps":
        weight = (working, hessian, rows, patterns, state.dampening)
        state.pruned, state.dampening = alps.prune(
            *weight, iterations=iterations, label=problem.label
        )
    elif method in scores.MASKS:
        state.pruned = scores.prune(method, working, hessian, rows, patterns)
    elif method == "none":
        state.pruned = torch.zeros_like(working, dtype=torch.bool)
    else:
        state.pruned = stacked(problem.weights, hessian) == 0


def _finish(method: Method, state: _State, refit_steps: int | None) -> list[Solution]:
    """Step 4, unless `refit_steps` is None, and what the result loses."""
    problem, working, pruned = state.problem, state.working, state.pruned
    hessian, dampening = problem.hessian, state.dampening
    if method not in scores.MASKS:
        pruned[state.dead] = True

    # 4. Refit.
    steps = None
    if refit_steps is not None:
        target, bf16 = stacked(state.targets, hessian), linalg.bf16_is_fast(hessian.device)
        steps = refit_kept(
            working, pruned, target, hessian, dampening, steps=refit_steps, bf16=bf16
        )

    # SparseGPT's own errors are without a refit and before rounding.
    dtype, errors = problem.weights[0].dtype, state.errors
    if errors is None or steps is not None or dtype != working.dtype:
        change = stacked(state.targets, hessian).sub_(working.to(dtype))
        errors = quadratic_form(change, hessian)
    solutions, first = [], 0
    for name, original, target in zip(problem.names, problem.weights, state.targets, strict=True):
        rows = slice(first, first + len(original))
        first = rows.stop
        weight = working[:, rows].T.contiguous().to(original)
        raised = f"raise dampening_frac ({dampening.frac})"
        refuse(not is_finite(weight), f"{name}: the pruned weight overflows {dtype}; {raised}")
        error = max(float(errors[rows].sum()), 0.0)  # rounding: 0 may be < 0
        total = float(state.totals[rows].sum())
        solution = Solution(
            name=name,
            weight=weight,
            mask=pruned[:, rows].T.logical_not().contiguous().to(original.device),
            target=target,
            error=error,
            relative_error=error / total if total > 0 else 0.0,
            dampening_used=dampening.frac if state.damped or steps is not None else 0.0,
            retries=dampening.retries,
            dead_inputs=int(state.dead.sum()),
            refit_steps=steps or 0,
            factor=state.factor,
        )
        solutions.append(solution)
    return solutions
