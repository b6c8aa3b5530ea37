"""The solvers on one problem, with defaults."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rac_modifier.pruning.problem import Problem, SolverOptions
from rac_modifier.pruning.solve import Solution, solve_many
from rac_modifier.settings.pattern import Pattern


def solve(
    solver: str,
    weights: Sequence[Tensor],
    hessian: Tensor,
    pattern: Pattern | Sequence[Pattern],
    *,
    names: Sequence[str] | None = None,
    cross_moment: Sequence[Tensor] | None = None,
    tokens: float = math.inf,
    **settings: Any,
) -> list[Solution]:
    """Prune the modules of one problem, with a pattern for all or one per module."""
    names = [f"weight {i}" for i in range(len(weights))] if names is None else names
    patterns = [pattern] * len(weights) if isinstance(pattern, Pattern) else list(pattern)
    problem = Problem(weights, hessian, patterns, names, cross_moment, tokens)
    return solve_many([problem], SolverOptions(solver, **settings))[0]
