"""Prune the linear modules that read one input: the whole algorithm, in the four steps of `solve`.

For one module with weights W [rows, d], its inputs X_p [tokens, d] in the pruned model and its inputs X_d in the dense
model (without token weights; hessian.py has them):

    H  = 2/tokens X_p^T X_p                  Hessian: second moment of the inputs                        [d, d]
    C  = 2/tokens W (X_d - X_p)^T X_p        cross moment: output error before this module x inputs      [rows, d]

    1. damped Hessian    H' = H + lambda I,  lambda = dampening_frac * mean(diag H)                linalg.py
    2. target            W* = W + C H'^-1                                                         dense_target.py
    3. mask              minimise trace((W* - W') H' (W* - W')^T) over W' that hold the pattern    alps.py, sparsegpt.py,
                                                                                                  scores.py
    4. refit             minimise the same over the values that the mask keeps:                    refit.py
                         H'_SS w'_S = (H' w*)_S for each row w' with kept columns S

Modules that read the same input share H and are solved together: for d inputs and r rows of all modules, with s steps of the
refit and i iterations, the multiply-adds are about

    factor of H' d^3 / 6    target d^2 r    sparsegpt d^2 r / 2    alps i d^3 / 24 + (i + 2) d^2 r    refit (s + 1) d^2 r

Memory beside the weights: d^2 for a factor, and as much for a matrix of ALPS.

`solve_many` solves problems of one shape, with an H each, at once: the experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rac_modifier.errors import RacError
from rac_modifier.pruning import alps, checks, linalg, scores, sparsegpt
from rac_modifier.pruning.dense_target import target_weights
from rac_modifier.pruning.linalg import Dampening, Factor, factorise, quadratic_form, stacked
from rac_modifier.pruning.refit import errors_as_stored
from rac_modifier.pruning.refit import refit as refit_kept
from rac_modifier.settings.pattern import Pattern
from rac_modifier.settings.pruning import ITERATIONS, REFIT_STEPS, Method


@dataclass(frozen=True)
class Solution:
    """A pruned module, with what quantization needs to go on.

    Attributes:
        name: of the module, for messages and the run record.
        weight: [rows, d] in the dtype and on the device of the weight given.
        mask: bool [rows, d], True = kept. What the method chose; a kept weight may still round to zero.
        target: [rows, d], W* of step 2.
        error: trace((W* - W') H (W* - W')^T), that is ||W* X - W' X||^2, for W' as stored.
        relative_error: error / trace(W* H W*^T); 0 when both are 0.
        dampening_used: dampening_frac of H'; 0 when no step used H'.
        retries: how often dampening_frac was raised, because H' could not be factored.
        dead_inputs: number of inputs that are 0 on every calibration token.
        iterations: of ALPS, else 0.
        refit_steps: steps that the refit took, fewer than allowed when it converged; 0 without a refit.
        refit_residual: the largest relative residual of a row after the refit; 0 without a refit.
        factor: of H', when a step needed it.
    """

    name: str
    weight: torch.Tensor
    mask: torch.Tensor
    target: torch.Tensor
    error: float = 0.0
    relative_error: float = 0.0
    dampening_used: float = 0.0
    retries: int = 0
    dead_inputs: int = 0
    iterations: int = 0
    refit_steps: int = 0
    refit_residual: float = 0.0
    factor: Factor | None = None

    def record(self) -> dict[str, Any]:
        """The entry of this module in the run record."""
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
    """Modules that read the same input.

    Attributes:
        weights: of each module, [rows_i, d].
        hessian: H [d, d], float32, symmetric.
        patterns: one per module: the same N:M, or unstructured with a sparsity per module.
        names: of the modules, for messages.
        cross_moment: C of each module (hessian.py); without it the target is `weights`.
    """

    weights: Sequence[torch.Tensor]
    hessian: torch.Tensor
    patterns: Sequence[Pattern]
    names: Sequence[str]
    cross_moment: Sequence[torch.Tensor] | None = None

    @property
    def rows(self) -> list[int]:
        """Of each module."""
        return [w.shape[0] for w in self.weights]

    @property
    def label(self) -> str:
        """For messages about the Hessian."""
        return ", ".join(self.names)


def solve(
    method: Method,
    weights: Sequence[torch.Tensor],
    hessian: torch.Tensor,
    pattern: Pattern | Sequence[Pattern],
    *,
    names: Sequence[str] | None = None,
    cross_moment: Sequence[torch.Tensor] | None = None,
    **settings: Any,
) -> list[Solution]:
    """Prune the modules of one problem; `pattern` may be one for all of them. `settings` are those of `solve_many`."""
    names = [f"weight {i}" for i in range(len(weights))] if names is None else names
    patterns = [pattern] * len(weights) if isinstance(pattern, Pattern) else list(pattern)
    return solve_many(
        method, [Problem(weights, hessian, patterns, names, cross_moment)], **settings
    )[0]


@torch.no_grad()
def solve_many(
    method: Method,
    problems: Sequence[Problem],
    *,
    block_size: int = 128,
    dampening_frac: float = 0.01,
    refit: bool = False,
    iterations: int = ITERATIONS,
    refit_steps: int = REFIT_STEPS,
    keep_factor: bool = True,
) -> list[list[Solution]]:
    """Prune the modules of each problem, which read the same input.

    Each module gets what it would get alone, except that the refit ends for all modules of a problem together; solving them
    together saves time. Problems of one shape are solved at once where that saves time (SparseGPT), else one after the other.
    Results are float32, on the device of the Hessian; ALPS and the refit use bfloat16 products where those are fast.

    Args:
        method: alps and keep always end with a refit; keep prunes what is zero in `weights` already, and none nothing, so that
            the result is the target; wanda and magnitude do not change the weights that they keep, unless `refit` is set.
        block_size: of sparsegpt.
        iterations: of alps.
        keep_factor: whether solutions have their `factor`; it takes the memory of a Hessian.

    Raises:
        RacError: shapes, numbers or a pattern that cannot work, values that are not finite, or a Hessian that cannot be
            factored. No method falls back to another.
    """
    checks.check_settings(method, block_size, dampening_frac, iterations, refit_steps)
    works = [_aim(method, problem, dampening_frac) for problem in problems]  # steps 1 and 2
    if method == "sparsegpt":
        _sparsegpt(works, block_size)
    for work in works:
        work.factor = work.factor if keep_factor else None
        if method != "sparsegpt":
            _choose(method, work, iterations)
    return [_finish(method, work, refit, iterations, refit_steps) for work in works]


@dataclass
class _Work:
    """A problem between the steps: `working` is W'^T of all modules, side by side; `pruned` its mask."""

    given: Problem
    dampening: Dampening
    damped: bool
    factor: Factor | None
    targets: list[torch.Tensor]
    working: torch.Tensor
    totals: torch.Tensor
    dead: torch.Tensor
    pruned: torch.Tensor
    errors: torch.Tensor | None = None


