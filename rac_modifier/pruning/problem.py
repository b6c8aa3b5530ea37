"""What the steps of solve.py hand on: options, problem, target, masked weights."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from rac_modifier.errors import RacError
from rac_modifier.pruning.linalg import Dampening, Factor, check_finite, stacked
from rac_modifier.settings.pattern import Pattern
from rac_modifier.settings.pruning import ITERATIONS, REFIT_STEPS


@dataclass(frozen=True)
class SolverOptions:
    """What decides about a solution besides the problem.

    Attributes:
        solver: the name of step 3's, in settings/solvers.py.
        dampening_frac: lambda / mean(diag H).
        refit: whether to run step 4 after solvers that do not always.
        iterations: of alps.
        refit_steps: the most steps of the refit.
        keep_factor: whether solutions have their factor, which takes the memory of a Hessian.
    """

    solver: str
    dampening_frac: float = 0.01
    refit: bool = False
    iterations: int = ITERATIONS
    refit_steps: int = REFIT_STEPS
    keep_factor: bool = True


@dataclass(frozen=True)
class Problem:
    """Modules that read the same input: weights [rows_i, d], Hessian [d, d] in float32, names.

    patterns: one per module: the same N:M, or unstructured with a sparsity per module.
    cross_moment: C of each module (hessian.py); without it the target is `weights`.
    tokens: behind the cross moment; few of them keep the target close to `weights`.
    """

    weights: Sequence[Tensor]
    hessian: Tensor
    patterns: Sequence[Pattern]
    names: Sequence[str]
    cross_moment: Sequence[Tensor] | None = None
    tokens: float = math.inf

    @property
    def rows(self) -> list[int]:
        """Return the rows of each module."""
        return [w.shape[0] for w in self.weights]

    @property
    def label(self) -> str:
        """Return the names, for messages about the Hessian."""
        return ", ".join(self.names)

    def check(self) -> None:
        """Refuse shapes, patterns or values that cannot be solved together (RacError)."""
        hessian, first = self.hessian, self.weights[0]
        d = len(hessian)
        # once for all solvers and the rounding: behind this nothing looks at shapes again
        for name, w, pattern in zip(self.names, self.weights, self.patterns, strict=True):
            if hessian.shape != (d, d) or w.shape != (len(w), d) or w.dtype != first.dtype:
                raise RacError(
                    f"{name}: weight {list(w.shape)} and Hessian {list(hessian.shape)} do not fit "
                    f"together, or {w.dtype} is next to {first.dtype}; use the Hessian of this "
                    "module's inputs, and one dtype"
                )
            pattern.check_shape(name, *w.shape)
            check_finite(w, name, "weight", "check the checkpoint")
        if len(structures := {pattern.mask_structure for pattern in self.patterns}) > 1:
            raise RacError(
                f"{self.label}: patterns {', '.join(sorted(structures))}; modules that are solved "
                "together need the same N:M, or are all unstructured"
            )
        step = "check the activations of this layer"
        for name, c in zip(self.names, self.cross_moment or (), strict=False):
            check_finite(c, name, "cross moment", step)
        check_finite(hessian, self.label, "Hessian", step)
        least, most = float(hessian.diagonal().min()), float(hessian.diagonal().max())
        if least < 0 or most <= 0:
            raise RacError(
                f"{self.label}: the diagonal of the Hessian is between {least:.4g} and {most:.4g}; "
                "it holds sums of squares of inputs, which are positive if there were tokens: "
                "check the calibration traces"
            )


@dataclass(frozen=True)
class Target:
    """A problem after steps 1 and 2.

    Attributes:
        weights: W* [rows_i, d] of each module.
        totals: w* H w*^T of each row, float64 [sum(rows)].
        factor: of H', where a solver or what follows needs it.
    """

    problem: Problem
    weights: Sequence[Tensor]
    totals: Tensor
    dampening: Dampening
    factor: Factor | None
    only_scores: bool  # of the solver

    @property
    def dead(self) -> Tensor:
        """Return which inputs are 0 on every calibration token, bool [d]."""
        return self.problem.hessian.diagonal() == 0

    def start(self) -> Tensor:
        """Return a copy of W*^T of all modules, [d, sum(rows)], without weights of dead inputs."""
        # what multiplies 0 on every token can be pruned at no cost
        weight = stacked(self.weights, self.problem.hessian)
        if not self.only_scores:
            weight[self.dead] = 0.0
        return weight


@dataclass(frozen=True)
class Masked:
    """A problem after step 3: `weight` W'^T [d, sum(rows)], and `pruned`, bool, its mask.

    `dampening` is what the solver used, `errors` those of each row, float64, where it knows them.
    """

    target: Target
    weight: Tensor
    pruned: Tensor
    dampening: Dampening
    errors: Tensor | None = None