def _aim(method: Method, given: Problem, dampening_frac: float) -> _Work:
    """Steps 1 and 2."""
    weights, names, hessian = given.weights, given.names, given.hessian
    checks.check_weights(weights, names, hessian.shape[0])
    if given.cross_moment is not None:
        checks.check_cross_moment(given.cross_moment, weights, names)
    checks.check_patterns(weights, names, given.patterns)
    checks.check_hessian(hessian, given.label)

    # 1. Damped Hessian: H' = H + lambda I with lambda = dampening_frac * mean(diag H). Where a step needs the factor U of
    #    H' = U U^T, lambda is raised until it exists.
    dampening, factor = Dampening.of(hessian, dampening_frac), None
    if given.cross_moment is not None or method == "sparsegpt":
        factor = factorise(
            hessian, dampening, given.label, largest_first=method == "none"
        )  # the order of rounding
        dampening = factor.dampening

    # 2. Target: W* = W + C H'^-1, or W itself without a cross moment.
    targets = list(weights)
    if given.cross_moment is not None and factor is not None:
        targets = target_weights(weights, given.cross_moment, factor, names)

    # The weights of dead inputs are pruned too, because they never matter; scores do not change what they keep.
    working, dead = stacked(targets, hessian), hessian.diagonal() == 0
    totals = quadratic_form(working, hessian, bf16=linalg.bf16_is_fast(hessian.device))
    if method not in scores.MASKS:
        working[dead] = 0.0
    return _Work(
        given,
        dampening,
        factor is not None,
        factor,
        targets,
        working,
        totals,
        dead,
        dead.unsqueeze(1),
    )


def _sparsegpt(works: Sequence[_Work], block_size: int) -> None:
    """Step 3 by SparseGPT: all at once if they have the same shapes and patterns, else one after the other."""
    kinds = {(work.given.hessian.shape, *work.given.rows, *work.given.patterns) for work in works}
    for part in [works] if len(kinds) == 1 else [[work] for work in works]:
        given, factors = part[0].given, [work.factor for work in part if work.factor is not None]
        found = sparsegpt.prune_alike(
            [w.working for w in part], factors, given.rows, given.patterns, block_size
        )
        for work, (working, pruned, errors) in zip(part, found, strict=True):
            work.working, work.pruned, work.errors = working, pruned, errors


def _choose(method: Method, work: _Work, iterations: int) -> None:
    """Step 3 by any other method: minimise trace((W* - W') H' (W* - W')^T) over W' that hold the pattern."""
    given, working = work.given, work.working
    rows, patterns = given.rows, given.patterns
    if method == "alps":
        work.pruned, work.dampening = alps.prune(
            working,
            given.hessian,
            rows,
            patterns,
            work.dampening,
            iterations=iterations,
            label=given.label,
        )
    elif method in scores.MASKS:
        work.pruned = scores.prune(method, working, given.hessian, rows, patterns)
    elif method == "none":
        work.pruned = torch.zeros_like(working, dtype=torch.bool)
    else:
        work.pruned = stacked(given.weights, given.hessian) == 0
        working.masked_fill_(work.pruned, 0.0)


def _finish(
    method: Method, work: _Work, refit: bool, iterations: int, refit_steps: int
) -> list[Solution]:
    """Step 4, and what the result loses."""
    given, working, pruned, hessian, targets = (
        work.given,
        work.working,
        work.pruned,
        work.given.hessian,
        work.targets,
    )
    if method not in scores.MASKS:
        pruned[work.dead] = True

    # 4. Refit: H'_SS w'_S = (H' w*)_S for each row w' with kept columns S.
    fitted, bf16 = None, linalg.bf16_is_fast(hessian.device)
    if refit or method in ("alps", "keep"):
        fitted = refit_kept(
            working,
            pruned,
            stacked(targets, hessian),
            hessian,
            work.dampening,
            steps=refit_steps,
            bf16=bf16,
        )

    dtype, errors = given.weights[0].dtype, work.errors
    if (
        errors is None or fitted or dtype != working.dtype
    ):  # those of SparseGPT are without a refit and before rounding
        stored = working.to(dtype).to(working.dtype)
        said = (
            fitted if bf16 and method == "alps" else None
        )  # others lower the error by much, and say it less well
        errors = errors_as_stored(
            said, working, stored, stacked(targets, hessian), hessian, work.dampening
        )
    solutions = []
    columns = (x.split(given.rows, dim=1) for x in (working, pruned))
    each = (x.split(given.rows) for x in (errors, work.totals))
    for name, before, target, w, mask, error, total in zip(
        given.names, given.weights, targets, *columns, *each, strict=True
    ):
        weight = w.T.contiguous().to(before)
        if not checks.is_finite(weight):
            raise RacError(
                f"{name}: the pruned weight overflows {dtype}; raise dampening_frac ({work.dampening.frac})"
            )
        change, whole = (
            max(float(error.sum()), 0.0),
            float(total.sum()),
        )  # rounding can make a zero error negative
        solution = Solution(
            name=name,
            weight=weight,
            mask=mask.T.logical_not().contiguous().to(before.device),
            target=target,
            error=change,
            relative_error=change / whole if whole > 0 else 0.0,
            dampening_used=work.dampening.frac if work.damped or fitted else 0.0,
            retries=work.dampening.retries,
            dead_inputs=int(work.dead.sum()),
            iterations=iterations if method == "alps" else 0,
            refit_steps=fitted.steps if fitted else 0,
            refit_residual=fitted.residual if fitted else 0.0,
            factor=work.factor,
        )
        solutions.append(solution)
    return solutions
